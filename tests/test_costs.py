"""What a plan costs: the law that is fitted to timed steps is found again; counts are those of a real training."""

import dataclasses

import pytest
from datasets import Dataset

import hft
from hft.trainers import HFTTrainer, HFTTrainingConfig
from hft.trainers.plan_costs import duration, plan_costs
from hft.trainers.planner import Plan, TaskProbe
from hft.trainers.recipes import Recipe
from hft.trainers.time_estimate import CHILD, StepTime, _fit, _longest, task_steps, time_steps, tokens_a_step


def test_steps_and_tokens(tmp_path):
    config = HFTTrainingConfig(output_dir=str(tmp_path), per_device_train_batch_size=4, num_train_epochs=2)
    assert task_steps({"a": 9, "b": 4}, config) == {"a": 6, "b": 2}
    config.task_passes = {"a": 1 / 3}
    assert task_steps({"a": 9, "b": 4}, config) == {"a": 2, "b": 2}
    config.max_steps = 7
    shared = task_steps({"a": 9, "b": 4}, config)
    assert sum(shared.values()) == 7 and abs(shared["a"] - shared["b"]) == 1
    assert tokens_a_step([7] * 10, config) == 28
    assert 28 < tokens_a_step([7, 9], config) < 36


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


@pytest.mark.parametrize("max_steps", [-1, 5])
@pytest.mark.parametrize("families", [{}, {"root": ["a", "b"]}])
def test_steps_and_bytes_are_those_of_the_training(backbones, tokenizer, tmp_path, max_steps, families):
    tree = {"a": [], "b": [], "c": ["a"]} | {task: [root] for root, its in families.items() for task in its}
    rows = {
        task: [{"prompt": f"{i} and {task} is", "completion": f" {i % 3}"} for i in range(9 + 4 * n)]
        for n, task in enumerate(tree)
    }
    training = {
        "output_dir": str(tmp_path / "run"), "num_train_epochs": 2, "per_device_train_batch_size": 4, "report_to": "none",
        "max_steps": max_steps, "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True, "save_strategy": "no",
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
