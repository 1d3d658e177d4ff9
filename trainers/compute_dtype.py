"""Where and in what a machine multiplies: bfloat16, unless it is a CPU that can do so only number by number."""

import torch


ADVICE = (
    "This CPU has no products of bfloat16 numbers and takes many times as long for them as for float32: add --dtype float32 "
    "--bnb_4bit_compute_dtype float32 --bf16 false."
)


def is_bfloat16_slow() -> bool:
    """Whether there is only a CPU for whose bfloat16 products oneDNN has no kernel: one without AVX-512, as a rule."""
    return not torch.accelerator.is_available() and not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def device_here() -> torch.device:
    """The accelerator, if there is one; PyTorch names one as well where it is only built for one."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if found is None else found


def fast_dtype() -> torch.dtype:
    """The dtype to compute in where nothing else is said."""
    return torch.float32 if is_bfloat16_slow() else torch.bfloat16
