"""The trainer: invariants 5 and 8, siblings that do not disturb one another, and data that is wrong."""

import copy
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, EarlyStoppingCallback, TrainerCallback
from trl import SFTConfig

import hft
from hft.trainers import HFTTrainer, HFTTrainingConfig
from hft.trainers.checkpoints import last_checkpoint
from hft.trainers.curriculum import Mastery, Stage, open_stages

from .test_model import prompts
from .tiny import bits, snapshot


HIERARCHY = {"a": [], "e": [], "b": ["a"], "d": ["a", "e"], "x": ["b", "d"]}


def rows(seed: int, count: int = 7) -> Dataset:
    """Lengths differ, so that micro-batches are padded."""
    return Dataset.from_list(
        [{"prompt": f"t{seed}t plus {i} is" + " so" * (i % 3), "completion": f" {seed + i}"} for i in range(count)]
    )


def data(hierarchy=HIERARCHY) -> dict[str, Dataset]:
    return {task: rows(10 * i, 5 + i) for i, task in enumerate(hierarchy)}


def make(
    backbones,
    tokenizer,
    folder,
    hierarchy=HIERARCHY,
    train=None,
    eval_dataset=None,
    cls=HFTTrainer,
    dtype=torch.float32,
    memory=None,
    quantization=None,
    **options,
):
    torch.manual_seed(0)
    model = hft.HFTForCausalLM.from_backbone(
        backbones["llama"],
        hierarchy,
        rank=3,
        dtype=dtype,
        memory_config=memory or {"slots": 2},
        quantization_config=quantization,
    )
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "bf16": False, "save_steps": 2,
               "gradient_checkpointing": False, "num_train_epochs": 2, "logging_steps": 1, "learning_rate": 1e-2,
               "disable_tqdm": True, **options}  # fmt: skip
    args = HFTTrainingConfig(output_dir=str(folder), **options)
    return cls(
        model, args, train_dataset=train or data(hierarchy), eval_dataset=eval_dataset, processing_class=tokenizer
    )


class Recording(HFTTrainer):
    """Notes every parameter before and after each stage."""

    def _train_stage(self, stage, checkpoint, **kwargs):
        self.model.start_stage(stage.tasks)  # which the trainer does again: twice is as once
        before = snapshot(self.model)
        output = super()._train_stage(stage, checkpoint, **kwargs)
        vars(self).setdefault("seen", []).append((stage, before, snapshot(self.model)))
        return output

    def stage_ended(self, stage, trims):
        saved = hft.HFTConfig.from_pretrained(self.args.output_dir).sealed_tasks()
        vars(self).setdefault("ended", []).append((stage.tasks, len(saved), list(trims)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_checkpointing": True},
        {"packing": True, "max_length": 64},
        {"padding_free": True, "max_length": None},
        {"mixed_steps": False},
    ],
)
def test_5_in_a_stage_all_that_is_its_own_moves_and_nothing_else(backbones, tokenizer, tmp_path, options):
    trainer = make(backbones, tokenizer, tmp_path, cls=Recording, num_train_epochs=4, **options)
    trainer.train()
    assert [stage.tasks for stage, _, _ in trainer.seen] == [("a", "e"), ("b", "d"), ("x",)]
    assert trainer.ended == [(("a", "e"), 2, []), (("b", "d"), 4, []), (("x",), 5, [])]
    for stage, before, after in trainer.seen:
        own = {name for task in stage.tasks for name in trainer.model.task_parameters(task)}
        assert trainer.model.config.page(stage.level)["writers"] == list(stage.tasks)
        own |= set(trainer.model.page_parameters(stage.level))
        own -= {"hft_gates.g_a", "hft_gates.g_e"}  # which inherit nothing
        assert {name for name in before if before[name] != after[name]} == own
        for task in stage.tasks:
            gates = trainer.model.gates(task)
            start = torch.frombuffer(bytearray(before[f"hft_gates.g_{task}"]), dtype=torch.float32)
            moved = gates.values != start.view_as(gates.values)
            learns = [source not in (task, f"page:{stage.level}") for source in gates.sources]
            assert moved.any(0).tolist() == moved.all(0).tolist() == learns, task
    assert all(task["sealed"] for task in trainer.model.config.tasks)
    assert not any(parameter.requires_grad for parameter in trainer.model.parameters())


def test_siblings_do_not_disturb_one_another(backbones, tokenizer, tmp_path):
    """Without a memory, which they would share, a task learns the same to the bit with siblings and without: also its
    gradients' norm is its own."""
    options = {"lr_scheduler_type": "constant", "max_grad_norm": 0.1, "memory": {"read": "off"}}
    together = make(backbones, tokenizer, tmp_path / "1", {"a": [], "e": [], "g": []}, **options)
    start = {name: p.detach().clone() for name, p in together.model.named_parameters()}
    together.train()
    alone = make(backbones, tokenizer, tmp_path / "2", {"e": []}, train={"e": data()["e"]}, **options)
    with torch.no_grad():
        for name, parameter in alone.model.named_parameters():
            parameter.copy_(start[name])
    alone.train()
    for name, parameter in alone.model.task_parameters("e").items():
        assert bits(parameter) == bits(together.model.task_parameters("e")[name]), name


@pytest.mark.parametrize("mixed_steps", [False, True])
def test_every_micro_batch_holds_one_task_packed_or_not(backbones, tokenizer, tmp_path, mixed_steps):
    for options in ({}, {"packing": True, "max_length": 40}, {"padding_free": True, "max_length": None}):
        trainer = make(backbones, tokenizer, tmp_path, mixed_steps=mixed_steps, **options)
        batches = list(trainer.get_train_dataloader())
        tasks = [sorted(set(batch["task"])) for batch in batches]
        assert all(len(task) == 1 for task in tasks)
        steps = [tasks[i : i + 2] for i in range(0, len(tasks), 2)]
        assert all(len(step) == 2 for step in steps)
        if not (mixed_steps and options):  # packed, there are too few to mix
            assert any(step[0] != step[1] for step in steps) == mixed_steps
        assert {step[0][0] for step in steps} == {0, 1}
        # and a row holds what its task's data says: task i's prompts begin with 10 * i
        for batch, (task,) in zip(batches, tasks, strict=True):
            text = tokenizer.decode(batch["input_ids"].flatten().tolist(), skip_special_tokens=True)
            assert set(re.findall(r"t(\d+)t plus", text)) == {
                str(10 * list(HIERARCHY).index(trainer._task_names[task]))
            }


class Kill(TrainerCallback):
    """As if the process died after a step, or while a checkpoint was being written."""

    def __init__(self, step: int, when: str):
        self.step, self.when, self.steps = step, when, 0

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1
        if self.when == "step" and self.steps == self.step:
            raise KeyboardInterrupt

    def on_save(self, args, state, control, **kwargs):
        if self.when == "save" and self.steps >= self.step:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / "trainer_state.json").write_text(
                '{"epoch": 1'
            )
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def uninterrupted(backbones, tokenizer, tmp_path_factory):
    torch.manual_seed(0)
    trainer = make(backbones, tokenizer, tmp_path_factory.mktemp("whole"))
    trainer.train()
    return snapshot(trainer.model)


@pytest.mark.parametrize(
    ("step", "when"), [(1, "step"), (3, "step"), (4, "save"), (9, "step"), (13, "save"), (15, "step"), (21, "step")]
)
def test_8_interrupted_and_resumed_is_uninterrupted(backbones, tokenizer, tmp_path, uninterrupted, step, when):
    killed = make(backbones, tokenizer, tmp_path)
    killed.add_callback(Kill(step, when))
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed = make(backbones, tokenizer, tmp_path)
    sealed = hft.HFTConfig.from_pretrained(tmp_path).sealed_tasks()
    (stage, *_) = open_stages(resumed.model.hierarchy, sealed)
    known = resumed.model.hierarchy.names if last_checkpoint(tmp_path / stage.folder) else sealed
    with torch.no_grad():  # what is on disk counts, not what a resumed run starts with
        for task in known:
            for parameter in resumed.model.task_parameters(task).values():
                parameter.add_(1)
    (tmp_path / ".writing-left").mkdir()  # by a kill inside a save
    resumed.train(resume_from_checkpoint=True)
    assert not list(tmp_path.rglob(".writing-*"))
    assert snapshot(resumed.model) == uninterrupted
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert snapshot(loaded) == uninterrupted


def test_8_resumes_from_a_named_checkpoint(backbones, tokenizer, tmp_path, uninterrupted):
    killed = make(backbones, tokenizer, tmp_path / "run")
    killed.add_callback(Kill(15, "step"))
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    shutil.move(tmp_path / "run", tmp_path / "moved")
    checkpoint = last_checkpoint(tmp_path / "moved/stage-2")
    resumed = make(backbones, tokenizer, tmp_path / "other")
    resumed.train(resume_from_checkpoint=checkpoint)
    assert snapshot(resumed.model) == uninterrupted
    with pytest.raises(ValueError, match=r"is no whole checkpoint \(no trainer_state.json\); give the run's folder"):
        missing = tmp_path / "moved/stage-2/checkpoint-9"
        make(backbones, tokenizer, tmp_path / "third").train(resume_from_checkpoint=str(missing))
    with pytest.raises(ValueError, match=r"holds no run to resume \(no config.json\); give a run's folder, or True"):
        make(backbones, tokenizer, tmp_path / "third").train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))


def test_3_a_child_starts_as_its_trained_parent(backbones, tokenizer, tmp_path):
    """Also when the whole hierarchy was made before the parent's gates had moved."""
    x = prompts(2, 6)
    differences = {}

    class AtStart(HFTTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            task = self._task_of(inputs)
            if task not in differences and (parents := self.model.hierarchy.parents(task)):
                with torch.no_grad():
                    at_start = self.model(x, task=task).logits - self.model(x, task=parents[0]).logits
                    learnt = self.model(x, task=parents[0]).logits - self.model(x, task="backbone").logits
                differences[task] = float(at_start.abs().max())
                assert learnt.abs().max() > 1e-2
            return super().training_step(model, inputs, *args, **kwargs)

    make(
        backbones, tokenizer, tmp_path, {"a": [], "b": ["a"], "c": ["b"]}, cls=AtStart, gate_learning_rate=0.1
    ).train()
    assert differences.keys() == {"b", "c"} and max(differences.values()) < 1e-5


def test_a_run_never_picks_up_another_ones_checkpoints(backbones, tokenizer, tmp_path):
    killed = make(backbones, tokenizer, tmp_path)
    killed.add_callback(Kill(3, "step"))
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    with pytest.raises(
        ValueError, match=r"holds checkpoints of an earlier run \(stage-1/checkpoint-2\); go on with it by"
    ):
        make(backbones, tokenizer, tmp_path).train()
    done = make(backbones, tokenizer, tmp_path / "done", {"a": []}, save_strategy="no", max_steps=1)
    done.train()
    with pytest.raises(ValueError, match=r"done' holds a model that has learnt a, which this run's model has not and"):
        make(backbones, tokenizer, tmp_path / "done", {"a": []}, save_strategy="no", max_steps=1).train()
    with pytest.raises(ValueError, match=re.escape("`eval_dataset` has data for the unknown task 'zz'")):
        done.evaluate({"zz": rows(1)})
    with pytest.raises(ValueError, match=r"`eval_dataset` has no rows of the task 'zz'\."):
        done.evaluate("zz")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"odd' holds a config\.json that is no JSON"):
        make(backbones, tokenizer, tmp_path / "odd", {"a": []}, save_strategy="no", max_steps=1).train()
    done.model.add_task("late", ["a"])  # goes on from there
    more = HFTTrainingConfig(str(tmp_path / "done"), save_strategy="no", max_steps=1, bf16=False, report_to="none")
    HFTTrainer(done.model, more, train_dataset={"late": rows(3)}, processing_class=tokenizer).train()
    with pytest.raises(ValueError, match=r"nowhere' holds no run to resume \(no config.json\); give a run's folder"):
        make(backbones, tokenizer, tmp_path / "new").train(resume_from_checkpoint=str(tmp_path / "nowhere"))


def test_a_model_grows_in_its_own_folder_and_resumes(backbones, tokenizer, tmp_path):
    """The folder held a finished model of fewer tasks; a kill before the first checkpoint is no trap."""
    make(backbones, tokenizer, tmp_path, {"a": []}).train()

    def grown(cls=HFTTrainer):
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
        if "b" not in model.hierarchy:
            model.add_task("b", ["a"])
        args = HFTTrainingConfig(output_dir=str(tmp_path), max_steps=3, bf16=False, disable_tqdm=True, save_steps=1)
        return HFTTrainer(model, args, train_dataset={"b": rows(1)}, processing_class=tokenizer)

    killed = grown()
    killed.add_callback(Kill(2, "step"))
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    assert grown().train(resume_from_checkpoint=True).global_step == 3
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.sealed_tasks() == ["a", "b"]


def test_a_finished_run_resumes_to_itself(backbones, tokenizer, tmp_path):
    trainer = make(backbones, tokenizer, tmp_path, {"a": []})
    trainer.train()
    again = make(backbones, tokenizer, tmp_path, {"a": []})
    assert again.train(resume_from_checkpoint=True).global_step == 0
    assert snapshot(again.model) == snapshot(trainer.model)


def test_a_deep_copy_of_a_trained_model_is_a_model_of_its_own(backbones, tokenizer, tmp_path):
    """The forward that TRL puts onto a model is there only while the trainer computes: a copy would run the original's."""
    trainer = make(backbones, tokenizer, tmp_path, {"a": []}, eval_dataset={"a": rows(1)})
    batch = trainer.data_collator([{**row, "task_id": 0} for row in trainer.eval_dataset["a"]])

    def stop():
        raise InterruptedError

    uses = (
        trainer.train,
        trainer.evaluate,
        lambda: trainer.predict({"a": rows(1)}),
        lambda: trainer.compute_loss(model, batch),
    )
    model, x = trainer.model, prompts(2, 6)
    for use in (lambda: None, *uses):
        use()
        assert "forward" not in vars(model)
    trainer.compute_loss_func = lambda *_, **__: stop()
    with pytest.raises(InterruptedError):
        trainer.compute_loss(model, batch)
    assert "forward" not in vars(model)
    before, twin = bits(model(x, task="a").logits), copy.deepcopy(model)
    assert bits(twin(x, task="a").logits) == before
    twin.add_task("b", ["a"])
    assert torch.allclose(twin(x, task="b").logits, model(x, task="a").logits, atol=1e-5)
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert not twin(x, task="a").logits.any()
    assert bits(model(x, task="a").logits) == before


def test_a_task_added_later_leaves_the_others_alone(backbones, tokenizer, tmp_path):
    trainer = make(backbones, tokenizer, tmp_path / "1", {"a": [], "b": ["a"]})
    trainer.train()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "1")
    x = prompts(2, 6)
    before = {task: bits(model(x, task=task).logits) for task in ("a", "b")}
    model.add_task("c", ["b"])
    args = HFTTrainingConfig(
        output_dir=str(tmp_path / "2"), max_steps=2, bf16=False, disable_tqdm=True, learning_rate=0.1
    )
    HFTTrainer(model, args, train_dataset={"c": rows(1)}, processing_class=tokenizer).train()
    assert {task: bits(model(x, task=task).logits) for task in ("a", "b")} == before
    for task in "ab":
        path = f"tasks/{task}.safetensors"
        assert (tmp_path / "1" / path).read_bytes() == (tmp_path / "2" / path).read_bytes()
    assert (model(x, task="c").logits - model(x, task="b").logits).abs().max() > 1e-3


FORMATS = {
    "text": [{"text": "one two"}, {"text": "three"}],
    "messages": [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}] * 2,
    "prompt-completion": [{"prompt": "one", "completion": " two"}] * 2,
    "conversational": [
        {"prompt": [{"role": "user", "content": "hi"}], "completion": [{"role": "assistant", "content": "ho"}]}
    ]
    * 2,
    "tokenized": [{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}],
}


def test_all_formats_that_trl_takes_also_side_by_side(backbones, tokenizer, tmp_path):
    train = {name: Dataset.from_list(made) for name, made in FORMATS.items()}
    trainer = make(backbones, tokenizer, tmp_path, {name: [] for name in FORMATS}, train, max_steps=5)
    masked = {
        name: sum(label == -100 for labels in trainer._prepared[name]["labels"] for label in labels)
        for name in FORMATS
    }
    assert {name for name, count in masked.items() if count} == {"prompt-completion", "conversational"}
    assert trainer.train().global_step == 5


def test_one_dataset_with_a_column_is_the_same_as_a_dict(backbones, tokenizer, tmp_path):
    train = {"a": rows(1, 4), "e": rows(2, 3)}
    column = Dataset.from_list([{**row, "task": task} for task, made in train.items() for row in made])
    first = make(backbones, tokenizer, tmp_path / "1", {"a": [], "e": []}, train)
    second = make(backbones, tokenizer, tmp_path / "2", {"a": [], "e": []}, column)
    first.train(), second.train()
    assert snapshot(first.model) == snapshot(second.model)


def test_without_a_tokenizer_it_takes_the_backbones_or_the_models_own(backbones, tmp_path):
    model = hft.HFTForCausalLM.from_backbone(backbones["llama"], {"a": []})
    first = HFTTrainer(
        model, HFTTrainingConfig(output_dir=str(tmp_path), max_steps=1, bf16=False), train_dataset={"a": rows(1)}
    )
    first.train()
    grown = AutoModelForCausalLM.from_pretrained(tmp_path)
    grown.add_task("b", ["a"])
    second = HFTTrainer(grown, HFTTrainingConfig(output_dir=str(tmp_path / "2")), train_dataset={"b": rows(1)})
    assert second.processing_class.get_vocab() == first.processing_class.get_vocab()


def test_prepared_data_is_taken_as_it_is(backbones, tokenizer, tmp_path):
    train = {
        task: Dataset.from_list([{"input_ids": [5, 6, i], "labels": [-100, 6, i]} for i in (7, 8)]) for task in "ae"
    }
    trainer = make(
        backbones, tokenizer, tmp_path, {"a": [], "e": []}, train, dataset_kwargs={"skip_prepare_dataset": True}
    )
    assert trainer.train().global_step > 0
    masked = {"a": train["a"], "e": Dataset.from_list([{"input_ids": [5, 6], "labels": [-100, -100]}])}
    options = {"dataset_kwargs": {"skip_prepare_dataset": True}}
    with pytest.raises(ValueError, match="Nothing is left to learn in the 1 rows of task 'e'"):
        make(backbones, tokenizer, tmp_path / "2", {"a": [], "e": []}, masked, **options)
    evaluated = make(backbones, tokenizer, tmp_path / "3", {"a": [], "e": []}, train, eval_dataset=train, **options)
    losses = {name: loss for name, loss in evaluated.evaluate().items() if name.endswith("_loss")}
    assert losses.keys() == {"eval_a_loss", "eval_e_loss"}
    named = concatenate_datasets([its.add_column("task", [task] * 2) for task, its in train.items()])
    raw = make(backbones, tokenizer, tmp_path / "4", {"a": [], "e": []})
    for trainer in (evaluated, raw):  # raw: rows may be tokenised where those of the training were not
        for data in (train, named):
            assert losses.items() <= trainer.evaluate(data).items()


def test_logs_name_task_and_stage_and_every_stage_starts_afresh(backbones, tokenizer, tmp_path, capsys):
    evals = {"a": rows(3, 3), "b": rows(4, 3)}
    trainer = make(
        backbones, tokenizer, tmp_path, {"a": [], "e": [], "b": ["a"]}, eval_dataset=evals, eval_strategy="epoch"
    )
    trainer.train()
    steps = [log for log in trainer.log_history if "loss" in log]
    assert [log["stage"] for log in steps] == sorted(log["stage"] for log in steps)
    for log in steps:  # logged each step, which holds one task or, where a page is shared, two
        losses = [log[key] for key in log if key.endswith("_loss")]
        assert min(losses) * (1 - 1e-3) <= log["loss"] <= max(losses) * (1 + 1e-3)
    assert {sum(key.endswith("_loss") for key in log) for log in steps} == {1, 2}
    for level, tasks in ((1, {"a_loss", "e_loss"}), (2, {"b_loss"})):
        of_stage = [log for log in steps if log["stage"] == level]
        assert {key for log in of_stage for key in log if key.endswith("_loss")} == tasks
        rates = [log["learning_rate"] for log in of_stage]
        assert rates[0] == 1e-2 and rates == sorted(rates, reverse=True) and rates[-1] < 5e-3
    assert [log["stage"] for log in trainer.log_history if "eval_a_loss" in log] == [1, 1]
    assert [log["stage"] for log in trainer.log_history if "eval_b_loss" in log] == [2, 2]
    assert "stage 1/2: a, e (" in capsys.readouterr().out


def test_the_progress_bar_names_the_stage(backbones, tokenizer, tmp_path, capsys):
    make(backbones, tokenizer, tmp_path, {"a": [], "b": ["a"]}, disable_tqdm=False, max_steps=1).train()
    assert "stage 1/2: a: " in (shown := capsys.readouterr().err) and "stage 2/2: b: " in shown


def test_passes_of_a_task(backbones, tokenizer, tmp_path):
    trainer = make(backbones, tokenizer, tmp_path, {"a": [], "e": []}, num_train_epochs=2, task_passes={"a": 2.0})
    block = trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps
    blocks = {task: math.ceil(len(rows) / block) for task, rows in data().items()}
    assert trainer.train().global_step == 2 * (2 * blocks["a"] + blocks["e"])
    assert trainer.record.budget["task_passes"] == {"a": 2.0} and "rank_tolerance" not in trainer.record.budget
    with pytest.raises(ValueError, match=r"`task_passes` names the unknown task 'ee'\..*'e'"):
        make(backbones, tokenizer, tmp_path / "2", {"a": [], "e": []}, task_passes={"ee": 2.0})


def test_tasks_that_write_no_page(backbones, tokenizer, tmp_path):
    trainer = make(backbones, tokenizer, tmp_path, {"a": [], "e": [], "b": ["a"]}, page_tasks=["b", "e"], max_steps=2)
    trainer.train()
    config = trainer.model.config
    assert [page["writers"] for page in config.pages] == [["e"], ["b"]]
    assert [config.task(task)["pages"] for task in "aeb"] == [[], [1], [1, 2]]
    trainer = make(backbones, tokenizer, tmp_path / "2", {"a": [], "b": ["a"]}, page_tasks=["b"], max_steps=2)
    trainer.train()
    assert [page["writers"] for page in trainer.model.config.pages] == [["b"]]
    assert trainer.record.budget["page_tasks"] == ["b"]


def test_where_nobody_writes_a_page_training_is_as_without_memory(backbones, tokenizer, tmp_path):
    tree, learnt = {"a": [], "b": ["a"]}, []
    for memory, options in (({"slots": 2}, {"page_tasks": []}), ({"read": "off"}, {})):
        trainer = make(backbones, tokenizer, tmp_path / str(options), tree, memory=memory, max_steps=2, **options)
        trainer.train()
        assert trainer.model.config.pages == []
        learnt.append({name: bits(its) for name, its in trainer.model.named_parameters() if name.startswith("hft_")})
    assert learnt[0] == learnt[1]


def test_tasks_have_learning_rates_of_their_own(backbones, tokenizer, tmp_path):
    rates = {"e": 2e-4}
    trainer = make(backbones, tokenizer, tmp_path, {"a": [], "e": []}, task_learning_rates=rates, weight_decay=0.1)
    begun = []

    class Rates(TrainerCallback):
        def on_train_begin(self, args, state, control, *, optimizer, lr_scheduler, **kwargs):
            found = {id(p): rate for group, rate in zip(optimizer.param_groups, lr_scheduler.base_lrs, strict=True)
                     for p in group["params"]}  # fmt: skip
            decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
            begun.append((found, decayed))

    trainer.add_callback(Rates())
    model = trainer.model
    trainer.train()
    assert trainer.record.budget["task_learning_rates"] == rates
    ((found, decayed),) = begun
    nodes = {task: [p for name, p in model.task_parameters(task).items() if "gates" not in name] for task in "ae"}
    assert {found[id(p)] for p in nodes["a"]} == {trainer.args.learning_rate}
    assert {found[id(p)] for p in nodes["e"]} == {2e-4}
    assert {found[id(p)] for p in model.page_parameters(1).values()} == {trainer.args.learning_rate}  # no one task's
    assert decayed == set(found)
    with pytest.raises(ValueError, match=r"`task_learning_rates` names the unknown task 'aa'\..*'a'"):
        make(backbones, tokenizer, tmp_path / "2", {"a": []}, task_learning_rates={"aa": 2e-4})


def test_gates_have_a_learning_rate_of_their_own(backbones, tokenizer, tmp_path):
    trainer = make(backbones, tokenizer, tmp_path, gate_learning_rate=0.5, weight_decay=0.1)
    with pytest.raises(RuntimeError, match="no stage has begun: `train` makes one for each"):
        trainer.create_optimizer()
    trainer.model.set_trainable(["d"])
    trainer.stage = Stage(3, ("d",), 3)
    groups = trainer.create_optimizer().param_groups
    gates = [group for group in groups if group["lr"] == 0.5]
    assert len(gates) == 1 and [id(p) for p in gates[0]["params"]] == [id(trainer.model.hft_gates.of("d"))]
    assert gates[0]["weight_decay"] == 0
    assert sum(len(group["params"]) for group in groups) == len(trainer.model.task_parameters("d"))
    trainer.optimizer, trainer.args.task_learning_rates = None, {"d": trainer.args.learning_rate / 10}
    groups = trainer.create_optimizer().param_groups
    assert [group["lr"] for group in groups] == pytest.approx([trainer.args.learning_rate / 10, 0.05])


def test_a_parameter_that_gets_no_gradient_is_named(backbones, tokenizer, tmp_path):
    trainer = make(backbones, tokenizer, tmp_path)
    deaf = trainer.model._layer_of
    attach, names = trainer.model._attach, dict(deaf)
    del deaf["layers.1.mlp.up_proj"]
    attach()
    trainer.model._layer_of = names
    message = r"no gradient reached 4 of the 56 parameters of task '[ae]', first 'hft_nodes\.layers_1_mlp_up_proj\.A_"
    with pytest.raises(RuntimeError, match="stage 1/3: a, e: " + message):
        trainer.train()


@pytest.mark.parametrize(
    ("train", "options", "error", "message"),
    [
        ({"a": rows(1)}, {}, ValueError, "`train_dataset` has no data for the task 'e'"),
        ({**data(), "yelp": rows(1)}, {}, ValueError, "has data for the unknown task 'yelp'"),
        ({**data(), "a": rows(1).select([])}, {}, ValueError, "`train_dataset['a']` is empty"),
        (rows(1), {}, ValueError, "is one Dataset without a column 'task' (it has prompt, completion)"),
        ({**data(), "a": [1]}, {}, TypeError, "`train_dataset['a']` is a list; HFT needs a datasets.Dataset"),
        ({**data(), "a": rows(1).to_iterable_dataset()}, {}, TypeError, "is a IterableDataset; HFT needs"),
        ([1], {}, TypeError, "`train_dataset` is a list; give {name: Dataset}"),
        (None, {"max_length": 3}, ValueError,
            "Nothing is left to learn in the 5 rows of task 'a': all labels are masked, or on a first token, which nothing"),
        (None, {"train_sampling_strategy": "group_by_length"}, ValueError, "a micro-batch must hold one task"),
        (None, {"accelerator_config": {"split_batches": True}}, ValueError, "`accelerator_config` sets `split_batches`"),
    ],
)  # fmt: skip
def test_wrong_data(backbones, tokenizer, tmp_path, train, options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make(backbones, tokenizer, tmp_path, train=train, **options)


def test_one_process_trains_on_one_gpu(backbones, tokenizer, tmp_path, caplog):
    """As it is, transformers would wrap the model in DataParallel."""
    model = hft.HFTForCausalLM.from_backbone(backbones["llama"], {"a": []}, rank=2)
    args = HFTTrainingConfig(output_dir=str(tmp_path), max_steps=1, report_to="none")
    args._n_gpu = 2
    trainer = HFTTrainer(model, args, {"a": rows(1)}, processing_class=tokenizer)
    assert (
        trainer.args.n_gpu == 1 and "sees 2 GPUs and trains on one; start it with `accelerate launch`" in caplog.text
    )
    args._n_gpu, model.hf_device_map = 2, {"a": 0, "b": 1}
    caplog.clear()
    trainer = HFTTrainer(model, args, {"a": rows(1)}, processing_class=tokenizer)
    assert trainer.args.n_gpu == 1 and "sees 2 GPUs" not in caplog.text  # the model is spread over them


def test_rows_that_lose_their_answer_are_counted(backbones, tokenizer, tmp_path, caplog):
    from transformers.utils import logging

    logging.enable_propagation()
    make(backbones, tokenizer, tmp_path, {"a": []}, train={"a": rows(1)}, max_length=16)
    logging.disable_propagation()
    assert re.search(r"[1-6] of the 7 rows of task 'a' were dropped: with `max_length`=16", caplog.text)


def test_wrong_models(backbones, tokenizer, tmp_path):
    args = HFTTrainingConfig(output_dir=str(tmp_path))
    model = hft.HFTForCausalLM.from_backbone(backbones["llama"], {"a": []})
    from peft import LoraConfig, get_peft_model

    plain = AutoModelForCausalLM.from_pretrained(backbones["llama"])
    wrapped = get_peft_model(
        hft.HFTForCausalLM.from_backbone(backbones["llama"], {"a": []}), LoraConfig(target_modules=["q_proj"])
    )
    for wrong, name in ((plain, "LlamaForCausalLM"), (wrapped, "PeftModel"), (None, "NoneType")):
        with pytest.raises(
            ValueError, match=f"HFTTrainer got a {name} as `model`; give an HFTForCausalLM, not wrapped"
        ):
            HFTTrainer(wrong, args, train_dataset={"a": rows(1)}, processing_class=tokenizer)
    HFTTrainer(torch.compile(model, backend="eager"), args, train_dataset={"a": rows(1)}, processing_class=tokenizer)
    for stopper in (EarlyStoppingCallback, EarlyStoppingCallback(2)):
        with pytest.raises(ValueError, match=r"takes no EarlyStoppingCallback: .*; set `mastery_patience`"):
            HFTTrainer(model, args, {"a": rows(1)}, processing_class=tokenizer, callbacks=[stopper])
    for refused in ({"peft_config": LoraConfig()}, {"optimizers": (torch.optim.SGD(model.parameters(), 0.1), None)}):
        with pytest.raises(ValueError, match=f"HFTTrainer takes no `{next(iter(refused))}`"):
            HFTTrainer(model, args, train_dataset={"a": rows(1)}, processing_class=tokenizer, **refused)
    for name, refused in (
        ("load_best_model_at_end", {"load_best_model_at_end": True, "eval_strategy": "steps", "save_steps": 500}),
        ("metric_for_best_model", {"metric_for_best_model": "eval_a_loss"}),
        ("save_strategy='best'", {"save_strategy": "best"}),
        ("lr_scheduler_type='reduce_lr_on_plateau'", {"lr_scheduler_type": "reduce_lr_on_plateau"}),
    ):
        with pytest.raises(ValueError, match=f"`{name}` is not supported: each stage evaluates other tasks"):
            HFTTrainingConfig(output_dir=str(tmp_path), **refused)
    with pytest.raises(TypeError, match="HFTTrainer got a SFTConfig as `args`; give an HFTTrainingConfig"):
        HFTTrainer(model, SFTConfig(str(tmp_path), use_cpu=True), train_dataset={"a": rows(1)})
    with pytest.raises(ValueError, match="`train_dataset` is missing"):
        HFTTrainer(model, args, processing_class=tokenizer)
    model.seal(["a"])
    with pytest.raises(ValueError, match="All tasks of this model are sealed; add one"):
        HFTTrainer(model, args, train_dataset={"a": rows(1)}, processing_class=tokenizer)


@pytest.mark.parametrize(
    "report_to, message",
    [
        (
            "comet_ml",
            "`report_to` names 'comet_ml', which is not installed or is switched off; install it (pip install",
        ),
        (["tensorbord"], "`report_to` names the tracker 'tensorbord'. Did you mean 'tensorboard'?"),
    ],
)
def test_a_tracker_that_is_not_there_is_named_before_anything_is_loaded(report_to, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        HFTTrainingConfig(output_dir=str(tmp_path), report_to=report_to)
    assert HFTTrainingConfig(output_dir=str(tmp_path), report_to="none").report_to == []


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"optim": "lomo"},
            "`optim` is 'lomo' and `optim_args` None, with which training could not begin (You need to",
        ),
        ({"optim": "sgd", "optim_args": "3"}, "`optim` is 'sgd' and `optim_args` '3', with which training could not"),
        (
            {"lr_scheduler_type": "warmup_stable_decay"},
            "`lr_scheduler_type` is 'warmup_stable_decay' and `lr_scheduler_kwargs` None, with which training could not "
            "begin (get_wsd_schedule() missing 1 required positional argument: 'num_decay_steps')",
        ),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "(One of min_lr or min_lr_rate should be set through the"),
    ],
)
def test_what_no_stage_could_begin_with_is_named_before_anything_is_loaded(options, message, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.trainer_optimizer.is_lomo_available", lambda: False)
    with pytest.raises(ValueError, match=re.escape(message)):
        HFTTrainingConfig(output_dir=str(tmp_path), **options)


def test_schedules_with_what_they_need_and_optimizers_of_parts_are_taken(tmp_path):
    wsd = {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 5}}
    for options in (wsd, {"optim": "sgd", "optim_args": "momentum=0.9", "optim_target_modules": ["attn"]}):
        HFTTrainingConfig(output_dir=str(tmp_path), **options)


def test_a_template_is_taken_from_a_file(backbones, tokenizer, tmp_path):
    """With a model's TRL takes tokens, too, which a frozen backbone of 261 embeddings has no place for."""
    with pytest.raises(
        ValueError, match=r"`chat_template_path` is '.*', a model, .* has 261, and is frozen. Give the template alone"
    ):
        make(backbones, tokenizer, tmp_path, {"a": []}, chat_template_path=str(backbones["qwen3"]))
    (tmp_path / "own.jinja").write_text("{{ messages[0]['content'] }}")
    trainer = make(backbones, copy.deepcopy(tokenizer), tmp_path, chat_template_path=str(tmp_path / "own.jinja"))
    assert trainer.processing_class.chat_template == "{{ messages[0]['content'] }}"


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, ["a", "e"]),
        ({"page_tasks": ["e", "b"]}, ["e"]),  # alone with its page
        ({"gradient_accumulation_steps": 1}, []),
        ({"mixed_steps": False}, []),
        ({"memory": {"read": "off"}}, []),
    ],
)
def test_who_shares_optimizer_steps(backbones, tokenizer, tmp_path, options, expected):
    seen = {}

    class Noting(HFTTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            if self.stage.level == 1:
                task = self._task_of(inputs)
                seen.setdefault(self.state.global_step, set()).add(task)
            return super().training_step(model, inputs, *args, **kwargs)

    hierarchy = {"a": [], "e": [], "b": ["a"]}
    trainer = make(backbones, tokenizer, tmp_path, hierarchy, cls=Noting, save_strategy="no", **options)
    trainer.train()
    writers = {"memory": [], "page_tasks": ["e"]}.get(next(iter(options), ""), ["a", "e"])
    assert trainer.args.writers(["a", "e"], trainer.model.config.memory_config) == writers
    assert any(len(tasks) == 2 for tasks in seen.values()) == (len(expected) > 1)


def test_a_task_may_be_called_train_and_its_evaluation_is_its_own(backbones, tokenizer, tmp_path, capsys):
    trainer = make(
        backbones, tokenizer, tmp_path, {"train": []}, {"train": rows(1, 9)}, eval_dataset={"train": rows(2, 2)}
    )
    assert len(trainer.eval_dataset["train"]) == 2 and len(trainer.train_dataset) == 9
    trainer.train()
    shown = capsys.readouterr().out
    assert "step 1/" in shown and "(train " in shown and "steps in" in shown


def test_the_training_loss_of_a_task_called_eval_something_is_no_evaluation():
    mastery = Mastery(["a"], patience=1)
    assert mastery.observe_log({"step": 1, "eval_a_loss": 2.0, "loss": 2.0}) is None
    for step in (1, 2):
        found = mastery.observe_log({"step": step, "eval_a_loss": 2.0, "eval_a_runtime": 0.1})
    assert found[0] == "a"


def test_a_task_added_after_the_trainer_was_made_needs_a_new_one(backbones, tokenizer, tmp_path):
    trainer = make(backbones, tokenizer, tmp_path, {"a": []}, save_strategy="no")
    trainer.train()
    trainer.model.add_task("b", ["a"])
    with pytest.raises(ValueError, match="The task 'b' was added after this trainer was made; make a new one"):
        trainer.train()


def test_an_unwritable_folder_is_found_before_training(backbones, tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Cannot write to the folder"):
        make(backbones, tokenizer, tmp_path / "file")


def test_the_run_folder_is_a_model_with_a_card_and_no_path_of_this_machine(backbones, tokenizer, tmp_path):
    trainer = make(backbones, tokenizer, tmp_path, {"a": [], "b": ["a"]}, max_steps=1)
    trainer.train()
    assert (
        list(tmp_path.glob("stage-1/checkpoint-*")) and not (tmp_path / "README.md").exists()
    )  # drawn once, not at each
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "└─ a\n   └─ b" in card and str(backbones["llama"]) not in card
    config = (tmp_path / "config.json").read_text()
    assert json.loads(config)["backbone"] == str(backbones["llama"])  # a slim model must say where its backbone is
    assert config.count(str(backbones["llama"])) == 1 and str(tmp_path) not in config


# ---- NF4 ----


def nf4() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
    )


@pytest.fixture
def quantized(backbones, monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    torch.use_deterministic_algorithms(False)
    return hft.HFTForCausalLM.from_backbone(
        backbones["llama"], {"a": [], "b": ["a"]}, rank=3, quantization_config=nf4(), dtype=torch.bfloat16
    )


def test_5_and_7_in_4_bit_it_trains_saves_and_loads(quantized, tokenizer, tmp_path, backbones):
    import bitsandbytes as bnb

    linears = [m for m in quantized.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(linears) == 14
    trainer = Recording(
        quantized,
        HFTTrainingConfig(
            output_dir=str(tmp_path / "run"), max_steps=6, disable_tqdm=True, per_device_train_batch_size=2
        ),
        train_dataset={"a": rows(1), "b": rows(2)},
        processing_class=tokenizer,
    )
    trainer.train()
    for stage, before, after in trainer.seen:
        own = {name for task in stage.tasks for name in quantized.task_parameters(task)}
        own |= set(quantized.page_parameters(stage.level))
        own -= {"hft_gates.g_a"}  # which inherits nothing
        assert {name for name in before if before[name] != after[name]} == own
    assert quantized.hft_gates.of("b").dtype == torch.float32
    x = prompts(2, 6)
    with torch.no_grad():
        expected = {task: bits(quantized(x, task=task).logits) for task in ("a", "b", "backbone")}
        quantized.save_pretrained(tmp_path / "full", slim=False)
        slim = AutoModelForCausalLM.from_pretrained(tmp_path / "run", quantization_config=nf4())
        full = AutoModelForCausalLM.from_pretrained(tmp_path / "full")
        for loaded in (slim, full):
            assert sum(isinstance(m, bnb.nn.Linear4bit) for m in loaded.modules()) == 14
            assert {task: bits(loaded(x, task=task).logits) for task in expected} == expected


def test_nf4_gradients_are_right_also_after_an_evaluation(quantized):
    """On CPUs with AVX512-BF16, bitsandbytes repacks weights in place at the first evaluation: gradients were wrong."""
    x = prompts(2, 6)

    def gradient():
        quantized.zero_grad()
        quantized(x, labels=x, task="a").loss.backward()
        return torch.cat([p.grad.flatten() for p in quantized.task_parameters("a").values() if p.grad is not None])

    quantized.train()
    before = gradient()
    quantized.eval()
    with torch.inference_mode():
        quantized(x, task="a")
    quantized.train()
    torch.testing.assert_close(gradient(), before)
    exact = quantized.dequantize()
    exact.set_trainable(["a"])
    torch.testing.assert_close(gradient(), before, rtol=0.1, atol=float(before.abs().max()) * 0.05)


def test_bitsandbytes_that_is_missing_is_named(backbones, monkeypatch):
    monkeypatch.setattr(
        "transformers.quantizers.quantizer_bnb_4bit.is_bitsandbytes_available", lambda *_, **__: False, raising=False
    )
    with pytest.raises(ImportError, match=r"(?i)bitsandbytes"):
        hft.HFTForCausalLM.from_backbone(backbones["llama"], {"a": []}, quantization_config=nf4())


def test_assistant_only_loss_is_checked_for_each_task(backbones, tokenizer, tmp_path):
    """TRL looks at the first task only, and would score all tokens of another one that has no messages."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (
        "{% for message in messages %}<|{{ message['role'] }}|>{% if message['role'] == 'assistant' %}{% generation %}"
        "{{ message['content'] }}</s>{% endgeneration %}{% else %}{{ message['content'] }}</s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    train = {"a": Dataset.from_list([{"messages": talk}] * 3), "e": rows(1)}
    with pytest.raises(ValueError, match=re.escape("the rows of task 'e' are no messages (prompt, completion)")):
        make(backbones, tokenizer, tmp_path, {"a": [], "e": []}, train, assistant_only_loss=True)


def test_a_formatting_function_is_checked_for_each_task(backbones, tokenizer, tmp_path):
    """TRL looks at the first task only, and would join another one's prompts and answers without it."""
    train = {"a": Dataset.from_list([{"question": "q", "answer": "x"}] * 3), "e": rows(1)}
    model = hft.HFTForCausalLM.from_backbone(backbones["llama"], {"a": [], "e": []}, rank=3)
    args = HFTTrainingConfig(str(tmp_path), bf16=False, report_to="none")

    def trainer(data, args):
        ours = {"train_dataset": data, "processing_class": tokenizer}
        return HFTTrainer(model, args, formatting_func=lambda row: "=".join(map(str, row.values())), **ours)

    with pytest.raises(ValueError, match=re.escape("and the rows of task 'e' have prompts and completions, which it")):
        trainer(train, args)
    found = trainer({**train, "e": train["a"]}, args)._prepared["e"][0]
    assert tokenizer.decode(found["input_ids"]).startswith("q=x") and found["labels"] == found["input_ids"]
