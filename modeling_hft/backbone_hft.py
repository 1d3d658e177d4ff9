"""What HFT must know of a backbone's family: its decoder, what it takes, and how its files name it."""

import copy
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from huggingface_hub import ResolvedRevision
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils.hub import resolve_revision


_REFUSED = {
    "trocr": "whose layers read an encoder's states",
    "xlm": "whose tokens see those to come",
    "xlnet": "which computes tokens before rows",
}


def without_weights(text_config: PreTrainedConfig) -> PreTrainedModel:
    """A decoder of the family whose parameters have shapes only."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(text_config))


def decoder_of(backbone: PreTrainedModel) -> PreTrainedModel:
    """The stack of layers without the head."""
    decoder = backbone.base_model
    if decoder is backbone:  # Llama 4's `base_model_prefix` names none of its parts
        return next((part for part in backbone.children() if isinstance(part, PreTrainedModel)), backbone)
    return decoder


def decoder_name(backbone: PreTrainedModel) -> str:
    """What the backbone calls its decoder: `model`."""
    decoder = decoder_of(backbone)
    return next(name for name, module in backbone.named_modules() if module is decoder)


def check_dtype(key: str, dtype: Any, auto: bool = True) -> None:
    """Raises ValueError for what is no floating-point dtype, its name, None, or, where that may be, "auto"."""
    found = dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype), None)
    is_known = dtype is None or (auto and dtype == "auto")
    if not is_known and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ValueError(f"`{key}` is {dtype!r}; it must be a floating-point type of torch, such as bfloat16.")


def check_is_decoder(name: str, text_config: PreTrainedConfig) -> None:
    """Raises ValueError for a model that takes more than text, has an encoder, or sees tokens to come."""
    family = text_config.model_type
    if text_config.get_text_config(decoder=True).model_type != family:
        raise ValueError(f"'{name}' is a {family!r}, which takes more than text; give a text model of the family.")
    if family in _REFUSED:
        raise ValueError(
            f"'{name}' is a {family!r}, {_REFUSED[family]}; HFT stands on decoders such as Llama, Qwen or Gemma."
        )
    if 0 < (getattr(text_config, "rescale_every", 0) or 0) < text_config.num_hidden_layers:
        raise ValueError(
            f"'{name}' is a {family!r} that halves the weights of its deeper layers when it stops to train, but not what is "
            'added to them; write "rescale_every": 0 into its config.json.'
        )
    if text_config.is_encoder_decoder:
        raise ValueError(
            f"'{name}' is a {family!r}, an encoder and a decoder; HFT stands on decoders, such as Llama, Qwen or Gemma."
        )
    # Families that can be either, as BERT, say which; GPT-NeoX has the key, too, and never heeds it.
    if family in MODEL_FOR_MASKED_LM_MAPPING_NAMES and getattr(text_config, "is_decoder", None) is False:
        raise ValueError(
            f"'{name}' is a {family!r} whose tokens see those to come, so it cannot generate; HFT stands on decoders, "
            "such as Llama, Qwen or Gemma."
        )


def check_own_code(name: str, files: Mapping[str, Any]) -> None:
    """Raises ValueError for a repository, by what its config.json says, whose family is code of its own."""
    if "auto_map" in files and files.get("model_type") not in CONFIG_MAPPING:
        raise ValueError(
            f"'{name}' is a {files.get('model_type')!r} that comes with code of its own, which HFT cannot stand on; take a "
            "decoder that transformers itself knows."
        )


def keep_weights(backbone: PreTrainedModel) -> None:
    """Switches off what writes into a backbone's weights when training ends.

    bitsandbytes would repack the weights of a CPU with AVX512-BF16 in place at the first evaluation pass, after which
    gradients are wrong (see its `Linear4bit`).
    """
    for module in backbone.modules():
        if "support_avx512bf16_for_cpu" in vars(module):
            module.support_avx512bf16_for_cpu = False


def commit_of(repo: str, download: Mapping[str, Any]) -> str | None:
    """The commit of a Hub repository's revision, so that the backbone never changes under its tasks; None for a folder."""
    if os.path.isdir(repo):
        return None
    resolved = resolve_revision(
        repo,
        download.get("revision"),
        token=download.get("token"),
        local_files_only=download.get("local_files_only", False),
        cache_dir=download.get("cache_dir"),
    )
    return resolved.resolved if isinstance(resolved, ResolvedRevision) else None


def is_hub_id(backbone: str) -> bool:
    """Whether a backbone's name can only be that of a repository on the Hub: not a folder's, here or elsewhere."""
    if os.path.isdir(backbone):
        return False
    try:
        validate_repo_id(backbone)
    except HFValidationError:  # a path
        return False
    return True


def check_unshared(decoder: PreTrainedModel, linears: Iterable[str]) -> None:
    """Raises ValueError if two of the linears share a weight, as Zamba2's: none could have a path of its own added to it."""
    whose: dict[int, str] = {}
    for name in linears:
        other = whose.setdefault(id(decoder.get_submodule(name).weight), name)
        if other != name:
            raise ValueError(
                f"The linears {other!r} and {name!r} of this backbone share one weight, and what is added to each differs, "
                "so a path cannot be merged into it; fold it without merge=True, or export it as a LoRA."
            )


def key_mapping_of(text_config: PreTrainedConfig) -> dict[str, str] | None:
    """How to read the files of a family whose keys begin with `backbone.`, as Nemotron-H's; None for others.

    transformers would take that for the name under which HFT has its backbone, and so not do the family's own renaming.
    """
    for conversion in get_checkpoint_conversion_mapping(text_config.model_type) or ():
        for source, target in zip(conversion.source_patterns, conversion.target_patterns, strict=False):
            if source.lstrip("^").replace("\\", "") == "backbone.":
                return {r"^backbone\.": target}
    return None
