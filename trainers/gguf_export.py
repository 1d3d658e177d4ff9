"""Exports as GGUF files, checked each time: read again by transformers, and by llama.cpp itself where it is installed."""

import contextlib
import copy
import importlib.util
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from hft.hierarchy_hft import BACKBONE
from hft.lora_io_hft import Factors, cut_path, path_factors

from .export import (
    NOTES,
    NOTES_BEGIN,
    PROMPTS,
    ExportError,
    add_path,
    check,
    compare,
    logits_of,
    on_plain,
    plain_backbone,
    written,
)
from .gguf_files import ROPE_FACTORS, check_backbone, read_lora_gguf, write_lora, write_model
from .gguf_vocabulary import pre_tokenizer_of
from .run_record import write_json, write_text


# Where ways to split a text into tokens part.
HARD_TO_SPLIT = "It's 1999,\n\n  12 apples\tand  naïve café's: 東京 😀 ___ 3.14159   "


def export_gguf_lora(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    folder: Path,
    max_rank: int | None = None,
    backbone: Path | None = None,
    onto: str = "backbone",
    prompts: Sequence[str] = PROMPTS,
    tolerance: float = 1e-3,
    llama_tolerance: float = 1e-3,
) -> dict[str, Any]:
    """Writes a task's path as `<task>.gguf` for llama.cpp's `--lora`, reads it again, and compares on the same backbone.

    Args:
        model, task, max_rank: as for `export_lora`; the rank is not padded.
        tokenizer: the model's.
        folder: made if missing.
        backbone: the backbone's GGUF file, on which llama.cpp runs the LoRA, too, if llama-cpp-python is installed; without
            it, one is written for that.
        onto: what the backbone's file stands for, see `export_merged`.
        prompts: what all are asked.
        tolerance: the highest mean KL divergence, in nats a token; with `max_rank`, where the path is cut on purpose, it is
            reported only.
        llama_tolerance: the same for llama.cpp, from what HFT computes in float32.

    Returns:
        What is written into `export.json`.

    Raises:
        ExportError: outside the tolerance; the files are removed.
        ValueError: an unknown task, a rank below 1, a backbone that cannot be written.
    """
    config = model.backbone.config
    check_backbone(config)
    whole = path_factors(model, task)
    factors, error = cut_path(whole, max_rank)
    ours = logits_of(model, tokenizer, prompts, task=task)
    with written(folder, "export.json", "gguf") as staging:
        path = staging / f"{task}.gguf"
        write_lora(factors, config, path, f"{_base_name(model)} {task}", task)
        read = read_lora_gguf(path, config)
        training = model.training
        theirs = on_plain(model.backbone, read, tokenizer, prompts)
        model.train(training)
        report = {
            "task": task,
            "form": "gguf",
            "rank": max(len(A_RI) for A_RI, _ in factors.values()),
            "path_rank": max(len(A_RI) for A_RI, _ in whole.values()),
            "svd_error": error,
            **asdict(compare(ours, theirs)),
            "prompts": len(prompts),
        }
        check(report, None if error else tolerance)
        if has_llama():
            plain = plain_backbone(model, onto)
            exact = _exactly(plain, factors, tokenizer, prompts)
            with tempfile.TemporaryDirectory(dir=staging) as work:
                if backbone is None:
                    backbone = Path(work) / f"{BACKBONE}.gguf"
                    write_model(plain, tokenizer, backbone, BACKBONE)
                report["llama_cpp"] = _by_llama(backbone, tokenizer, prompts, exact, report, llama_tolerance, path)
        write_json(staging / "export.json", report)
    return report


def export_gguf_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    folder: Path,
    onto: str = "backbone",
    prompts: Sequence[str] = PROMPTS,
    tolerance: float = 1e-2,
    llama_tolerance: float = 1e-2,
) -> dict[str, Any]:
    """Writes a whole 16-bit model, with tokenizer and chat template; reads it again and compares.

    The file is `<task>.merged.gguf`, or `backbone.gguf` where no path is added.

    Args:
        model: an HFT model; how it holds its backbone does not matter.
        tokenizer: the model's.
        task: whose path is added; `"backbone"` adds none.
        folder: made if missing.
        onto: as for `export_merged`.
        prompts: what both are asked.
        tolerance: the highest mean KL divergence, in nats a token. Adding to 16-bit weights rounds them.
        llama_tolerance: the same for llama.cpp, if it is installed, from what HFT computes in float32.

    Returns:
        What is written into `export.json`.

    Raises:
        ExportError: outside the tolerance, or prompts are split into other tokens; the files are removed.
        ValueError: an unknown task, an `onto` that is neither, or `"dequantized"` of a model that is not held in 4 bit; a
            backbone or tokenizer that cannot be written.
    """
    check_backbone(model.backbone.config)
    pre_tokenizer_of(tokenizer)
    factors = {} if task == BACKBONE else path_factors(model, task)
    plain = plain_backbone(model, onto)
    ours = on_plain(plain, factors, tokenizer, prompts)
    exact = _exactly(plain, factors, tokenizer, prompts) if has_llama() else None
    add_path(plain, factors)
    with written(folder, "export.json", "gguf") as staging:
        path = staging / (f"{task}.gguf" if task == BACKBONE else f"{task}.merged.gguf")  # beside its LoRA
        write_model(plain, tokenizer, path, f"{_base_name(model)} {task}")
        config = plain.config
        del plain
        _check_tokens("transformers", AutoTokenizer.from_pretrained(staging, gguf_file=path.name), tokenizer, prompts)
        agreement = compare(ours, logits_of(_read_model(path, config), tokenizer, prompts))
        report = {"task": task, "form": "gguf model", "onto": onto, "dtype": "torch.float16", **asdict(agreement)}
        report["prompts"] = len(prompts)
        check(report, tolerance)
        if exact is not None:
            report["llama_cpp"] = _by_llama(path, tokenizer, prompts, exact, report, llama_tolerance)
        write_json(staging / "export.json", report)
    return report


def write_llama_notes(folder: Path, backbone: str | None, tasks: Sequence[str]) -> None:
    """A README beside a folder a task and one for the backbone: the command line that serves them all."""
    loras = ",".join(f"{task}/{task}.gguf:0" for task in tasks)
    text = f"""{NOTES_BEGIN}{len(tasks)} tasks, each a LoRA on `{backbone or "the backbone"}`, as GGUF files

```
llama-server -m {BACKBONE}/{BACKBONE}.gguf --lora-scaled {loras}
```

All are loaded with scale 0. Each request names the one that it wants, by its place in that line:
`"lora": [{{"id": 0, "scale": 1.0}}]` is `{tasks[0]}`, and `"lora": [{{"id": 0, "scale": 0.0}}]` is the plain backbone. Say
it in every request: one that does not may be answered from what llama-server kept of another task's prompt. One task only:

```
llama-cli -m {BACKBONE}/{BACKBONE}.gguf --lora {tasks[0]}/{tasks[0]}.gguf
```
"""
    write_text(folder / NOTES, text)


def has_llama() -> bool:
    """Whether llama-cpp-python is installed."""
    return importlib.util.find_spec("llama_cpp") is not None


def llama_logits(
    model: Path, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], lora: Path | None = None
) -> list[torch.Tensor]:
    """The logits [T, V] of each prompt, as llama.cpp computes them.

    Raises:
        ExportError: if llama.cpp cannot load the files, or splits a text into other tokens than the tokenizer.
    """
    from llama_cpp import Llama

    lengths = [len(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    try:
        llama = Llama(
            str(model),
            lora_path=None if lora is None else str(lora),
            n_ctx=max(256, *lengths),
            logits_all=True,
            verbose=False,
        )
    except (ValueError, RuntimeError) as error:
        raise ExportError(f"llama.cpp does not load what was written ({error}). Nothing was written.") from error
    with contextlib.closing(llama):
        found = []
        for prompt in (*prompts, HARD_TO_SPLIT):
            tokens = llama.tokenize(prompt.encode(), add_bos=True, special=True)
            _check_same("llama.cpp", tokens, tokenizer(prompt)["input_ids"], prompt)
        for prompt in prompts:
            tokens = tokenizer(prompt)["input_ids"]
            llama.reset()
            llama.eval(tokens)
            found.append(torch.from_numpy(llama.scores[: len(tokens)].copy()))
    return found


def _by_llama(
    model: Path,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    ours: Sequence[torch.Tensor],
    report: dict[str, Any],
    tolerance: float,
    lora: Path | None = None,
) -> dict[str, float]:
    agreement = asdict(compare(ours, llama_logits(model, tokenizer, prompts, lora)))
    check({**report, **agreement, "form": f"{report['form']} in llama.cpp"}, tolerance)
    return agreement


def _read_model(path: Path, config: Any) -> PreTrainedModel:
    """A whole model's file, read by transformers in the dtype that it has."""
    found = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    found.head_dim = config.head_dim  # in the file, but transformers' reader takes Qwen3's default
    factors = [torch.from_numpy(one.data.copy()) for one in GGUFReader(path).tensors if one.name == ROPE_FACTORS]
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would advise float32 for speed
    try:
        read = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, config=found, dtype=config.dtype
        ).eval()
    finally:
        logging.set_verbosity(verbosity)
    for factors_F in factors:  # in Llama 3's file, and transformers' reader skips them
        read.base_model.rotary_emb.inv_freq /= factors_F
    return read


def _exactly(plain: PreTrainedModel, factors: Factors, tokenizer: Any, prompts: Sequence[str]) -> list[torch.Tensor]:
    """As `on_plain`, in float32: else most of the distance to llama.cpp would be the rounding of HFT's own activations."""
    return on_plain(copy.deepcopy(plain).float(), factors, tokenizer, prompts)


def _check_tokens(reader: str, theirs: Any, ours: PreTrainedTokenizerBase, prompts: Sequence[str]) -> None:
    for prompt in prompts:
        _check_same(reader, theirs(prompt)["input_ids"], ours(prompt)["input_ids"], prompt)


def _check_same(reader: str, theirs: Sequence[int], ours: Sequence[int], prompt: str) -> None:
    if list(theirs) != list(ours):
        raise ExportError(
            f"The exported gguf model is split into other tokens by {reader}: {prompt[:40]!r} becomes {len(theirs)} "
            f"tokens, {len(ours)} in HFT. Nothing was written."
        )


def _base_name(model: PreTrainedModel) -> str:
    """What a backbone is called without its owner or folder."""
    return Path(model.config.backbone or BACKBONE).name
