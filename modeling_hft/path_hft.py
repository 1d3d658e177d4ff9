"""The path that a pass takes: which nodes run, behind which gates; and how the linears get to know it.

B batch, L layers, N nodes on the path, R rank of the whole path.
"""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class HFTPath:
    """The nodes that a batch runs.

    Args:
        nodes: names of the tasks whose nodes run, N of them.
        gates: [L, N] if all rows take the same path, or [B, L, N] with zeros for the nodes that are not on a row's path.
        node_of_column_R: for each of the R columns of the fused factors, the place of its node in `nodes`.
    """

    nodes: tuple[str, ...]
    gates: torch.Tensor
    node_of_column_R: torch.Tensor

    def gates_of(self, layer: int) -> torch.Tensor:
        """One layer's gates, a number a rank column: [R] or [B, R], float32."""
        return self.gates[..., layer, :][..., self.node_of_column_R]


class _ThreadState(threading.local):
    """A thread's own state: two threads may generate with different tasks at the same time."""

    path: HFTPath | None = None


_state = _ThreadState()


def active_path() -> HFTPath | None:
    """The path of the pass that this thread is in, or None: the plain backbone."""
    return _state.path


@contextmanager
def on_path(path: HFTPath | None) -> Iterator[None]:
    """All linears that run inside take `path`; afterwards what was before is active again."""
    before = _state.path
    _state.path = path
    try:
        yield
    finally:
        _state.path = before


def keep_path(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """A checkpoint function whose recompute takes the path that the forward pass took.

    The recompute runs during `backward`, when another path may be active, or none; and in a thread of its own on CUDA.

    Args:
        checkpoint: as `torch.utils.checkpoint.checkpoint`: called with a function and that function's arguments.
    """

    @functools.wraps(checkpoint)
    def checkpoint_on_path(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        path = _state.path

        def recomputable(*inputs: Any, **options: Any) -> Any:
            with on_path(path):
                return function(*inputs, **options)

        return checkpoint(recomputable, *args, **kwargs)

    return checkpoint_on_path
