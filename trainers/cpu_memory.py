"""How a process on a CPU keeps its memory small, and so predictable, without losing speed."""

import ctypes
import os
import sys

from torch import accelerator


# PyTorch and oneDNN read them at the first product.
CAPACITIES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's `mallopt`


def use_memory_well() -> None:
    """On a CPU: large blocks are reused, and few of oneDNN's kernels are kept. To be called before the first product.

    glibc gives each large block back to the kernel, which zeroes its pages again when they are next asked for. PyTorch and
    oneDNN each keep what 1024 products of one shape need, so the process grows by some 8 MB with every new length of rows.
    With 128 it stops, and a training step takes no longer; with 16 it takes a tenth longer (SmolLM2-135M, NF4, one core). A
    capacity that the user has set stays.
    """
    if accelerator.is_available():
        return
    for capacity in CAPACITIES:
        os.environ.setdefault(capacity, "128")
    for setting in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
        _glibc("mallopt", setting, 2**31 - 1)


def give_freed_back() -> None:
    """On a CPU: what is free within the process goes back to the kernel, as after loading, which may leave 400 MB."""
    if not accelerator.is_available():
        _glibc("malloc_trim", 0)


def _glibc(name: str, *arguments: int) -> None:
    """Calls a function of the C library, where there is one of this name: musl, macOS and Windows have none."""
    if sys.platform.startswith("linux") and (function := getattr(ctypes.CDLL(None), name, None)) is not None:
        function(*arguments)
