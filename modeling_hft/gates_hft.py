"""The gates: how much of each node flows into a task, layer by layer.

B batch, L layers, N nodes on a path.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from transformers import initialization as init

from .hierarchy_hft import Hierarchy


class HFTGates(nn.Module):
    """One learnt number a (task, node, layer), in float32: how much of the node the task lets in at that layer.

    Unlike the gates of a mixture of experts, they do not depend on the input: a task's path stays one plain LoRA.

    Args:
        num_layers: L.
        start: a task's gate on its own node at the start.
    """

    def __init__(self, num_layers: int, start: float):
        super().__init__()
        self.num_layers = num_layers
        self.start = start

    def add(self, task: str, num_nodes: int, device: torch.device | None = None) -> None:
        """Makes room for a task's gates [L, N]. `reset_parameters` fills it."""
        gates_LN = torch.empty(self.num_layers, num_nodes, dtype=torch.float32, device=device)
        self.register_parameter(f"g_{task}", nn.Parameter(gates_LN))  # a prefix: a task may be called "forward"

    def of(self, task: str) -> nn.Parameter:
        """A task's gates [L, N], in the order of its path."""
        return self._parameters[f"g_{task}"]

    def tasks(self) -> list[str]:
        """The names of the tasks that have gates."""
        return [name.removeprefix("g_") for name in self._parameters]

    def reset_parameters(self, task: str, hierarchy: Hierarchy) -> None:
        """The child starts as its parent: the mean of its parents' gates, and `start` on its own node, still silent."""
        path = hierarchy.path(task)
        parents = hierarchy.parents(task)
        start_LN = self.of(task).new_zeros(self.num_layers, len(path))
        start_LN[:, -1] = self.start
        for parent in parents:
            for column, node in enumerate(hierarchy.path(parent)):
                start_LN[:, path.index(node)] += self.of(parent)[:, column].detach().to(start_LN) / len(parents)
        init.copy_(self.of(task), start_LN)

    def of_rows(
        self, rows: Sequence[str | None], paths: Mapping[str, Sequence[str]]
    ) -> tuple[tuple[str, ...], torch.Tensor]:
        """The gates of a batch whose rows belong to different tasks.

        Args:
            rows: B names; None for the plain backbone.
            paths: the path of each task among them.

        Returns:
            The names of all nodes that any row needs, N of them; and the gates [B, L, N], zero for nodes off a row's path.
        """
        nodes = tuple(dict.fromkeys(node for row in rows if row is not None for node in paths[row]))
        tasks = tuple(dict.fromkeys(rows))
        anything = next(self.parameters())  # for device and dtype
        table_KLN = []
        for task in tasks:
            gates_LN = anything.new_zeros(self.num_layers, len(nodes))
            if task is not None:
                columns = torch.tensor([nodes.index(node) for node in paths[task]], device=anything.device)
                gates_LN = gates_LN.index_copy(1, columns, self.of(task))
            table_KLN.append(gates_LN)
        task_of_row_B = torch.tensor([tasks.index(row) for row in rows], device=anything.device)
        return nodes, torch.stack(table_KLN)[task_of_row_B]

    def extra_repr(self) -> str:
        return f"num_layers={self.num_layers}, tasks={self.tasks()}"
