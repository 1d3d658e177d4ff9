"""Roots that learn from the rows of the tasks on them: `mixtures` says in one word what can be said of each task."""

import pytest
from datasets import Dataset, concatenate_datasets

import hft
from hft.trainers import HFTTrainer, HFTTrainingConfig

from .test_trainer import make, rows
from .tiny import snapshot


TREE = {"root": [], "alone": [], "a": ["root"], "b": ["root"]}
FAMILY = {"root": ["a", "b"]}


def sets() -> dict[str, Dataset]:
    return {"alone": rows(1, 6), "a": rows(2, 8), "b": rows(3, 12)}


def test_a_mixture_is_what_can_be_said_of_each_task(backbones, tokenizer, tmp_path):
    """The same model, to the bit: rows, passes, rates, pages, and whom the router knows."""
    short = make(
        backbones, tokenizer, tmp_path / "short", TREE, sets(), mixtures=FAMILY, root_share=0.75, num_train_epochs=1
    )
    short.train()
    mixed = concatenate_datasets([sets()["a"], sets()["b"]]).shuffle(seed=0)
    said = {
        "task_passes": {"root": 0.75, "a": 0.25, "b": 0.25},
        "task_learning_rates": {"a": 1e-3, "b": 1e-3},
        "page_tasks": ["alone"],
        "route_tasks": ["alone", "a", "b"],
    }
    long = make(backbones, tokenizer, tmp_path / "long", TREE, {"root": mixed, **sets()}, num_train_epochs=1, **said)
    long.train()
    assert snapshot(short.model) == snapshot(long.model)
    assert short.model.config.to_dict() == long.model.config.to_dict()
    assert set(short.model.hft_router.tasks()) == {"alone", "a", "b"}
    steps = [[stage["steps"] for stage in trainer.record.stages] for trainer in (short, long)]
    assert steps[0] == steps[1]
    assert short.record.budget["mixtures"] == FAMILY and short.record.budget["root_share"] == 0.75
    assert "root_share" not in long.record.budget


def test_a_root_may_have_rows_of_its_own_and_more_to_go_by(backbones, tokenizer, tmp_path):
    more = {"mixtures": FAMILY, "eval_strategy": "steps", "eval_steps": 2, "mastery_patience": 9}
    trainer = make(backbones, tokenizer, tmp_path, TREE, {"root": rows(9, 4), **sets()}, eval_dataset=sets(), **more)
    assert len(trainer._train_sets["root"]) == 4
    assert len(trainer.eval_dataset["root"]) == len(sets()["a"]) + len(
        sets()["b"]
    )  # mastery goes by rows of each task


def test_rows_that_are_prepared_become_the_roots(backbones, tokenizer, tmp_path):
    first = make(backbones, tokenizer, tmp_path / "1", TREE, sets(), eval_dataset=sets(), mixtures=FAMILY)
    ready = {task: its for task, its in first.eval_dataset.items() if task != "root"}
    again = make(backbones, tokenizer, tmp_path / "2", TREE, sets(), eval_dataset=ready, mixtures=FAMILY)
    (root_id,) = set(again.eval_dataset["root"]["hft_task"])
    assert again._task_names[root_id] == "root" and len(again.eval_dataset["root"]) == 20
    assert again.evaluate("root")["eval_loss"] == pytest.approx(first.evaluate("root")["eval_loss"])


def test_a_root_that_is_sealed_has_no_new_tasks(backbones, tokenizer, tmp_path):
    trainer = make(backbones, tokenizer, tmp_path, TREE, sets(), mixtures=FAMILY, num_train_epochs=1)
    trainer.train()
    trainer.model.add_task("c", ["root"])
    trainer.args.mixtures = {"root": ["a", "b", "c"]}
    more = HFTTrainer(trainer.model, trainer.args, {"c": rows(4)}, processing_class=tokenizer)
    with pytest.raises(ValueError, match=r"`mixtures\['root'\]` names 'c', from whose rows 'root' has not learnt"):
        more.train()
    trainer.args.mixtures = FAMILY
    HFTTrainer(trainer.model, trainer.args, {"c": rows(4)}, processing_class=tokenizer).train()


def test_mixtures_as_text(tmp_path):
    config = HFTTrainingConfig(output_dir=str(tmp_path), mixtures='{"root": ["a", "b"]}')
    assert config.mixtures == FAMILY == HFTTrainingConfig(**config.to_dict()).mixtures


def test_a_stopped_family_goes_on(backbones, tokenizer, tmp_path):
    whole = make(backbones, tokenizer, tmp_path / "whole", TREE, sets(), mixtures=FAMILY)
    whole.train()

    class Stops(HFTTrainer):
        def stage_ended(self, stage, trims):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(backbones, tokenizer, tmp_path / "cut", TREE, sets(), cls=Stops, mixtures=FAMILY).train()
    assert hft.HFTConfig.from_pretrained(tmp_path / "cut").sealed_tasks() == ["root", "alone"]
    with pytest.raises(ValueError, match="`mixtures` is None, and the run to be resumed was begun with"):
        make(backbones, tokenizer, tmp_path / "cut", TREE, {"root": rows(9), **sets()}).train(
            resume_from_checkpoint=True
        )
    on = make(backbones, tokenizer, tmp_path / "cut", TREE, sets(), mixtures=FAMILY)
    on.train(resume_from_checkpoint=True)
    assert snapshot(on.model) == snapshot(whole.model)


@pytest.mark.parametrize(
    ("mixtures", "change", "message"),
    [
        ({"root": ["a", "c"]}, {}, r"`mixtures\['root'\]` names the unknown task 'c'"),
        ({"root": ["alone"]}, {}, "has the rows of 'alone', which does not stand on it; make it a parent"),
        ({"root": []}, {}, r"`mixtures\['root'\]` is \[\]; give a list of tasks"),
        ('{"root": "a"}', {}, r"`mixtures\['root'\]` is 'a'; give a list of tasks"),
        ("root", {}, "`mixtures` is 'root'; give `task: \\[tasks\\]`"),
        ({"root": ["a", "b", "a"]}, {}, r"`mixtures\['root'\]` is \['a', 'b', 'a'\]; name each task once"),
        ({"root": [["a"]]}, {}, r"`mixtures\['root'\]` is \[\['a'\]\]; give a list of tasks"),
        (FAMILY, {"a": None}, "`train_dataset` has no rows of 'a', from which 'root' learns"),
        (FAMILY, {"b": Dataset.from_list([{"text": "so it is"}])}, "'root' learns from the rows of 'a' and 'b'"),
    ],
)
def test_wrong_mixtures(backbones, tokenizer, tmp_path, mixtures, change, message):
    train = {task: its for task, its in {**sets(), **change}.items() if its is not None}
    with pytest.raises(ValueError, match=message):
        make(backbones, tokenizer, tmp_path, TREE, train, mixtures=mixtures)
