"""`hft demo`: six verifiable tasks in three levels, on a real 4-bit model, in minutes and without a network."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.utils import logging

import hft
from hft.files_hft import check_writable
from hft.hierarchy_hft import Hierarchy

from .compute_dtype import is_bfloat16_slow
from .demo_backbone import find_backbone
from .evaluation import EvalSet
from .hft_config import HFTTrainingConfig
from .hft_trainer import HFTTrainer
from .metrics import find_metric
from .report import REPORT_FILE
from .run_record import machine, versions, write_json
from .transfer import forgetting, format_matrix


@dataclass(frozen=True)
class DemoTask:
    """A family of reasoning-gym at one difficulty.

    Args:
        family: its name in reasoning-gym.
        parents: what it builds on.
        train: rows to learn from.
        max_new_tokens: where an answer is cut off.
        settings: the family's difficulty.
    """

    family: str
    parents: tuple[str, ...]
    train: int
    max_new_tokens: int
    settings: Mapping[str, Any] = field(default_factory=dict)


_SMALL = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
_PLAIN = {"operators": ("+", "-"), "allow_negation": False, "allow_parentheses": False}
TASKS = {
    "find": DemoTask("needle_haystack", (), 176, 8, {"min_num_statements": 3, "max_num_statements": 3}),
    "reverse": DemoTask("word_sequence_reversal", (), 192, 16, {"min_words": 3, "max_words": 3}),
    "add": DemoTask("chain_sum", (), 120, 5, _SMALL),
    "reverse-more": DemoTask("word_sequence_reversal", ("reverse",), 112, 20, {"min_words": 4, "max_words": 4}),
    "calculate": DemoTask("basic_arithmetic", ("add",), 96, 5, {**_SMALL, **_PLAIN}),
    "add-larger": DemoTask("chain_sum", ("calculate",), 176, 6, {**_SMALL, "max_digits": 2}),
}
NUM_TEST = 28  # questions a task, none of which stands in the training rows of its path
TRAIN_SEED, TEST_SEED = 1, 999
# One word instead of the model's own system prompt: half as many tokens.
SYSTEM = {"role": "system", "content": "Answer"}


def make_rows(task: DemoTask, count: int, seed: int, seen: set[str]) -> list[dict[str, Any]]:
    """Distinct questions of a task as chat rows, with reasoning-gym's own entry for the scorer.

    Args:
        task: the family and its difficulty.
        count: how many; fewer if the family does not have as many.
        seed: reasoning-gym's.
        seen: questions to leave out; the new ones are added.
    """
    import reasoning_gym

    rows = []
    for entry in reasoning_gym.create_dataset(task.family, size=20 * count, seed=seed, **task.settings):
        if entry["question"] in seen or len(rows) == count:
            continue
        seen.add(entry["question"])
        prompt = [SYSTEM, {"role": "user", "content": entry["question"]}]
        rows.append(
            {"prompt": prompt, "completion": [{"role": "assistant", "content": entry["answer"]}], "entry": entry}
        )
    return rows


def make_all_rows() -> tuple[dict[str, list[dict[str, Any]]], dict[str, list[dict[str, Any]]]]:
    """The training and the test rows of each task, as `make_rows` gives them; no test row was learnt on the task's path."""
    train, test, asked = {}, {}, {}
    tree = Hierarchy({name: task.parents for name, task in TASKS.items()})
    for name in tree.names:
        asked[name] = set()
        train[name] = make_rows(TASKS[name], TASKS[name].train, TRAIN_SEED, asked[name])
        seen = set().union(*(asked[node] for node in tree.path(name)))
        test[name] = make_rows(TASKS[name], NUM_TEST, TEST_SEED, seen)
    return train, test


def clear(folder: Path) -> None:
    """Removes the model of an earlier demo, finished or not.

    Raises:
        ValueError: a folder that holds another model.
    """
    if not (folder / "config.json").exists():
        return
    tasks = PreTrainedConfig.get_config_dict(folder)[0].get("tasks") or []
    if {task["name"] for task in tasks} != set(TASKS):
        raise ValueError(f"'{folder}' holds another model than the demo's; choose another folder: hft demo --out DIR.")
    shutil.rmtree(folder)


def run_demo(out: Path) -> dict[str, Any]:
    """Trains, evaluates, saves and loads again; prints what it does.

    Args:
        out: folder for `report.json` and the model; those of an earlier demo are replaced.

    Returns:
        What is in `report.json`: `forgetting` and `mean_gain_points` in accuracy points, `seconds`,
        `reload_max_abs_diff` of logits, accuracies, the matrix.

    Raises:
        ImportError: if a package of the extra `demo` is missing, or there is neither a hub nor the model's package.
        ValueError: if the folder holds another model.
    """
    start = time.monotonic()
    try:
        import reasoning_gym  # noqa: F401
    except ImportError as error:
        raise ImportError("`hft demo` needs reasoning-gym: pip install reasoning-gym.") from error
    check_writable(out)
    clear(out / "model")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bar()
    set_seed(0)
    backbone, source = find_backbone()
    dtype = torch.float32 if is_bfloat16_slow() else torch.bfloat16
    print(f"Backbone: {source}, held in NF4")
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    train_rows, test_rows = make_all_rows()
    train, test = {}, {}
    for name, task in TASKS.items():
        rows = [{key: row[key] for key in ("prompt", "completion")} for row in train_rows[name]]
        train[name] = Dataset.from_list(rows)
        metric = find_metric(f"reasoning_gym:{task.family}")
        test[name] = EvalSet(test_rows[name], metric, task.max_new_tokens)

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=True,
    )
    model = hft.HFTForCausalLM.from_backbone(
        backbone,
        {name: task.parents for name, task in TASKS.items()},
        quantization_config=nf4,
        dtype=dtype,
    )
    print("The hierarchy, each task with the rows that it learns from:\n")
    print(model.hierarchy.draw({name: f"({len(train[name])} x {task.family})" for name, task in TASKS.items()}))
    print()
    args = HFTTrainingConfig(
        output_dir=str(out / "model"),
        per_device_train_batch_size=8,
        per_device_eval_batch_size=32,
        num_train_epochs=1,
        learning_rate=3e-3,
        warmup_steps=3,
        logging_steps=1000,
        save_strategy="no",
        gradient_checkpointing=False,
        max_length=256,
        disable_tqdm=False,
        bf16=dtype == torch.bfloat16,
    )
    trainer = HFTTrainer(model, args, train_dataset=train, test_sets=test, processing_class=tokenizer)
    trainer.train()
    trainer.create_model_card()

    matrix = trainer.record.matrix()
    before, after = {task: score["score"] for task, score in trainer.record.before.items()}, matrix[-1]
    print("\nAccuracy (%) on held-out questions\n")
    print(f"{'task':<16}{'before':>8}{'after':>8}")
    for name in TASKS:
        print(f"{name:<16}{before[name]:>8.1f}{after[name]:>8.1f}")
    print("\nAccuracy (%) of each task after each stage\n")
    print(format_matrix(matrix, list(TASKS)))
    difference = _reload_difference(model, tokenizer, backbone, out / "model", test)
    report = {
        "forgetting": forgetting(matrix),
        "mean_gain_points": sum(after.values()) / len(after) - sum(before.values()) / len(before),
        "seconds": time.monotonic() - start,
        "reload_max_abs_diff": difference,
        "accuracy_before": before,
        "accuracy_after": after,
        "matrix": matrix,
        "test_questions": {name: len(data.rows) for name, data in test.items()},
        "train_questions": {name: len(rows) for name, rows in train.items()},
        "hierarchy": {name: list(task.parents) for name, task in TASKS.items()},
        "backbone": source,
        "machine": machine(),
        "versions": versions(),
    }
    write_json(out / "report.json", report)
    print(f"\nMean gain over the backbone: {report['mean_gain_points']:.1f} points")
    print(f"Forgetting: {report['forgetting']:.3f} points (from the answers generated after each stage)")
    print(f"Loaded again as remote code in a fresh process: logits differ by {difference}")
    print(f"{report['seconds']:.0f} s; the model is in {out / 'model'}, the numbers in {out / 'report.json'}")
    if (page := out / "model" / REPORT_FILE).exists():
        print(f"Pictures: open {page}")
    return report


_RELOAD = """
import sys
sys.modules["hft"] = None  # as where the package is not installed
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

folder, inputs, outputs, dtype = sys.argv[1:]
nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype,
                         bnb_4bit_use_double_quant=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=dtype, quantization_config=nf4)
with torch.inference_mode():
    inputs = load_file(inputs, device=str(model.device))
    save_file({task: model(ids, task=task).logits.cpu() for task, ids in inputs.items()}, outputs)
"""


def _reload_difference(
    model: hft.HFTForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    backbone: str,
    folder: Path,
    test: Mapping[str, EvalSet],
) -> float:
    """The largest difference of any logit between the model in memory and the saved one in a process without HFT."""
    prompts, dtype = {}, str(model.dtype).removeprefix("torch.")
    for task in [*test, "backbone"]:
        row = test.get(task, next(iter(test.values()))).rows[0]
        text = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
        prompts[task] = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    with tempfile.TemporaryDirectory() as temporary:
        inputs, outputs = Path(temporary) / "inputs.safetensors", Path(temporary) / "outputs.safetensors"
        save_file(prompts, inputs)
        environment = {**os.environ, "HF_MODULES_CACHE": str(Path(temporary) / "modules")}
        done = subprocess.run(
            [sys.executable, "-c", _RELOAD, str(folder.absolute()), str(inputs), str(outputs), dtype],
            cwd=temporary,
            env=environment,
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise RuntimeError(f"The saved model did not load in a fresh process: {done.stderr[-2000:]}")
        reloaded = load_file(outputs)
    model.eval()
    with torch.inference_mode():
        return max(
            float((model(ids.to(model.device), task=task).logits.cpu().float() - reloaded[task].float()).abs().max())
            for task, ids in prompts.items()
        )
