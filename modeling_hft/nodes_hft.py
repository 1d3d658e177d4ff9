"""The low-rank nodes of one linear layer.

B batch, T tokens, I/O in and out features, R rank (of the whole path: the sum over its nodes).
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from .hierarchy_hft import nearest
from .path_hft import HFTPath, active_path


class HFTNodes(nn.Module):
    """All tasks' nodes beside one frozen `nn.Linear`: y = W x + sum over the path's nodes n of g_n B_n A_n x.

    Unlike a LoRA layer, it does not wrap its linear but adds to its output through a forward hook, so the backbone's
    parameters keep their names; and a pass runs a *path* of several nodes, fused into one pair of matrix products.

    Args:
        in_features, out_features: I and O of the linear.
        layer: index of the decoder layer that the linear is in; picks the gates.
    """

    def __init__(self, in_features: int, out_features: int, layer: int):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.layer = layer

    def add(self, task: str, rank: int, dtype: torch.dtype, device: torch.device | None = None) -> None:
        """Makes room for a task's node: A [rank, I] and B [O, rank]. `reset_parameters` fills it."""
        A_RI = torch.empty(rank, self.in_features, dtype=dtype, device=device)
        B_OR = torch.empty(self.out_features, rank, dtype=dtype, device=device)
        self.register_parameter(f"A_{task}", nn.Parameter(A_RI))
        self.register_parameter(f"B_{task}", nn.Parameter(B_OR))

    def node(self, task: str) -> tuple[nn.Parameter, nn.Parameter]:
        """A task's A [R, I] and B [O, R]."""
        return self._parameters[f"A_{task}"], self._parameters[f"B_{task}"]

    def tasks(self) -> list[str]:
        """The names of the tasks that have a node here."""
        return [name.removeprefix("A_") for name in self._parameters if name.startswith("A_")]

    def reset_parameters(self, task: str) -> None:
        """A as in LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685): uniform, B zero, so the node starts silent."""
        A_RI, B_OR = self.node(task)
        init.kaiming_uniform_(A_RI, a=math.sqrt(5))
        init.zeros_(B_OR)

    def forward(self, x_BTI: torch.Tensor, path: HFTPath) -> torch.Tensor:
        """What the path adds to the linear's output.

        Args:
            x_BTI: the linear's input; any leading axes if the whole batch is on one path.
            path: the nodes to run and their gates.

        Returns:
            Tensor [B, T, O] in the input's dtype: (x A^T) (g B)^T.
        """
        A_RI = torch.cat([self._parameters[f"A_{task}"] for task in path.nodes]).to(x_BTI)
        B_OR = torch.cat([self._parameters[f"B_{task}"] for task in path.nodes], dim=1).to(x_BTI.device)
        g_R = path.gates_of(self.layer).to(x_BTI.device)
        if g_R.dim() == 1:  # one path for all rows: scaled factors are those of an exported LoRA, to the bit
            return F.linear(F.linear(x_BTI, A_RI), (B_OR * g_R).to(x_BTI.dtype))
        # A path a row: g is [B, R], zero for the nodes of other rows. Some decoders flatten rows and tokens into one axis.
        h_BTR = F.linear(x_BTI, A_RI)
        gated_BTR = (h_BTR.reshape(len(g_R), -1, h_BTR.shape[-1]) * g_R[:, None]).to(x_BTI.dtype)
        return F.linear(gated_BTR.reshape(h_BTR.shape), B_OR.to(x_BTI.dtype))

    def on_linear(self, linear: nn.Module, args: tuple[torch.Tensor, ...], y_BTO: torch.Tensor) -> torch.Tensor | None:
        """The forward hook on the linear: adds the active path, or leaves the output as it is, bit for bit."""
        path = active_path()
        if path is None:
            return None
        return y_BTO + self(args[0], path).to(device=y_BTO.device, dtype=y_BTO.dtype)

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, layer={self.layer}, tasks={self.tasks()}"


def adapted_linears(decoder: nn.Module, target_modules: str | Sequence[str]) -> dict[str, int]:
    """The linears of a decoder that carry nodes.

    Args:
        decoder: the stack of layers, without the head.
        target_modules: `"all-linear"`, or a list of the last names of linears.

    Returns:
        The name of each linear within the decoder -> the index of its layer.

    Raises:
        ValueError: if the decoder has no such linear.
    """
    layer_of = {}
    for name, module in decoder.named_modules():
        indices = [int(part) for part in name.split(".") if part.isdigit()]
        # A subclass with a forward of its own, such as a mixture's router, need not return a plain tensor.
        if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward and indices:
            layer_of[name] = indices[0]
    if not layer_of:
        kinds = sorted({type(module).__name__ for module in decoder.modules() if not list(module.children())})
        raise ValueError(
            f"{type(decoder).__name__} has no nn.Linear in its layers (only {', '.join(kinds)}), and HFT's nodes stand "
            "beside nn.Linear. Choose a backbone such as Llama, Qwen, Gemma, Mistral, Phi-3 or SmolLM."
        )
    if target_modules == "all-linear":
        return layer_of
    known = sorted({name.rsplit(".", 1)[-1] for name in layer_of})
    for target in [target_modules] if isinstance(target_modules, str) else target_modules:
        if target not in known:
            raise ValueError(f"`target_modules` names {target!r}, which this backbone lacks. {nearest(target, known)}")
    return {name: layer for name, layer in layer_of.items() if name.rsplit(".", 1)[-1] in target_modules}


def flat(name: str) -> str:
    """`layers.0.self_attn.q_proj` as a key of a ModuleDict, which cannot hold dots."""
    return name.replace(".", "_")
