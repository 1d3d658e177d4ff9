"""Which fused factors of earlier passes are still right: looked up once a pass, not once a linear."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch._subclasses.fake_tensor import FakeTensor

from .path_hft import Pair


@dataclass(frozen=True)
class _Entry:
    """A task's fused factors.

    Args:
        made_of: place in memory and version of all parameters that they were made of.
        memory: these parameters' memory itself, so that no other tensor can come to stand in its place.
        factors: by linear.
    """

    made_of: list[tuple[int, int]]
    memory: list[torch.Tensor]
    factors: dict[str, Pair] = field(default_factory=dict)


MOST_TASKS = 8


class HFTKept:
    """The fused factors of sealed tasks, kept from pass to pass until one of their parameters changes.

    Of the tasks that were asked for last, eight, or as many as the last batch has: each takes as much memory again as all
    that it reads.

    A write that raises no version, as through `parameter.data`, is not seen; none of HFT's own is such.

    On the CPU, decoding a token of SmolLM2-135M looks at about 1900 parameters; at each linear for itself that took longer
    than all else that a task adds.
    """

    def __init__(self):
        self._entries: dict[str, _Entry] = {}  # what was asked for last is last
        self._lock = threading.Lock()

    def __reduce__(self):
        """A copy has parameters of its own, and begins anew."""
        return HFTKept, ()

    def clear(self) -> None:
        """Forgets all."""
        self._entries = {}

    def of(self, task: str, parameters: Sequence[torch.Tensor], num_tasks: int = 1) -> dict[str, Pair] | None:
        """The factors by linear that are right for these parameters, to be read and added to; None if none may be kept.

        Args:
            task: its name.
            parameters: all that the task's factors are made of.
            num_tasks: how many the batch has, which are kept together.
        """
        if any(parameter.requires_grad for parameter in parameters):
            self.clear()  # a refresh: a fused optimizer may change gates without raising their versions
            return None
        if torch.is_grad_enabled() or any(parameter.is_inference() for parameter in parameters):
            return None
        if torch._C._are_functorch_transforms_active() or isinstance(torch.empty(0), FakeTensor):
            return None  # what is made now is of a transform, or of a mode without numbers
        # A change in place raises a tensor's version; another tensor is elsewhere in memory.
        made_of = [(parameter.data_ptr(), parameter._version) for parameter in parameters]
        with self._lock:
            entry = self._entries.pop(task, None)
            if entry is None or entry.made_of != made_of:
                entry = _Entry(made_of, [parameter.detach() for parameter in parameters])
            self._entries[task] = entry
            while len(self._entries) > max(MOST_TASKS, num_tasks):
                del self._entries[next(iter(self._entries))]
        return entry.factors
