"""The examples run as a reader would run them, and the flat loop is the trainer's twin."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

import hft
from hft.trainers import HFTTrainer, HFTTrainingConfig
from hft.trainers.row_tokens import tokenize_rows

from .tiny import snapshot


EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.mark.parametrize("times", [1, 2])
def test_quickstart(backbones, tmp_path, monkeypatch, capsys, times):
    arguments = ["--backbone", str(backbones["llama"]), "--out", str(tmp_path), "--max_steps", "2"]
    for _ in range(times):
        run("quickstart.py", monkeypatch, *arguments)
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()[-3:]] == [
        "backbone",
        "parity",
        "two-more",
    ]
    assert hft.HFTForCausalLM.from_pretrained(tmp_path).hierarchy.path("two-more") == ("parity", "two-more")


@pytest.mark.parametrize("from_file", [False, True])
def test_train(backbones, tmp_path, monkeypatch, from_file):
    rows = [{"prompt": f"say {i}", "completion": f" {i}"} for i in range(6)]
    for task in "ab":
        (tmp_path / f"{task}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    values = {
        "backbone": str(backbones["llama"]),
        "hierarchy": '{"both": [], "a": ["both"], "b": ["both"]}',
        "mixtures": '{"both": ["a", "b"]}',
        "files": json.dumps({task: str(tmp_path / f"{task}.jsonl") for task in "ab"}),
        "output_dir": str(tmp_path / "out"),
        "max_steps": 2,
        "task_learning_rates": '{"b": 1e-4}',
    }
    if from_file:
        (tmp_path / "mine.yaml").write_text(json.dumps(values))  # JSON is YAML
        arguments = ["--config", str(tmp_path / "mine.yaml")]
    else:
        arguments = [word for key, value in values.items() for word in (f"--{key}", str(value))]
    run("train.py", monkeypatch, *arguments)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(task["sealed"] for task in model.config.tasks)
    budget = json.loads((tmp_path / "out/run.json").read_text())["budget"]
    assert budget["task_learning_rates"] == {"b": 1e-4} and budget["mixtures"] == {"both": ["a", "b"]}


@pytest.mark.parametrize("text", ["true", "True", "FOLDER"])
def test_train_goes_on_with_an_interrupted_run(backbones, tmp_path, monkeypatch, text):
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "say 1", "completion": " 1"}))
    values = {"backbone": backbones["llama"], "hierarchy": '{"a": []}', "files": f'{{"a": "{tmp_path / "a.jsonl"}"}}',
              "output_dir": tmp_path / "out", "max_steps": 1}  # fmt: skip
    arguments = [word for key, value in values.items() for word in (f"--{key}", str(value))]
    run("train.py", monkeypatch, *arguments)
    before = (tmp_path / "out/config.json").read_bytes()
    resume = text.replace("FOLDER", str(tmp_path / "out"))
    run("train.py", monkeypatch, *arguments, "--resume_from_checkpoint", resume)
    assert (tmp_path / "out/config.json").read_bytes() == before
    with pytest.raises(ValueError, match="'/no/run' holds no run to resume"):
        run("train.py", monkeypatch, *arguments, "--resume_from_checkpoint", "/no/run")


def test_train_loop(backbones, tmp_path, monkeypatch, capsys):
    run(
        "train_loop.py", monkeypatch, "--backbone", str(backbones["llama"]), "--out", str(tmp_path), "--max_steps", "2"
    )
    assert "stage 2/2: products  step 2/2  loss" in capsys.readouterr().out
    assert hft.HFTForCausalLM.from_pretrained(tmp_path).hierarchy.names == ("sums", "differences", "products")


def test_the_flat_loop_and_the_trainer_learn_the_same(backbones, tokenizer, tmp_path):
    loop = runpy.run_path(str(EXAMPLES / "train_loop.py"))
    hierarchy = {"sums": [], "differences": [], "products": ["sums"]}
    rows = {task: loop["toy_rows"](task, 9 + i) for i, task in enumerate(hierarchy)}

    def model():
        torch.manual_seed(0)
        return hft.HFTForCausalLM.from_backbone(backbones["llama"], hierarchy, rank=3)

    by_loop = model()
    tokens = {task: tokenize_rows(made, tokenizer) for task, made in rows.items()}
    loop["train"](by_loop, tokens, tokenizer.pad_token_id, epochs=2, batch_size=2, accumulation=2)

    by_trainer = model()
    args = HFTTrainingConfig(
        output_dir=str(tmp_path), num_train_epochs=2, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        bf16=False, gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    data = {task: Dataset.from_list(made) for task, made in rows.items()}
    HFTTrainer(by_trainer, args, train_dataset=data, processing_class=tokenizer).train()
    loop_weights, trainer_weights = dict(by_loop.named_parameters()), dict(by_trainer.named_parameters())
    for name, weight in loop_weights.items():
        # Weights move by about 1e-2; where a gradient is next to nothing, Adam makes its rounding a thousandth of a step.
        torch.testing.assert_close(weight, trainer_weights[name], rtol=1e-5, atol=1e-5, msg=name)
    assert snapshot(by_loop) != snapshot(model())


def test_a_shelf_of_loras(backbones, tmp_path, monkeypatch, capsys):
    arguments = ["--backbone", str(backbones["llama"]), "--out", str(tmp_path), "--max_steps", "1"]
    run("shelf_of_loras.py", monkeypatch, *arguments)
    lines = capsys.readouterr().out.splitlines()[-4:]
    assert [line.split(" -> ")[1].split(" ")[0] for line in lines[:3]] == ["shout", "spell", "count"]
    assert hft.HFTForCausalLM.from_pretrained(tmp_path / "model").hierarchy.names == ("shout", "spell", "count")
