"""The gates: how much of each node and each memory page flows into a task, layer by layer.

L layers, N sources that a task reads: nodes, then pages.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init

from .nodes_hft import never_rounding
from .path_hft import HFTSources


class HFTGates(nn.Module):
    """One learnt number a (task, source, layer), in float32: how much of a node or page the task lets in at that layer.

    Unlike the gates of a mixture of experts, they do not depend on the input: a task's path stays one plain LoRA. While a
    task learns, so do its gates on what it inherits; those on its own node and its own stage's page stay as they are.

    Args:
        num_layers: L.
        start: a task's gate on its own node.
        page_start: on its own stage's page.
        root_page_start: a root's, on pages that were there before it.
    """

    def __init__(self, num_layers: int, start: float, page_start: float, root_page_start: float):
        super().__init__()
        self.num_layers = num_layers
        self.start = start
        self.page_start = page_start
        self.root_page_start = root_page_start

    def add(self, task: str, num_sources: int, device: torch.device | None = None) -> None:
        """Makes room for a task's gates [L, N]. `reset_parameters` fills it."""
        gates_LN = torch.empty(self.num_layers, num_sources, dtype=torch.float32, device=device)
        self.register_parameter(f"g_{task}", nn.Parameter(gates_LN))  # a prefix: a task may be called "forward"

    def remove(self, task: str) -> None:
        """Lets go of a task's gates."""
        del self._parameters[f"g_{task}"]

    def of(self, task: str) -> nn.Parameter:
        """A task's gates [L, N]."""
        return self._parameters[f"g_{task}"]

    def tasks(self) -> list[str]:
        """The names of the tasks that have gates."""
        return [name.removeprefix("g_") for name in self._parameters]

    def reset_parameters(
        self, task: str, sources: Mapping[str, HFTSources], parents: Sequence[str], silent_pages: Sequence[str]
    ) -> None:
        """The child starts as its parent: the mean of its parents' gates.

        On its own node, which is silent at first, it starts at `start`; on its own stage's page, and others that are silent,
        at `page_start`; on pages that others wrote, a root at `root_page_start`, and a child, whose parents do not read
        them, at 0.

        Args:
            task: whose gates.
            sources: what the task and its parents read.
            parents: of the task.
            silent_pages: those that nobody has written yet, and the one that the task itself writes.
        """
        own = sources[task]
        start_LN = self.of(task).new_zeros(self.num_layers, len(own))
        start_LN[:, own.nodes.index(task)] = self.start
        for column, page in enumerate(own.pages, start=len(own.nodes)):
            if page in silent_pages:
                start_LN[:, column] = self.page_start
            elif not parents:
                start_LN[:, column] = self.root_page_start
        labels = own.labels()
        for parent in parents:
            for column, label in enumerate(sources[parent].labels()):
                if label not in labels:
                    continue  # the parent has come to read it in a refresh, when the child was there
                start_LN[:, labels.index(label)] += self.of(parent)[:, column].detach().to(start_LN) / len(parents)
        init.copy_(self.of(task), start_LN)

    @torch.no_grad()
    def shrink(self, task: str, columns: Sequence[int], amount: float) -> None:
        """Soft thresholding, the proximal step of an L1 penalty: draws some of a task's gates towards 0, and stops there."""
        gates_LN = self.of(task)
        chosen_LM = gates_LN[:, list(columns)]
        gates_LN[:, list(columns)] = chosen_LM.sign() * (chosen_LM.abs() - amount).clamp(min=0)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True):
        return super()._apply(never_rounding(fn), recurse)

    def extra_repr(self) -> str:
        return f"num_layers={self.num_layers}, tasks={self.tasks()}"


@dataclass(frozen=True)
class HFTGateTable:
    """A task's gates, to be read: `print(model.gates("yelp"))`.

    Args:
        task: whose they are.
        sources: the N names: of nodes, and `page:<id>`.
        values: [L, N], float32, a copy.
    """

    task: str
    sources: tuple[str, ...]
    values: torch.Tensor

    def mean(self) -> dict[str, float]:
        """The mean of the absolute gates over all layers, for each source; 0.0 if the task lets nothing of it in."""
        return dict(zip(self.sources, self.values.abs().mean(0).tolist(), strict=True))

    def __str__(self) -> str:
        width = max(8, *(len(source) for source in self.sources))
        rows = [("layer", self.sources)]
        rows += [(str(layer), [f"{g:.3f}" for g in row]) for layer, row in enumerate(self.values.tolist())]
        rows += [("mean |g|", [f"{g:.3f}" for g in self.mean().values()])]
        lines = ["  ".join([head.rjust(8), *(cell.rjust(width) for cell in cells)]) for head, cells in rows]
        return f"Gates of {self.task}\n" + "\n".join(lines)
