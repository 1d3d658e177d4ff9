"""On a CPU, too, the loss meets the head at positions that have a label only.

TRL chooses these where its Triton kernels run; elsewhere it scores all positions, prompts and padding included, to keep the
shapes of a batch, though the loss counts none of them. On two cores that was a quarter of a step's time and, with tiles of
logits in float32, more memory than all else.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.modeling_outputs import ModelOutput


@contextlib.contextmanager
def answers_only(trainer: Trainer, inputs: dict[str, Any], wants_logits: bool) -> Iterator[None]:
    """While open, the decoder gives the hidden states [1, N, H] that predict the batch's N labels, and no others.

    Nothing changes on an accelerator, for a compiled decoder, or where the logits are needed: for the caller, for a
    `compute_loss_func`, for label smoothing.

    Args:
        trainer: its model's forward takes `shift_labels`, as TRL's fused head does.
        inputs: of the model; `labels` [B, T] become `shift_labels` [1, N].
        wants_logits: whether the caller does.
    """
    wants_logits = wants_logits or trainer.compute_loss_func is not None or trainer.label_smoother is not None
    if inputs["labels"].device.type != "cpu" or trainer.args.torch_compile or wants_logits:
        yield
        return
    labels_BT = inputs.pop("labels")[:, 1:]
    is_label_BT = labels_BT != -100
    inputs["shift_labels"] = labels_BT[is_label_BT][None]

    def choose(decoder: nn.Module, args: Any, output: ModelOutput) -> ModelOutput:
        output.last_hidden_state = output.last_hidden_state[:, :-1][is_label_BT][None]
        return output

    hook = trainer.model.base_model.register_forward_hook(choose)
    try:
        yield
    finally:
        hook.remove()
