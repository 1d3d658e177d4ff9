"""Several processes: two with 2 rows each learn what one with 4 rows learns, stages, resuming and files included."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hft
from hft.trainers import HFTTrainingConfig
from hft.trainers.processes import check_fsdp

from .test_trainer import make
from .tiny import bits, free_port


ROOT = Path(__file__).parent.parent
OPTIONS = {"bf16": False, "save_steps": 2, "gradient_checkpointing": False, "num_train_epochs": 2, "logging_steps": 1,
           "learning_rate": 1e-2, "disable_tqdm": True, "report_to": "none", "use_cpu": True}  # fmt: skip
TWO = {"a": [], "e": [], "b": ["a", "e"]}
KILLED = 3  # as worker.py's `Kill` ends


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"]


def launch(spec: dict, folder: Path, code: int = 0, file: str | None = None, worker: str = "worker.py") -> list[dict]:
    """Runs two processes to their end, by torchrun or with a configuration that is shipped; what each of them saw."""
    (folder / "spec.json").write_text(json.dumps(spec))
    port = free_port()
    if file is None:
        command = [*TORCHRUN, str(port)]
    else:
        path = str(ROOT / "hub_configs/accelerate" / file)
        command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", path]
        command += ["--mixed_precision", "bf16" if spec["options"]["bf16"] else "no", "--main_process_port", str(port)]
    package = str(Path(importlib.util.find_spec("hft").origin).parent.parent)
    paths = os.pathsep.join([str(ROOT), package, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, str(ROOT / "tests" / worker), str(folder / "spec.json")],
        capture_output=True, text=True, timeout=540, env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert (done.returncode == 0) == (code == 0), done.stderr[-4000:]
    if code:  # of the one that killed itself, not of one that failed before
        assert re.search(rf"exitcode *: {code}\b", done.stderr), done.stderr[-4000:]
    if code or worker != "worker.py":
        return []
    return [json.loads(Path(spec["out"] + f".{rank}.json").read_text()) for rank in range(2)]


def described(backbones, folder: Path, hierarchy=TWO, batch: int = 2, accumulation: int = 1, **more) -> dict:
    options = {**OPTIONS, "per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    options.update(more.pop("options", {}))
    return {"backbone": str(backbones["llama"]), "hierarchy": hierarchy, "out": str(folder / "run"),
            "options": options, **more}  # fmt: skip


def check_same(seen, folder: Path, single) -> None:
    """Logs, weights and files of two processes against one."""
    assert [one["world"] for one in seen] == [2, 2]
    assert seen[0]["tasks"] == seen[1]["tasks"]  # in each micro-batch both hold the same task
    # Not `num_tokens`: TRL counts anew after resuming, and counted fewer with one packed row a process.
    keys = ("loss", "grad_norm", "learning_rate", "stage", *(f"{task}_loss" for task in TWO))
    logs = [
        [{key: log[key] for key in keys if key in log} for log in one] for one in (seen[0]["log"], single.log_history)
    ]
    assert len(logs[0]) == len(logs[1])
    for two, one in zip(*logs, strict=True):
        assert two == pytest.approx(one, rel=1e-3)
    weights = [torch.load(f"{folder}/run.{rank}.pt") for rank in range(2)]
    for name, parameter in single.model.named_parameters():
        if name.startswith("hft_"):
            assert bits(weights[0][name]) == bits(weights[1][name]), name
            torch.testing.assert_close(weights[0][name], parameter, rtol=1e-3, atol=1e-4, msg=name)
    saved = dict(hft.HFTForCausalLM.from_pretrained(f"{folder}/run").named_parameters())
    assert all(bits(saved[name]) == bits(weight) for name, weight in weights[0].items())
    assert not list(Path(f"{folder}/run").rglob(".writing-*"))
    code = {path.name for path in Path(f"{folder}/single").glob("*.py")}
    assert {path.name for path in Path(f"{folder}/run").glob("*.py")} == code and "modeling_hft.py" in code
    assert json.loads(Path(f"{folder}/run/config.json").read_text())["architectures"] == ["HFTForCausalLM"]


def keep_last(seen, single, is_resumed: bool = True) -> None:
    """Of the logs, what came after resuming: less than all, unless the run was killed before its first checkpoint."""
    last, all_logs = ([log for log in logs if "loss" in log] for logs in (seen[0]["log"], single.log_history))
    assert (0 < len(last) < len(all_logs)) == is_resumed
    seen[0]["log"], single.log_history = last, all_logs[-len(last) :]


def one_process(backbones, tokenizer, folder, hierarchy=TWO, batch: int = 4, **options):
    single = make(
        backbones, tokenizer, folder / "single", hierarchy, memory={"slots": 2}, per_device_train_batch_size=batch,
        **{**OPTIONS, "gradient_accumulation_steps": 1, **options},
    )  # fmt: skip
    single.train()
    return single


def test_two_processes_learn_what_one_learns(backbones, tokenizer, tmp_path):
    seen = launch(described(backbones, tmp_path), tmp_path)
    assert set(seen[0]["tasks"]) == set(TWO)
    check_same(seen, tmp_path, one_process(backbones, tokenizer, tmp_path))


@pytest.mark.slow
def test_two_processes_agree_when_a_task_has_left_the_steps_that_it_shares(backbones, tmp_path):
    """DDP averages with a step's last micro-batch, which must not be one that computes nothing."""
    options = {"eval_strategy": "steps", "eval_steps": 1, "mastery_patience": 99, "num_train_epochs": 4}
    spec = described(backbones, tmp_path, {"a": [], "e": []}, accumulation=4, options=options, mastered=["e", 1])
    seen = launch(spec, tmp_path)
    turns = seen[0]["tasks"]
    steps = [turns[begin : begin + 4] for begin in range(0, len(turns), 4)]
    assert any(set(step) == {"a", "e"} for step in steps[1:])
    one, other = (torch.load(f"{tmp_path}/run.{rank}.pt") for rank in range(2))
    assert {name: bits(w) for name, w in one.items()} == {name: bits(w) for name, w in other.items()}


@pytest.mark.slow
def test_two_processes_log_a_tasks_own_loss_however_tokens_are_counted(backbones, tmp_path):
    options = {"average_tokens_across_devices": False, "learning_rate": 0.0, "num_train_epochs": 1}
    seen = launch(described(backbones, tmp_path, {"a": [], "e": []}, options=options), tmp_path)
    logs = [log for log in seen[0]["log"] if "loss" in log]
    assert logs and all(log["loss"] == pytest.approx(log.get("a_loss", log.get("e_loss")), rel=1e-4) for log in logs)


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 4, 5])
def test_killed_and_resumed_two_processes_learn_what_one_learns(backbones, tokenizer, tmp_path, step):
    """Killed before the first checkpoint, in the middle of a second epoch, and in the second stage; accumulating."""
    spec = described(backbones, tmp_path, accumulation=2, options={"save_steps": 3 if step == 4 else 2})
    launch({**spec, "kill": step}, tmp_path, code=KILLED)
    seen = launch({**spec, "resume": True}, tmp_path)
    single = one_process(backbones, tokenizer, tmp_path, gradient_accumulation_steps=2)
    keep_last(seen, single, is_resumed=step > 1)
    check_same(seen, tmp_path, single)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True},
        {"packing": True, "max_length": 40, "per_device_train_batch_size": 1},
        {"gate_shrink": 1.0, "max_grad_norm": 0.1},
        {"torch_compile": True, "torch_compile_backend": "aot_eager"},
        {"task_learning_rates": {"e": 1e-3, "b": 5e-3}, "page_tasks": ["a", "b"], "task_passes": {"a": 0.5}},
    ],
    ids=lambda options: next(iter(options)),
)
def test_two_processes_also_in_these_ways(backbones, tokenizer, tmp_path, options):
    seen = launch(described(backbones, tmp_path, options=options), tmp_path)
    batch = 2 * options.get("per_device_train_batch_size", 2)
    rest = {name: value for name, value in options.items() if name != "per_device_train_batch_size"}
    check_same(seen, tmp_path, one_process(backbones, tokenizer, tmp_path, batch=batch, **rest))


@pytest.mark.slow
def test_two_processes_in_nf4(backbones, tmp_path):
    """Both hold the same weights at the end, gates in float32."""
    seen = launch(described(backbones, tmp_path, nf4=True, options={"bf16": True}), tmp_path)
    assert seen[0]["tasks"] == seen[1]["tasks"] and seen[0]["log"][-1]["stage"] == 2
    one, other = (torch.load(f"{tmp_path}/run.{rank}.pt") for rank in range(2))
    assert {name: bits(w) for name, w in one.items()} == {name: bits(w) for name, w in other.items()}
    assert {w.dtype for name, w in one.items() if "gates" in name} == {torch.float32}


@pytest.mark.slow
def test_accelerate_launch_with_the_shipped_file(backbones, tokenizer, tmp_path):
    seen = launch(described(backbones, tmp_path), tmp_path, file="ddp.yaml")
    check_same(seen, tmp_path, one_process(backbones, tokenizer, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options, step",
    [
        ({"task_learning_rates": {"e": 1e-3, "b": 5e-3}, "page_tasks": ["a", "b"]}, 8),
        ({"gradient_accumulation_steps": 2}, 5),  # a and e share steps
    ],
)
def test_a_sharded_backbone_learns_what_a_whole_one_learns(backbones, tokenizer, tmp_path, options, step):
    """accelerate's FSDP2, by the file that is shipped; killed in the second stage and resumed."""
    spec = described(backbones, tmp_path, fsdp=True, options=options)
    launch({**spec, "kill": step}, tmp_path, code=KILLED, file="fsdp2.yaml")
    seen = launch({**spec, "resume": True}, tmp_path, file="fsdp2.yaml")
    single = one_process(backbones, tokenizer, tmp_path, **options)
    keep_last(seen, single)
    check_same(seen, tmp_path, single)
    assert not list((tmp_path / "run").rglob("*.distcp"))  # no shares: a checkpoint is what it is without FSDP


@pytest.mark.slow
def test_a_sharded_nf4_backbone_trains(backbones, tmp_path):
    """QLoRA's weights are sharded in bfloat16 storage; gates stay float32 beside them."""
    spec = described(backbones, tmp_path, fsdp=True, nf4=True, options={"bf16": True})
    seen = launch(spec, tmp_path, file="fsdp2.yaml")
    assert seen[0]["tasks"] == seen[1]["tasks"] and seen[0]["log"][-1]["stage"] == 2
    one, other = (torch.load(f"{tmp_path}/run.{rank}.pt") for rank in range(2))
    assert {name: bits(w) for name, w in one.items()} == {name: bits(w) for name, w in other.items()}
    assert {w.dtype for name, w in one.items() if "gates" in name} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("nf4", [False, True])
def test_fully_shard_computes_what_the_whole_model_computes(backbones, tmp_path, nf4):
    """PyTorch's own function on a model, without trainer or accelerate: logits and gradients."""
    spec = described(backbones, tmp_path, nf4=nf4)
    launch(spec, tmp_path, worker="shard_worker.py")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fsdp_version": 1}, "HFT trains under FSDP version 2 only; set `fsdp_version: 2`"),
        (
            {"fsdp_version": 2, "cpu_ram_efficient_loading": True},
            "`fsdp_cpu_ram_efficient_loading` loads weights in one",
        ),
    ],
)
def test_ways_of_fsdp_that_would_go_wrong_are_refused(options, message):
    from accelerate.utils import FullyShardedDataParallelPlugin

    with pytest.raises(ValueError, match=re.escape(message)):
        check_fsdp(FullyShardedDataParallelPlugin(**options))
    check_fsdp(FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False))


def test_the_shipped_files_are_accelerates(tmp_path):
    from accelerate.commands.config.config_args import load_config_from_file

    for file in sorted((ROOT / "hub_configs/accelerate").glob("*.yaml")):
        config = load_config_from_file(str(file))  # refuses unknown keys
        assert config.num_processes == 2 and config.mixed_precision == "bf16"


def test_reentrant_checkpointing_in_several_processes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(HFTTrainingConfig, "world_size", 2)
    message = "Reentrant checkpointing hides from DDP which parameters a step uses, and there are 2 processes; leave"
    with pytest.raises(ValueError, match=re.escape(message)):
        HFTTrainingConfig(str(tmp_path), gradient_checkpointing_kwargs={"use_reentrant": True})


def test_a_process_that_does_not_write_does_not_clean_up(tmp_path):
    from hft.trainers.checkpoints import RunFolder

    (tmp_path / ".writing-1").mkdir()
    RunFolder(tmp_path, writes=False).begin()
    assert (tmp_path / ".writing-1").exists()
    RunFolder(tmp_path).begin()
    assert not (tmp_path / ".writing-1").exists()


@pytest.mark.slow
def test_a_recipe_in_two_processes(backbones, tmp_path):
    """`accelerate launch -m hft.trainers.cli train` and torchrun alike: half as many steps, and one writes."""
    for task in ("mail", "notes"):
        (tmp_path / "data" / task).mkdir(parents=True)
        for split, count in (("train", 40), ("validation", 8)):
            rows = [
                {"instruction": f"{task}?", "options": ["a", "b"], "input": f"{i}", "output": "ab"[i % 2]}
                for i in range(count)
            ]
            (tmp_path / "data" / task / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = {
        "backbone": str(backbones["llama"]),
        "hierarchy": {"common": [], "mail": ["common"], "notes": ["common"]},
        "mixtures": {"common": ["mail", "notes"]},
        "data": str(tmp_path / "data"),
        "output_dir": str(tmp_path / "run"),
        "rank": 2,
        "per_device_train_batch_size": 2,
        "stage_eval_samples": 4,
        "num_train_epochs": 1,
        **{key: OPTIONS[key] for key in ("bf16", "report_to")},
    }
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    command = [*TORCHRUN, str(free_port()), "-m", "hft.trainers.cli", "train", str(tmp_path / "r.yaml")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert [stage["steps"] for stage in record["stages"]] == [18, 2]
    assert done.stdout.count("the model is in") == 1
    assert all(task["sealed"] for task in hft.HFTConfig.from_pretrained(tmp_path / "run").tasks)
