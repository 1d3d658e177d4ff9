"""Rows that the trainer is given to evaluate, or to predict, in any form that it trains on."""

import contextlib
import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

from datasets import Dataset
from transformers.trainer_utils import PredictionOutput
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from hft.hierarchy_hft import nearest

from .curriculum import NOT_OWN_ROWS, Mastery
from .task_data import TASK_ID, OneTaskCollator, is_tagged, split_by_task


class HFTHeldOut:
    """The part of `HFTTrainer` that evaluates and predicts, each task's rows on the task's path."""

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As SFTTrainer's; `eval_dataset` takes the forms that the trainer takes. Mastery goes by the trainer's own only."""
        given = eval_dataset is not None and not isinstance(eval_dataset, str)
        if isinstance(eval_dataset, str) and eval_dataset not in (known := list(self.eval_dataset or {})):
            if self._is_in_stage and eval_dataset in self._task_names:
                raise ValueError(
                    f"The task {eval_dataset!r} is not of this stage ({', '.join(self.stage.tasks)}); while it trains, give "
                    f"that task's rows: evaluate({{{eval_dataset!r}: rows}})."
                )
            raise ValueError(
                f"`eval_dataset` has no rows of the task {eval_dataset!r}. {nearest(eval_dataset, known)}"
            )
        if given:
            eval_dataset = self._by_task(eval_dataset, "eval_dataset")
        with self._looking_at(given):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def predict(
        self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """As SFTTrainer's, on the path of the one task that `test_dataset` has rows of, in a form that the trainer takes.

        Raises:
            ValueError: rows of several tasks, or such as lose their answers when they are cut.
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
                args = copy.copy(self.args)
                args.shuffle_dataset = False  # predictions come in the order of the rows
                ready = self._prepare_dataset(rows, self.processing_class, args, False, self._formatting_func, task)
                _check_all_there(task, rows, ready, args.max_length)
                rows = ready
        with self._looking_at(True), self._row_by_row():
            return super().predict(rows, ignore_keys, metric_key_prefix)

    @contextlib.contextmanager
    def _row_by_row(self) -> Iterator[None]:
        """Predictions are of rows, so that TRL's collator pads them, even where training lays them end to end."""
        usual = self.data_collator
        if isinstance(usual.collator, DataCollatorForLanguageModeling):
            self.data_collator = OneTaskCollator(dataclasses.replace(usual.collator, padding_free=False))
        try:
            yield
        finally:
            self.data_collator = usual

    @contextlib.contextmanager
    def _looking_at(self, others: bool) -> Iterator[None]:
        """Inside, the means of an evaluation begin empty; afterwards they are dropped, and mode and mastery come back.

        Args:
            others: the rows are not those that the trainer was made with: no task is mastered by them.
        """
        self._wrap_collator()
        self._metrics["eval"].clear()
        self._means.clear("eval")
        judge, is_training, begin = self.mastery, self.model.training, len(self.state.log_history)
        if others:
            self.mastery = Mastery([])
            # With persistent workers the Trainer keeps a loader a name, and has one name for all rows that it is given.
            getattr(self, "_eval_dataloaders", {}).pop("eval", None)
        # Within a stage accelerate wraps the model; outside it computes in the same precision.
        precision = contextlib.nullcontext() if self._is_in_stage else self.accelerator.autocast()
        try:
            with precision, self._forward.lent():
                yield
        finally:
            self.mastery = judge
            if self.is_in_train:
                self.model.train(is_training)
            self._metrics["eval"].clear()
            self._means.clear("eval")
            for logs in self.state.log_history[begin:] if others else ():
                logs[NOT_OWN_ROWS] = True  # a resumed run reads this, too

    def _by_task(self, data: Any, what: str) -> Dataset | dict[str, Dataset]:
        """Rows to evaluate, task -> rows; rows of one task that are prepared already stay as they are."""
        if is_tagged(data) and len(data.unique(TASK_ID)) == 1:
            return data.with_format(None)
        sets = split_by_task(data, self._task_names, what)
        if self._skip_prepare_dataset:
            ready = {task: self._ready(task, rows, self.args) for task, rows in sets.items()}
            for task, rows in sets.items() if what == "test_dataset" else ():
                _check_all_there(task, rows, ready[task], self.args.max_length)
            return ready
        return sets


def _check_all_there(task: str, rows: Dataset, ready: Dataset, max_length: int | None) -> None:
    """Raises ValueError if rows were lost, of which predictions are asked."""
    if lost := len(rows) - len(ready):
        raise ValueError(
            f"{lost} of the {len(rows)} rows of task {task!r} have no answer, or lose it with `max_length`={max_length}, so "
            "predictions would not be of these rows; raise it, or leave those rows out."
        )
