"""Exports that are checked each time: the files are read again by their own reader and must answer as HFT does."""

import copy
import json
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from hft.backbone_hft import check_unshared, decoder_of
from hft.files_hft import disk_errors, replacing
from hft.lora_io_hft import Factors, export_lora, path_factors

from .run_record import write_json, write_text


NOTES = "README.md"  # beside the folders of all tasks: how to serve them
NOTES_BEGIN = "# How to serve "

# What any model can be asked, where nothing better is given.
PROMPTS = (
    "What is the sentiment of the following paragraph? Choose one from the option.\nOptions: Bad, Good\nText: a masterpiece",
    "Write one sentence about the sea.",
    "12 + 30 =",
    "Is the following true or false? Water boils at a lower temperature on a mountain.",
)


@dataclass(frozen=True)
class Agreement:
    """How near the exported model is to HFT's, over all tokens of some prompts.

    Args:
        max_difference: of any logit.
        top1: share of positions with the same likeliest token, 0 to 1.
        kl: mean KL divergence of the exported from HFT's distribution, in nats a token.
    """

    max_difference: float
    top1: float
    kl: float


class ExportError(OSError):
    """The export was written, read again, and found to be another model."""


@torch.no_grad()
def logits_of(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], **which: Any
) -> list[torch.Tensor]:
    """The logits [T, V] of each prompt, one at a time, float32 on the CPU."""
    found = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
        found.append(model(input_ids=ids, use_cache=False, **which).logits[0].float().cpu())
    return found


def compare(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> Agreement:
    """How near two lists of logits [T, V] are."""
    one, other = torch.cat(list(ours)), torch.cat(list(theirs))
    kl = torch.nn.functional.kl_div(other.log_softmax(-1), one.log_softmax(-1), log_target=True, reduction="none").sum(
        -1
    )
    same = (one.argmax(-1) == other.argmax(-1)).float().mean()
    return Agreement(float((one - other).abs().max()), float(same), float(kl.mean().clamp(min=0)))


def export_peft(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    folder: Path,
    max_rank: int | None = None,
    prompts: Sequence[str] = PROMPTS,
    tolerance: float = 1e-3,
) -> dict[str, Any]:
    """Writes a task as a PEFT LoRA, reads it with PEFT on the same backbone, and compares.

    Args:
        model, task, max_rank: as for `export_lora`.
        tokenizer: the model's; saved beside it, with the chat template that the task learnt with.
        folder: made if missing.
        prompts: what both are asked.
        tolerance: the highest mean KL divergence, in nats a token; with `max_rank`, where the path is cut on purpose, it is
            reported only.

    Returns:
        What is written into `export.json`.

    Raises:
        ExportError: outside the tolerance; the files are removed.
        ValueError: as `export_lora`.
    """
    ours = logits_of(model, tokenizer, prompts, task=task)
    with written(folder, "adapter_config.json", "peft") as staging:
        report = export_lora(model, task, staging, max_rank)
        # PEFT stands its layers into the backbone in memory and takes them out again, so nothing is loaded twice.
        # It would compute 16-bit adapters in float32; without that its bits are ours, and the check sees the files alone.
        training = model.training
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by an older name
            peft = PeftModel.from_pretrained(model.backbone, staging, autocast_adapter_dtype=False)
        try:
            theirs = logits_of(peft.eval(), tokenizer, prompts)
        finally:
            peft.unload()
            model._finish()
            model.train(training)
        agreement = compare(ours, theirs)
        report = {"task": task, "form": "peft", **report, **asdict(agreement), "prompts": len(prompts)}
        check(report, tolerance if report["svd_error"] == 0 else None)
        tokenizer.save_pretrained(staging)
        write_json(staging / "export.json", report)
    return report


def export_merged(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    folder: Path,
    onto: str = "backbone",
    prompts: Sequence[str] = PROMPTS,
    tolerance: float = 1e-2,
) -> dict[str, Any]:
    """Writes a whole plain model: the backbone in 16 bit with a task's path added to its weights.

    Args:
        model: an HFT model; how it holds its backbone does not matter.
        tokenizer: saved beside it.
        task: whose path.
        folder: made if missing.
        onto: `"backbone"`: the 16-bit weights of the backbone's repository, which the reader is compared on, too;
            `"dequantized"`: what the 4-bit weights of this model stand for.
        prompts: what both are asked.
        tolerance: the highest mean KL divergence, in nats a token. Adding to 16-bit weights rounds them.

    Returns:
        What is written into `export.json`.

    Raises:
        ExportError: outside the tolerance; the files are removed.
        ValueError: an unknown task, an `onto` that is neither, or `"dequantized"` of a model that is not held in 4 bit.
    """
    factors = path_factors(model, task)
    plain = plain_backbone(model, onto)
    ours = on_plain(plain, factors, tokenizer, prompts)
    add_path(plain, factors)
    _end_alike(plain, model)
    with written(folder, "config.json", "merged") as staging:
        with disk_errors(folder):
            plain.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        dtype = plain.dtype
        del plain
        read = AutoModelForCausalLM.from_pretrained(staging, dtype=dtype)
        agreement = compare(ours, logits_of(read.eval(), tokenizer, prompts))
        report = {"task": task, "form": "merged", "onto": onto, "dtype": str(dtype), **asdict(agreement)}
        report["prompts"] = len(prompts)
        check(report, tolerance)
        write_json(staging / "export.json", report)
    return report


def write_serving_notes(folder: Path, backbone: str | None, tasks: Sequence[str], ranks: Sequence[int]) -> None:
    """A README beside a folder a task: the command lines that serve them all."""
    modules = " ".join(f"{task}={task}" for task in tasks)
    backbone = backbone or "BACKBONE"
    limits = f"--max-lora-rank {max(ranks)} --max-loras {len(tasks)}"
    text = f"""{NOTES_BEGIN}the adapters of {len(tasks)} tasks, each a plain PEFT LoRA on `{backbone}`

vLLM, all at once (a request names one by `"model": "{tasks[0]}"`):

```
vllm serve {backbone} --tokenizer {tasks[0]} --enable-lora {limits} --lora-modules {modules}
```

The tokenizer, in each folder the same, has the chat template that the tasks learnt with.

llama-server reads GGUF files instead, which `hft export MODEL FOLDER --all --to gguf` writes.

PEFT: `PeftModel.from_pretrained(backbone, "{tasks[0]}")`.
"""
    write_text(folder / NOTES, text)


def check_notes(folder: Path) -> None:
    """Raises ValueError if a folder has a README that is none of an export's, which one would overwrite."""
    notes = folder / NOTES
    if notes.exists() and not notes.read_text(errors="replace").startswith(NOTES_BEGIN):
        raise ValueError(f"'{notes}' would be overwritten by how to serve the exports; choose another folder.")


def plain_backbone(model: PreTrainedModel, onto: str = "backbone") -> PreTrainedModel:
    """The backbone by itself in 16 bit (in float32 if the model holds it so), on the CPU.

    Args:
        model: an HFT model.
        onto: `"backbone"`: the weights of the backbone's repository; `"dequantized"`: what the 4-bit weights of this model
            stand for.

    Raises:
        ValueError: an `onto` that is neither, `"dequantized"` of a model that is not held in 4 bit, or `"backbone"` of one
            whose repository holds it in 4 bit.
    """
    if onto not in ("backbone", "dequantized"):
        raise ValueError(f"`onto` is {onto!r}; it is 'backbone' or 'dequantized'.")
    if onto == "dequantized" and not _is_4bit(model):
        raise ValueError(
            "`onto` is 'dequantized', and this model's backbone is not in 4 bit: load it so (`--load_in_4bit`), or take "
            "'backbone'."
        )
    config = model.config
    dtype = torch.bfloat16 if model.backbone.dtype == torch.float32 and _is_4bit(model) else model.backbone.dtype
    text_config = AutoConfig.from_pretrained(config.backbone, revision=config.backbone_revision)
    if getattr(text_config, "quantization_config", None) is None:
        plain = AutoModelForCausalLM.from_pretrained(config.backbone, revision=config.backbone_revision, dtype=dtype)
    elif onto == "backbone":
        raise ValueError(
            f"'{config.backbone}' holds its weights quantised, so there are none in 16 bit to write; take what they stand "
            "for: --onto dequantized."
        )
    else:
        del text_config.quantization_config
        plain = AutoModelForCausalLM.from_config(text_config, dtype=dtype)
        whole = plain.state_dict()
        own = {name: it for name, it in model.backbone.state_dict().items() if name in whole}
        plain.load_state_dict({name: it for name, it in own.items() if it.shape == whole[name].shape}, strict=False)
    if onto == "dequantized":
        _take_weights(plain, model.backbone)
    return plain


def _end_alike(plain: PreTrainedModel, model: PreTrainedModel) -> None:
    """A plain model that generates as an HFT model does: training may have set other tokens that begin and end a text."""
    plain.generation_config = copy.deepcopy(model.generation_config)
    vars(plain.generation_config).pop("task", None)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if (token := getattr(model.generation_config, name, None)) is not None:
            setattr(plain.config, name, token)


@torch.no_grad()
def add_path(plain: PreTrainedModel, factors: Factors) -> None:
    """Adds a path to the weights of a plain backbone, in place; ValueError if two of its linears share one."""
    decoder = decoder_of(plain)
    check_unshared(decoder, factors)
    for name, (A_RI, B_OR) in factors.items():
        weight_OI = decoder.get_submodule(name).weight
        weight_OI.copy_((weight_OI.float() + B_OR.float().cpu() @ A_RI.float().cpu()).to(weight_OI.dtype))


def check_free(folder: Path, form: str | None) -> None:
    """Whether an export may be written into a folder: not where a model or an export of another form is.

    Args:
        folder: need not be there.
        form: `"peft"`, `"merged"` or `"gguf"`, whose files of a model and of its LoRAs may lie side by side; None: folders
            of exports.

    Raises:
        ValueError: it may not.
    """
    before = folder / "export.json"
    if before.is_file():
        try:
            other = json.loads(before.read_text())["form"]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"'{before}' is not what an export writes ({error!r}); remove it, or choose another folder."
            ) from error
        if form is None or not other.startswith(form):
            raise ValueError(f"'{folder}' holds an export of another form ({other}); choose another folder.")
    elif found := [name for name in ("config.json", "adapter_config.json") if (folder / name).exists()]:
        raise ValueError(
            f"'{folder}' holds a model already ({found[0]}), which would be overwritten; choose another folder."
        )


@contextmanager
def written(folder: Path, last: str, form: str) -> Iterator[Path]:
    """A folder to write into and to check in; its files appear in `folder` only if the block ends without an error.

    Raises:
        ValueError: a folder that is not free, see `check_free`.
    """
    check_free(folder, form)
    with replacing(folder, last=last) as staging, tempfile.TemporaryDirectory(dir=staging) as work:
        yield Path(work)
        for path in Path(work).iterdir():
            shutil.move(path, staging / path.name)


def check(report: dict[str, Any], tolerance: float | None) -> None:
    """Lets a report within the tolerance pass; None lets all pass.

    Raises:
        ExportError: outside of it.
    """
    if tolerance is not None and not report["kl"] <= tolerance:
        raise ExportError(
            f"The exported {report['form']} of task {report['task']!r} does not answer as HFT does: mean KL "
            f"{report['kl']:.2g} nats a token (tolerance {tolerance:g}), top-1 agreement {report['top1']:.3f}, largest "
            f"difference of a logit {report['max_difference']:.3g}. Nothing was written."
        )


def on_plain(plain: PreTrainedModel, factors: Factors, tokenizer: Any, prompts: Sequence[str]) -> list[torch.Tensor]:
    """The logits of a plain backbone with a path added beside its linears, as HFT computes it."""

    def add(module: Any, args: Any, y: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        return y + (args[0] @ A.T.to(args[0])) @ B.T.to(args[0])

    hooks = []
    for name, (A_RI, B_OR) in factors.items():
        linear = decoder_of(plain).get_submodule(name)
        hooks.append(linear.register_forward_hook(lambda m, a, y, A=A_RI, B=B_OR: add(m, a, y, A, B)))
    try:
        return logits_of(plain.eval(), tokenizer, prompts)
    finally:
        for hook in hooks:
            hook.remove()


def _is_4bit(model: PreTrainedModel) -> bool:
    return getattr(model, "is_loaded_in_4bit", False)


@torch.no_grad()
def _take_weights(plain: PreTrainedModel, backbone: PreTrainedModel) -> None:
    """Overwrites the weights of a plain model by what the 4-bit weights of another stand for."""
    for name, module in backbone.named_modules():
        weight = getattr(module, "weight", None)
        state = getattr(weight, "quant_state", None)
        if state is not None:
            from bitsandbytes.functional import dequantize_4bit

            plain.get_submodule(name).weight.copy_(dequantize_4bit(weight.data, state))
