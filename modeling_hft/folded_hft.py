"""Serving form: one task's path, folded once into a pre-scaled pair a linear, or merged into the backbone's weights.

I/O in and out features, R rank of a whole path.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from .backbone_hft import check_unshared
from .fused_hft import padded
from .path_hft import HFTPath, HFTTaskPath, Pair, active_path


class HFTFolding:
    """The part of `HFTPreTrainedModel` that serves one task only, and then all of them again."""

    _folded: str | None = None  # the task
    _folded_path: HFTPath | None = None  # with its pairs, or without any if it is merged
    _unmerged: dict[str, torch.Tensor] | None = None  # the backbone's weights as they were; None unless merged

    @torch.no_grad()
    def fold(self, task: str, merge: bool = False, rank: int | None = None) -> None:
        """From here on `forward` and `generate` serve this task, also without `task=`, and no other; until `unfold`.

        The path is computed once: one pair, down [R, I] and up [O, R] with the gates in it, a linear. Passes no longer look
        whether a parameter has changed; logits are the same bits as before. It takes the pairs' memory besides the nodes':
        2 (I + O) R bytes a linear in 16 bit, and twice as much again while a CPU generates. Passes through parts, as
        `model.base_model(...)`, stay the plain backbone's unless it is merged: for them there is `activate`.

        Args:
            task: its name.
            merge: add the path to the backbone's weights instead, so that a pass costs what the backbone's costs; logits
                then differ by the rounding of the weights. The weights as they were are kept in main memory, as many bytes
                again as the adapted linears have, and `unfold` brings them back bit by bit.
            rank: fill the pairs with zeros up to this R, so that all tasks that are folded to it look the same to a compiled
                model: after one `torch.compile(model)`, `unfold()` and `fold(other, rank=same)` switch tasks without
                compiling again. `model.widest_rank()` fits all. Logits may then differ in their last bits.

        Raises:
            ValueError: an unknown task, a model that is folded already, or one that cannot be merged (quantised, offloaded);
                or a `rank` below the path's.
        """
        self.hierarchy.check(task)
        self._check_unfolded()
        with torch.inference_mode(False), torch.no_grad():
            path, pairs = self._ready_path(task, rank)
            if merge:
                self._check_mergeable(task)
                self._merge(pairs)
                path = HFTPath(self._owner, ())
            self._folded_path = path
        self._folded = task

    def _merge(self, pairs: Mapping[str, Pair]) -> None:
        """All weights get their pairs added, or none does."""
        self._unmerged = {}
        try:
            for name, (down_RI, up_OR) in pairs.items():
                weight_OI = self.base_model.get_submodule(name).weight
                self._unmerged[name] = weight_OI.detach().to("cpu", copy=True)
                weight_OI.copy_(weight_OI.float() + up_OR.float() @ down_RI.float())
        except BaseException:
            self.unfold()
            raise

    @torch.no_grad()
    def unfold(self) -> None:
        """Serves all tasks again; a merged backbone gets its weights back, bit by bit. Does nothing if nothing is folded."""
        for name, weight_OI in (self._unmerged or {}).items():  # none twice: see `_check_mergeable`
            self.base_model.get_submodule(name).weight.copy_(weight_OI)
        self._folded, self._folded_path, self._unmerged = None, None, None

    def widest_rank(self) -> int:
        """The R that holds each task's path, also once the stages that are open, one a level, have written their pages."""
        sealed = self.config.sealed_tasks()
        num_open = sum(any(task not in sealed for task in level) for level in self.hierarchy.levels())
        pages = sum(page["slots"] for page in self.config.pages) + self.config.memory_config.slots * num_open
        paths = (sum(self.config.task(node)["rank"] for node in self.sources(t).nodes) for t in self.hierarchy.names)
        return max(paths, default=0) + pages

    def _ready_path(self, task: str, rank: int | None) -> tuple[HFTPath, dict[str, Pair]]:
        """A path whose linears find their pairs made, of rank R or filled up to `rank`; and these pairs.

        A compiled pass sees them as inputs: neither a task's name nor its own rank is part of the graph.
        """
        path: HFTTaskPath = self._task_path(task, kept={})
        if rank is not None:
            self._check_fits(task, len(path.source_of_column_R), rank)
        pairs = {name: fused.factors(path, self._like(name)) for name, fused in self._fused.items()}
        if rank is not None:
            path.kept.update((name, padded(pair, rank)) for name, pair in pairs.items())
        return HFTPath(self._owner, (path,)), path.kept

    def _like(self, name: str) -> torch.Tensor:
        """A tensor of the dtype and on the device in which a linear computes."""
        linear = self.base_model.get_submodule(name)
        is_plain = type(linear).forward is nn.Linear.forward  # else it is quantised, stored in whatever dtype
        dtype = linear.weight.dtype if is_plain else self.backbone.dtype
        return torch.empty(0, dtype=dtype, device=self._device_of()[name])

    def _on_folded(self, rows: Sequence[str | None]) -> HFTPath:
        """The path of a pass of a folded model; ValueError if it asks for something else."""
        for row in rows:
            if row != self._folded:
                raise ValueError(
                    f"The model is folded for task {self._folded!r} and cannot run {row or 'the plain backbone'!r}; call "
                    "unfold() first."
                )
        return self._folded_path

    def _check_unfolded(self) -> None:
        if self._folded is not None:
            raise ValueError(f"The model is folded for task {self._folded!r}; call unfold() first.")

    def _check_inactive(self) -> None:
        """Raises ValueError within `activate`, which would go on with what a task read and was before."""
        if (path := active_path(self._owner)) is not None and path.tasks:
            names = ", ".join(repr(name) for name in dict.fromkeys(path.names()) if name is not None)
            raise ValueError(f"Task {names} is active, and passes would go on as before; do this outside `activate`.")

    def _check_unmerged(self) -> None:
        if self._unmerged is not None:
            raise ValueError(f"Task {self._folded!r} is merged into the backbone's weights; call unfold() first.")

    def _check_fits(self, task: str, path_rank: int, rank: int) -> None:
        if rank < path_rank:
            raise ValueError(
                f"`rank` is {rank}, but the path of task {task!r} has rank {path_rank}; model.widest_rank() holds every "
                "task's."
            )

    def _check_mergeable(self, task: str) -> None:
        for name in self._fused:
            linear = self.base_model.get_submodule(name)
            if type(linear).forward is not nn.Linear.forward or linear.weight.device.type == "meta":
                raise ValueError(
                    f"A path can be merged only into weights in 16 or 32 bit that are in memory, and {name!r} is a "
                    f"{type(linear).__name__} on {linear.weight.device.type!r}; fold it without merge=True, or load the "
                    "model without quantization."
                )
        check_unshared(self.base_model, self._fused)
