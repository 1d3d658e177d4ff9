"""Where and in what a machine multiplies: in bfloat16, unless it can do so only number by number."""

import torch


def is_bfloat16_slow() -> bool:
    """Whether there are no products of bfloat16 numbers: on an NVIDIA GPU before Ampere, or where there is only a CPU for
    which oneDNN has no kernel (one without AVX-512, as a rule)."""
    if torch.cuda.is_available():
        return not torch.cuda.is_bf16_supported(including_emulation=False)
    return not torch.accelerator.is_available() and not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def advice() -> str:
    """What to add to a command whose model computes in bfloat16, where that is slow."""
    device, dtype = ("GPU", "float16") if torch.cuda.is_available() else ("CPU", "float32")
    scaled = "--fp16 true " if dtype == "float16" else ""
    return (
        f"This {device} has no products of bfloat16 numbers and takes many times as long for them as for {dtype}: add "
        f"--dtype {dtype} --bnb_4bit_compute_dtype {dtype} {scaled}--bf16 false."
    )


def device_here() -> torch.device:
    """The accelerator, if there is one; PyTorch names one as well where it is only built for one."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if found is None else found


def fast_dtype() -> torch.dtype:
    """The dtype to compute in where nothing else is said."""
    if not is_bfloat16_slow():
        return torch.bfloat16
    return torch.float16 if torch.cuda.is_available() else torch.float32
