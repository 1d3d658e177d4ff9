"""Products of bfloat16 matrices on a CPU that has no instruction for them: in float32, then rounded.

Such a CPU, one without AVX-512 as a rule, leaves them to a kernel that needs fifty times as long as float32's. A bfloat16
product sums in float32 and rounds once, here as there: only the order of the sum differs, and with it the last bit of one
entry in ten thousand. So a cell that was run with these products stands beside those of other machines.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.library import Library


_overrides: list[Library] = []


def use_float32_products() -> None:
    """From here on this process takes `mm`, `addmm`, `bmm` and `baddbmm` of bfloat16 on the CPU through float32."""
    if _overrides:
        return
    library = Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Warning only once for all operators")
        for name in ("mm", "addmm", "bmm", "baddbmm"):
            library.impl(name, _through_float32(getattr(torch, name)), "CPU")
    _overrides.append(library)


def withdraw() -> None:
    """The machine's own products again."""
    while _overrides:
        _overrides.pop()._destroy()


def _through_float32(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`product` with its result written to `out`: an operator of its own, which is not overridden."""

    def multiply(*matrices: Tensor, **scales: float) -> Tensor:
        dtype = matrices[-1].dtype
        wide = [matrix.float() if matrix.dtype == torch.bfloat16 else matrix for matrix in matrices]
        out = wide[0].new_empty((*wide[-2].shape[:-1], wide[-1].shape[-1]))
        return product(*wide, **scales, out=out).to(dtype)

    return multiply
