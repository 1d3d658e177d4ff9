"""All of HFT on another device than the CPU: a pretended one, whose tensors refuse to meet those of the CPU."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils import backend_registration
from transformers import AutoTokenizer

import hft
from hft.trainers import HFTTrainer, HFTTrainingConfig
from hft.trainers.evaluation import EvalSet

from .test_trainer import rows


ROOT = Path(__file__).parent.parent
TREE = {"a": [], "b": ["a"], "c": []}


def train(base: str, folder: Path, place: Callable) -> list[float]:
    """Two stages that mix tasks, evaluate, shrink gates, score and save, of a model that `place` brings to where it trains.

    Gives the losses of the steps. (A run is not resumed: a pretended device's tensors are of a class that is not unpickled.)
    """
    torch.manual_seed(0)
    model = place(
        hft.HFTForCausalLM.from_backbone(base, TREE, rank=3, memory_config={"slots": 2}, attn_implementation="eager")
    )
    data = {name: rows(10 * i, 8) for i, name in enumerate(TREE)}
    args = HFTTrainingConfig(
        str(folder), num_train_epochs=1, per_device_train_batch_size=2, gradient_accumulation_steps=2, bf16=False,
        learning_rate=1e-2, logging_steps=1, eval_strategy="steps", eval_steps=2, save_steps=1, gate_shrink=0.1,
        mastery_patience=9, report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    questions = EvalSet([{"prompt": "t0t plus 1 is", "completion": " 1"}] * 2, "exact_match")
    trainer = HFTTrainer(
        model, args, train_dataset=data, eval_dataset=data, test_sets={"a": questions},
        processing_class=AutoTokenizer.from_pretrained(base),
    )  # fmt: skip
    devices = {args.device, *getattr(model, "hf_device_map", {}).values()}
    assert {parameter.device for parameter in model.parameters()} == devices
    trainer.train()
    assert {parameter.device for parameter in model.parameters()} == devices
    assert set(model.config.sealed_tasks()) == set(TREE)
    return [log["loss"] for log in trainer.log_history if "loss" in log]


def on_the_device(what: str, base: str, folder: Path, **environment: str) -> None:
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this PyTorch has no devices in Python")
    done = subprocess.run(
        [sys.executable, "-m", "tests.on_device", what, base, str(folder)],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_model_there_is_as_here_and_waits_for_nothing(backbones, tmp_path):
    on_the_device("model", str(backbones["llama"]), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["trainer", "split"])
def test_it_learns_there_what_it_learns_here(backbones, tokenizer, tmp_path, what):
    """All on the device, or all but the head."""
    base = str(backbones["llama"])
    on_the_device(what, base, tmp_path, ACCELERATE_TORCH_DEVICE="card:0")
    there = json.loads((tmp_path / "losses.json").read_text())
    assert there == pytest.approx(train(base, tmp_path / "here", lambda model: model), rel=1e-5)
