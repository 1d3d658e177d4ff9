"""What a plan costs: the law that is fitted to timed steps is found again; counts are those of a real training."""

import copy
import dataclasses
import random

import pytest
from datasets import Dataset

import hft
from hft.nodes_hft import numbers_a_rank
from hft.trainers import HFTTrainer, HFTTrainingConfig
from hft.trainers.plan_costs import _measure, duration, plan_costs
from hft.trainers.planner import Plan, TaskProbe
from hft.trainers.recipes import Recipe
from hft.trainers.row_tokens import tokenize_rows
from hft.trainers.time_estimate import (
    CHILD,
    STEP_KEYS,
    StepTime,
    _enough,
    _fit,
    _longest,
    rows_that_train,
    task_steps,
    time_steps,
    timing_config,
    tokens_a_step,
)
from tests.tiny import grow


# What a recipe may ask for that must not happen while `hft plan` times steps.
OTHER_SETTINGS = {
    "push_to_hub": True, "hub_model_id": "me/mine", "hub_strategy": "all_checkpoints", "report_to": "tensorboard",
    "mastery_patience": 1, "mastery_accuracy": 0.5, "rank_tolerance": 0.01, "eval_strategy": "steps", "eval_steps": 1,
    "eval_on_start": True, "save_strategy": "steps", "save_steps": 1, "max_steps": 1, "gradient_accumulation_steps": 3,
    "route_tasks": ["a"], "page_tasks": ["a"], "task_passes": {"a": 0.5}, "task_learning_rates": {"a": 1e-4},
    "resume_from_checkpoint": "/no/run", "dataset_kwargs": {"skip_prepare_dataset": True}, "logging_steps": 1,
}  # fmt: skip


def test_steps_and_tokens(tmp_path):
    config = HFTTrainingConfig(output_dir=str(tmp_path), per_device_train_batch_size=4, num_train_epochs=2)
    assert task_steps({"a": 9, "b": 4}, config) == {"a": 6, "b": 2}
    config.num_train_epochs = 0.5  # of the stage: ten steps in an epoch of tasks with one each
    assert sum(task_steps(dict.fromkeys("abcdefghij", 4), config).values()) == 5
    config.num_train_epochs, config.task_passes = 2, {"a": 1 / 3}
    assert task_steps({"a": 9, "b": 4}, config) == {"a": 2, "b": 2}
    config.max_steps = 7
    shared = task_steps({"a": 9, "b": 4}, config)
    assert sum(shared.values()) == 7 and abs(shared["a"] - shared["b"]) == 1
    assert tokens_a_step([7] * 10, config) == 28
    assert 33 < tokens_a_step([7, 9], config) < 36  # padded
    config.packing = True
    assert tokens_a_step([7, 9], config) == pytest.approx(32, rel=0.01)
    config.packing_strategy = "wrapped"
    assert 33 < tokens_a_step([7, 9], config) < 36


def test_the_time_of_steps_is_found_again():
    """Steps that follow the law that is fitted, after a slow first one, give the law back."""
    law = StepTime(fixed=0.5, per_token=0.01, per_rank=0.02, per_prompt=0.1, per_stage=3.0)
    starts, now = [], 0.0
    for stage, tasks in ((1, ["timed-short", "timed-long"] * 4), (2, [CHILD] * 4)):
        for task in tasks:
            tokens = 50 if task == "timed-short" else 90
            starts.append((now, stage, task, tokens))
            now += law.seconds(tokens, 4 if task == CHILD else 0) + (5.0 if len(starts) == 1 else 0)
    found = _fit(starts, 4, 0.1, now)
    assert (found.fixed, found.per_token, found.per_rank) == pytest.approx((0.5, 0.01, 0.02))
    same = [(begin, stage, task, 70) for begin, stage, task, _ in starts]  # lengths that say nothing
    assert _fit(same, 4, 0.1, now).seconds(70, 0) == pytest.approx(0.5 + 0.01 * 70, rel=0.05)


def test_times_for_people():
    assert [duration(n) for n in (3.21, 200, 7300)] == ["3.2 s", "3 min 20 s", "2 h 1 min"]


def test_no_setting_acts_on_timed_steps_but_what_costs_time(backbones, tokenizer, tmp_path):
    assert set(STEP_KEYS) <= {field.name for field in dataclasses.fields(HFTTrainingConfig)}
    assert not set(STEP_KEYS) & set(OTHER_SETTINGS)
    costly = {"per_device_train_batch_size": 3, "max_length": 50, "bf16": False, "gradient_checkpointing": False}
    everything = {**OTHER_SETTINGS, **costly, "output_dir": str(tmp_path / "mine")}
    config = timing_config(everything, str(tmp_path))
    assert config.to_dict() == timing_config(costly, str(tmp_path)).to_dict()
    assert (config.per_device_train_batch_size, config.max_length, config.push_to_hub) == (3, 50, False)
    rows = {"a": [{"prompt": "so " * i, "completion": " yes"} for i in range(1, 7)]}
    model = hft.HFTForCausalLM.from_backbone(backbones["llama"], {}, rank=3)
    assert time_steps(model, rows, tokenizer, everything, num_steps=2).seconds(80, 0) > 0
    assert not (tmp_path / "mine").exists()


ONE_BY_ONE = {"packing": True, "per_device_train_batch_size": 1}


@pytest.mark.parametrize(
    ("max_steps", "families", "more"),
    [
        (-1, {}, {}),
        (5, {}, {}),
        (-1, {"root": ["a", "b"]}, {}),
        (5, {"root": ["a", "b"]}, {}),
        (-1, {"root": ["a", "b"]}, {**ONE_BY_ONE, "max_length": 40}),
        (5, {}, {"packing": True, "max_length": 40}),
        (-1, {}, {**ONE_BY_ONE, "max_length": 10, "packing_strategy": "bfd_split"}),
        (-1, {}, {**ONE_BY_ONE, "max_length": 10, "packing_strategy": "wrapped"}),
        (-1, {}, {"padding_free": True, "max_length": None}),
    ],
)
def test_steps_and_bytes_are_those_of_the_training(backbones, tokenizer, tmp_path, max_steps, families, more):
    tree = {"a": [], "b": [], "c": ["a"]} | {task: [root] for root, its in families.items() for task in its}
    rows = {
        task: [{"prompt": f"{i} and {task} is", "completion": f" {i % 3}"} for i in range(9 + 4 * n)]
        for n, task in enumerate(tree)
    }
    training = {
        "output_dir": str(tmp_path / "run"), "num_train_epochs": 2, "per_device_train_batch_size": 4, "report_to": "none",
        "max_steps": max_steps, "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True, "save_strategy": "no",
        **more,
    }  # fmt: skip
    recipe = Recipe(backbone=str(backbones["llama"]), hierarchy=tree, training=training)
    scratch = hft.HFTForCausalLM.from_backbone(backbones["llama"], {}, rank=3)
    probes = {task: TaskProbe(1.0, 0.1, {"backbone": [1.0] * 9}) for task in tree}
    tree = {root: [] for root in families} | tree
    costs = plan_costs(Plan(tree, probes, (), families), recipe, scratch, rows, tokenizer)

    model = hft.HFTForCausalLM.from_backbone(backbones["llama"], tree, rank=3)
    rows |= {root: [row for task in its for row in rows[task]] for root, its in families.items()}
    data = {task: Dataset.from_list(its) for task, its in rows.items()}
    training = dataclasses.replace(recipe, hierarchy=tree, mixtures=families).training_arguments()
    trainer = HFTTrainer(model, HFTTrainingConfig(**training), train_dataset=data, processing_class=tokenizer)
    assert trainer.train().global_step == sum(costs.steps.values())
    for file, size in (("tasks/c.safetensors", costs.task_bytes), ("pages/1.safetensors", costs.page_bytes)):
        content = (tmp_path / "run" / file).read_bytes()
        assert size == len(content) - 8 - int.from_bytes(content[:8], "little")
    assert len(list((tmp_path / "run/pages").iterdir())) == costs.num_pages
    lines = costs.lines()
    assert [line.split()[0] for line in lines[:-1]] == ["task", *families, "a", "b", "c", "stages", "in"]
    assert 0 < costs.total_seconds() < 600 and lines[-1].startswith(
        f"Peak of a step with rows of {costs.length} tokens"
    )


def test_tasks_that_join_a_model(backbones, tokenizer, tmp_path):
    """Of these alone: steps and stages are those of their training; a file is of the rank that they get."""
    learnt = hft.HFTForCausalLM.from_backbone(backbones["llama"], {"a": [], "b": ["a"]}, rank=3)
    grow(learnt)
    learnt.add_task("open")
    learnt.add_task("too", ["open"])  # as an interrupted run leaves them
    tree = {"c": ["b"], "d": ["c"]}
    rows = {task: [{"prompt": f"{i} {task} is", "completion": f" {i % 3}"} for i in range(9)] for task in tree}
    training = {
        "output_dir": str(tmp_path / "run"), "per_device_train_batch_size": 4, "num_train_epochs": 1, "save_strategy": "no",
        "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True, "report_to": "none",
    }  # fmt: skip
    recipe = Recipe(from_model="here", hierarchy=tree, training=training, model={"rank": 2})
    probes = {task: TaskProbe(1.0, 0.1, {"backbone": [1.0] * 9}) for task in tree}
    scratch = copy.deepcopy(learnt)
    parents = {"a": [], "b": ["a"], "open": [], "too": ["open"], **tree}
    costs = plan_costs(Plan(parents, probes, ()), recipe, scratch, rows, tokenizer)
    assert list(costs.steps) == ["c", "d"] and costs.num_pages == 2 and costs.total_seconds() > 0
    nodes, pages = (numbers_a_rank(its) for its in (learnt.hft_nodes, learnt.hft_memory))
    slots = learnt.config.memory_config.slots  # before the second stage: nodes of rank 3, 3 and 2, and three pages
    assert costs.memory.tasks == learnt.dtype.itemsize * (8 * nodes + 3 * slots * pages)

    learnt.remove_task("open", cascade=True)
    for task, parents in tree.items():
        learnt.add_task(task, parents, rank=2)
    data = {task: Dataset.from_list(its) for task, its in rows.items()}
    trainer = HFTTrainer(learnt, HFTTrainingConfig(**training), train_dataset=data, processing_class=tokenizer)
    assert trainer.train().global_step == sum(costs.steps.values())
    content = (tmp_path / "run/tasks/d.safetensors").read_bytes()
    assert costs.task_bytes == len(content) - 8 - int.from_bytes(content[:8], "little")


def test_rows_that_lose_their_answers_are_not_timed(backbones, tokenizer, tmp_path):
    rows = {"a": [{"prompt": "so " * 4 * i, "completion": " yes"} for i in range(1, 7)]}
    training = {"output_dir": str(tmp_path), "max_length": 40, "bf16": False, "per_device_train_batch_size": 2}

    def longest(rows, **options):
        return list(_longest(rows, tokenizer, HFTTrainingConfig(**training, **options)))

    assert longest(rows["a"]) == rows["a"][2::-1]  # a token a letter: the prompt of the fourth has 48
    for whole in ({"truncation_mode": "keep_end"}, {"completion_only_loss": False}):
        assert longest(rows["a"], **whole) == rows["a"][::-1]
    training["max_length"] = None
    assert longest(rows["a"]) == rows["a"][::-1]
    training["max_length"] = 40
    with pytest.raises(ValueError, match="`max_length`=40 tokens cuts off the answers of all 1 rows: raise it"):
        longest(rows["a"][-1:])
    model = hft.HFTForCausalLM.from_backbone(backbones["llama"], {}, rank=3)
    assert time_steps(model, rows, tokenizer, training, num_steps=2).seconds(80, 0) > 0


def packing_config(folder, **more):
    return HFTTrainingConfig(output_dir=str(folder), packing=True, **{"max_length": 24, **more})


def test_packed_rows_of_a_large_task_are_told_from_some(tokenizer, tmp_path):
    draw = random.Random(1)
    rows = [{"prompt": "o" * draw.randint(3, 90), "completion": " yes"} for _ in range(2500)]
    for strategy in ("bfd", "bfd_split", "wrapped"):
        config = packing_config(tmp_path, max_length=200, packing_strategy=strategy)
        whole = rows_that_train(tokenize_rows(rows, tokenizer), config)
        count, lengths, _ = _measure("a", rows, tokenizer, config)
        assert count == pytest.approx(len(whole), rel=0.05) and count < 900
        assert max(lengths) <= 200


def test_enough_packed_rows_are_timed_and_not_many_more(tokenizer, tmp_path):
    rows = [{"prompt": "o" * length, "completion": " y"} for length in (3, 9, 11, 14, 70)]
    for strategy in ("bfd", "bfd_split", "wrapped"):
        config = packing_config(tmp_path, packing_strategy=strategy)
        chosen = _enough(rows, 20, tokenizer, config)
        assert 20 <= len(rows_that_train(tokenize_rows(chosen, tokenizer), config)) <= 24
    config.packing = False
    assert _enough(rows, 7, tokenizer, config) == rows + rows[:2]


def test_packed_rows_without_answers_or_length_are_refused(tokenizer, tmp_path):
    rows = [{"prompt": "so " * 20, "completion": " yes"}] * 3
    with pytest.raises(ValueError, match="`max_length`=24 tokens cuts off all answers of task 'a': raise it"):
        _measure("a", rows, tokenizer, packing_config(tmp_path))
    assert _measure("a", rows, tokenizer, packing_config(tmp_path, completion_only_loss=False))[0] == 3
    with pytest.raises(ValueError, match="`packing` is set and `max_length` is None; set it to the tokens of"):
        _measure("a", rows, tokenizer, packing_config(tmp_path, max_length=None))
    with pytest.raises(ValueError, match="`max_length`=24 tokens cuts off the answers of all 3 rows: raise it"):
        list(_longest(rows, tokenizer, packing_config(tmp_path, truncation_mode="keep_end")))
    assert list(_longest(rows, tokenizer, packing_config(tmp_path, packing_strategy="wrapped"))) == rows
