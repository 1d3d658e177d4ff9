"""How far the training is, with the stage's name."""

from collections.abc import Callable
from typing import Any

from transformers.trainer_callback import PrinterCallback, ProgressCallback

from .curriculum import Stage


def _summary(stage: Stage | None, logs: dict[str, Any]) -> str:
    """What the Trainer logs at the end of a stage, as a sentence."""
    steps = round(logs["train_runtime"] * logs["train_steps_per_second"])
    return f"{stage}: {steps} steps in {logs['train_runtime']:.0f} s, mean loss {logs['train_loss']:.3f}"


class StageProgress(ProgressCallback):
    """A progress bar that names the stage."""

    def __init__(self, stage: Callable[[], Stage | None]):
        super().__init__()
        self.stage = stage

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs is not None and "train_runtime" in logs and self.training_bar is not None:
            self.training_bar.write(_summary(self.stage(), logs))
        else:
            super().on_log(args, state, control, logs=logs, **kwargs)

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(str(self.stage()))


class StagePrinter(PrinterCallback):
    """Without a bar: a line that names the stage."""

    def __init__(self, stage: Callable[[], Stage | None]):
        self.stage = stage

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs is not None and "train_runtime" in logs and state.is_world_process_zero:
            print(_summary(self.stage(), logs))
        elif not any(name.startswith("score/") for name in logs or ()):  # those are printed in words
            super().on_log(args, state, control, logs=logs, **kwargs)

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            print(f"{self.stage()} ({state.max_steps} steps)")
