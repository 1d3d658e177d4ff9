"""Which attention to take."""

import copy

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import is_flash_attn_2_available


def has_flash_attention() -> bool:
    """Whether the GPU and the installed packages allow FlashAttention-2."""
    on_ampere = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    return on_ampere and is_flash_attn_2_available()


def best_attention(decoder: PreTrainedModel) -> str:
    """FlashAttention-2 where it can be had, else PyTorch's own kernel, and eager where the decoder's family has neither."""
    return "flash_attention_2" if decoder._supports_flash_attn and has_flash_attention() else plain_attention(decoder)


def plain_attention(decoder: PreTrainedModel) -> str:
    """PyTorch's own kernel, and eager where the decoder's family does not have it."""
    return "sdpa" if decoder._supports_sdpa else "eager"


def without_weights(text_config: PreTrainedConfig) -> PreTrainedModel:
    """A decoder of the family whose parameters have shapes only."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(text_config))
