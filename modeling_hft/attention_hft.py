"""Which attention to take."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import is_flash_attn_2_available


def has_flash_attention() -> bool:
    """Whether the GPU and the installed packages allow FlashAttention-2."""
    on_ampere = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    return on_ampere and is_flash_attn_2_available()


def best_attention(decoder: PreTrainedModel, on_gpu: bool, dtype: torch.dtype) -> str:
    """FlashAttention-2 where it can be had and computes, else PyTorch's own kernel, and eager where the family has neither.

    Args:
        decoder: one of the family.
        on_gpu: whether the model is loaded onto a GPU: there only are its kernels.
        dtype: of the model; they are for half precision only.
    """
    computes = on_gpu and dtype in (torch.bfloat16, torch.float16) and decoder._supports_flash_attn
    return "flash_attention_2" if computes and has_flash_attention() else plain_attention(decoder)


def goes_to_gpu(device_map: Any, is_quantized: bool) -> bool:
    """Whether `from_pretrained` loads onto a GPU: by `device_map`, as bitsandbytes does, or as the default device says."""
    if device_map is None:
        return is_quantized or torch.get_default_device().type == "cuda"
    places = device_map.values() if isinstance(device_map, Mapping) else [device_map]
    return not all(str(place).startswith(("cpu", "disk", "meta", "mps")) for place in places)


def plain_attention(decoder: PreTrainedModel) -> str:
    """PyTorch's own kernel, and eager where the decoder's family does not have it."""
    return "sdpa" if decoder._supports_sdpa else "eager"
