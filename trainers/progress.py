"""How far the training is, with the stage's name."""

from collections.abc import Callable
from typing import Any

from transformers.trainer_callback import PrinterCallback, ProgressCallback

from .curriculum import Mastery, Stage


# What the Trainer logs of an evaluation besides metrics of people's own.
_NOT_METRICS = ("loss", "runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


def counted(number: int, what: str) -> str:
    """A number of something, in words: "1 step", "2 steps"."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def _summary(stage: Stage | None, logs: dict[str, Any], steps: int) -> str:
    """What the Trainer logs at the end of a stage, as a sentence."""
    return f"{stage}: {counted(steps, 'step')} in {logs['train_runtime']:.0f} s, mean loss {logs['train_loss']:.3f}"


def _in_words(logs: dict[str, Any], state: Any, stage: Stage | None, mastery: Mastery) -> str | None:
    """A log in one short line: how a stage went, or its tasks' losses.

    Empty for scores, which are printed elsewhere; None if it has to be shown as it is.
    """
    if "train_samples_per_second" in logs:  # `train_runtime` may be in each log, `train_loss` be a task's
        return _summary(stage, logs, state.global_step)
    if any(name.startswith("score/") for name in logs):
        return ""
    where, tasks = f"step {state.global_step}/{state.max_steps}: ", stage.tasks if stage is not None else ()
    if "learning_rate" in logs:
        losses = ", ".join(f"{task} {logs[f'{task}_loss']:.3f}" for task in tasks if f"{task}_loss" in logs)
        if "loss" not in logs or (not losses and mastery.mastered):
            return f"{where}nothing to learn, the tasks of these steps are mastered"
        losses = f" ({losses})" if losses else ""  # a loss of one's own need not say whose it is
        return f"{where}loss {logs['loss']:.3f}{losses}, learning rate {logs['learning_rate']:.2g}"
    task = next((task for task in tasks if f"eval_{task}_loss" in logs), None)
    if task is None:
        return None
    right = logs.get("eval_mean_token_accuracy")
    tokens = "" if right is None else f", {100 * right:.0f} % of its tokens right"
    prefix = f"eval_{task}_"
    more = {name.removeprefix(prefix): its for name, its in logs.items() if name.startswith(prefix)}
    metrics = [
        f", {name} {its:.3g}" for name, its in more.items() if name not in _NOT_METRICS and isinstance(its, float)
    ]
    return f"{where}{task} on validation rows: loss {logs[f'eval_{task}_loss']:.3f}{tokens}{''.join(metrics)}"


class StageProgress(ProgressCallback):
    """A progress bar that names the stage."""

    def __init__(self, stage: Callable[[], Stage | None], mastery: Callable[[], Mastery]):
        super().__init__()
        self.stage, self.mastery = stage, mastery

    def on_log(self, args, state, control, logs=None, **kwargs):
        words = _in_words(logs or {}, state, self.stage(), self.mastery())
        if words is None:
            super().on_log(args, state, control, logs=logs, **kwargs)
        elif words and self.training_bar is not None:  # else another process shows it
            self.training_bar.write(words)

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(str(self.stage()))


class StagePrinter(PrinterCallback):
    """Without a bar: a line that names the stage."""

    def __init__(self, stage: Callable[[], Stage | None], mastery: Callable[[], Mastery]):
        self.stage, self.mastery = stage, mastery

    def on_log(self, args, state, control, logs=None, **kwargs):
        words = _in_words(logs or {}, state, self.stage(), self.mastery())
        if words is None or (words and not state.is_world_process_zero):
            super().on_log(args, state, control, logs=logs, **kwargs)
        elif words:
            print(words)

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            print(f"{self.stage()} ({counted(state.max_steps, 'step')})")
