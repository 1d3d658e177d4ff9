"""The loss of a micro-batch, on its task's path."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .answers_only import answers_only


class LentForward:
    """The forward that TRL puts onto a model as its trainer is made, taken off again, and lent to it for a while.

    It is tied to that very model: a deep copy that has it would compute with the weights, and the tasks, of the original.

    Args:
        model: before its trainer is made.
    """

    def __init__(self, model: PreTrainedModel):
        self._model = model
        self._own = vars(model).get("forward")  # accelerate's, of a model on several devices
        self._lent = None
        self._is_lent = False

    def take_off(self) -> None:
        """Once the trainer is made: the model's forward is its own again."""
        self._lent = self._model.forward
        self._give_back()

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """Inside, the model's forward is TRL's; what others wrap around it meanwhile goes with it."""
        if self._is_lent:
            yield
            return
        self._model.forward, self._is_lent = self._lent, True
        try:
            yield
        finally:
            self._is_lent = False
            self._give_back()

    def _give_back(self) -> None:
        if self._own is not None:
            self._model.forward = self._own
        else:
            vars(self._model).pop("forward", None)


class HFTLosses:
    """The part of `HFTTrainer` that computes losses."""

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """As SFTTrainer's, on the batch's path; also logs `<task>_loss`, a mean over tokens (`eval_...`: over batches)."""
        inputs, labels = dict(inputs), inputs["labels"]
        task = self._task_of(inputs)
        del inputs["task"]
        num_items = num_items_in_batch
        if isinstance(num_items, torch.Tensor):  # of a model on several devices the head may be on another one
            num_items = num_items.to(self.model.get_output_embeddings().weight.device)
        # TRL's fused loss calls `base_model` directly, past any `forward` of ours, so the path is set around it.
        with self._on_path(task), self._forward.lent(), answers_only(self, inputs, return_outputs):
            result = super().compute_loss(model, inputs, return_outputs, num_items)
        loss, *outputs = result if return_outputs else (result,)
        loss = loss.to(self.args.device)
        result = (loss, *outputs) if return_outputs else loss
        num_labels, loss = (labels[..., 1:] != -100).sum(), loss.detach()
        if num_items_in_batch is not None:  # of the whole step
            mean_of = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            loss = loss * num_items_in_batch / mean_of  # DDP's mean is made up for
        else:
            loss = loss * num_labels
        total, count = self._summed(loss, num_labels)
        mode = "train" if self.model.training else "eval"
        for name in ("mean_token_accuracy", "entropy"):  # TRL's, of this batch
            if values := self._metrics[mode].get(name):
                self._means.add(mode, name, values[-1] * count, count)
        if self.model.training:  # in evaluation the Trainer itself logs a loss a task
            self._means.add(mode, f"{task}_loss", total, count)
        return result

    @contextlib.contextmanager
    def _on_path(self, task: str) -> Iterator[None]:
        if self._compiled is None:
            with self.model.activate(task):
                yield
        else:
            with self.model.activate(task, rank=self._compiled.rank), self._compiled.running():
                yield
