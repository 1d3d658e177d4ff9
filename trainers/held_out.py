"""Rows that the trainer is given to evaluate, or to predict, in any form that it trains on."""

from typing import Any

from datasets import Dataset
from transformers.trainer_utils import PredictionOutput

from hft.hierarchy_hft import nearest

from .task_data import TASK_ID, is_tagged, split_by_task


class HFTHeldOut:
    """The part of `HFTTrainer` that evaluates and predicts, each task's rows on the task's path."""

    def evaluate(self, eval_dataset: Any = None, **kwargs: Any) -> dict[str, float]:
        """As SFTTrainer's; `eval_dataset` takes the forms that the trainer takes."""
        given = eval_dataset is not None and not isinstance(eval_dataset, str)
        if isinstance(eval_dataset, str) and eval_dataset not in (known := list(self.eval_dataset or {})):
            raise ValueError(
                f"`eval_dataset` has no rows of the task {eval_dataset!r}. {nearest(eval_dataset, known)}"
            )
        if given:
            eval_dataset = self._by_task(eval_dataset, "eval_dataset")
        return super().evaluate(eval_dataset=eval_dataset, **kwargs)

    def predict(self, test_dataset: Any, **kwargs: Any) -> PredictionOutput:
        """As SFTTrainer's, on the path of the one task that `test_dataset` has rows of, in a form that the trainer takes.

        Raises:
            ValueError: rows of several tasks.
        """
        rows = self._by_task(test_dataset, "test_dataset")
        if isinstance(rows, dict):
            if len(rows) != 1:
                raise ValueError(
                    f"`test_dataset` has rows of {len(rows)} tasks ({', '.join(rows)}), and predictions are of one; call "
                    "`predict` once a task: {name: Dataset}."
                )
            ((task, rows),) = rows.items()
            if not self._skip_prepare_dataset:
                how = (self.processing_class, self.args, False, self._formatting_func)
                rows = self._prepare_dataset(rows, *how, task)
        return super().predict(rows, **kwargs)

    def _by_task(self, data: Any, what: str) -> Dataset | dict[str, Dataset]:
        """Rows to evaluate, task -> rows; rows of one task that are prepared already stay as they are."""
        if is_tagged(data) and len(data.unique(TASK_ID)) == 1:
            return data.with_format(None)
        sets = split_by_task(data, self._task_names, what)
        if self._skip_prepare_dataset:
            return {task: self._ready(task, rows, self.args) for task, rows in sets.items()}
        return sets
