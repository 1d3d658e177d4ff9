"""Training beside quantised weights, as PEFT does, without PEFT."""

import contextlib
from collections.abc import Iterator

from transformers import PreTrainedModel


@contextlib.contextmanager
def passing_as_unquantized(model: PreTrainedModel) -> Iterator[None]:
    """The Trainer refuses quantised models without PEFT adapters; ours train beside the quantised weights, too."""
    quantized = getattr(model, "is_quantized", False)
    model.is_quantized = False
    try:
        yield
    finally:
        model.is_quantized = quantized
