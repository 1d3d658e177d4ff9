"""Trimming: before a task is sealed, its node is cut to the smallest rank that keeps its validation loss.

I/O in and out features, R rank.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .nodes_hft import numbers_a_rank
from .path_hft import Pair
from .refresh_hft import frozen, mean_and_error


@dataclass(frozen=True)
class HFTTrim:
    """What a trim found out.

    Args:
        task: whose node was cut, or left as it was.
        old_rank, rank: of the node at each linear, before and now.
        before, after: mean loss a validation row at the old rank and now, in nats a token.
        error: the standard error of the mean rise over the validation rows.
        saved_bytes: what the task's file is smaller by once it is sealed.
    """

    task: str
    old_rank: int
    rank: int
    before: float
    after: float
    error: float
    saved_bytes: int

    def __str__(self) -> str:
        if self.rank == self.old_rank:
            return f"{self.task}: rank {self.rank} stays, loss {self.before:.3f}; a lower one would cost too much"
        return (
            f"{self.task}: rank {self.old_rank} -> {self.rank}, loss {self.before:.3f} -> {self.after:.3f} "
            f"(± {self.error:.3f}), {self.saved_bytes / 1e6:.1f} MB saved"
        )


class HFTTrimming:
    """The part of `HFTPreTrainedModel` that cuts nodes to the rank that they need."""

    @torch.inference_mode(False)
    @torch.no_grad()
    def trim(
        self,
        task: str,
        validation: Iterable[Mapping[str, Sequence[int]]],
        tolerance: float,
        batch_size: int = 8,
    ) -> HFTTrim:
        """Cuts an open task's node to the smallest rank whose loss on validation rows rises by no more than `tolerance`.

        At each linear the node's product B A keeps its largest singular directions (the best approximation of that rank,
        Eckart and Young 1936), as many at all linears: one rank a task, as config.json shows it and servers take it. It is
        found by bisection, one reading of the rows a try, each with the very numbers that sealing would leave. Gates and
        memory pages stay as they are; if no lower rank will do, so does the node, to the bit. `seal` calls this.

        A rise below half of its standard error counts as none. (Where no row gains, the mean rise is never below a whole
        one, so a cut that only harms, be it a single row, does not pass as noise.)

        Args:
            task: open, and no other task has learnt on top of it.
            validation: tokenised rows {"input_ids": [T], "labels": [T]}, -100 where there is no loss; two or more.
            tolerance: of the rise of the mean loss a row, in nats a token; 0 or more.
            batch_size: rows at once.

        Raises:
            ValueError: an unknown or sealed task, one that others have learnt on top of, fewer than two rows, or a tolerance
                below 0; a folded model; or within `activate`.
        """
        rows = list(validation)
        self._check_trim(task, rows, tolerance)
        old = best = {key: nodes.pair(task) for key, nodes in self.hft_nodes.items()}
        whole = {key: balanced(*pair)[:2] for key, pair in old.items()}
        old_rank = rank = self.config.task(task)["rank"]
        with frozen(self):
            try:
                before = after = self._losses_with(task, self._rounded(old), rows, batch_size)
                error, too_low = 0.0, 0
                while rank - too_low > 1:
                    middle = (rank + too_low) // 2
                    cut = self._rounded({key: (down[:middle], up[:, :middle]) for key, (down, up) in whole.items()})
                    losses = self._losses_with(task, cut, rows, batch_size)
                    rise, its_error = mean_and_error([new - old for new, old in zip(losses, before, strict=True)])
                    if rise <= max(tolerance, its_error / 2):
                        rank, best, after, error = middle, cut, losses, its_error
                    else:
                        too_low = middle
            except BaseException:
                best = old
                raise
            finally:
                self._put_node(task, best)
        for key, pair in best.items():
            for new, parameter in zip(pair, old[key], strict=True):
                new.requires_grad_(parameter.requires_grad)
        saved = (old_rank - rank) * numbers_a_rank(self.hft_nodes) * self.backbone.dtype.itemsize
        return HFTTrim(task, old_rank, rank, statistics.mean(before), statistics.mean(after), error, saved)

    def _trim_all(self, validation: Mapping[str, Sequence[Any]], tolerance: float) -> list[HFTTrim]:
        """A trim of each of these tasks by its rows, or of none if one of them fails."""
        before = {task: {key: nodes.pair(task) for key, nodes in self.hft_nodes.items()} for task in validation}
        try:
            return [self.trim(task, rows, tolerance) for task, rows in validation.items()]
        except BaseException:
            for task, pairs in before.items():
                self._put_node(task, pairs)
            raise

    def _check_trim(self, task: str, rows: Sequence[Any], tolerance: float) -> None:
        self._check_unfolded()
        self._check_inactive()
        if self.config.task(task)["sealed"]:
            raise ValueError(f"Task {task!r} is sealed and never changes; trim a task before it is sealed.")
        if not tolerance >= 0:
            raise ValueError(f"The tolerance is {tolerance}; it must be 0 nats a token or more.")
        if len(rows) < 2:
            raise ValueError(
                f"Trimming {task!r} is judged by validation rows, two or more, and there are {len(rows)}; give it some, or "
                "seal it without `rank_tolerance`."
            )
        for other in self.hierarchy.names:
            if other != task and task in self.sources(other).nodes and self._has_learnt(other):
                raise ValueError(
                    f"Task {other!r} has learnt on top of {task!r}, which can be trimmed only before that."
                )

    def _rounded(self, pairs: Mapping[str, Pair]) -> dict[str, Pair]:
        """The numbers that sealing leaves, as parameters of an open task."""
        return {
            key: tuple(nn.Parameter(factor.to(self.backbone.dtype).float().contiguous(), False) for factor in pair)
            for key, pair in pairs.items()
        }

    def _put_node(self, task: str, pairs: Mapping[str, Pair]) -> None:
        for key, (down_RI, up_OR) in pairs.items():
            self.hft_nodes[key].put(task, down_RI, up_OR)
            self.config.task(task)["rank"] = len(down_RI)

    def _losses_with(
        self, task: str, pairs: Mapping[str, Pair], rows: Sequence[Mapping[str, Sequence[int]]], batch_size: int
    ) -> list[float]:
        self._put_node(task, pairs)
        return self.losses(task, rows, batch_size)


def balanced(down_RI: torch.Tensor, up_OR: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same product up @ down from balanced factors U sqrt(S) and sqrt(S) V^T, strongest first.

    Their first k rows and columns are the product's best approximation of rank k. The O x I product is never formed: QR of
    both factors, then the SVD of an R x R core.

    Returns:
        down [R, I], up [O, R], float64, and the singular values S [R]; 0 beyond the rank that O and I allow. (Those of
        Apple's GPUs on the CPU.)
    """
    if up_OR.device.type == "mps":  # which has no float64
        down_RI, up_OR = down_RI.cpu(), up_OR.cpu()
    left_OR, core_up_RR = torch.linalg.qr(up_OR.double())
    right_IR, core_down_RR = torch.linalg.qr(down_RI.double().T)
    U_RR, S_R, Vh_RR = torch.linalg.svd(core_up_RR @ core_down_RR.T, full_matrices=False)
    root_R, missing = S_R.sqrt(), len(down_RI) - len(S_R)
    down = root_R[:, None] * (Vh_RR @ right_IR.T)
    up = (left_OR @ U_RR) * root_R
    return F.pad(down, (0, 0, 0, missing)), F.pad(up, (0, missing)), F.pad(S_R, (0, missing))
