"""The tasks' scores before, between and after the stages of a training, kept in the run's record."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hft.hierarchy_hft import BACKBONE, nearest

from .curriculum import Stage
from .evaluation import EvalSet, score_task
from .run_record import RunRecord, Score, as_score


class StageScores:
    """Scores tasks on their test sets, for the record of a run.

    Args:
        model: an HFT model.
        tokenizer: its tokenizer.
        sets: task -> what it is tested on; tasks without one are left out.
        batch_size: prompts at once.
        has_bars: whether to show how far it is; in one process of several.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sets: Mapping[str, EvalSet],
        batch_size: int = 16,
        has_bars: bool = True,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.sets = sets
        self.batch_size = batch_size
        self.has_bars = has_bars

    def begin(self, record: RunRecord) -> None:
        """Before any stage: the plain backbone on every task."""
        missing = [task for task in self.sets if task not in record.before]
        record.before |= self._score(missing, "the backbone", BACKBONE)

    def start(self, record: RunRecord, stage: Stage) -> None:
        """As a stage begins: what its tasks with parents can do already."""
        children = [task for task in stage.tasks if self.model.hierarchy.parents(task)]
        record.start |= self._score([t for t in children if t not in record.start], f"as {stage} begins")

    def end(self, stage: Stage) -> dict[str, Score]:
        """After a stage was sealed: all tasks learnt so far, each with its id."""
        return self._score(self.model.config.sealed_tasks(), f"after {stage}")

    def _score(self, tasks: Iterable[str], when: str, path: str | None = None) -> dict[str, Score]:
        found: dict[str, Score] = {}
        for task in tasks:
            if task in self.sets:
                which, bar = path or task, f"{task}, {when}" if self.has_bars else None
                scores = score_task(self.model, self.tokenizer, self.sets[task], which, self.batch_size, bar)
                found[task] = as_score(scores)
        return found


def check_sets(sets: Mapping[str, EvalSet], known: Sequence[str]) -> None:
    """Raises ValueError for a test set of an unknown task, an empty one, or one of rows in another form."""
    for task, data in sets.items():
        if task not in known:
            raise ValueError(f"`test_sets` has rows of the unknown task {task!r}. {nearest(task, known)}")
        if not data.rows:
            raise ValueError(f"`test_sets[{task!r}]` is empty; leave it out, or give it rows.")
        if missing := [key for key in ("prompt", "completion") if key not in data.rows[0]]:
            raise ValueError(
                f"A row of `test_sets[{task!r}]` lacks {missing[0]!r} (it has {', '.join(data.rows[0])}); give "
                "prompt-completion rows."
            )


def in_words(scores: Mapping[str, Mapping[str, Any]]) -> str:
    """`sst2 90.0 ± 3.0, yelp 49.0 ± 5.0`."""
    return ", ".join(f"{task} {score['score']:.1f} ± {score['se']:.1f}" for task, score in scores.items())
