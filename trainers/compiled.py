"""Training with `torch_compile=True`: the decoder as one graph for all tasks and stages."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


class CompiledDecoder:
    """A compiled form of an HFT model's decoder, for losses only.

    What a path adds enters the graph as tensors, filled with zeros up to one rank (see `HFTPreTrainedModel.activate`), so
    neither the next task nor the next stage is compiled again; lengths that vary are, once. Head and loss are not part of
    it, and neither is generating between the stages, whose cache would be compiled for itself.

    Args:
        model: an HFT model.
        backend, mode: as for `torch.compile`.
    """

    def __init__(self, model: PreTrainedModel, backend: str | None, mode: str | None):
        self.rank = model.widest_rank()
        self._model = model
        self._decoder: nn.Module = model.base_model
        self._call: Any = torch.compile(self._decoder._call_impl, backend=backend or "inductor", mode=mode)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within the block, whoever calls the decoder runs its compiled form."""
        # Checkpointing of the reentrant kind needs embeddings whose output wants a gradient, which no graph can hand out.
        self._model.disable_input_require_grads()
        self._decoder._compiled_call_impl = self._call  # what nn.Module.compile() sets for good
        try:
            yield
        finally:
            self._decoder._compiled_call_impl = None
