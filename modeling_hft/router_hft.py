"""The router: which task is this prompt? Closed form on features of the frozen backbone; nothing is trained.

B batch, T tokens, D hidden size, M random features, K tasks.
"""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from .configuration_hft import HFTRouterConfig
from .hierarchy_hft import BACKBONE, Hierarchy


@dataclass(frozen=True)
class HFTRoute:
    """Where a prompt goes, and why.

    Args:
        task: the task that answers, or `"backbone"`.
        names: the K tasks whose prompts the router tells apart, removed ones included; none if it was not asked.
        probabilities: of each of them, given that the prompt is one of theirs.
        novelty: how far the prompt is from all that the router has seen; above 1 the backbone answers. 0 if it was not
            asked, infinite if it knows no task.
        reason: in words.
    """

    task: str
    names: tuple[str, ...]
    probabilities: tuple[float, ...]
    novelty: float
    reason: str


class HFTRouter:
    """Ridge regression from random features of a prompt to its task, from sums that tasks only add to.

    With phi [M] the features of a prompt and y [K] the one-hot task, W = (G + r I)^-1 C with G = sum phi phi^T and
    C = sum phi y^T, in float64, and r = `ridge` times the mean of G's diagonal. Adding a task adds its sums, so neither the
    order of tasks nor whether they came at once matters, and nothing is forgotten (as in RanPAC, McDonnell et al. 2023,
    https://arxiv.org/abs/2307.02251, and analytic class-incremental learning, Zhuang et al. 2022,
    https://arxiv.org/abs/2205.14922). phi = relu(f P), with a fixed random P and f the normalised mean of the hidden states
    over the prompt's own tokens.

    A prompt unlike all that was seen is told by its leverage phi^T (G + r I)^-1 phi, the variance of the ridge
    prediction, relative to that of held-out prompts of the tasks.

    A task that is removed leaves its column of C: G has its prompts for good (a G of each task's own would be 4 MB a task),
    so they stay familiar, and without the column they would be taken for the likeliest other task's.

    Args:
        config: M, the penalty, and how sure is sure enough; its `tasks` are the router's own record, at first empty.
        hidden_size: D.
        num_layers: of the backbone.

    Raises:
        ValueError: a layer that the backbone lacks.
    """

    def __init__(self, config: HFTRouterConfig, hidden_size: int, num_layers: int):
        self.config = config
        self.hidden_size = hidden_size
        self.layer = max(1, num_layers // 8) if config.layer is None else config.layer
        if self.layer >= num_layers and num_layers > 1:
            raise ValueError(
                f"`layer` of the router is {self.layer}, of {num_layers} that the backbone has; give 1 to {num_layers - 1}."
            )
        self.layer = min(self.layer, num_layers - 1)
        config.tasks = []  # those of a saved model come with their sums, by `load`
        self.cross_M: dict[str, torch.Tensor] = {}  # task, which may have been removed -> its column of C
        self.held_out_ND: dict[str, torch.Tensor] = {}  # task -> features to calibrate on
        self._solved: _Solution | None = None

    # Made when they are first needed: while transformers builds a model, every new tensor is an empty one.
    @functools.cached_property
    def projection_DM(self) -> torch.Tensor:
        """P, float16. It is kept in the file: a generator's numbers may change with torch."""
        shape, generator = (self.hidden_size, self.config.num_features), torch.Generator().manual_seed(0)
        return (torch.randn(shape, generator=generator, device="cpu") / math.sqrt(self.hidden_size)).half()

    @functools.cached_property
    def gram_MM(self) -> torch.Tensor:
        """G, float64."""
        return torch.zeros(self.config.num_features, self.config.num_features, dtype=torch.float64, device="cpu")

    def tasks(self) -> tuple[str, ...]:
        """The tasks that the router knows by their prompts; in doubt, prompts go to what several of them stand on."""
        return tuple(self.config.tasks)

    def names(self) -> tuple[str, ...]:
        """The K tasks whose prompts it tells apart: `tasks` and those that were removed."""
        return tuple(sorted(self.cross_M))

    def expand(self, f_BD: torch.Tensor) -> torch.Tensor:
        """phi: [B, D] -> [B, M], float64."""
        return (self._normalised(f_BD) @ self.projection_DM.double()).relu()

    def _normalised(self, f_BD: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.layer_norm(f_BD.cpu().double(), (self.hidden_size,))

    def add(self, task: str, f_BD: torch.Tensor, held_out_ND: torch.Tensor) -> None:
        """Adds a task's sums; more prompts of a task that is known add to its own.

        So do prompts of a task that was removed and is there again: they are mostly the same, and were the old ones
        nobody's, they would halve its scores.

        Args:
            task: its name.
            f_BD: features of prompts.
            held_out_ND: features of other prompts of the task, to calibrate on; kept normalised, at most 64 of them.

        Raises:
            ValueError: no prompts, or features that are not finite; then nothing has changed.
        """
        if not len(f_BD) or not len(held_out_ND):
            raise ValueError(f"The router got no prompts of task {task!r}; give two or more.")
        if not (f_BD.isfinite().all() and held_out_ND.isfinite().all()):
            raise ValueError(
                f"Hidden states of prompts of task {task!r} are not finite; the router learns nothing of them."
            )
        phi_BM = self.expand(f_BD)
        self.cross_M[task] = self.cross_M.get(task, 0) + phi_BM.sum(0)
        held_out_ND = self._normalised(held_out_ND).half()  # as they are, some models' would overflow
        before = self.held_out_ND.get(task, held_out_ND[:0])
        self.held_out_ND[task] = torch.cat([before, held_out_ND])[:64]
        self.config.tasks = sorted({*self.tasks(), task})
        # Last: by it, a thread that solves meanwhile sees that it was late.
        self.gram_MM = self.gram_MM + phi_BM.T @ phi_BM
        self._solved = None

    def clear(self) -> None:
        """Forgets all tasks and what their prompts added."""
        self.cross_M, self.held_out_ND, self.config.tasks, self._solved = {}, {}, [], None
        self.gram_MM = torch.zeros_like(self.gram_MM)

    def remove(self, task: str) -> None:
        """From here on a task's prompts go to the backbone. With the last task all that was learnt goes."""
        if task in self.tasks():
            self.config.tasks = [other for other in self.tasks() if other != task]
            if not self.tasks():
                self.clear()

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that it knows, by the names that a file has: a contract."""
        return {
            "projection": self.projection_DM,
            "gram": self.gram_MM[tuple(self._triangle())],  # it is symmetric
            **{f"cross.{task}": cross_M for task, cross_M in self.cross_M.items()},
            **{f"held_out.{task}": held_out_ND for task, held_out_ND in self.held_out_ND.items()},
        }

    def load(self, tensors: Mapping[str, torch.Tensor], tasks: Iterable[str]) -> None:
        """Takes over what `tensors` gave.

        Args:
            tensors: of these tasks, and of those that were removed.
            tasks: those that are there.

        Raises:
            ValueError: as `check`.
        """
        self.check(tensors)
        self.projection_DM = tensors["projection"]
        row, column = self._triangle()
        self.gram_MM[row, column] = self.gram_MM[column, row] = tensors["gram"]
        names = [key.removeprefix("cross.") for key in tensors if key.startswith("cross.")]
        self.cross_M = {name: tensors[f"cross.{name}"] for name in names}
        self.held_out_ND = {name: tensors[f"held_out.{name}"] for name in names}
        self.config.tasks = sorted(tasks)
        self._solved = None

    def check(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Raises ValueError if `tensors` are those of a router with features of another size."""
        if tensors["projection"].shape != self.projection_DM.shape:
            raise ValueError(
                f"The router's file is for features {list(tensors['projection'].shape)}, and this model has "
                f"{list(self.projection_DM.shape)}. Is it another backbone?"
            )

    def _triangle(self) -> torch.Tensor:
        return torch.tril_indices(self.config.num_features, self.config.num_features, device="cpu")

    def route(self, f_BD: torch.Tensor, hierarchy: Hierarchy) -> list[HFTRoute]:
        """Where each prompt goes.

        A prompt that is farther from all that was seen than held-out prompts are, those of its likeliest task, too, goes to
        the backbone. Else to the likeliest
        task, if that one is likely enough and no other as likely; else to the lowest task on the paths of all leading
        candidates; else to the backbone, which also answers where a leading candidate was removed.

        Args:
            f_BD: features of prompts; NaN for a prompt of nothing but padding.
            hierarchy: of the tasks.
        """
        if not self.tasks():
            return [HFTRoute(BACKBONE, (), (), math.inf, "the router knows no task")] * len(f_BD)
        if not (finite_B := f_BD.isfinite().all(1)).all():
            routes = iter(self.route(f_BD[finite_B], hierarchy))
            empty, broken = (
                HFTRoute(BACKBONE, (), (), math.inf, reason)
                for reason in ("the prompt is empty", "the prompt's hidden states are not finite")
            )
            return [next(routes) if f_D.isfinite().all() else empty if f_D.isnan().all() else broken for f_D in f_BD]
        solved = self._solve()
        names = solved.names
        phi_BM = self.expand(f_BD)
        score_BK = solved.scores(phi_BM)
        novelty_B = solved.leverage(phi_BM) / solved.most_leverage_K[score_BK.argmax(-1)]
        routes = []
        for probability_K, novelty in zip((score_BK / solved.temperature).softmax(-1), novelty_B, strict=True):
            leading = [names[k] for k in self._leading(probability_K)]
            removed = set(leading) - {*self.tasks()}
            if novelty > 1:
                task, reason = BACKBONE, "unlike all prompts that the router has seen"
            elif len(leading) > 1:
                task = None if removed else hierarchy.lowest_common_ancestor(leading)
                reason = f"not sure between {', '.join(leading)}"
            elif removed:
                task, reason = BACKBONE, f"it belongs to {leading[0]}, which was removed"
            else:
                task, reason = leading[0], f"probability {float(probability_K.max()):.2f}"
            routes.append(HFTRoute(task or BACKBONE, names, tuple(probability_K.tolist()), float(novelty), reason))
        return routes

    def _leading(self, probability_K: torch.Tensor) -> list[int]:
        """The places of the likeliest tasks that are likely enough together, and of those that tie with the last of them."""
        sorted_K, order_K = probability_K.sort(descending=True)
        last = int((sorted_K.cumsum(0) < self.config.confidence).sum())
        least = sorted_K[min(last, len(sorted_K) - 1)] - 1e-4  # no probability is known better than that
        return order_K[sorted_K >= least].tolist()

    def _solve(self) -> "_Solution":
        """The solution of all that was added so far; solved anew after something was added, or with another `ridge`."""
        solved, ridge, gram_MM, held_out_ND = self._solved, self.config.ridge, self.gram_MM, dict(self.held_out_ND)
        if solved is not None and solved.ridge == ridge:
            return solved
        scale = gram_MM.diagonal().mean().clamp(min=1e-12)
        regular_MM = gram_MM + ridge * scale * torch.eye(len(gram_MM), dtype=torch.float64, device="cpu")
        factor_MM, names = torch.linalg.cholesky(regular_MM), tuple(sorted(held_out_ND))
        cross_MK = torch.stack([self.cross_M[name] for name in names], 1)
        solved = _Solution(names, ridge, factor_MM, torch.cholesky_solve(cross_MK, factor_MM))
        self._calibrate(solved, [held_out_ND[name] for name in names])
        if self.gram_MM is gram_MM:  # else another thread has added meanwhile
            self._solved = solved
        return solved

    def _calibrate(self, solved: "_Solution", held_out: Sequence[torch.Tensor]) -> None:
        """Sets temperature and thresholds on the held-out prompts of all tasks."""
        phi_NM = torch.cat([self.expand(its_ND.double()) for its_ND in held_out])
        counts = torch.tensor([len(its_ND) for its_ND in held_out], device="cpu")
        label_N = torch.arange(len(counts), device="cpu").repeat_interleave(counts)
        score_NK = solved.scores(phi_NM)
        grid = [2.0**-power for power in range(8)]
        losses = [float(torch.nn.functional.cross_entropy(score_NK / t, label_N)) for t in grid]
        solved.temperature = grid[losses.index(min(losses))]
        # Few prompts of a task are farther from all that was seen than many are: each has its own limit, too.
        leverage_N = solved.leverage(phi_NM)
        of_all, of_each = leverage_N.quantile(0.98), leverage_N.split(counts.tolist())
        limits = [torch.maximum(of_all, its_N.quantile(0.98)) if len(its_N) else of_all for its_N in of_each]
        solved.most_leverage_K = 1.1 * torch.stack(limits)


@dataclass
class _Solution:
    """What routes go by.

    Args:
        names: the K tasks.
        ridge: that of the config.
        factor_MM: the Cholesky factor of G + r I.
        weights_MK: W.
        temperature: of the probabilities.
        most_leverage_K: of prompts that are like those of a task.
    """

    names: tuple[str, ...]
    ridge: float
    factor_MM: torch.Tensor
    weights_MK: torch.Tensor
    temperature: float = 1.0
    most_leverage_K: torch.Tensor = field(default_factory=lambda: torch.full((1,), math.inf, device="cpu"))

    def scores(self, phi_BM: torch.Tensor) -> torch.Tensor:
        return phi_BM @ self.weights_MK

    def leverage(self, phi_BM: torch.Tensor) -> torch.Tensor:
        half_MB = torch.linalg.solve_triangular(self.factor_MM, phi_BM.T, upper=False)
        return half_MB.square().sum(0)
