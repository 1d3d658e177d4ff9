"""Runs that are stopped from outside, go back, or are asked for what would seal tasks that have learnt nothing."""

import dataclasses
import json
import os
import re
import shutil
import signal
import time

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

import hft
from hft.trainers import HFTTrainer, HFTTrainingConfig
from hft.trainers.checkpoints import RunFolder, last_checkpoint
from hft.trainers.cli import main
from hft.trainers.evaluation import EvalSet
from hft.trainers.interference import advice
from hft.trainers.metrics import metric_name
from hft.trainers.run_record import RunRecord, as_score

from .test_resume import TREE, learnt
from .test_trainer import Kill, make, rows
from .tiny import bits


class Stop(TrainerCallback):
    """Stops a training as a time limit would, at one step of one stage."""

    def __init__(self, trainer, level: int, step: int):
        self.trainer, self.level, self.step = trainer, level, step

    def on_step_end(self, args, state, control, **kwargs):
        if (self.trainer.stage.level, state.global_step) == (self.level, self.step):
            control.should_training_stop = True


@pytest.mark.parametrize(("level", "step"), [(1, 1), (1, 2), (2, 3)])
def test_a_stopped_stage_is_not_sealed_and_goes_on(backbones, tokenizer, tmp_path, level, step):
    """Whether its last step was saved or not; and no later stage begins."""
    whole = make(backbones, tokenizer, tmp_path / "whole", TREE)
    whole.train()
    stopped = make(backbones, tokenizer, tmp_path / "cut", TREE)
    stopped.add_callback(Stop(stopped, level, step))
    output = stopped.train()
    assert output.metrics["stopped"] == step
    assert stopped.model.config.sealed_tasks() == ["a", "b"][: level - 1]
    assert hft.HFTConfig.from_pretrained(tmp_path / "cut").sealed_tasks() == ["a", "b"][: level - 1]
    assert last_checkpoint(tmp_path / f"cut/stage-{level}").endswith(f"checkpoint-{step}")
    resumed = make(backbones, tokenizer, tmp_path / "cut", TREE)
    output = resumed.train(resume_from_checkpoint=True)
    assert "stopped" not in output.metrics and learnt(resumed) == learnt(whole)


def test_a_signal_is_heard_in_each_stage(backbones, tokenizer, tmp_path):
    """transformers' own checkpoint on SIGTERM, as batch systems send it."""
    whole = make(backbones, tokenizer, tmp_path / "whole", TREE)
    whole.train()
    before = signal.getsignal(signal.SIGTERM)
    trainer = make(backbones, tokenizer, tmp_path / "cut", TREE, enable_jit_checkpoint=True)
    (manager,) = [c.jit_manager for c in trainer.callback_handler.callbacks if hasattr(c, "jit_manager")]
    manager.kill_wait = 0

    class Send(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if (trainer.stage.level, state.global_step) == (2, 1):
                assert signal.getsignal(signal.SIGTERM) != before, "nobody listens"
                os.kill(os.getpid(), signal.SIGTERM)
                end = time.monotonic() + 60
                while not manager.is_checkpoint_requested:
                    assert time.monotonic() < end, "nobody heard it"
                    time.sleep(0.01)

    trainer.add_callback(Send())
    assert trainer.train().metrics["stopped"] == 2
    assert trainer.model.config.sealed_tasks() == ["a"] and signal.getsignal(signal.SIGTERM) == before
    resumed = make(backbones, tokenizer, tmp_path / "cut", TREE, enable_jit_checkpoint=True)
    resumed.train(resume_from_checkpoint=True)
    assert learnt(resumed) == learnt(whole) and signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("name", ["checkpoints", "checkpoint-final", "checkpoint-7"])
def test_a_run_may_be_called_as_checkpoints_are(backbones, tokenizer, tmp_path, name):
    trainer = make(backbones, tokenizer, tmp_path / name, TREE)
    trainer.add_callback(Kill(3, "step"))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    kept = tmp_path / name / "stage-1/checkpoint-2"
    shutil.copytree(kept, kept.with_name("checkpoint-2-backup"))
    resumed = make(backbones, tokenizer, tmp_path / name, TREE)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.model.config.sealed_tasks() == ["a", "b"]


@pytest.mark.parametrize("cut", [1, 2])
def test_a_run_that_went_back_never_meets_what_it_had_learnt_before(backbones, tokenizer, tmp_path, cut):
    """Redone from a checkpoint with other data, and cut off again: within that stage, and before the next one's first."""
    train = {"a": rows(1), "b": rows(2)}
    other = {"a": rows(5), "b": rows(6)}
    options = {"num_train_epochs": 3}
    make(backbones, tokenizer, tmp_path / "run", TREE, train, **options).train()
    shutil.copytree(tmp_path / "run", tmp_path / "whole")
    back = "stage-1/checkpoint-2"
    whole = make(backbones, tokenizer, tmp_path / "whole", TREE, other, **options)
    whole.train(resume_from_checkpoint=str(tmp_path / "whole" / back))

    again = make(backbones, tokenizer, tmp_path / "run", TREE, other, **options)

    class Cut(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if (again.stage.level, state.global_step) == ((1, 3) if cut == 1 else (2, 1)):
                raise KeyboardInterrupt

    again.add_callback(Cut())
    with pytest.raises(KeyboardInterrupt):
        again.train(resume_from_checkpoint=str(tmp_path / "run" / back))
    record = RunRecord.load(tmp_path / "run")
    assert [stage["tasks"] for stage in record.stages] == [["a"]][: cut - 1]
    resumed = make(backbones, tokenizer, tmp_path / "run", TREE, other, **options)
    resumed.train(resume_from_checkpoint=True)
    assert learnt(resumed) == learnt(whole)


def test_a_stage_goes_on_in_the_batches_that_fitted(backbones, tokenizer, tmp_path):
    """Of 12 rows, four batches of three that the memory had room for, not three of the four that were asked for."""

    class Full(HFTTrainer):
        def training_step(self, *args, **kwargs):
            if self._train_batch_size > 3:
                raise RuntimeError("CUDA out of memory. Tried to allocate")
            return super().training_step(*args, **kwargs)

    options = {"auto_find_batch_size": True, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    options |= {"num_train_epochs": 1, "save_strategy": "no"}
    stopped = make(backbones, tokenizer, tmp_path, {"a": []}, {"a": rows(0, 12)}, cls=Full, **options)
    stopped.add_callback(Stop(stopped, 1, 3))
    assert stopped.train().metrics["stopped"] == 3
    resumed = make(backbones, tokenizer, tmp_path, {"a": []}, {"a": rows(0, 12)}, **options)
    assert resumed.train(resume_from_checkpoint=True).global_step == 4
    assert resumed.model.config.sealed_tasks() == ["a"]


def files_of(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_cannot_go_back_loses_nothing(backbones, tokenizer, tmp_path, monkeypatch):
    """Refused, or cut off while later checkpoints go and the model is saved."""
    run = tmp_path / "run"
    make(backbones, tokenizer, run, TREE).train()
    before = files_of(run)
    for options, message in (
        (
            {"learning_rate": 1e-3},
            "`learning_rate` is 0.001, and stage 1, which is to be resumed, was begun with 0.01",
        ),
        ({"page_tasks": ["a"]}, "`page_tasks` is ['a'], and the run to be resumed was begun with None"),
        ({"num_train_epochs": 0}, "has no steps"),
        (
            {"per_device_train_batch_size": 4},
            "`per_device_train_batch_size` x processes is 4, and stage 1, which is to be resumed, was begun with 2; give",
        ),
        (
            {"gradient_accumulation_steps": 1},
            "`gradient_accumulation_steps` is 1, and stage 1, which is to be resumed,",
        ),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            make(backbones, tokenizer, run, TREE, **options).train(str(run / "stage-1/checkpoint-2"))
        assert files_of(run) == before
    trainer = make(backbones, tokenizer, run, TREE)
    monkeypatch.setattr(trainer, "save_model", lambda **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        trainer.train(str(run / "stage-1/checkpoint-2"))
    lost = before.keys() - files_of(run).keys()
    assert lost and all(name.endswith("trainer_state.json") for name in lost)
    again = make(backbones, tokenizer, run, TREE)
    assert again.train(resume_from_checkpoint=True).global_step == 0  # as if it had not been asked
    assert again.model.config.sealed_tasks() == ["a", "b"]


@pytest.mark.parametrize("name", ["stage-1/checkpoint-best", "kept/checkpoint-2"])
def test_a_copy_of_a_checkpoint_is_one_wherever_it_is(backbones, tokenizer, tmp_path, name):
    run = tmp_path / "run"
    whole = make(backbones, tokenizer, run, TREE)
    whole.train()
    shutil.copytree(run / "stage-1/checkpoint-2", run / name)
    for folder in (tmp_path / "other", run):
        trainer = make(backbones, tokenizer, folder, TREE)
        output = trainer.train(resume_from_checkpoint=str(run / name))
        assert (output.global_step, learnt(trainer)) == (8, learnt(whole))
        assert trainer.log_history[0]["step"] == 3
    assert (run / name).is_dir()


def test_another_runs_checkpoints_are_never_removed(backbones, tokenizer, tmp_path):
    stopped = make(backbones, tokenizer, tmp_path, TREE)
    stopped.add_callback(Stop(stopped, 2, 2))
    stopped.train()
    hft.HFTForCausalLM.from_backbone(backbones["llama"], {"x": []}).save_pretrained(tmp_path)
    before = files_of(tmp_path)
    with pytest.raises(ValueError, match=r"holds checkpoints of an earlier run .* or delete its stage-\* folders"):
        make(backbones, tokenizer, tmp_path, {"x": []}).train()
    assert files_of(tmp_path) == before


def test_a_resumed_run_keeps_what_is_known_of_a_removed_tasks_siblings(backbones, tokenizer, tmp_path):
    make(backbones, tokenizer, tmp_path, {"a": [], "c": []}).train()
    model = hft.HFTForCausalLM.from_pretrained(tmp_path)
    model.remove_task("c")
    model.add_task("d", ["a"])
    model.save_pretrained(tmp_path)
    args = HFTTrainingConfig(output_dir=str(tmp_path), bf16=False, num_train_epochs=1, disable_tqdm=True)
    HFTTrainer(model, args, {"d": rows(3)}, processing_class=tokenizer).train(resume_from_checkpoint=True)
    assert [stage["tasks"] for stage in RunRecord.load(tmp_path).stages] == [["a"], ["d"]]


def test_tasks_that_take_no_step_are_named_and_a_stage_without_any_is_refused(backbones, tokenizer, tmp_path, caplog):
    trainer = make(backbones, tokenizer, tmp_path / "0", {"a": [], "e": []}, num_train_epochs=0)
    with pytest.raises(ValueError, match=re.escape("stage 1/1: a, e has no steps (`num_train_epochs` is 0), and its")):
        trainer.train()
    assert trainer.model.config.sealed_tasks() == []
    with caplog.at_level("WARNING"):
        options = {"max_steps": 1, "gradient_accumulation_steps": 1}
        make(backbones, tokenizer, tmp_path / "1", {"a": [], "e": []}, **options).train()
    assert "stage 1/1: a, e has 1 steps, and none of them is of e, sealed for good" in caplog.text


def test_what_diverged_is_not_sealed(backbones, tokenizer, tmp_path):
    trainer = make(backbones, tokenizer, tmp_path, TREE)

    class Diverge(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            with torch.no_grad():
                next(iter(trainer.model.task_parameters("a").values())).fill_(torch.nan)

    trainer.add_callback(Diverge())
    with pytest.raises(ValueError, match=r"Task 'a' has learnt numbers that are not finite .* its training diverged"):
        trainer.train()
    assert trainer.model.config.sealed_tasks() == hft.HFTConfig.from_pretrained(tmp_path).sealed_tasks() == []


@pytest.mark.parametrize("changed", [{"learning_rate": 1e-4}, {"gate_learning_rate": 1e-3}])
def test_a_stage_goes_on_at_its_own_rates(backbones, tokenizer, tmp_path, changed):
    """Its optimizer's groups are told apart by them; between stages they may change."""
    for level in (1, 2):
        folder = tmp_path / str(level)
        trainer = make(backbones, tokenizer, folder, TREE)

        class Cut(TrainerCallback):
            def on_step_begin(self, args, state, control, level=level, trainer=trainer, **kwargs):
                if (trainer.stage.level, state.global_step) == (level, 2 if level == 1 else 0):
                    raise KeyboardInterrupt

        trainer.add_callback(Cut())
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        resumed = make(backbones, tokenizer, folder, TREE, **changed)
        if level == 1:
            (name,) = changed
            with pytest.raises(
                ValueError, match=f"`{name}` is .*, and stage 1, which is to be resumed, was begun with .*; give that"
            ):
                resumed.train(resume_from_checkpoint=True)
        else:
            resumed.train(resume_from_checkpoint=True)


def test_without_an_optimizers_state_a_resume_says_so(backbones, tokenizer, tmp_path, caplog):
    trainer = make(backbones, tokenizer, tmp_path, TREE, save_only_model=True)
    trainer.add_callback(Kill(3, "step"))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    with caplog.at_level("WARNING"):
        make(backbones, tokenizer, tmp_path, TREE).train(resume_from_checkpoint=True)
    assert "has no optimizer's state (`save_only_model`): its optimizer begins anew" in caplog.text


def test_lists_of_tasks_may_be_tuples_and_are_resumed(backbones, tokenizer, tmp_path):
    trainer = make(backbones, tokenizer, tmp_path, TREE, page_tasks=("a",))
    trainer.add_callback(Kill(3, "step"))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    again = make(backbones, tokenizer, tmp_path, TREE, page_tasks=("a",))
    again.train(resume_from_checkpoint=True)
    assert again.record.budget["page_tasks"] == ["a"] and again.model.config.sealed_tasks() == ["a", "b"]


def test_a_task_of_a_half_trained_stage_stays(backbones, tokenizer, tmp_path, capsys):
    killed = make(backbones, tokenizer, tmp_path, {"a": [], "e": []})
    killed.add_callback(Kill(3, "step"))
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    before = files_of(tmp_path)
    assert main(["remove", str(tmp_path), "--task", "a"]) == 2 and files_of(tmp_path) == before
    assert "stage 1/1: a, e is half trained, and could not go on without 'a'" in capsys.readouterr().err


@pytest.mark.parametrize("include", ["all", "non_padding"])
@pytest.mark.parametrize("disable_tqdm", [True, False])
def test_logs_may_count_tokens(backbones, tokenizer, tmp_path, capsys, include, disable_tqdm):
    make(
        backbones, tokenizer, tmp_path, {"a": []}, include_num_input_tokens_seen=include, disable_tqdm=disable_tqdm
    ).train()
    shown = "".join(capsys.readouterr())
    assert "step 1/4: loss " in shown and "stage 1/1: a: 4 steps in" in shown


def test_masks_without_labels_are_refused(backbones, tokenizer, tmp_path):
    train = {"a": Dataset.from_list([{"input_ids": [5, 6, 7, 8], "completion_mask": [0, 0, 1, 1]}] * 4)}
    with pytest.raises(
        ValueError, match="have the column 'completion_mask' and no 'labels', so whole rows, prompts inc"
    ):
        make(backbones, tokenizer, tmp_path, {"a": []}, train, dataset_kwargs={"skip_prepare_dataset": True})


def test_rows_to_trim_by_are_counted_before_the_training(backbones, tokenizer, tmp_path):
    checks = {"a": Dataset.from_list([{"prompt": "p" * n, "completion": " c"} for n in (3, 90)])}
    with pytest.raises(
        ValueError, match="needs two rows or more of task 'a' in `eval_dataset`, and 1 is left when they"
    ):
        make(backbones, tokenizer, tmp_path, {"a": []}, None, checks, rank_tolerance=0.1, max_length=20)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr_scheduler_type": "greedy"}, "`lr_scheduler_type='greedy'` is not supported: each stage evaluates other"),
        (
            {"gradient_accumulation_steps": 0},
            "`gradient_accumulation_steps` is 0; it must be a whole number of 1 or m",
        ),
        ({"max_steps": 1.5}, "`max_steps` is 1.5; it must be a whole number"),
        ({"max_steps": True}, "`max_steps` is True; it must be a whole number."),
        ({"learning_rate": True}, "`learning_rate` is True; it must be a number of 0 or more."),
        ({"mastery_patience": 1.5}, "`mastery_patience` is 1.5; it must be a whole number of 1 or more, or None."),
        ({"max_length": -1}, "`max_length` is -1; it must be a whole number of 1 or more, or None."),
        ({"max_length": 10.5}, "`max_length` is 10.5; it must be a whole number of 1 or more, or None."),
        ({"route_samples": -1}, "`route_samples` is -1; it must be a whole number of 0 or more."),
        ({"neftune_noise_alpha": -1}, "`neftune_noise_alpha` is -1; it must be a number of 0 or more, or None."),
        ({"max_grad_norm": None}, "`max_grad_norm` is None; it must be a number."),
        ({"seed": 1.5}, "`seed` is 1.5; it must be a whole number."),
        ({"page_tasks": 3}, "`page_tasks` is 3; it must be a list."),
        ({"packing": "false"}, "`packing` is 'false'; it must be true or false."),
        (
            {"gradient_checkpointing_kwargs": 3},
            "`gradient_checkpointing_kwargs` is 3; it must be text or `key: value` pairs.",
        ),
        ({"output_dir": ""}, "`output_dir` is ''; name a folder, or leave it out."),
        ({"chat_template_path": "no.jinja"}, "`chat_template_path` is 'no.jinja', and there is no such file."),
        ({"learning_rate": None}, "`learning_rate` is None; it must be a number of 0 or more."),
        ({"max_steps": 0}, "`max_steps` is 0; it must be a whole number of 1 or more (-1: as many as there are)."),
        ({"num_train_epochs": -1}, "`num_train_epochs` is -1; it must be a number of 0 or more."),
        (
            {"fp16": True, "bf16": False, "mastery_patience": 1, "eval_strategy": "steps"},
            "`fp16` does not go with `mastery_accuracy` or `mastery_patience`",
        ),
    ],
)
def test_arguments_that_no_stage_could_use(tmp_path, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        HFTTrainingConfig(**{"output_dir": str(tmp_path), **options})


def test_values_of_kinds_that_transformers_takes_without_saying_so(tmp_path):
    options = {"fsdp": "", "resume_from_checkpoint": True, "save_steps": None, "logging_steps": None, "use_cpu": 1}
    options |= {"logging_strategy": "epoch", "save_strategy": "no", "page_tasks": ("a",), "max_grad_norm": 1}
    made = HFTTrainingConfig(tmp_path, bf16=False, report_to="none", **options)
    again = dataclasses.replace(made, learning_rate=1)  # with what the first has made of its values
    assert again.page_tasks == ["a"] and again.resume_from_checkpoint is True and again.accelerator_config is not None


def test_a_model_that_has_lost_a_task_grows_in_its_folder(backbones, tokenizer, tmp_path):
    make(backbones, tokenizer, tmp_path, TREE).train()
    model = hft.HFTForCausalLM.from_pretrained(tmp_path)
    model.remove_task("b")
    model.save_pretrained(tmp_path)
    before = bits(model(torch.tensor([[5, 6, 7]]), task="a").logits)
    model.add_task("c", ["a"])
    args = HFTTrainingConfig(output_dir=str(tmp_path), bf16=False, num_train_epochs=1, disable_tqdm=True)
    grown = HFTTrainer(model, args, {"c": rows(3)}, processing_class=tokenizer)
    grown.train()
    assert not list(tmp_path.glob("stage-1/checkpoint-*"))
    loaded = hft.HFTForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.sealed_tasks() == ["a", "c"]
    assert bits(loaded(torch.tensor([[5, 6, 7]]), task="a").logits) == before
    RunFolder(tmp_path).forget_checkpoints()
    assert not list(tmp_path.glob("stage-*/checkpoint-*"))


def test_scores_of_what_is_sealed_stay_when_others_are_learnt():
    record = RunRecord(before={"a": as_score([0.0, 0.0]), "b": as_score([0.0, 0.0])})
    for level, scores in enumerate(({"a": [1.0, 1.0]}, {"b": [0.0, 0.0]}), start=1):
        (task,) = scores
        record.add_stage(
            {"level": level, "tasks": [task], "log": [], "scores": {t: as_score(its) for t, its in scores.items()}}
        )
    assert record.matrix() == [{"a": 100.0}, {"a": 100.0, "b": 0.0}]
    assert record.measures()["average_performance"] == 50 and record.measures()["forgetting"] == 0
    assert set(record.last_scores()) == {"a", "b"}
    json.dumps(record.last_scores())


def test_a_loss_of_every_row_is_a_loss():
    found = {"score": 0.0, "se": 0.0, "rows": 9, "drop": 100.0, "drop_se": 0.0, "gate": 1.0}
    assert advice({"b": ["a"]}, {"b": {"a": found}}, {}) == ["b rests on a: without it, it loses 100.0 ± 0.0 points."]
    gains = {**found, "drop": -100.0}
    assert "is in the way of b" in advice({"b": ["a"]}, {"b": {"a": gains}}, {})[0]
    nothing = {**found, "score": 50.0, "drop": 0.0}
    assert "does not measurably use" in advice({"b": ["a"]}, {"b": {"a": nothing}}, {})[0]


def test_a_metric_may_be_named_or_any_callable(backbones, tokenizer, tmp_path):
    class Mine:
        def __call__(self, answer, row):
            return 1.0

    assert metric_name(Mine()) == "Mine"
    assert metric_name(EvalSet([], "exact_match").score) == "exact match"
    with pytest.raises(ValueError, match="Unknown metric 'exact_mach'"):
        EvalSet([], "exact_mach")
    messages = [{"messages": [{"role": "user", "content": "x"}]}]
    with pytest.raises(
        ValueError, match=re.escape("A row of `test_sets['a']` lacks 'prompt' (it has messages); give")
    ):
        model = hft.HFTForCausalLM.from_backbone(backbones["llama"], {"a": []})
        args = HFTTrainingConfig(output_dir=str(tmp_path), bf16=False)
        HFTTrainer(model, args, {"a": rows(1)}, test_sets={"a": EvalSet(messages)}, processing_class=tokenizer)


@pytest.mark.parametrize("warmup_steps", [5, 0.1])
def test_a_warm_up_leaves_no_task_unlearnt(backbones, tokenizer, tmp_path, caplog, warmup_steps):
    """Its first step is at a rate of 0; a task that has no other one would be sealed as it began."""
    for name, tree, options in (
        ("one-step", {"a": []}, {"max_steps": 1}),
        ("one-each", {"a": [], "e": []}, {"max_steps": 2, "num_train_epochs": 1}),
    ):
        caplog.clear()
        train = {task: rows(1, 4) for task in tree}
        trainer = make(backbones, tokenizer, tmp_path / name, tree, train, warmup_steps=warmup_steps, **options)
        with caplog.at_level("WARNING"):
            trainer.train()
        model = trainer.model
        assert all(nodes.pair(task)[1].any() for nodes in model.hft_nodes.values() for task in tree)
        assert "too few to warm up: it begins at the whole learning rate" in caplog.text
        assert trainer.args.warmup_steps == warmup_steps
    caplog.clear()
    trainer = make(backbones, tokenizer, tmp_path / "long", {"a": []}, {"a": rows(1, 4)}, warmup_steps=5, max_steps=8)
    trainer.train()
    rates = [log["learning_rate"] for log in trainer.log_history if "learning_rate" in log]
    assert "too few to warm up" not in caplog.text and rates[:3] == pytest.approx([0.0, 2e-3, 4e-3])
