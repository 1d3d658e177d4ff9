"""The path that a pass takes: which nodes and pages it reads, behind which gates; and how the linears get to know it.

Making a linear's fused factors costs more than using them in a short pass, so they are used again for as long as they are
right:

    HFTKept                 a task's, from pass to pass, until a parameter of theirs changes; none before it is sealed
    HFTTaskPath.kept        those of one path: HFTKept's; or made once for a `generate` beside open tasks, for `fold`, or
                            for `activate(rank=...)`; None where each linear makes them anew: in training and `activate`
    HFTTaskPath.wide, HFTPath.wide_stacks    in float32, for one `generate` on a CPU
    HFTFused._stack         those of the last mixed batch, stacked
    made_paths()            the paths themselves, for one `generate`

B batch, L layers, N nodes and P memory pages that a task reads, R rank of its whole path.
"""

import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor


Pair = tuple[torch.Tensor, torch.Tensor]  # down [R, I] and up [O, R]


@dataclass(frozen=True)
class HFTSources:
    """What a task reads: nodes, its own among them, and memory pages. Its gates have these columns, nodes first."""

    nodes: tuple[str, ...]
    pages: tuple[str, ...]

    @classmethod
    def of(cls, entry: Mapping[str, Any], path: Sequence[str]) -> "HFTSources":
        """What the task of an entry of `config.tasks`, with this path, reads."""
        return cls((*path, *entry["borrows"]), tuple(str(page_id) for page_id in entry["pages"]))

    def labels(self) -> tuple[str, ...]:
        """The nodes' names and `page:<id>`; no task can be called so."""
        return (*self.nodes, *(f"page:{page}" for page in self.pages))

    def __len__(self) -> int:
        return len(self.nodes) + len(self.pages)


@dataclass(frozen=True)
class HFTTaskPath:
    """What one task reads, ready for the linears.

    Args:
        task: its name.
        sources: N nodes and P pages.
        gates: [L, N + P].
        source_of_column_R: for each of the R columns of the fused factors, the place of its source, nodes first.
        num_node_columns: how many of these columns belong to nodes.
        kept: the fused factors that linears made on this path, by linear, and which are still right; linears add theirs.
            None: they make them anew.
        wide: the same in float32, while tokens are generated; None otherwise.
        learns_N: which sources' gates get gradients; None if no gate does.
    """

    task: str
    sources: HFTSources
    gates: torch.Tensor
    source_of_column_R: torch.Tensor
    num_node_columns: int
    kept: dict[str, Pair] | None = None
    wide: dict[str, Pair] | None = None
    learns_N: torch.Tensor | None = None

    @functools.cached_property
    def learns_RN(self) -> torch.Tensor | None:
        """1.0 where a column's source is one whose gate gets gradients; None if no gate does. Asked for in training only."""
        if self.learns_N is None:
            return None
        return torch.eye(len(self.learns_N), device=self.learns_N.device)[self.source_of_column_R] * self.learns_N

    def columns(self, with_pages: bool) -> slice:
        """Of the fused factors at one linear: the nodes', or all."""
        return slice(None if with_pages else self.num_node_columns)

    def column_gates(self, layer: int, with_pages: bool) -> torch.Tensor:
        """One layer's gates, a number a column of the factors: [R], float32; the nodes' columns, or all."""
        columns = self.source_of_column_R[self.columns(with_pages)]
        gates_N = self.gates[layer]
        if self.learns_N is not None and torch.is_grad_enabled():
            gates_N = torch.where(self.learns_N, gates_N, gates_N.detach())
        return gates_N[columns]


class HFTOwner:
    """Whose a path is: each model has one. Several models may be active in a thread, each on a path of its own."""


class HFTConstants:
    """Small tensors of numbers on some device, each brought there once.

    A copy to a GPU waits for all that the GPU still has to do, so no pass should make one.
    """

    MOST = 1024  # of mixed batches there are as many as there are ways to mix tasks

    def __init__(self):
        self._made: dict[tuple[Any, ...], torch.Tensor] = {}

    def of(self, numbers: Sequence[float], device: torch.device) -> torch.Tensor:
        """These numbers [N]; not to be written to."""
        if torch.compiler.is_compiling():
            return torch.tensor(numbers, device=device)
        key = (device, type(numbers[0]), *numbers)  # as dictionaries see it, True is 1
        made = self._made  # once: another thread may begin anew
        if (tensor := made.get(key)) is not None:
            return tensor
        with torch.inference_mode(False):  # training may need it, too
            tensor = torch.tensor(numbers, device=device)
        if not isinstance(tensor, FakeTensor):  # which is of its mode
            if len(made) >= self.MOST:
                self._made = made = {}
            made[key] = tensor
        return tensor

    def __reduce__(self):
        """A copy, or what is loaded, maybe onto another device, begins anew."""
        return HFTConstants, ()


@dataclass(frozen=True)
class HFTPath:
    """The paths that a batch takes.

    Args:
        owner: the model's whose tasks these are.
        tasks: those that any row takes, each once; none for the plain backbone.
        task_of_row_B: for each row its place in `tasks`, and one more than the last for the plain backbone; None if all rows
            take the only one.
        in_order: whether the places are 0, 1, 2, ...: each row has a task of its own.
        wide_stacks: of rows with different tasks, while tokens are generated: by linear, their factors in one tensor each,
            in float32; linears add theirs. None otherwise.
    """

    owner: HFTOwner
    tasks: tuple[HFTTaskPath, ...]
    task_of_row_B: torch.Tensor | None = None
    in_order: bool = False
    wide_stacks: dict[str, Pair] | None = None

    def names(self) -> list[str | None]:
        """The task of each row, None for the plain backbone; one name if it is one for all rows."""
        names = [*(task.task for task in self.tasks), None]
        return names[:1] if self.task_of_row_B is None else [names[place] for place in self.task_of_row_B.tolist()]

    def check(self, num_rows: int | None) -> None:
        """Raises ValueError if the path is of another number of rows than a pass has."""
        if self.task_of_row_B is not None and num_rows not in (None, len(self.task_of_row_B)):
            raise ValueError(
                f"The active path names tasks for {len(self.task_of_row_B)} rows, and the pass has {num_rows}; activate one "
                "name, or one a row."
            )

    def with_wide_factors(self) -> "HFTPath":
        """The same paths with room for factors in float32."""
        return replace(self, tasks=tuple(replace(task, wide={}) for task in self.tasks), wide_stacks={})


class _ThreadState(threading.local):
    """A thread's own state: two threads may generate with different tasks at the same time."""

    paths: tuple[HFTPath, ...] = ()  # of any models, the innermost last
    made: dict[Any, HFTPath | None] | None = None


_state = _ThreadState()


def active_path(owner: HFTOwner) -> HFTPath | None:
    """A model's innermost path that is active in this thread; None if none is: the plain backbone."""
    for path in reversed(_state.paths):
        if path.owner is owner:
            return path
    return None


@contextmanager
def on_path(path: HFTPath) -> Iterator[None]:
    """All of its model's linears that run inside take `path`; afterwards what was before is active again.

    Raises:
        RuntimeError: another block, begun within this one, has not ended yet. That one's path stays active.
    """
    _state.paths = (*_state.paths, path)
    try:
        yield
    finally:
        paths = _state.paths
        if paths[-1] is path:
            _state.paths = paths[:-1]
        else:
            _state.paths = tuple(other for other in paths if other is not path)
            raise RuntimeError(
                "Two blocks with an active task overlap, and neither is within the other, so passes took the wrong one's: "
                "do not await or yield within `activate`; give `task=` to forward and generate instead."
            )


@contextmanager
def _on_paths(paths: tuple[HFTPath, ...]) -> Iterator[None]:
    before = _state.paths
    _state.paths = paths
    try:
        yield
    finally:
        _state.paths = before


@contextmanager
def generating() -> Iterator[None]:
    """Inside, parameters do not change: a pass may take a path that an earlier pass made, without looking."""
    before = _state.made
    _state.made = {}
    try:
        yield
    finally:
        _state.made = before


def made_paths() -> dict[Any, HFTPath | None] | None:
    """The paths that were made while this thread generates, to be added to; None if it does not."""
    return _state.made


def keep_path(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """A checkpoint function whose recompute takes the path that the forward pass took.

    The recompute runs during `backward`, when another path may be active, or none; and in a thread of its own on CUDA. In a
    compiled pass there is nothing to do: its recompute is part of the graph.

    Args:
        checkpoint: as `torch.utils.checkpoint.checkpoint`: called with a function and that function's arguments.
    """

    @functools.wraps(checkpoint)
    def checkpoint_on_path(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return checkpoint(function, *args, **kwargs)
        paths = _state.paths

        def recomputable(*inputs: Any, **options: Any) -> Any:
            with _on_paths(paths):
                return function(*inputs, **options)

        return checkpoint(recomputable, *args, **kwargs)

    return checkpoint_on_path
