"""To and from plain PEFT LoRA. Not shipped to the Hub: nothing that ships imports it.

A task's path is one LoRA: rows of A concatenated, columns of B scaled by the gates (Hu et al. 2021,
https://arxiv.org/abs/2106.09685). I/O in and out features, R rank.
"""

import copy
import json
import math
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file
from transformers import PreTrainedModel
from transformers.utils import cached_file

from .backbone_hft import decoder_name, without_weights
from .files_hft import replacing, write_tensors
from .nodes_hft import beside, flat
from .trimmed_hft import balanced


# What a LoRA adds at each linear, by its name within the decoder: A [R, I] and B [O, R].
Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]

# The ranks that vLLM serves (`max_lora_rank`); others it refuses.
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def path_factors(model: PreTrainedModel, task: str) -> Factors:
    """A task's path at each linear as one pair of factors: A [R, I] and B [O, R], the gates in B, in the backbone's dtype.

    Nodes and pages whose gates are 0 at all layers are left out.

    Raises:
        ValueError: an unknown task.
    """
    model.hierarchy.check(task)
    sources, gates_LN = model.sources(task), model.hft_gates.of(task).detach()
    used = gates_LN.any(0).tolist()
    factors = {}
    for name in model._layer_of:
        nodes, memory = model.hft_nodes[flat(name)], beside(model.hft_memory, name)
        pairs = [(nodes.pair(node), column) for column, node in enumerate(sources.nodes)]
        if memory is not None:
            pages = enumerate(sources.pages, start=len(sources.nodes))
            pairs += [(memory.pair(page), column) for column, page in pages]
        # A linear that reads nothing keeps one silent column, so that all linears stay targets.
        pairs = [(pair, column) for pair, column in pairs if used[column]] or pairs[:1]
        dtype = model.backbone.dtype  # as in a pass: first the dtype, then the gates
        down_RI = torch.cat([down.detach().to(dtype) for (down, _), _ in pairs])
        up_OR = torch.cat([up.detach().to(dtype) for (_, up), _ in pairs], 1)
        g_R = torch.cat([gates_LN[nodes.layer, column].expand(len(down)) for (down, _), column in pairs])
        factors[name] = (down_RI, (up_OR * g_R.to(up_OR.device)).to(dtype))
    return factors


def shrink_rank(A_RI: torch.Tensor, B_OR: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The best approximation of B A of a lower rank, balanced: both factors get the square root of the singular values.

    Returns:
        A [rank, I], B [O, rank] and the relative error of B A (Frobenius norm); unchanged if their rank is low enough.
    """
    if len(A_RI) <= rank:
        return A_RI, B_OR, 0.0
    down_RI, up_OR, S_R = balanced(A_RI, B_OR)
    error = float(S_R[rank:].norm() / S_R.norm().clamp(min=1e-30))
    return down_RI[:rank].to(A_RI.dtype), up_OR[:, :rank].to(B_OR.dtype), error


def cut_path(factors: Factors, max_rank: int | None) -> tuple[Factors, float]:
    """A path of at most `max_rank` at each linear (None: as it is), and the largest relative error at any.

    Raises:
        ValueError: a rank below 1.
    """
    if max_rank is None:
        return factors, 0.0
    if max_rank < 1:
        raise ValueError(f"`max_rank` is {max_rank}; it must be 1 or more.")
    cut = {name: shrink_rank(A_RI, B_OR, max_rank) for name, (A_RI, B_OR) in factors.items()}
    return {name: (A_RI, B_OR) for name, (A_RI, B_OR, _) in cut.items()}, max(error for _, _, error in cut.values())


def served_rank(rank: int) -> int:
    """The next rank that vLLM takes.

    Raises:
        ValueError: above the highest.
    """
    for allowed in RANKS:
        if rank <= allowed:
            return allowed
    raise ValueError(
        f"The path has rank {rank}, and servers take {RANKS[-1]} at most; cut it with max_rank={RANKS[-1]}."
    )


def export_lora(
    model: PreTrainedModel, task: str, folder: str | os.PathLike, max_rank: int | None = None
) -> dict[str, Any]:
    """Writes a task's path as a plain PEFT LoRA: `adapter_config.json` and `adapter_model.safetensors`.

    `lora_alpha` equals the rank, which is padded with zeros to one that vLLM takes; there are no `modules_to_save`.

    Args:
        model: an HFT model.
        task: whose path.
        folder: made if missing; files of the same names are replaced.
        max_rank: cut the path to this rank at each linear (by its singular values).

    Returns:
        `rank`, `path_rank`, and `svd_error`: the largest relative error at any linear.

    Raises:
        ValueError: an unknown task, a rank below 1 or above what servers take, or linears that PEFT would not load.
        ImportError: without peft.
    """
    from peft import LoraConfig

    whole = path_factors(model, task)
    factors, error = cut_path(whole, max_rank)
    path_rank = max(len(A_RI) for A_RI, _ in whole.values())
    rank = served_rank(max(len(A_RI) for A_RI, _ in factors.values()))
    decoder = decoder_name(model.backbone)
    factors = {f"{decoder}.{name}": pair for name, pair in factors.items()}
    tensors = {}
    for name, (A_RI, B_OR) in factors.items():
        padding = rank - len(A_RI)
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.nn.functional.pad(A_RI, (0, 0, 0, padding))
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.nn.functional.pad(B_OR, (0, padding))
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=_targets(model.backbone, factors),
        task_type="CAUSAL_LM",
        base_model_name_or_path=model.config.backbone,
        revision=model.config.backbone_revision,
        inference_mode=True,
    )
    _check_peft_takes(config, model, factors, tensors)
    with replacing(folder, last="adapter_config.json") as staging:
        write_tensors(tensors, staging / "adapter_model.safetensors")
        config.save_pretrained(staging)
    return {"rank": rank, "path_rank": path_rank, "svd_error": error}


def _targets(backbone: PreTrainedModel, linears: Collection[str]) -> list[str]:
    """The last names of the linears for `target_modules`; in full where other modules end in the same."""
    others = {name.rsplit(".", 1)[-1] for name, _ in backbone.named_modules() if name not in linears}
    return sorted({last if (last := name.rsplit(".", 1)[-1]) not in others else name for name in linears})


def _check_peft_takes(
    config: Any, model: PreTrainedModel, linears: Collection[str], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Raises ValueError where PEFT would leave linears out without a word: it reads some names as a mixture's experts, and
    gives some tensors other names."""
    from peft import PeftModel, set_peft_model_state_dict
    from peft.tuners.lora import LoraLayer

    plain = without_weights(model.config.text_config)
    its = PeftModel(plain, copy.deepcopy(config), low_cpu_mem_usage=True)
    taken = {name for name, module in plain.named_modules() if isinstance(module, LoraLayer)}
    shapes = {name: tensor.to("meta") for name, tensor in tensors.items()}
    unread = set_peft_model_state_dict(its, shapes, low_cpu_mem_usage=True).missing_keys
    without = {name for name in linears if any(f".{name}.lora_" in key for key in unread)}
    if lost := sorted({name.rsplit(".", 1)[-1] for name in (set(linears) - taken) | without}):
        raise ValueError(
            f"PEFT leaves out {', '.join(map(repr, lost))} of a {model.config.text_config.model_type!r}, as it takes these "
            "names for its experts', so the path is no plain LoRA there; build the model with `target_modules` of attention "
            "only, or export it merged."
        )


def read_lora(repo: str | os.PathLike, model: PreTrainedModel, **download: Any) -> Factors:
    """The factors of a plain PEFT LoRA for a model's backbone, its scaling multiplied into B.

    Args:
        repo: folder or Hub id of the adapter.
        model: an HFT model on the same backbone.
        download: `revision`, `token`, ... as for `transformers.utils.cached_file`.

    Returns:
        For each linear that it adapts: A [R, I] and B [O, R], float32.

    Raises:
        OSError: if there is no adapter.
        ValueError: an adapter that is more than a plain LoRA, or of another backbone.
    """
    config = json.loads(Path(_file(repo, "adapter_config.json", download)).read_text())
    _check_plain(repo, config)
    base, ours = config.get("base_model_name_or_path"), model.config.backbone
    if base and ours and not _same_backbone(base, ours):
        raise ValueError(f"'{repo}' is an adapter of '{base}', and this model stands on '{ours}'.")
    tensors = load_file(_file(repo, "adapter_model.safetensors", download))
    prefix = decoder_name(model.backbone)
    decoder = f"base_model.model.{prefix}."
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, kind = key.removesuffix(".weight").rpartition(".lora_")
        linear = name.removeprefix(decoder)
        if not key.startswith(decoder):
            raise ValueError(
                f"'{repo}' adapts {key!r}, which is outside the decoder's layers; nodes stand beside those only."
            )
        if kind not in ("A", "B"):
            raise ValueError(f"'{repo}' holds {key!r}, no A or B of a LoRA; only plain LoRA can become a node.")
        if linear not in model._layer_of:
            raise ValueError(
                f"'{repo}' adapts {key!r}, which is none of the linears that this model's nodes stand beside; make the "
                "model with `target_modules` that cover it."
            )
        found.setdefault(linear, {})[kind] = tensor.float()
    factors = {}
    for linear, pair in found.items():
        if len(pair) < 2:
            raise ValueError(
                f"'{repo}' has only lora_{min(pair)} at {linear!r}; its file is not whole. Copy or download it again."
            )
        nodes, rank = model.hft_nodes[flat(linear)], len(pair["A"])
        if pair["A"].shape != (rank, nodes.in_features) or pair["B"].shape != (nodes.out_features, rank):
            raise ValueError(
                f"'{repo}' has factors {list(pair['A'].shape)} and {list(pair['B'].shape)} at {linear!r}, which is "
                f"{nodes.in_features} -> {nodes.out_features} here. Is it an adapter of another backbone?"
            )
        if not all(bool(factor.isfinite().all()) for factor in pair.values()):
            raise ValueError(f"'{repo}' has numbers that are not finite at {linear!r}; its training diverged.")
        alpha = _of_pattern(config.get("alpha_pattern"), f"{prefix}.{linear}", config["lora_alpha"])
        scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        factors[linear] = (pair["A"], pair["B"] * scaling)
    return factors


def _check_plain(repo: str | os.PathLike, config: dict[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise ValueError(f"'{repo}' is a {config.get('peft_type')} adapter; only plain LoRA can become a node.")
    for key, what in (
        ("use_dora", "DoRA, which scales the backbone's own weight"),
        ("modules_to_save", "whole modules beside the LoRA (`modules_to_save`)"),
        ("trainable_token_indices", "trained token embeddings"),
        ("layer_replication", "replicated layers"),
        ("alora_invocation_tokens", "an activated LoRA, which is off for part of the prompt"),
        ("fan_in_fan_out", "transposed weights (`fan_in_fan_out`)"),
        ("lora_bias", "a bias in its LoRA"),
    ):
        if config.get(key):
            raise ValueError(f"'{repo}' has {what}; only plain LoRA can become a node.")
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        raise ValueError(
            f"'{repo}' began as {start!r}, which changes the backbone's own weights; save it with PEFT's "
            "`path_initial_model_for_weight_conversion`, which makes a plain LoRA of it."
        )
    if config.get("bias", "none") != "none":
        raise ValueError(f"'{repo}' trained biases (`bias` is {config['bias']!r}); only plain LoRA can become a node.")


def _of_pattern(pattern: dict[str, float] | None, linear: str, default: float) -> float:
    """PEFT's `alpha_pattern`: the first key that the end of the linear's name matches."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", linear):
            return value
    return default


def _same_backbone(one: str, other: str) -> bool:
    """The same name, or the same folder."""
    return one == other or (os.path.isdir(one) and os.path.isdir(other) and os.path.samefile(one, other))


def _file(repo: str | os.PathLike, name: str, download: dict[str, Any]) -> str:
    try:
        path = cached_file(repo, name, _raise_exceptions_for_missing_entries=False, **download)
    except EntryNotFoundError:
        path = None
    if path is None:
        raise OSError(f"'{repo}' holds no {name}; is it a PEFT adapter in safetensors form?")
    return path
