"""What the active path adds to one linear: its nodes and memory pages, fused into one pair of matrix products.

B batch, T tokens, I/O in and out features, R rank of a whole path: the sum over its nodes and pages; K different tasks.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_hft import HFTMemoryConfig
from .memory_hft import HFTMemory
from .nodes_hft import HFTNodes
from .path_hft import HFTPath, HFTTaskPath, Pair, active_path


class HFTFused:
    """Beside one frozen linear: y = W x + sum over the path's sources s of g_s * up_s (down_s x).

    A source is a node (up B, down A) or a memory page (up V, down K). Where nothing is trained, a task's concatenated and
    scaled factors are kept until one of them changes: see `HFTKept`.

    Args:
        name: the linear's name within the decoder.
        nodes: the nodes beside the linear.
        memory: the pages beside it; None if this linear carries none.
        config: how pages are read.
    """

    def __init__(self, name: str, nodes: HFTNodes, memory: HFTMemory | None, config: HFTMemoryConfig):
        self.name = name
        self.nodes = nodes
        self.memory = memory
        self.config = config
        self._stack: tuple[list[Pair], Pair] | None = None  # of a mixed batch: what it was made of, and the result

    def on_linear(self, linear: nn.Module, args: tuple[torch.Tensor, ...], y_BTO: torch.Tensor) -> torch.Tensor | None:
        """The forward hook on the linear: adds the active path, or leaves the output as it is, bit for bit."""
        path = active_path()
        if path is None:
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
            down_RI, up_OR = self.factors(task, x_BTI)
            return self._with_top(F.linear(F.linear(x_BTI, down_RI), up_OR), x_BTI, task)
        # A path a row: each row meets the factors of its own task only. Some decoders flatten rows and tokens into one axis.
        rows_BTI = x_BTI.reshape(len(path.task_of_row_B), -1, x_BTI.shape[-1])
        down_BRI, up_BOR = self._stacked([self.factors(task, x_BTI) for task in path.tasks])
        if path.in_order:
            down_BRI, up_BOR = down_BRI[: len(rows_BTI)], up_BOR[: len(rows_BTI)]
        else:
            rows_B = path.task_of_row_B.to(x_BTI.device)
            down_BRI, up_BOR = down_BRI[rows_B], up_BOR[rows_B]
        added_BTO = (rows_BTI @ down_BRI.mT) @ up_BOR.mT
        if self.memory is not None and self.config.read == "topk":
            for k, task in enumerate(path.tasks):
                is_its_B11 = (path.task_of_row_B.to(x_BTI.device) == k)[:, None, None]
                added_BTO = torch.where(is_its_B11, self._with_top(added_BTO, rows_BTI, task), added_BTO)
        return added_BTO.reshape(*x_BTI.shape[:-1], -1)

    def _stacked(self, pairs: list[Pair]) -> Pair:
        """The factors of K tasks, padded to one rank: [K + 1, R, I] and [K + 1, O, R]; last the backbone's, which are 0.

        The last stack is kept for the next pass: a batch is decoded many times with the same tasks.
        """
        if (
            self._stack is not None
            and len(self._stack[0]) == len(pairs)
            and all(
                a is b
                for one, other in zip(self._stack[0], pairs, strict=True)
                for a, b in zip(one, other, strict=True)
            )
        ):
            return self._stack[1]
        rank = max(len(down_RI) for down_RI, _ in pairs)
        downs, ups = zip(*(padded(pair, rank) for pair in pairs), strict=True)
        stack = (
            torch.stack([*downs, torch.zeros_like(downs[0])]),
            torch.stack([*ups, torch.zeros_like(ups[0])]),
        )
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
        if pair is None or pair[0].dtype != like.dtype or pair[0].device != like.device:
            pair = task.kept[self.name] = self._fuse(task, like)
        return pair

    def _fuse(self, task: HFTTaskPath, like: torch.Tensor) -> Pair:
        pairs = [self.nodes.pair(node) for node in task.sources.nodes]
        with_pages = self.memory is not None and self.config.read == "linear"
        if with_pages:
            pairs += [self.memory.pair(page) for page in task.sources.pages]
        down_RI = torch.cat([down for down, _ in pairs]).to(like)
        up_OR = torch.cat([up for _, up in pairs], dim=1).to(like.device)
        g_R = task.column_gates(self.nodes.layer, with_pages).to(like.device)
        return down_RI, (up_OR * g_R).to(like.dtype)

    def _with_top(self, added_BTO: torch.Tensor, x_BTI: torch.Tensor, task: HFTTaskPath) -> torch.Tensor:
        """Adds what a task reads sparsely from its pages, if that is how they are read."""
        if self.memory is None or self.config.read != "topk":
            return added_BTO
        gates_P = task.page_gates(self.nodes.layer).to(x_BTI.device)
        for page, g in zip(task.sources.pages, gates_P.unbind(), strict=True):
            read_BTO = self.memory.read_top(x_BTI, page, self.config.top_k)
            added_BTO = added_BTO + (read_BTO * g).to(added_BTO.dtype)
        return added_BTO


def padded(pair: Pair, rank: int) -> Pair:
    """Factors [R, I] and [O, R] with zeros up to a larger rank: they compute the same."""
    down_RI, up_OR = pair
    return F.pad(down_RI, (0, 0, 0, rank - len(down_RI))), F.pad(up_OR, (0, rank - up_OR.shape[1]))
