"""Serving form: one task's path, folded once into a pre-scaled pair a linear, or merged into the backbone's weights.

I/O in and out features, R rank of a whole path.
"""

from collections.abc import Sequence

import torch
from torch import nn

from .path_hft import HFTPath


class HFTFolding:
    """The part of `HFTPreTrainedModel` that serves one task only, and then all of them again."""

    _folded: str | None = None  # the task
    _folded_path: HFTPath | None = None  # its pairs; None if it is merged
    _unmerged: dict[str, torch.Tensor] | None = None  # the backbone's weights as they were; None unless merged

    @torch.no_grad()
    def fold(self, task: str, merge: bool = False) -> None:
        """From here on `forward` and `generate` serve this task, also without `task=`, and no other; until `unfold`.

        The path is computed once: one pair, down [R, I] and up [O, R] with the gates in it, a linear. Passes no longer look
        whether a parameter has changed; logits are the same bits as before. It takes the pairs' memory besides the nodes':
        2 (I + O) R bytes a linear in 16 bit.

        Args:
            task: its name.
            merge: add the path to the backbone's weights instead, so that a pass costs what the backbone's costs; logits
                then differ by the rounding of the weights. The weights as they were are kept in main memory, as many bytes
                again as the adapted linears have, and `unfold` brings them back bit by bit.

        Raises:
            ValueError: an unknown task, a model that is folded already, or one that cannot be merged: quantised, offloaded,
                or with a memory that is read sparsely.
        """
        self.hierarchy.check(task)
        self._check_unfolded()
        with torch.inference_mode(False):
            path = HFTPath((self._task_path(task, kept={}),))
            pairs = {}
            for name, fused in self._fused.items():
                pairs[name] = fused.factors(path.tasks[0], self._like(name))
            if merge:
                self._check_mergeable(task)
                self._unmerged = {}
                for name, (down_RI, up_OR) in pairs.items():
                    weight_OI = self.base_model.get_submodule(name).weight
                    self._unmerged[name] = weight_OI.detach().to("cpu", copy=True)
                    weight_OI.copy_(weight_OI.float() + up_OR.float() @ down_RI.float())
            else:
                self._folded_path = path
        self._folded = task

    @torch.no_grad()
    def unfold(self) -> None:
        """Serves all tasks again; a merged backbone gets its weights back, bit by bit. Does nothing if nothing is folded."""
        for name, weight_OI in (self._unmerged or {}).items():
            self.base_model.get_submodule(name).weight.copy_(weight_OI)
        self._folded, self._folded_path, self._unmerged = None, None, None

    def _like(self, name: str) -> torch.Tensor:
        """A tensor of the dtype and on the device in which a linear computes."""
        weight = self.base_model.get_submodule(name).weight
        device = self._device_of()[name]
        return torch.empty(0, dtype=weight.dtype if weight.is_floating_point() else self.backbone.dtype, device=device)

    def _on_folded(self, rows: Sequence[str | None]) -> HFTPath | None:
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

    def _check_unmerged(self) -> None:
        if self._unmerged is not None:
            raise ValueError(f"Task {self._folded!r} is merged into the backbone's weights; call unfold() first.")

    def _check_mergeable(self, task: str) -> None:
        if self.config.memory_config.read == "topk" and self.sources(task).pages:
            raise ValueError(
                f"Task {task!r} reads its memory sparsely (`topk`), which no one matrix can stand for; fold it without "
                "merge=True."
            )
        for name in self._fused:
            linear = self.base_model.get_submodule(name)
            if type(linear).forward is not nn.Linear.forward or linear.weight.device.type == "meta":
                raise ValueError(
                    f"A path can be merged only into weights in 16 or 32 bit that are in memory, and {name!r} is a "
                    f"{type(linear).__name__} on {linear.weight.device.type!r}; fold it without merge=True, or load the "
                    "model without quantization."
                )
