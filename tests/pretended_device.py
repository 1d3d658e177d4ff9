"""A device that is none: its tensors lie in main memory, but say that they are on `card:0`, and refuse to meet others there.

What is right on it and waits for nothing is fit for a GPU, as far as that can be known without one: a tensor that was left
on the CPU raises, and what makes a CPU wait for a GPU is counted. PyTorch takes it for an accelerator, so importing this
module changes the process for good (see PyTorch's `_setup_privateuseone_for_python_backend`).
"""

import contextlib
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend


class _Module:
    """What PyTorch looks up as `torch.card`."""

    is_initialized = is_available = lambda self: True
    device_count = lambda self: 1  # noqa: E731
    current_device = _is_in_bad_fork = lambda self: 0
    manual_seed = manual_seed_all = synchronize = empty_cache = lambda self, *args: None
    device = lambda self, index: contextlib.nullcontext()  # noqa: E731
    get_amp_supported_dtype = lambda self: [torch.bfloat16, torch.float16]  # noqa: E731
    get_rng_state = lambda self, device=None: torch.get_rng_state()  # noqa: E731
    set_rng_state = lambda self, state, device=None: torch.set_rng_state(state)  # noqa: E731


_setup_privateuseone_for_python_backend("card", _Module())
CARD, CARD_KEY = torch.device("card", 0), "PrivateUse1"
ROOT, TORCH = Path(__file__).parent.parent, Path(torch.__file__).parent
aten = torch.ops.aten
WAITS = (aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default, aten.masked_select.default)
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)

# (which line of this project or of a library, what it did) -> how often the CPU waited there
waited: Counter[tuple[str, str]] = Counter()


def waited_in(*places: str) -> dict[tuple[str, str], int]:
    """What waited so far in files whose path within the project begins with one of these."""
    return {key: count for key, count in waited.items() if key[0].startswith(places)}


class Card(torch.Tensor):
    """A tensor on the device; `held` has its numbers."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor, requires_grad: bool = False):
        card = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=CARD,
            requires_grad=requires_grad,
        )  # fmt: skip
        card.held = held
        return card

    def __repr__(self) -> str:
        return f"Card({self.held})"

    def __deepcopy__(self, memo: dict) -> "Card":
        copied = Card(self.held.detach().clone())
        is_parameter = isinstance(self, torch.nn.Parameter)
        return (
            torch.nn.Parameter(copied, self.requires_grad)
            if is_parameter
            else copied.requires_grad_(self.requires_grad)
        )

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _run(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """An operation, done in main memory; RuntimeError if a GPU could not do it."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    cards = [tensor for tensor in tensors if isinstance(tensor, Card)]
    others = [tensor for tensor in tensors if not isinstance(tensor, Card)]
    asked = kwargs.get("device")
    lands_here = bool(cards) if asked is None else torch.device(asked).type == CARD.type
    if func is aten.copy_.default:
        lands_here = isinstance(args[0], Card)
    if func in (aten._to_copy.default, aten.copy_.default):
        source = args[func is aten.copy_.default]
        if isinstance(source, Card) != lands_here:
            _note("a copy to the device" if lands_here else "a copy from the device")
    elif func in WAITS and cards:
        _note(str(func))
    elif func in INDEXING and isinstance(args[0], Card):
        if any(tensor.dim() for tensor in others) or any(index.dtype == torch.bool for index in cards):
            _note("an index that must be copied or counted")
    elif cards and any(tensor.dim() for tensor in others):
        shapes = ", ".join(f"{type(tensor).__name__} {tuple(tensor.shape)}" for tensor in tensors)
        raise RuntimeError(f"{func} got tensors on the device and on the CPU: {shapes}.")
    if lands_here and asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    result = func(
        *tree_map(_held, args),
        **tree_map(_held, {**kwargs, "pin_memory": False} if "pin_memory" in kwargs else kwargs),
    )
    if func is aten.copy_.default:
        return args[0]
    if func is aten._to_copy.default and result is _held(args[0]):
        result = result.clone()
    if not lands_here:
        return result
    written = [argument for argument in func._schema.arguments if argument.alias_info and argument.alias_info.is_write]
    returns = func._schema.returns
    if written and len(returns) <= 1 and all(one.alias_info and one.alias_info.is_write for one in returns):
        if not returns:
            return None
        place = [argument.name for argument in func._schema.arguments].index(written[0].name)
        return kwargs[written[0].name] if written[0].kwarg_only else args[place]
    return tree_map(
        lambda one: Card(one) if isinstance(one, torch.Tensor) and not isinstance(one, Card) else one, result
    )


# What makes a tensor on the device has none among its arguments.
_library = torch.library.Library("_", "IMPL")
_library.fallback(lambda func, *args, **kwargs: _run(func, args, kwargs), CARD_KEY)


def _held(leaf: Any) -> Any:
    return leaf.held if isinstance(leaf, Card) else leaf


def _note(what: str) -> None:
    """Counts it for the innermost line that is neither PyTorch's nor in this file."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(TORCH) or path.name == Path(__file__).name:
            continue
        name = path.relative_to(ROOT) if path.is_relative_to(ROOT) and not path.is_relative_to(TORCH.parent) else path
        waited[f"{name}: {frame.line}", what] += 1
        return


class OnDevice(TorchFunctionMode):
    """What Python must do itself, where PyTorch passes the dispatcher by, for tensors that wrap others."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        first = args[0] if args else None
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu").type == CARD.type:
            return func(*args, **{**kwargs, "device": "cpu"}).to(CARD)
        if isinstance(first, Card) and func is torch.Tensor.tolist:
            _note("tolist")
            return first.held.tolist()
        if isinstance(first, Card) and func is torch.Tensor.data_ptr:
            return first.held.data_ptr()
        if isinstance(first, Card) and func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            index = tuple(torch.tensor(one).to(CARD) if isinstance(one, list) else one for one in index)
            args = (first, index, *args[2:])
        if not torch.is_inference_mode_enabled():
            return func(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():  # in it, a tensor that wraps another would have no version
            return func(*args, **kwargs)


def moved(model: torch.nn.Module) -> torch.nn.Module:
    """A model, moved to the device: its parameters become others, as they are of another class here."""
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        return model.to(CARD)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
