"""Backbones of real models' shapes with random weights, made in NF4 layer by layer: never whole in 16 bit, no download."""

import bitsandbytes as bnb
import torch
from harness import NF4
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.quantizers import AutoHfQuantizer
from transformers.utils.quantization_config import QuantizationMethod

import hft


_LLAMA = dict(hidden_act="silu", rms_norm_eps=1e-5, max_position_embeddings=4096, bos_token_id=1, eos_token_id=2)
SHAPES = {
    "tiny": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, vocab_size=512, tie_word_embeddings=True),
    # SmolLM2-135M, Llama-3.2-1B, Llama-3.1-8B
    "135m": dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                 num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True),
    "1b": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
               num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=True),
    "8b": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
               num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False),
}  # fmt: skip


def config_of(shape: str, attention: str) -> LlamaConfig:
    """The configuration of one of `SHAPES`; `attention` as in transformers."""
    config = LlamaConfig(**_LLAMA, **SHAPES[shape], dtype=torch.bfloat16)
    config._attn_implementation = attention
    return config


def random_backbone(config: LlamaConfig, device: torch.device) -> PreTrainedModel:
    """A decoder in NF4 with double quantisation, embeddings and head in bfloat16. At most one linear is held in 16 bit."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    torch.manual_seed(0)
    for name, linear in list(model.base_model.named_modules()):
        if isinstance(linear, nn.Linear):
            parent = model.base_model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], _quantized(linear, device))
    rotary = type(model.base_model.rotary_emb)  # its buffers are computed, and not part of any state
    model.base_model.rotary_emb = rotary(config).to(device)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                filled = torch.ones if parameter.ndim == 1 else lambda *size, **kw: torch.randn(*size, **kw).mul_(0.02)
                made = filled(*parameter.shape, dtype=torch.bfloat16, device=device)
                module.register_parameter(name, nn.Parameter(made, requires_grad=False))
    model.tie_weights()
    return as_quantized(model)


def _quantized(linear: nn.Linear, device: torch.device) -> bnb.nn.Linear4bit:
    made = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        compute_dtype=torch.bfloat16,
        quant_type="nf4",
        device="meta",
    )
    weight_OI = torch.randn(linear.out_features, linear.in_features, dtype=torch.bfloat16, device=device).mul_(0.02)
    made.weight = bnb.nn.Params4bit(
        weight_OI, requires_grad=False, compress_statistics=True, quant_type="nf4", module=made
    ).to(device)
    made.weight.requires_grad_(False)
    return made


def as_quantized(model: PreTrainedModel) -> PreTrainedModel:
    """Marks a model as what from_pretrained would have made, so that trainers and PEFT treat it so."""
    model.is_quantized, model.is_loaded_in_4bit = True, True
    model.quantization_method = QuantizationMethod.BITS_AND_BYTES
    model.hf_quantizer = AutoHfQuantizer.from_config(BitsAndBytesConfig(**NF4))
    return model


def hft_on(backbone: PreTrainedModel, hierarchy: dict[str, list[str]], rank: int) -> hft.HFTForCausalLM:
    """An HFT model around a backbone that is in memory already."""
    config = hft.HFTConfig(
        text_config=backbone.config,
        rank=rank,
        backbone="random",
        dtype=torch.bfloat16,
        target_modules="all-linear",
        attn_implementation=backbone.config._attn_implementation,
    )
    with torch.device("meta"):
        model = hft.HFTForCausalLM(config)
    model.backbone = backbone
    model._finish()  # hooks on the linears that are there now
    as_quantized(model)
    for task, parents in hierarchy.items():
        model.add_task(task, parents)
    return model


def word_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """For trainers that want one; the data is token ids."""
    words = {f"w{i}": i for i in range(vocab_size)}
    raw = Tokenizer(models.WordLevel(words, unk_token="w0"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="w0", bos_token="w1", eos_token="w2")
