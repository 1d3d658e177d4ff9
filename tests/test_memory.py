"""The memory: pages that a stage's tasks write together and later tasks read."""

import copy
import json
import re

import numpy
import pytest
import torch

import hft

from .test_model import prompts
from .tiny import bits, fill, grow, snapshot


@pytest.fixture
def grown(backbones) -> hft.HFTForCausalLM:
    """Two branches, a -> b and e -> f, sealed, with a page for each of the two stages."""
    made = hft.HFTForCausalLM.from_backbone(
        backbones["llama"], {"a": [], "b": ["a"], "e": [], "f": ["e"]}, rank=3, memory_config={"slots": 2}
    )
    grow(made)
    return made


def test_a_stage_that_is_started_again_lets_all_its_tasks_write_the_page(backbones):
    """Also those whose turn had not come when it was cut off: their gate on it does not learn, and 0 would stay."""
    model = hft.HFTForCausalLM.from_backbone(
        backbones["llama"], {"a": [], "b": []}, rank=3, memory_config={"slots": 2}
    )
    model.start_stage(["a", "b"])
    before = model.gates("b").values
    fill(model, only_trainable=True)
    with torch.no_grad():
        for nodes in model.hft_nodes.values():
            nodes.reset_parameters("b")
    model.start_stage(["a", "b"])
    assert torch.equal(model.gates("b").values, before) and (before == 1).all()
    model(prompts(2, 6), labels=prompts(2, 6), task="b").loss.backward()
    assert all(memory.pair("1")[1].grad.any() for memory in model.hft_memory.values())


def test_a_stage_writes_one_page_and_later_tasks_of_any_branch_read_it(grown):
    config = grown.config
    assert [(page["id"], page["writers"], page["sealed"]) for page in config.pages] == [
        (1, ["a", "e"], True),
        (2, ["b", "f"], True),
    ]
    assert {task["name"]: task["pages"] for task in config.tasks} == {"a": [1], "e": [1], "b": [1, 2], "f": [1, 2]}
    grown.add_task("late")
    assert config.task("late")["pages"] == []  # until its stage begins it is the backbone
    grown.start_stage(["late"])
    assert config.task("late")["pages"] == [1, 2, 3]
    assert grown.gates("late").sources == ("late", "page:1", "page:2", "page:3")


def test_without_a_task_or_with_its_gates_at_zero_the_memory_is_silent(backbones):
    model = hft.HFTForCausalLM.from_backbone(backbones["llama"], {"a": [], "b": ["a"]})
    x = prompts(2, 6)
    plain = bits(model(x).logits)
    grow(model)
    with torch.no_grad():
        assert bits(model(x).logits) == plain
        before = model(x, task="b").logits
        model.hft_gates.of("b")[:, 2:].zero_()  # its pages
        without_pages = model(x, task="b").logits
        assert (without_pages - before).abs().max() > 1e-3
        fill_pages(model)
        assert bits(model(x, task="b").logits) == bits(without_pages)


def fill_pages(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("hft_memory"):
                parameter.normal_()


def test_a_child_starts_as_its_parent_and_reads_new_pages_at_zero(grown):
    x = prompts(2, 6)
    grown.add_task("child", ["b"])
    expected = grown(x, task="b").logits
    torch.testing.assert_close(grown(x, task="child").logits, expected)
    grown.add_task("other", ["a"])  # a reads page 1 only
    grown.start_stage(["child", "other"])
    torch.testing.assert_close(grown(x, task="child").logits, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grown(x, task="other").logits, grown(x, task="a").logits, rtol=1e-5, atol=1e-5)
    gates = grown.gates("other")
    assert gates.sources == ("a", "other", "page:1", "page:2", "page:3")
    assert gates.mean()["page:2"] == 0.0 and gates.mean()["page:3"] == 1.0
    torch.testing.assert_close(gates.values[:, 2], grown.gates("a").values[:, 1])


def test_a_stage_that_is_started_twice_is_started_once(grown):
    grown.add_task("late", ["a"])
    grown.start_stage(["late"])
    before, config = snapshot(grown), copy.deepcopy(grown.config.tasks)
    grown.start_stage(["late"])
    assert snapshot(grown) == before
    assert grown.config.tasks == config
    assert len(grown.config.pages) == 3


def test_what_a_stage_started_with_can_go_on_learning(grown):
    """A task that has learnt something is left as it is when its stage begins again."""
    grown.add_task("late", ["a"])
    grown.start_stage(["late"])
    fill(grown)
    before = snapshot(grown)
    grown.start_stage(["late"])
    assert snapshot(grown) == before


def test_pages_start_the_same_whatever_the_random_state(backbones):
    keys = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = hft.HFTForCausalLM.from_backbone(backbones["llama"], {"a": []})
        state = torch.random.get_rng_state()
        model.start_stage(["a"])
        assert torch.equal(torch.random.get_rng_state(), state)
        keys.append({name: bits(p) for name, p in model.page_parameters(1).items()})
    assert keys[0] == keys[1]
    assert len(set(keys[0].values())) > len(keys[0]) // 2  # each linear has keys of its own


def test_memory_can_be_off(backbones):
    model = hft.HFTForCausalLM.from_backbone(backbones["llama"], {"a": []}, memory_config={"read": "off"})
    grow(model)
    assert model.config.pages == [] and model.gates("a").sources == ("a",)
    assert not list(model.hft_memory.parameters())


def test_the_gate_table(grown):
    with torch.no_grad():
        grown.hft_gates.of("b").copy_(torch.tensor([[0.0, 1.0, 0.5, 0.25], [0.0, -1.0, 1.5, 0.25]]))
    table = grown.gates("b")
    assert table.mean() == {"a": 0.0, "b": 1.0, "page:1": 1.0, "page:2": 0.25}
    assert str(table).splitlines() == [
        "Gates of b",
        "   layer         a         b    page:1    page:2",
        "       0     0.000     1.000     0.500     0.250",
        "       1     0.000    -1.000     1.500     0.250",
        "mean |g|     0.000     1.000     1.000     0.250",
    ]
    with pytest.raises(ValueError, match=re.escape("Unknown task 'bb'. Did you mean 'b'?")):
        grown.gates("bb")


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        ({"slots": 0}, "`slots` is 0; a page needs 1 or more."),
        ({"slot": 4}, "`memory_config` has the unknown key 'slot'. Did you mean 'slots'?"),
        ({"read": "dense"}, "read"),
        ({"target_modules": ["q_prj"]}, "`target_modules` names 'q_prj', which this backbone lacks."),
    ],
)
def test_wrong_memories(backbones, memory, message):
    with pytest.raises(Exception, match=re.escape(message)):
        hft.HFTForCausalLM.from_backbone(backbones["llama"], {"a": []}, memory_config=memory)


def test_a_config_that_reads_what_is_not_there_is_refused():
    for key, value, message in (
        ("pages", [3], "Task 'a' reads 3 in `pages`."),
        ("borrows", ["b"], "reads 'b' in `bor"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            hft.HFTConfig(tasks=[{"name": "a", key: value}])


def test_writers_are_tasks_and_ranks_whole_numbers_of_any_kind(grown):
    grown.add_task("late")
    with pytest.raises(ValueError, match="Unknown task 'typo'"):
        grown.start_stage(["late"], writers=["typo"])
    with pytest.raises(ValueError, match=re.escape("The tasks are the string 'late'; give a list: ['late'].")):
        grown.start_stage("late")
    grown.add_task("more", (parent for parent in ["late"]), rank=numpy.int64(2))
    assert grown.config.task("more")["rank"] == 2 and grown.hierarchy.parents("more") == ("late",)
    json.dumps(grown.config.to_dict())
