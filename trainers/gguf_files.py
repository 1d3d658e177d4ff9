"""Backbones and paths as GGUF files, which llama.cpp and its relatives read: written and read again.

llama.cpp rotates pairs of neighbouring features of a Llama's queries and keys, transformers those half a head apart; so the
rows of q_proj and k_proj change places. I/O in and out features, R rank.
"""

from pathlib import Path

import torch
from gguf import (
    GGML_QUANT_VERSION,
    GGUFReader,
    GGUFType,
    GGUFWriter,
    Keys,
    LlamaFileType,
    TensorNameMap,
    get_tensor_name_map,
)
from gguf.constants import MODEL_ARCH
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hft.lora_io_hft import Factors

from .gguf_vocabulary import add_vocabulary


ARCHITECTURES = {"llama": MODEL_ARCH.LLAMA, "qwen3": MODEL_ARCH.QWEN3}

ROPE_FACTORS = "rope_freqs.weight"  # what Llama 3 divides the frequencies of its positions by


def check_backbone(config: PreTrainedConfig) -> None:
    """Lets backbones pass that can be written as GGUF.

    Raises:
        ValueError: another family than Llama and Qwen3, or one of its options that llama.cpp does not compute alike.
    """
    kind, rope = config.model_type, config.rope_parameters["rope_type"] if config.model_type in ARCHITECTURES else ""
    if kind not in ARCHITECTURES:
        what = f"type {kind!r}"
    elif rope not in ("default", "llama3"):
        what = f"scaled rotary positions ({rope!r})"
    elif config.hidden_act != "silu":
        what = f"the activation {config.hidden_act!r}"
    elif getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
        what = "biases, which transformers does not read from such files"
    elif kind == "qwen3" and config.use_sliding_window:
        what = "sliding windows"
    else:
        return
    raise ValueError(
        f"The backbone has {what}, and HFT writes GGUF files of plain {' and '.join(ARCHITECTURES)} backbones; export with "
        "--to peft or --to merged and use llama.cpp's own converter."
    )


def write_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, name: str) -> None:
    """Writes a whole plain model with its tokenizer and chat template, in float16 (what has one axis: in float32).

    float16 keeps bfloat16 weights as they are, except those below 6e-5, and llama.cpp computes in it, on a CPU, with a 58th
    of the error that it makes in bfloat16 (mean KL divergence from float32 logits, SmolLM2-135M).

    Args:
        model: of a kind that `check_backbone` lets pass, not in 4 bit.
        tokenizer: its tokenizer.
        path: the file.
        name: `general.name` in it.

    Raises:
        ValueError: a tokenizer that cannot be written; see `add_vocabulary`.
    """
    config, names = model.config, _names(model.config)
    writer = _writer(path, config, GGUFType.MODEL, name)
    writer.add_file_type(LlamaFileType.MOSTLY_F16)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    add_vocabulary(writer, tokenizer, config.vocab_size)
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        tensor = _to_rotary_pairs(key, tensor.detach().cpu(), config).contiguous()
        dtype = torch.float32 if tensor.ndim == 1 else torch.float16
        writer.add_tensor(_name(names, key), tensor.to(dtype).numpy())
    if config.rope_parameters["rope_type"] == "llama3":
        powers_F = torch.arange(0, config.head_dim, 2) / config.head_dim
        plain_F, stretched_F = config.rope_parameters["rope_theta"] ** -powers_F, model.base_model.rotary_emb.inv_freq
        writer.add_tensor(ROPE_FACTORS, (plain_F / stretched_F.float().cpu()).numpy())
    _write(writer)


def write_lora(factors: Factors, config: PreTrainedConfig, path: Path, name: str, task: str) -> None:
    """Writes a path as the LoRA that llama.cpp's `--lora` takes, in float32.

    The file has one alpha for all linears, the highest rank, and llama.cpp scales by alpha / rank; where a linear's rank is
    lower, B is divided by that.

    Args:
        factors: of `path_factors`.
        config: the backbone's.
        path: the file.
        name: `general.name` in it.
        task: `adapter.lora.task_name` in it.
    """
    names, alpha = _names(config), max(len(A_RI) for A_RI, _ in factors.values())
    writer = _writer(path, config, GGUFType.ADAPTER, name)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, float(alpha))
    writer.add_string("adapter.lora.task_name", task)  # gguf 0.17 has no name for this key
    for linear, (A_RI, B_OR) in factors.items():
        key = f"model.{linear}.weight"
        B_OR = _to_rotary_pairs(key, B_OR.float().cpu() * (len(A_RI) / alpha), config).contiguous()
        writer.add_tensor(f"{_name(names, key)}.lora_a", A_RI.float().cpu().contiguous().numpy())
        writer.add_tensor(f"{_name(names, key)}.lora_b", B_OR.numpy())
    _write(writer)


def read_lora_gguf(path: Path, config: PreTrainedConfig) -> Factors:
    """The path in a file that `write_lora` wrote: A [R, I] and B [O, R] at each linear, float32, the scaling in B."""
    try:
        reader, names = GGUFReader(path), _names(config)
    except ValueError as error:  # the writer itself says nothing of a disk that is full
        raise OSError(f"'{path}' cannot be read again ({error}); it was cut short: is the disk full?") from error
    alpha = reader.fields[Keys.Adapter.LORA_ALPHA].contents()
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    factors = {}
    for i in range(config.num_hidden_layers):
        for linear in _LINEARS:
            key = f"model.layers.{i}.{linear}.weight"
            name = _name(names, key)
            if f"{name}.lora_a" in tensors:
                A_RI, B_OR = tensors.pop(f"{name}.lora_a"), tensors.pop(f"{name}.lora_b")
                scaled = B_OR * (alpha / len(A_RI))
                factors[f"layers.{i}.{linear}"] = (A_RI, _from_rotary_pairs(key, scaled, config))
    assert not tensors, f"unread: {list(tensors)}"
    return factors


_LINEARS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)


def _writer(path: Path, config: PreTrainedConfig, kind: str, name: str) -> GGUFWriter:
    writer = GGUFWriter(path, config.model_type)
    writer.add_type(kind)
    writer.add_name(name)
    return writer


def _write(writer: GGUFWriter) -> None:
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _names(config: PreTrainedConfig) -> TensorNameMap:
    return get_tensor_name_map(ARCHITECTURES[config.model_type], config.num_hidden_layers)


def _name(names: TensorNameMap, key: str) -> str:
    name = names.get_name(key, try_suffixes=(".weight", ".bias"))
    assert name is not None, key
    return name


def _rotary_heads(key: str, config: PreTrainedConfig) -> int | None:
    """How many heads a tensor's rows belong to, if they change places."""
    if config.model_type != "llama":
        return None
    linear = key.split(".")[-2]
    return {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(linear)


def _to_rotary_pairs(key: str, tensor: torch.Tensor, config: PreTrainedConfig) -> torch.Tensor:
    heads = _rotary_heads(key, config)
    return tensor if heads is None else tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _from_rotary_pairs(key: str, tensor: torch.Tensor, config: PreTrainedConfig) -> torch.Tensor:
    heads = _rotary_heads(key, config)
    return tensor if heads is None else tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
