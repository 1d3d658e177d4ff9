"""Gates that shrink, and tasks that leave their stage when they are mastered."""

import re

import pytest
import torch

from hft.trainers import HFTTrainer
from hft.trainers.curriculum import BlockSampler, Mastery

from .test_trainer import data, make, rows
from .tiny import bits, snapshot


def test_a_score_or_a_plateau_is_mastery():
    mastery = Mastery(["a", "b"], accuracy=0.9, patience=2)
    assert mastery.observe("a", 5, loss=1.0, accuracy=0.5) == ""
    assert mastery.observe("b", 5, loss=1.0, accuracy=0.5) == ""
    assert mastery.observe("a", 10, loss=1.5, accuracy=0.9) == "validation accuracy 0.900"
    assert mastery.observe("b", 10, loss=1.0, accuracy=0.5) == ""  # no lower: once
    assert not mastery.all_mastered()
    assert mastery.observe("b", 15, loss=0.9, accuracy=0.5) == ""  # lower: counted anew
    assert mastery.observe("b", 20, loss=0.9, accuracy=0.5) == ""
    assert mastery.observe("b", 25, loss=2.0, accuracy=0.5) == "no lower validation loss than 0.900 in 2 evaluations"
    assert mastery.observe("b", 30, loss=0.0, accuracy=1.0) == ""  # mastered once and for all
    assert mastery.all_mastered() and mastery.mastered == {"a": 10, "b": 25}


def test_an_evaluation_without_a_step_of_the_task_says_nothing():
    turns = {4: 0, 8: 0, 12: 1, 16: 1, 20: 2}
    mastery = Mastery(["a"], patience=2, turns_until=lambda task, step: turns[step])
    found = [mastery.observe("a", step, loss=1.0, accuracy=0.0) for step in turns]
    assert found[:4] == [""] * 4 and found[4].startswith("no lower validation loss")


def test_a_small_task_is_not_sealed_before_it_has_had_its_turns(backbones, tokenizer, tmp_path):
    """Of 22 blocks 2 are the small task's, so most evaluations find it as it was."""
    sets = {"large": rows(0, 40), "small": rows(50, 4)}
    options = {"mastery_patience": 2, "eval_steps": 1, "save_steps": 22, "num_train_epochs": 1, "learning_rate": 1e-4}
    trainer = make(backbones, tokenizer, tmp_path, {"large": [], "small": []}, sets, sets, cls=Watching,
                   memory={"read": "off"}, **{**OPTIONS, **options})  # fmt: skip
    trainer.train()
    assert ("small", False) in trainer.taken
    assert trainer.mastery.mastered.get("small", 99) > trainer.taken.index(("small", False))
    assert any(
        bits(up) != bits(up * 0) for name, up in trainer.model.task_parameters("small").items() if ".B_" in name
    )


def test_saved_steps_are_counted_from_the_plan():
    sampler = BlockSampler({"a": 5, "b": 9}, block_size=4, seed=1)  # 2 and 3 blocks an epoch
    plan = sampler.turns(0) + sampler.turns(1)
    assert sampler.turns_after(0, 10) == plan
    assert sampler.turns_after(3, 9) == plan[3:9]
    assert [sampler.turns_until("b", step) for step in range(11)] == [plan[:step].count("b") for step in range(11)]


class Watching(HFTTrainer):
    """Notes each task's parameters after each step."""

    def training_step(self, model, inputs, *args, **kwargs):
        task = self._task_of(inputs)
        vars(self).setdefault("taken", []).append((task, task in self.mastery.mastered))
        return super().training_step(model, inputs, *args, **kwargs)


OPTIONS = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 4, "num_train_epochs": 4, "bf16": False,
           "lr_scheduler_type": "constant", "gradient_accumulation_steps": 1}  # fmt: skip


def mastering(backbones, tokenizer, folder, hierarchy, cls=Watching, memory=None, **options):
    sets = {task: rows(10 * i, 6) for i, task in enumerate(hierarchy)}
    options = {**OPTIONS, "mastery_patience": 99, **options}
    return make(backbones, tokenizer, folder, hierarchy, sets, sets, cls=cls, memory=memory, **options)


@pytest.fixture
def e_is_mastered(monkeypatch):
    """The rules are tested above; here e is mastered at its evaluation after step 4, whatever its loss."""

    def observe(self, task, step, loss, accuracy):
        if task != "e" or step < 4 or "e" in self.mastered:
            return ""
        self.mastered[task] = step
        return "as told"

    monkeypatch.setattr(Mastery, "observe", observe)


def test_a_mastered_task_leaves_and_its_siblings_learn_as_if_it_had_stayed(
    backbones, tokenizer, tmp_path, monkeypatch, e_is_mastered
):
    options = {"hierarchy": {"a": [], "e": []}, "memory": {"read": "off"}}  # else they would meet in the page
    trainer = mastering(backbones, tokenizer, tmp_path / "1", **options)
    output = trainer.train()
    assert trainer.mastery.mastered == {"e": 4}
    skipped = [task for task, was_mastered in trainer.taken if was_mastered]
    turns = BlockSampler({"a": 6, "e": 6}, 2, trainer.args.seed).turns_after(4, 24)
    assert skipped == ["e"] * turns.count("e") and len(skipped) > 3
    assert output.global_step == 24 and output.metrics["saved_steps"] == len(skipped)
    assert trainer.model.config.sealed_tasks() == ["a", "e"]
    monkeypatch.undo()
    whole = mastering(backbones, tokenizer, tmp_path / "2", **options)
    assert whole.train().metrics["saved_steps"] == 0
    for task, same in (("a", True), ("e", False)):
        ours, theirs = trainer.model.task_parameters(task), whole.model.task_parameters(task)
        assert all(bits(ours[name]) == bits(theirs[name]) for name in ours) == same


def test_a_step_that_is_skipped_shrinks_no_gate(backbones, tokenizer, tmp_path, monkeypatch, e_is_mastered):
    options = {"hierarchy": {"a": [], "b": ["a"], "e": ["a"]}, "memory": {"read": "off"}, "gate_shrink": 5.0}
    at_mastery = []

    class Noting(Watching):
        def training_step(self, *args, **kwargs):
            if self.stage.level == 2 and self.state.global_step >= 4:
                at_mastery.append(self.model.gates("e").values)
            return super().training_step(*args, **kwargs)

    trainer = mastering(backbones, tokenizer, tmp_path / "1", cls=Noting, **options)
    trainer.train()
    assert trainer.mastery.mastered == {"e": 4} and trainer.model.gates("b").values.min() < 0.99
    assert len(at_mastery) > 4 and all(torch.equal(values, at_mastery[0]) for values in at_mastery)
    monkeypatch.undo()
    whole = mastering(backbones, tokenizer, tmp_path / "2", **options)
    whole.train()
    assert torch.equal(trainer.model.gates("b").values, whole.model.gates("b").values)


def test_the_stage_ends_when_all_are_mastered(backbones, tokenizer, tmp_path):
    hierarchy = {"a": [], "e": [], "b": ["a"]}
    trainer = mastering(backbones, tokenizer, tmp_path, hierarchy, mastery_patience=None, mastery_accuracy=1e-9)
    output = trainer.train()
    first, second = 2, 2  # the first evaluation of each stage
    assert output.global_step == first + second
    assert output.metrics["saved_steps"] == (2 * 3 * 4 - first) + (3 * 4 - second)
    assert trainer.model.config.open_tasks() == []


@pytest.mark.parametrize("accumulation", [1, 4])
def test_who_writes_a_page_leaves_with_its_other_writers(
    backbones, tokenizer, tmp_path, monkeypatch, e_is_mastered, accumulation
):
    """Else the page that it reads would change under it, after it was measured for the last time."""
    options = {"hierarchy": {"a": [], "e": []}, "gradient_accumulation_steps": accumulation}
    trainer = mastering(backbones, tokenizer, tmp_path / "1", **options)
    output = trainer.train()
    assert trainer.mastery.mastered == {"e": 4} and trainer.mastery.left == {}
    assert output.metrics["saved_steps"] == 0
    monkeypatch.undo()
    whole = mastering(backbones, tokenizer, tmp_path / "2", **options)
    whole.train()
    assert snapshot(trainer.model) == snapshot(whole.model)


def test_tasks_leave_together_once_all_would():
    mastery = Mastery(("a", "b", "c"), together=("a", "b"))
    mastery.mastered.update(a=2, c=4)
    assert mastery.left == {"c": 4}
    mastery.mastered["b"] = 6
    assert mastery.left == {"a": 6, "b": 6, "c": 4} and mastery.all_mastered()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_resumed_after_mastery_is_as_uninterrupted(backbones, tokenizer, tmp_path, e_is_mastered, accumulation):
    class Killed(Watching):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == 7:
                raise KeyboardInterrupt
            return super().training_step(*args, **kwargs)

    hierarchy = {"a": [], "e": []}
    options = {"gradient_accumulation_steps": accumulation, "memory": {"read": "off"}}
    whole = mastering(backbones, tokenizer, tmp_path / "whole", hierarchy, **options)
    expected = whole.train()
    with pytest.raises(KeyboardInterrupt):
        mastering(backbones, tokenizer, tmp_path / "cut", hierarchy, cls=Killed, **options).train()
    resumed = mastering(backbones, tokenizer, tmp_path / "cut", hierarchy, **options)
    output = resumed.train(resume_from_checkpoint=True)
    assert resumed.mastery.mastered == whole.mastery.mastered == {"e": 4}
    assert output.metrics["saved_steps"] == expected.metrics["saved_steps"] > 3
    assert snapshot(resumed.model) == snapshot(whole.model)


def test_shrinking_gates_reach_exactly_zero_and_only_inherited_ones(backbones, tokenizer, tmp_path):
    """A pull that no gradient can hold: what a task inherits ends at 0; its own node and page keep their gates."""
    trainer = make(backbones, tokenizer, tmp_path, gate_learning_rate=0.2, gate_shrink=20.0, num_train_epochs=4)
    trainer.train()
    for task in ("b", "d", "x"):
        gates = trainer.model.gates(task)
        own_page = f"page:{trainer.model.hierarchy.level(task)}"
        for source, column in zip(gates.sources, gates.values.T, strict=True):
            if source in (task, own_page):
                assert (column == 1).all(), (task, source)
            else:
                assert (column == 0).all(), (task, source)
    first = trainer.model.gates("a")
    assert first.sources == ("a", "page:1") and (first.values == 1).all()


def test_gates_that_do_not_learn_do_not_shrink(backbones, tokenizer, tmp_path):
    found = []
    for strength in (0.0, 20.0):
        trainer = make(backbones, tokenizer, tmp_path / str(strength), gate_shrink=strength)
        trainer.model.config.gating_config.trainable = False
        trainer.train()
        found.append({task: trainer.model.gates(task).values.tolist() for task in ("a", "b", "x")})
    assert found[0] == found[1] and found[0]["b"][0][0] == 1


def test_without_shrinking_gates_go_where_the_gradient_says(backbones, tokenizer, tmp_path):
    trainer = make(backbones, tokenizer, tmp_path)
    trainer.train()
    assert (trainer.model.gates("x").values != 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mastery_accuracy": 1.5}, "`mastery_accuracy` is 1.5; it must be above 0 and at most 1."),
        ({"mastery_patience": 0}, "`mastery_patience` is 0; it must be a whole number of 1 or more, or None."),
        (
            {"mastery_patience": 2},
            "go by evaluations, and `eval_strategy` is 'no'; set it to 'steps', and `eval_steps`.",
        ),
        ({"gate_shrink": -1.0}, "`gate_shrink` is -1.0; it must be a number of 0 or more."),
        ({"task_passes": {"a": 0}}, "`task_passes['a']` is 0; it must be a number above 0."),
        ({"task_passes": {"a": "1e-1"}}, "`task_passes['a']` is '1e-1'; it must be a number above 0."),
        ({"task_passes": {"a": True}}, "`task_passes['a']` is True; it must be a number above 0."),
        ({"task_passes": ["a"]}, "`task_passes` is ['a']; it must be text or `key: value` pairs."),
        ({"task_passes": "{a: 1}"}, "`task_passes` is '{a: 1}'; give {\"task\": passes}."),
        ({"page_tasks": "a"}, "`page_tasks` is 'a'; it must be a list."),
        (
            {"task_learning_rates": {"a": 1e-4}, "learning_rate": 0.0},
            "`learning_rate` is 0.0; with `task_learning_rates` it must be above 0.",
        ),
        ({"task_learning_rates": {"a": 0}}, "`task_learning_rates['a']` is 0; it must be a number above 0."),
    ],
)
def test_wrong_settings(backbones, tokenizer, tmp_path, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make(backbones, tokenizer, tmp_path, **options)


def test_mastery_needs_rows_to_validate_on(backbones, tokenizer, tmp_path):
    message = "`mastery_patience` or `mastery_accuracy` is set, but `eval_dataset` has no rows of the task 'e'"
    with pytest.raises(ValueError, match=re.escape(message)):
        make(backbones, tokenizer, tmp_path, eval_dataset={"a": data()["a"]}, mastery_patience=1,
             eval_strategy="steps")  # fmt: skip
