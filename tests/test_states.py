"""Every public call in every state that a model can be in: what it leaves behind, and what it refuses."""

import copy
import json
import sys
import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import hft
from hft.kept_hft import HFTKept

from .tiny import fill, grow, snapshot


TREE = {"a": [], "e": []}
IDS = torch.arange(14).reshape(2, 7) + 5


@pytest.fixture
def fresh(backbones):
    """Two open roots that speak, in a stage with a page."""
    model = hft.HFTForCausalLM.from_backbone(backbones["llama"], TREE, rank=3)
    model.start_stage(["a", "e"])
    fill(model, only_trainable=True)
    return model


def loss_of(model, task):
    return model(IDS, task=task, labels=IDS).loss


@pytest.mark.parametrize("merge", [False, True])
def test_folding_an_open_task_leaves_no_graph(fresh, merge):
    before = snapshot(fresh)
    fresh.fold("a", merge=merge)
    copy.deepcopy(fresh)
    fresh.unfold()
    assert snapshot(fresh) == before
    assert all(parameter.is_leaf and not parameter.requires_grad for parameter in fresh.backbone.parameters())
    for _ in range(2):
        loss_of(fresh, "e").backward()
    assert all(fresh.get_parameter(name).grad is None for name in fresh.task_parameters("a"))
    fresh.requires_grad_(False)


@pytest.mark.parametrize("slim", [True, False])
def test_2_a_root_of_rank_one_is_the_same_bits_wherever_it_lies_in_a_file(backbones, tmp_path, slim):
    for extra in range(4):  # tensors of others move its place
        model = hft.HFTForCausalLM.from_backbone(
            backbones["llama"], {"a": [], **{f"t{i}": [] for i in range(extra)}}, rank=1, memory_config={"read": "off"}
        )
        grow(model)
        folder = tmp_path / str(extra)
        model.save_pretrained(folder, slim=slim)
        again = hft.HFTForCausalLM.from_pretrained(folder)
        for name, parameter in again.named_parameters():
            assert not name.startswith("hft_") or parameter.data_ptr() % 64 == 0
        with torch.no_grad():
            for length in (1, 7):
                ids = IDS[:, :length]
                assert torch.equal(again(ids, task="a").logits, model(ids, task="a").logits)


def test_threads_may_ask_for_many_tasks_at_once():
    kept, parameters, errors = HFTKept(), {f"t{i}": [torch.zeros(1)] for i in range(14)}, []

    def ask(seed: int) -> None:
        try:
            with torch.no_grad():
                for i in range(4000):
                    task = f"t{(i * seed) % 14}"
                    assert kept.of(task, parameters[task]) == {}
        except BaseException as error:
            errors.append(error)

    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=ask, args=(seed,)) for seed in (1, 3, 5, 9)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(usual)
    assert not errors and isinstance(copy.deepcopy(kept), HFTKept)


def test_a_task_that_is_taught_meanwhile_moves_no_other_ones_place(fresh, monkeypatch):
    for task, first in (("a", 5), ("e", 90)):
        fresh.add_routes(task, [[first, first + i, first + 2, first + i] for i in range(8)])
    prompt = torch.tensor([[90, 91, 92, 91]])
    (expected,) = fresh.route(prompt)
    fresh.add_task("0")  # before the others by name
    solve = fresh.hft_router._solve

    def meanwhile():
        solved = solve()
        monkeypatch.undo()
        fresh.add_routes("0", [[60, 60 + i, 60, 61] for i in range(8)])
        return solved

    monkeypatch.setattr(fresh.hft_router, "_solve", meanwhile)
    (route,) = fresh.route(prompt)
    assert (route.task, route.names, route.probabilities) == (expected.task, ("a", "e"), expected.probabilities)
    assert fresh.route(prompt)[0].names == ("0", "a", "e")
    fresh.config.router_config.ridge = 10.0
    assert fresh.route(prompt)[0].probabilities != expected.probabilities  # at once, not when it is loaded again


def test_nothing_that_changes_what_is_read_goes_on_within_activate(fresh, tmp_path):
    fresh.seal(["a", "e"])
    fresh.save_pretrained(tmp_path)
    with fresh.activate("a"):
        with pytest.raises(ValueError, match="Task 'a' is active"):
            fresh.restore(tmp_path)
        with pytest.raises(ValueError, match="Task 'a' is active"):
            fresh.import_lora("n", tmp_path)
    assert "n" not in fresh.hierarchy
    with pytest.raises(ValueError, match="`part` is 'opened'; it is 'all', 'sealed' or 'open'"):
        fresh.restore(tmp_path, "opened")


def test_in_inference_mode_too_what_is_sealed_can_be_built_on(backbones, tmp_path):
    model = hft.HFTForCausalLM.from_backbone(backbones["llama"], {**TREE, "b": ["a"]}, rank=3, dtype=torch.bfloat16)
    model.start_stage(["a", "e"])
    fill(model, only_trainable=True)
    rows = [{"input_ids": row, "labels": row} for row in IDS.tolist()]
    with torch.inference_mode():
        model.trim("a", rows, tolerance=100.0)
        model.seal(["a", "e"])
        model.save_pretrained(tmp_path)
        model.restore(tmp_path)
        again = hft.HFTForCausalLM.from_pretrained(tmp_path)
        again.refresh_gates("a", rows * 3, num_steps=1)
    for its in (model, again):
        assert its.config.task("a")["rank"] == 1
        assert not any(parameter.is_inference() for parameter in its.parameters())
        its.start_stage(["b"])
        loss_of(its, "b").backward()


def test_the_loss_is_what_it_is_set_to(fresh):
    usual = fresh.loss_function
    fresh.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.sum() * 0 + 42
    assert loss_of(fresh, "a") == 42
    fresh.loss_function = usual
    assert loss_of(fresh, "a") != 42


def test_passes_without_numbers_leave_nothing_for_those_with_them(fresh):
    fresh.seal(["a", "e"])
    with torch.no_grad():
        expected = fresh(IDS, task="a").logits
        fresh._kept.clear()
        with FakeTensorMode(allow_non_fake_inputs=True):
            fresh(IDS, task="a")
        assert torch.equal(fresh(IDS, task="a").logits, expected)


def test_what_can_be_read_once_is_read_once(backbones):
    model = hft.HFTForCausalLM.from_backbone(backbones["llama"], TREE, rank=3)
    model.start_stage(["a", "e"], writers=(task for task in ("a", "e")))
    assert model.config.pages[0]["writers"] == ["a", "e"]
    tree = hft.Hierarchy({"a": [], "b": ["a"], "c": ["a"], "e": []})
    for tasks, expected in ((["b", "c"], "a"), (["b", "e"], None), ([], None), (["b"], "b")):
        assert tree.lowest_common_ancestor(iter(tasks)) == expected


def test_long_chains(monkeypatch):
    tree = hft.Hierarchy({f"t{i}": [f"t{i - 1}"] if i else [] for i in range(1500)})
    assert tree.path("t1499") == tuple(f"t{i}" for i in range(1500))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: hft.HFTRouterConfig(ridge=float("nan")), "its `ridge` nan"),
        (lambda: hft.HFTGatingConfig(init=float("nan")), "`init` of the gates is nan"),
        (lambda: hft.HFTMemoryConfig(init=float("inf")), "`init` of the memory is inf"),
        (lambda: hft.HFTConfig(pages=[{"id": 1, "slots": 2}]), "An entry of `pages` lacks 'sealed'"),
        (
            lambda: hft.HFTConfig(pages=[{"id": 1, "slots": 2, "sealed": True, "writers": []}] * 2),
            "The page 1 is a duplicate in `pages`",
        ),
    ],
)
def test_configs_that_no_model_could_have(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_no_call_could_mean(fresh, backbones, tmp_path):
    fresh.seal(["a", "e"])
    assert fresh.row_losses("a", []) == []
    with pytest.raises(ValueError, match="Unknown memory page '1'; pages have numbers, and there are: 1"):
        fresh.page_parameters("1")
    rows = [{"input_ids": row, "labels": row} for row in IDS.tolist()] * 3
    with pytest.raises(ValueError, match="`learning_rate` of the refresh is 0; it must be above 0"):
        fresh.refresh_gates("a", rows, learning_rate=0)
    with pytest.raises(ValueError, match=r"`target_modules` is \[\]; give 'all-linear', or a list"):
        hft.HFTForCausalLM.from_backbone(backbones["llama"], TREE, target_modules=[])
    export = tmp_path / "lora"
    hft.export_lora(fresh, "a", export)
    plain = tmp_path / "plain"
    fresh.backbone.save_pretrained(plain)
    for file in export.iterdir():
        (plain / file.name).write_bytes(file.read_bytes())
    assert json.loads((plain / "adapter_config.json").read_text())["peft_type"] == "LORA"
    with pytest.raises(ValueError, match="holds a PEFT adapter beside the weights"):
        hft.HFTForCausalLM.from_backbone(plain, TREE)
