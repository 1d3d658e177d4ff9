"""The order of learning: which tasks train together, and which rows make a micro-batch. No torch."""

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

from hft.hierarchy_hft import Hierarchy


NOT_OWN_ROWS = "not_own_rows"  # a key of log entries


@dataclass(frozen=True)
class Stage:
    """Tasks of one level that train together and are then sealed.

    Args:
        level: of the tasks; 1 for roots.
        tasks: their names.
        last_level: the level of the last stage.
    """

    level: int
    tasks: tuple[str, ...]
    last_level: int

    @property
    def folder(self) -> str:
        """Where the stage's checkpoints are, within the run's folder."""
        return f"stage-{self.level}"

    def __str__(self) -> str:
        return f"stage {self.level}/{self.last_level}: {', '.join(self.tasks)}"


def open_stages(hierarchy: Hierarchy, sealed: Collection[str]) -> list[Stage]:
    """The stages that are still to be trained, bottom-up: one a level that has tasks that are not sealed."""
    levels = hierarchy.levels()
    stages = []
    for level, names in enumerate(levels, start=1):
        tasks = tuple(name for name in names if name not in sealed)
        if tasks:
            stages.append(Stage(level, tasks, len(levels)))
    return stages


class Mastery:
    """When a task has learnt enough and leaves its stage: at a score, or when it gets no better.

    Args:
        tasks: of the stage.
        accuracy: the share of right answer tokens on the validation rows, 0 to 1, at which a task is mastered; None: never.
        patience: how many evaluations in a row may pass without a lower validation loss than the lowest before; None: any
            number. An evaluation counts if the task took a step since the last one that counted: of two between which it
            had no turn, the second has the loss of the first.
        turns_until: a task and a step -> how many turns the task has had by then; None: one at each evaluation.
        together: the tasks that write a memory page together. They leave together: as long as one of them learns, the page
            that the others read changes.
    """

    def __init__(
        self,
        tasks: Collection[str],
        accuracy: float | None = None,
        patience: int | None = None,
        turns_until: Callable[[str, int], int] | None = None,
        together: Collection[str] = (),
    ):
        self.tasks = tuple(tasks)
        self.together = tuple(together)
        self.accuracy = accuracy
        self.patience = patience
        self._turns_until = turns_until or (lambda task, step: step)
        self.mastered: dict[str, int] = {}  # task -> the step after which it was
        self._last_step = dict.fromkeys(self.tasks, -1)
        self._best = dict.fromkeys(self.tasks, math.inf)
        self._since_best = dict.fromkeys(self.tasks, 0)
        self._turns = dict.fromkeys(self.tasks, 0)  # as of the last evaluation that counted

    def observe(self, task: str, step: int, loss: float, accuracy: float) -> str:
        """Takes note of an evaluation, of each step once; returns why the task is mastered now, or an empty string."""
        if task in self.mastered or step <= self._last_step[task]:
            return ""
        self._last_step[task] = step
        turns = self._turns_until(task, step) if self.patience is not None else 0
        if loss < self._best[task]:  # maybe by a step of a sibling, on their page
            self._best[task], self._since_best[task] = loss, 0
        elif turns > self._turns[task]:
            self._since_best[task] += 1
        self._turns[task] = turns
        if self.accuracy is not None and accuracy >= self.accuracy:
            reason = f"validation accuracy {accuracy:.3f}"
        elif self.patience is not None and self._since_best[task] >= self.patience:
            reason = f"no lower validation loss than {self._best[task]:.3f} in {self.patience} evaluations"
        else:
            return ""
        self.mastered[task] = step
        return reason

    def observe_log(self, logs: Mapping[str, float]) -> tuple[str, str] | None:
        """Takes note of a log entry of the Trainer's, if it is an evaluation; the task that is mastered now, and why.

        Not of one marked `NOT_OWN_ROWS`: it is of other rows than the trainer was made with.
        """
        for task in self.tasks if NOT_OWN_ROWS not in logs else ():
            if f"eval_{task}_runtime" in logs:  # `eval_a_loss` may be the training loss of a task `eval_a`
                loss, accuracy = logs.get(f"eval_{task}_loss"), logs.get("eval_mean_token_accuracy", 0.0)
                if loss is None:  # of no whole batch (`dataloader_drop_last`)
                    continue
                if reason := self.observe(task, int(logs["step"]), loss, accuracy):
                    return task, reason
        return None

    @property
    def left(self) -> dict[str, int]:
        """The tasks that compute nothing any more -> the step after which they left."""
        waits = any(task not in self.mastered for task in self.together)
        last = 0 if waits else max((self.mastered[task] for task in self.together), default=0)
        return {
            task: last if task in self.together else step
            for task, step in self.mastered.items()
            if not (waits and task in self.together)
        }

    def all_mastered(self) -> bool:
        """Whether the stage can end."""
        return len(self.mastered) == len(self.tasks)


class BlockSampler:
    """Row indices in turns of one task each: a turn is a micro-batch of every process, and a block an optimizer step.

    A task has blocks of its own, all turns the same task's: then neither its loss, nor its gradient's norm, nor its order of
    rows depends on the task's siblings. Tasks that learn something `together` share blocks: their turns come in any order,
    so that a step on what they share is a step for all of them. A task's rows come in a new random order each time they have
    all been seen; a block may reach over from one order into the next.

    Args:
        num_rows: task -> how many rows it has in the dataset, where tasks follow one another in this order.
        block_size: rows of a block (micro-batch x accumulation x processes).
        seed: the same seed gives the same order, also after an interruption.
        passes: task -> passes over its rows in an epoch, above 0; 1 for those that are not in it. Each epoch has the whole
            number of blocks next to that; where one ends in a task's rows, the next goes on.
        turns_a_block: how many (the accumulation); it divides `block_size`.
        together: the tasks that share blocks.
    """

    def __init__(
        self,
        num_rows: Mapping[str, int],
        block_size: int,
        seed: int,
        passes: Mapping[str, float] | None = None,
        turns_a_block: int = 1,
        together: Collection[str] = (),
    ):
        self.num_rows = dict(num_rows)
        self.passes = dict(passes or {})
        self._first_row = dict(zip(num_rows, itertools.accumulate(num_rows.values(), initial=0), strict=False))
        self.block_size = block_size
        self.seed = seed
        self.epoch = 0
        self.turns_a_block = turns_a_block
        self.together = [task for task in num_rows if task in together and turns_a_block > 1]

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch that the next iteration gives."""
        self.epoch = epoch

    def num_blocks(self, task: str) -> int:
        """Optimizer steps of a task in an epoch: its rows over the block's, rounded up, times its passes; 1 or more."""
        return max(1, round(self.passes.get(task, 1) * math.ceil(self.num_rows[task] / self.block_size)))

    def __len__(self) -> int:
        return self.block_size * sum(self.num_blocks(task) for task in self.num_rows)

    def turns(self, epoch: int) -> list[str]:
        """The task of each turn of an epoch."""
        draw, each = random.Random(f"{self.seed}/turns/{epoch}"), self.turns_a_block
        mixed = [task for task in self.together for _ in range(self.num_blocks(task) * each)]
        draw.shuffle(mixed)
        blocks = [tuple(mixed[i : i + each]) for i in range(0, len(mixed), each)]
        alone = [task for task in self.num_rows if task not in self.together]
        blocks += [(task,) * each for task in alone for _ in range(self.num_blocks(task))]
        draw.shuffle(blocks)
        return [task for block in blocks for task in block]

    def turns_after(self, step: int, last_step: int) -> list[str]:
        """The task of each turn after the first `step` blocks, counted over all epochs, up to the block `last_step`."""
        epochs = range(math.ceil(last_step * self.block_size / len(self)))
        turns = [task for epoch in epochs for task in self.turns(epoch)]
        return turns[step * self.turns_a_block : last_step * self.turns_a_block]

    def turns_until(self, task: str, step: int) -> int:
        """How many turns a task has had after so many blocks, counted over all epochs."""
        epoch, rest = divmod(step, len(self) // self.block_size)
        begun = self.turns(epoch)[: rest * self.turns_a_block] if rest else []
        return epoch * self.num_blocks(task) * self.turns_a_block + begun.count(task)

    def steps_after(self, step: int, last_step: int) -> dict[str, int]:
        """How many whole blocks the turns of each task make, of the same span."""
        turns = Counter(self.turns_after(step, last_step))
        return {task: turns[task] // self.turns_a_block for task in self.num_rows}

    def __iter__(self) -> Iterator[int]:
        rows = {task: self._rows(task) for task in self.num_rows}
        for task in self.turns(self.epoch):
            for _ in range(self.block_size // self.turns_a_block):
                yield next(rows[task])

    def _rows(self, task: str) -> Iterator[int]:
        """A task's endless stream of rows, from where the epoch begins in it."""
        size = self.num_rows[task]
        begin = self.epoch * self.num_blocks(task) * self.block_size
        shuffle, place = divmod(begin, size)
        while True:
            order = list(range(size))
            random.Random(f"{self.seed}/{task}/{shuffle}").shuffle(order)
            for row in order[place:]:
                yield self._first_row[task] + row
            shuffle, place = shuffle + 1, 0
