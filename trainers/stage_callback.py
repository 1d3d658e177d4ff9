"""What happens around the optimizer steps of a stage: gates shrink, mastered tasks leave, an epoch's order begins."""

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback
from transformers.utils import logging

from .cpu_memory import give_freed_back
from .curriculum import BlockSampler, Mastery


logger = logging.get_logger(__name__)


class StageCallback(TrainerCallback):
    """Tells the trainer of each optimizer step, and notes at each evaluation which tasks are mastered.

    Args:
        step_taken: called after each optimizer step.
        mastery: gives the stage's rules.
        sampler: gives the one that orders the stage's rows.
    """

    def __init__(
        self, step_taken: Callable[[], None], mastery: Callable[[], Mastery], sampler: Callable[[], BlockSampler]
    ):
        self.step_taken = step_taken
        self.mastery = mastery
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # In several processes, the epoch of a resumed run does not reach the sampler through accelerate's wrappers.
        sampler = self.sampler()
        sampler.set_epoch(state.global_step * sampler.block_size // len(sampler))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step_taken()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        give_freed_back()  # of loading, or of the stage before

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs = state.log_history[-1]
        if found := self.mastery().observe_log(logs):
            stays = "" if found[0] in self.mastery().left else "; it learns on with those that write the page with it"
            logger.warning(f"{found[0]} is mastered after step {logs['step']}: {found[1]}{stays}.")
            control.should_training_stop = control.should_training_stop or self.mastery().all_mastered()
