"""The low-rank nodes of one linear layer, and which linears carry them.

I/O in and out features, R rank.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers import initialization as init

from .hierarchy_hft import nearest


# Linears of a Mamba mixer whose weights its kernels take, at least in training, without calling them: no hook would run.
_NOT_CALLED = ("dt_proj", "x_proj", "out_proj")
_INDEXER = "indexer"  # of sparse attention: its linears only choose positions, and get no gradient


class HFTFactors(nn.Module):
    """Named pairs of low-rank factors beside one frozen `nn.Linear`: a down projection [R, I] and an up projection [O, R].

    Unlike a LoRA layer, it does not wrap its linear: a forward hook adds what a path reads from it to the linear's output
    (see `HFTFused`), so the backbone's parameters keep their names.

    Args:
        in_features, out_features: I and O of the linear.
        layer: index of the decoder layer that the linear is in; picks the gates.
    """

    DOWN, UP = "A", "B"  # the letters of the two factors in the names of parameters and of saved tensors

    def __init__(self, in_features: int, out_features: int, layer: int):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.layer = layer

    def add(self, name: str, rank: int, dtype: torch.dtype, device: torch.device | None = None) -> None:
        """Makes room for a pair: [rank, I] and [O, rank]. `reset_parameters` fills it."""
        down_RI = torch.empty(rank, self.in_features, dtype=dtype, device=device)
        up_OR = torch.empty(self.out_features, rank, dtype=dtype, device=device)
        self.put(name, nn.Parameter(down_RI), nn.Parameter(up_OR))

    def put(self, name: str, down_RI: nn.Parameter, up_OR: nn.Parameter) -> None:
        """Lets a name mean this pair."""
        self.register_parameter(f"{self.DOWN}_{name}", down_RI)
        self.register_parameter(f"{self.UP}_{name}", up_OR)

    def remove(self, name: str) -> None:
        """Lets go of a pair."""
        del self._parameters[f"{self.DOWN}_{name}"], self._parameters[f"{self.UP}_{name}"]

    def pair(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """The factors called `name`: [R, I] and [O, R]."""
        return self._parameters[f"{self.DOWN}_{name}"], self._parameters[f"{self.UP}_{name}"]

    def pairs(self, names: Sequence[str]) -> list[nn.Parameter]:
        """The factors of several, one after another."""
        return [self._parameters[f"{letter}_{name}"] for name in names for letter in (self.DOWN, self.UP)]

    def names(self) -> list[str]:
        """What there is."""
        prefix = f"{self.DOWN}_"
        return [name.removeprefix(prefix) for name in self._parameters if name.startswith(prefix)]

    def reset_parameters(self, name: str) -> None:
        """As in LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685): down uniform, up zero: the pair starts silent."""
        down_RI, up_OR = self.pair(name)
        init.kaiming_uniform_(down_RI, a=math.sqrt(5))
        init.zeros_(up_OR)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True):
        return super()._apply(never_rounding(fn), recurse)

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, layer={self.layer}, names={self.names()}"


class HFTNodes(HFTFactors):
    """All tasks' nodes beside one linear: node n adds B_n A_n x. A is [R, I], B is [O, R]."""


def never_rounding(fn: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """What `Module.to` does to a tensor, but for a dtype that would round it: sealing only rounds what was learnt.

    Factors are cast where they are used; gates always compute in float32.
    """

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        other = fn(tensor)
        rounds = torch.promote_types(tensor.dtype, other.dtype) != other.dtype
        return tensor.to(other.device) if rounds else other

    return moved


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
        is_plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
        if is_plain and indices and _is_called(decoder, name):
            layer_of[name] = indices[0]
    if not layer_of:
        kinds = sorted({type(module).__name__ for module in decoder.modules() if not list(module.children())})
        raise ValueError(
            f"{type(decoder).__name__} has no nn.Linear in its layers (only {', '.join(kinds)}), and HFT's nodes stand "
            "beside nn.Linear. Choose a backbone such as Llama, Qwen, Gemma, Mistral, Phi-3 or SmolLM."
        )
    if target_modules == "all-linear":
        return layer_of
    if not isinstance(target_modules, Sequence) or not target_modules:
        raise ValueError(
            f"`target_modules` is {target_modules!r}; give 'all-linear', or a list of the last names of linears."
        )
    known = sorted({name.rsplit(".", 1)[-1] for name in layer_of})
    target_modules = [target_modules] if isinstance(target_modules, str) else target_modules
    for target in target_modules:
        if target not in known:
            raise ValueError(f"`target_modules` names {target!r}, which this backbone lacks. {nearest(target, known)}")
    return {name: layer for name, layer in layer_of.items() if name.rsplit(".", 1)[-1] in target_modules}


def _is_called(decoder: nn.Module, name: str) -> bool:
    """Whether the linear called `name` runs as a module wherever its weight is used, and can learn."""
    above, _, own = name.rpartition(".")
    if _INDEXER in above.split(".") or (
        above.endswith("router") and own == "classifier"
    ):  # LongCat's, see its forward
        return False
    mixer = decoder.get_submodule(above)
    return own not in _NOT_CALLED or not (hasattr(mixer, "A_log") and hasattr(mixer, "D"))


def numbers_a_rank(modules: nn.ModuleDict) -> int:
    """How many numbers one rank of a node, or one slot of a page, has beside all linears together."""
    return sum(factors.in_features + factors.out_features for factors in modules.values())


def flat(name: str) -> str:
    """`layers.0.self_attn.q_proj` as a key of a ModuleDict, which cannot hold dots."""
    return name.replace(".", "_")


def beside(modules: nn.ModuleDict, name: str) -> HFTFactors | None:
    """The factors beside the linear called `name` within the decoder, or None."""
    return modules[key] if (key := flat(name)) in modules else None
