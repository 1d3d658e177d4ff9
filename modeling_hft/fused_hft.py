"""What the active path adds to one linear: its nodes and memory pages, fused into one pair of matrix products.

B batch, T tokens, I/O in and out features, R rank of a whole path: the sum over its nodes and pages; K different tasks.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad

from .memory_hft import HFTMemory
from .nodes_hft import HFTNodes
from .path_hft import HFTOwner, HFTPath, HFTTaskPath, Pair, active_path


class HFTFused:
    """Beside one frozen linear: y = W x + sum over the path's sources s of g_s * up_s (down_s x).

    A source is a node (up B, down A) or a memory page (up V, down K). Where nothing is trained, a task's concatenated and
    scaled factors are kept until one of them changes: see `HFTKept`.

    Args:
        name: the linear's name within the decoder.
        nodes: the nodes beside the linear.
        memory: the pages beside it; None if this linear carries none.
        owner: the model's, as of its paths; a path of another model that is active around a pass adds nothing here.
    """

    def __init__(self, name: str, nodes: HFTNodes, memory: HFTMemory | None, owner: HFTOwner):
        self.name = name
        self.owner = owner
        self.nodes = nodes
        self.memory = memory
        self._stack: tuple[list[Pair], Pair] | None = None  # of a mixed batch: what it was made of, and the result

    def __getstate__(self) -> dict[str, Any]:
        """A copy has parameters of its own, and begins anew."""
        return {**vars(self), "_stack": None}

    def forget(self) -> None:
        """Frees what was made for the last mixed batch."""
        self._stack = None

    def on_linear(self, linear: nn.Module, args: tuple[torch.Tensor, ...], y_BTO: torch.Tensor) -> torch.Tensor | None:
        """The forward hook on the linear: adds the active path, or leaves the output as it is, bit for bit."""
        path = active_path(self.owner)
        if path is None or not path.tasks:
            return None
        return y_BTO + self.added(args[0], path).to(device=y_BTO.device, dtype=y_BTO.dtype)

    def added(self, x_BTI: torch.Tensor, path: HFTPath) -> torch.Tensor:
        """What the path adds to the linear's output.

        Args:
            x_BTI: the linear's input; any leading axes if the whole batch is on one path.
            path: the sources to read and their gates.

        Returns:
            Tensor [B, T, O] in the input's dtype: (x A^T) (g B)^T.
        """
        if path.task_of_row_B is None:
            (task,) = path.tasks
            if task.kept is None and torch.is_grad_enabled() and not _is_traced():
                factors = [factor for pair in self._pairs(task) for factor in pair]
                return _PathProduct.apply(x_BTI, task.gates, task, self.nodes.layer, self.memory is not None, *factors)
            if task.wide is not None and _are_few_on_cpu(x_BTI):
                down_RI, up_OR = self._wide_factors(task, task.wide, x_BTI)
                return F.linear(F.linear(x_BTI.float(), down_RI), up_OR).to(x_BTI.dtype)
            down_RI, up_OR = self.factors(task, x_BTI)
            return F.linear(F.linear(x_BTI, down_RI), up_OR)
        # A path a row: each row meets the factors of its own task only. Some decoders flatten rows and tokens into one axis.
        if x_BTI.ndim == 3 and len(x_BTI) > 1:
            path.check(len(x_BTI))
        rows_BTI = x_BTI.reshape(len(path.task_of_row_B), -1, x_BTI.shape[-1])
        if path.wide_stacks is not None and _are_few_on_cpu(x_BTI):
            rows_BTI = rows_BTI.float()
            if self.name not in path.wide_stacks:
                path.wide_stacks[self.name] = _widened(_stack([self.factors(task, x_BTI) for task in path.tasks]))
            down_BRI, up_BOR = path.wide_stacks[self.name]
        else:
            down_BRI, up_BOR = self._stacked([self.factors(task, x_BTI) for task in path.tasks])
        if path.in_order:
            down_BRI, up_BOR = down_BRI[: len(rows_BTI)], up_BOR[: len(rows_BTI)]
        else:
            rows_B = path.task_of_row_B.to(x_BTI.device)
            down_BRI, up_BOR = down_BRI[rows_B], up_BOR[rows_B]
        added_BTO = (rows_BTI @ down_BRI.mT) @ up_BOR.mT
        return added_BTO.reshape(*x_BTI.shape[:-1], -1).to(x_BTI.dtype)

    def _stacked(self, pairs: list[Pair]) -> Pair:
        """As `_stack`; the last one is kept for the next pass, which is often one with the same tasks."""
        kept = self._stack  # once: another thread may put its own there meanwhile
        if kept is not None and len(kept[0]) == len(pairs):
            both = zip(kept[0], pairs, strict=True)
            if all(a is b for one, other in both for a, b in zip(one, other, strict=True)):
                return kept[1]
        stack = _stack(pairs)
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._stack = (pairs, stack)
        return stack

    def factors(self, task: HFTTaskPath, like: torch.Tensor) -> Pair:
        """A task's path as one pair: down [R, I] and up [O, R], gates multiplied in, in dtype and on the device of `like`.

        These are the factors of an exported LoRA, to the bit.
        """
        if task.kept is None:
            return self._fuse(task, like)
        pair = task.kept.get(self.name)
        if pair is not None and torch.compiler.is_compiling():
            return pair[0].to(like), pair[1].to(like)  # to make it again, a graph would have to know the task
        if pair is None:
            task.kept[self.name] = self._fuse(task, like)
        elif pair[1].dtype != like.dtype or pair[1].device != like.device:  # `down` may be a parameter itself
            has_graph = any(factor.requires_grad for factor in pair)  # as it was made, it is made again
            with torch.inference_mode(False), torch.set_grad_enabled(has_graph):
                task.kept[self.name] = self._fuse(task, like)
        return task.kept[self.name]

    def _wide_factors(self, task: HFTTaskPath, wide: dict[str, Pair], like: torch.Tensor) -> Pair:
        """The same numbers in float32, as many bytes again twice; they go when the last token has come."""
        if self.name not in wide:
            wide[self.name] = _widened(self.factors(task, like))
        return wide[self.name]

    def _fuse(self, task: HFTTaskPath, like: torch.Tensor) -> Pair:
        down_RI, up_OR = _concatenated(self._pairs(task), like)
        g_R = task.column_gates(self.nodes.layer, self.memory is not None).to(like.device)
        return down_RI, (up_OR * g_R).to(like.dtype)

    def _pairs(self, task: HFTTaskPath) -> list[Pair]:
        """The factors of all sources: nodes first."""
        pairs = [self.nodes.pair(node) for node in task.sources.nodes]
        if self.memory is not None:
            pairs += [self.memory.pair(page) for page in task.sources.pages]
        return pairs


def _stack(pairs: list[Pair]) -> Pair:
    """The factors of K tasks, padded to one rank: [K + 1, R, I] and [K + 1, O, R]; last the backbone's, which are 0."""
    rank = max(len(down_RI) for down_RI, _ in pairs)
    downs, ups = zip(*(padded(pair, rank) for pair in pairs), strict=True)
    return torch.stack([*downs, torch.zeros_like(downs[0])]), torch.stack([*ups, torch.zeros_like(ups[0])])


def padded(pair: Pair, rank: int) -> Pair:
    """Factors [R, I] and [O, R] with zeros up to a larger rank: they compute the same."""
    down_RI, up_OR = pair
    return F.pad(down_RI, (0, 0, 0, rank - len(down_RI))), F.pad(up_OR, (0, rank - up_OR.shape[1]))


def _widened(pair: Pair) -> Pair:
    """The same numbers in float32, for few tokens: row by row in memory, in the order in which one token adds them up.

    So `up` lies transposed: its rows have R numbers only, and products of that length cost a CPU a quarter more.
    """
    down, up = pair
    return down.float(), up.float().mT.contiguous().mT


def _are_few_on_cpu(x_BTI: torch.Tensor) -> bool:
    """Whether a pass has so few tokens, up to 4 a row and 16 in all, that a CPU had better multiply them in float32.

    One token is faster so, eight are as fast, 16 up to a tenth slower. It holds whatever the tasks of the rows are: a row's
    tokens must not depend on its neighbours' tasks.
    """
    few = x_BTI.ndim == 3 and x_BTI.shape[1] <= 4 and x_BTI.numel() <= 16 * x_BTI.shape[-1]
    return few and x_BTI.device.type == "cpu" and x_BTI.dtype in (torch.bfloat16, torch.float16)


def _concatenated(pairs: Sequence[Pair], like: torch.Tensor) -> Pair:
    """Sources as one pair: down [R, I] and up [O, R], in the dtype and on the device of `like`."""
    if pairs[0][0].is_meta and not like.is_meta:
        raise ValueError(
            "What HFT owns (hft_nodes, hft_memory, hft_gates) was offloaded, and nothing brings it back in time; offload "
            "parts of `model.backbone` instead."
        )
    downs, ups = ([factor.to(like) for factor in factors] for factors in zip(*pairs, strict=True))
    return (downs[0], ups[0]) if len(pairs) == 1 else (torch.cat(downs), torch.cat(ups, dim=1))


def _is_traced() -> bool:
    """Whether something that needs plain operations looks at a pass: a compiler, a tracer, `torch.func`, forward-mode AD."""
    is_compiled = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return is_compiled or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


class _PathProduct(torch.autograd.Function):
    """(x A^T) (g B)^T, the very sums of an evaluation pass, with a backward pass that leaves out what does not train.

    Autograd by itself would compute the gradients of all concatenated factors, those of sealed ancestors and pages among
    them, which on a long path are most of it, and drop them. A gate needs no factor's gradient: its own is a sum over the
    rank axis. Factors that train and lie side by side get their gradients by one product. Where gradients are to be
    differentiated again (`create_graph`), autograd does all of it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_BTI: torch.Tensor,
        gates_LN: torch.Tensor,
        task: HFTTaskPath,
        layer: int,
        with_pages: bool,
        *factors: torch.Tensor,
    ) -> torch.Tensor:
        """`gates_LN`: the task's, for autograd to see; `factors`: down and up of each source, one after another."""
        down_RI, up_OR = _concatenated(list(zip(factors[::2], factors[1::2], strict=True)), x_BTI)
        g_R = task.column_gates(layer, with_pages).to(x_BTI.device)
        scaled_OR = torch.mul(up_OR, g_R, out=torch.empty_like(up_OR))
        h_BTR = F.linear(x_BTI, down_RI)
        made = (h_BTR, g_R, down_RI, up_OR if ctx.needs_input_grad[1] else scaled_OR)
        ctx.save_for_backward(*made, x_BTI, gates_LN, *factors)
        ctx.task, ctx.layer, ctx.with_pages = task, layer, with_pages
        ctx.ranks = [len(down) for down in factors[::2]]
        ctx.dtypes = [factor.dtype for factor in factors]
        return F.linear(h_BTR, scaled_OR)

    @staticmethod
    def backward(ctx: Any, dy_BTO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        h_BTR, g_R, down_RI, up_OR, x_BTI, gates_LN, *factors = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _differentiable_gradients(ctx, dy_BTO, x_BTI, gates_LN, factors)
        needs_x, needs_gates, _, _, _, *needs = ctx.needs_input_grad
        dy_NO = dy_BTO.reshape(-1, dy_BTO.shape[-1])  # N: all leading axes
        x_NI, h_NR = (saved.reshape(-1, saved.shape[-1]).to(dy_NO.dtype) for saved in (x_BTI, h_BTR))
        dh_NR, dgates_LN = dy_NO @ up_OR.to(dy_NO.dtype), None
        if needs_gates:
            dgates_LN = torch.zeros_like(ctx.task.gates)
            dg_R = (dh_NR.to(g_R.dtype) * h_NR).sum(0).to(dgates_LN.device)
            learns_RN = ctx.task.learns_RN[ctx.task.columns(ctx.with_pages)]
            dgates_LN[ctx.layer] = (dg_R[:, None] * learns_RN).sum(0)
            dh_NR = torch.mul(dh_NR, g_R, out=torch.empty_like(dh_NR))
        dx_BTI = (dh_NR @ down_RI.to(dy_NO.dtype)).to(x_BTI.dtype).view_as(x_BTI) if needs_x else None
        gradients: list[torch.Tensor | None] = [None] * len(needs)
        # Parts of one tensor, which autograd may keep as gradients: they share its memory.
        for sources, columns in _runs(needs[::2], ctx.ranks, ctx.dtypes[::2]):
            ddown_RI = (dh_NR[:, columns].T @ x_NI).to(ctx.dtypes[2 * sources[0]])
            for source, part_RI in zip(sources, ddown_RI.split([ctx.ranks[i] for i in sources]), strict=True):
                gradients[2 * source] = part_RI
        for sources, columns in _runs(needs[1::2], ctx.ranks, ctx.dtypes[1::2]):
            dup_OR = (dy_NO.T @ h_NR[:, columns]) * g_R[columns]
            for source, part_OR in zip(sources, dup_OR.split([ctx.ranks[i] for i in sources], dim=1), strict=True):
                gradients[2 * source + 1] = part_OR.to(ctx.dtypes[2 * source + 1])
        return dx_BTI, dgates_LN, None, None, None, *gradients


def _differentiable_gradients(
    ctx: Any, dy_BTO: torch.Tensor, x_BTI: torch.Tensor, gates_LN: torch.Tensor, factors: Sequence[torch.Tensor]
) -> tuple[torch.Tensor | None, ...]:
    """What `_PathProduct.backward` gives, as a function of all that it depends on."""
    # As views: the gates of earlier layers are the same tensor, which `x` depends on, too.
    x_BTI, gates_LN, *factors = (given.view_as(given) for given in (x_BTI, gates_LN, *factors))
    task = replace(ctx.task, gates=gates_LN)
    down_RI, up_OR = _concatenated(list(zip(factors[::2], factors[1::2], strict=True)), x_BTI)
    g_R = task.column_gates(ctx.layer, ctx.with_pages).to(x_BTI.device)
    y_BTO = F.linear(F.linear(x_BTI, down_RI), (up_OR * g_R).to(x_BTI.dtype))
    inputs = [x_BTI, gates_LN, None, None, None, *factors]
    places = [place for place, is_needed in enumerate(ctx.needs_input_grad) if is_needed]
    found = torch.autograd.grad(y_BTO, [inputs[place] for place in places], dy_BTO, create_graph=True)
    gradients = dict(zip(places, found, strict=True))
    return tuple(gradients.get(place) for place in range(len(inputs)))


def _runs(needs: Sequence[bool], ranks: Sequence[int], dtypes: Sequence[torch.dtype]) -> list[tuple[list[int], slice]]:
    """The sources that are needed, in runs of one dtype that lie side by side: their places, and their columns."""
    runs: list[tuple[list[int], slice]] = []
    begin = 0
    for source, (is_needed, rank) in enumerate(zip(needs, ranks, strict=True)):
        end = begin + rank
        if is_needed and runs and runs[-1][1].stop == begin and dtypes[source] == dtypes[source - 1]:
            runs[-1] = ([*runs[-1][0], source], slice(runs[-1][1].start, end))
        elif is_needed:
            runs.append(([source], slice(begin, end)))
        begin = end
    return runs
