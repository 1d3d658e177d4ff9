"""Folding: one task's path as one pair a linear, or in the backbone's own weights; and back."""

import copy
import re

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import hft
from hft.kept_hft import HFTKept

from .test_model import prompts
from .tiny import BACKBONES, bits, fill, grow, snapshot


@pytest.fixture
def sealed(model):
    model.seal(model.hierarchy.names)
    return model.eval()


@pytest.mark.parametrize("family", BACKBONES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folded_it_computes_the_same_bits_without_looking(backbones, family, dtype, monkeypatch):
    memory = {"slots": 3}
    model = hft.HFTForCausalLM.from_backbone(
        backbones[family], {"a": [], "b": ["a"], "c": ["b"]}, rank=3, memory_config=memory, dtype=dtype
    )
    grow(model)
    x = prompts(2, 6)
    with torch.no_grad():
        expected = bits(model(x, task="c").logits)
        plain = bits(model(x).logits)
        before = snapshot(model)
        model.fold("c")
        monkeypatch.setattr(HFTKept, "of", None)  # nothing is looked up any more
        for task in ({}, {"task": "c"}, {"task": ["c", "c"]}, {"task": torch.tensor([2, 2])}):
            assert bits(model(x, **task).logits) == expected
        monkeypatch.undo()
        model.unfold()
        assert bits(model(x, task="c").logits) == expected and bits(model(x).logits) == plain != expected
    assert snapshot(model) == before


@pytest.mark.parametrize("is_open", [False, True])
@pytest.mark.parametrize("first", [torch.inference_mode, torch.enable_grad])
def test_folded_it_goes_on_in_another_dtype(backbones, is_open, first):
    """Its pairs are made again by the first pass, and neither that pass's mode nor a graph stays in them."""
    model = hft.HFTForCausalLM.from_backbone(backbones["llama"], {"a": [], "b": ["a"]}, rank=3)
    grow(model, seal=False)
    if not is_open:
        model.seal(["a", "b"])
    model.fold("b")
    model.to(torch.bfloat16)
    x = prompts(2, 6)
    with first():
        model(x)
    embeddings = model.get_input_embeddings()(x).detach().requires_grad_()
    for _ in range(2):
        model(inputs_embeds=embeddings, use_cache=False).logits.float().sum().backward()
    assert embeddings.grad.any()


@torch.no_grad()
@pytest.mark.parametrize("target_modules", ["all-linear", ["v_proj"]])
def test_folded_it_goes_on_in_a_wider_dtype_and_back(backbones, target_modules):
    """A path of one source without memory reads that very parameter, which another dtype fills anew."""
    options = {"rank": 3, "target_modules": target_modules, "memory_config": {"read": "off"}}
    model = hft.HFTForCausalLM.from_backbone(backbones["llama"], {"a": []}, **options)
    grow(model)
    model.to(torch.bfloat16)
    x = prompts(2, 6)
    model.fold("a")
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        folded = model.to(dtype)(x).logits
        model.unfold()
        assert bits(model(x, task="a").logits) == bits(folded)
        model.fold("a")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_it_is_a_plain_backbone_and_comes_back_bit_by_bit(sealed, dtype):
    model, x = sealed.to(dtype), prompts(2, 6)
    before = snapshot(model)
    with torch.no_grad():
        expected, answer = model(x, task="d").logits, model.generate(x, task="d", max_new_tokens=4, do_sample=False)
        model.fold("d", merge=True)
        merged = model(x).logits
        assert bits(merged) == bits(model.backbone(x).logits)  # no hook adds anything
        tolerance = 1e-4 if dtype == torch.float32 else 0.05 * float(expected.abs().max())
        torch.testing.assert_close(merged, expected, rtol=1e-4, atol=tolerance)
        if dtype == torch.float32:
            assert model.generate(x, max_new_tokens=4, do_sample=False).tolist() == answer.tolist()
        assert snapshot(model) != before
        model.unfold()
        assert snapshot(model) == before
        assert bits(model(x, task="d").logits) == bits(expected)


def test_a_folded_model_generates_for_its_task_without_being_asked(sealed):
    """The router is not asked, and cached decoding, beams and left padding take the folded path."""
    model, x = sealed, prompts(2, 6)
    for i, task in enumerate(("e", "f")):
        model.add_routes(task, (prompts(8, 12, seed=i) % 40 + 5 + 40 * i).tolist())
    for options in ({"do_sample": False}, {"do_sample": False, "num_beams": 3}):
        expected = model.generate(x, task="d", max_new_tokens=6, **options)
        model.fold("d")
        found, routes = model.generate(x, max_new_tokens=6, return_route=True, **options)
        assert found.tolist() == expected.tolist() and [route.task for route in routes] == ["d", "d"]
        model.unfold()
    assert {route.task for route in model.generate(x, max_new_tokens=1, return_route=True)[1]} != {"d"}


def test_a_folded_model_refuses_everything_else(sealed, tmp_path):
    model, x = sealed, prompts(2, 6)
    model.add_task("open", ["a"])
    refused = re.escape("The model is folded for task 'd'; call unfold() first.")
    with pytest.raises(ValueError, match="Unknown task 'dd'"):
        model.fold("dd")
    model.fold("d")
    for task, name in (("a", "a"), (["d", "a"], "a"), ("backbone", "the plain backbone"), (["d", None], "the plain")):
        with pytest.raises(ValueError, match=f"is folded for task 'd' and cannot run '{name}"):
            model(x, task=task)
        with pytest.raises(ValueError, match="is folded for task 'd' and cannot run"):
            model.generate(x, task=task, max_new_tokens=1)
    for change in (
        lambda: model.fold("d"),
        lambda: model.add_task("new"),
        lambda: model.remove_task("open"),
        lambda: model.start_stage(["open"]),
        lambda: model.set_trainable([]),
        lambda: model.seal(["open"]),
        lambda: model.refresh_gates("a", []),
        lambda: model.restore(tmp_path),
        model.dequantize,
    ):
        with pytest.raises(ValueError, match=refused):
            change()
    model.save_pretrained(tmp_path / "pair")  # nothing that is saved has changed
    assert bits(AutoModelForCausalLM.from_pretrained(tmp_path / "pair")(x, task="a").logits) == bits(
        (model.unfold(), model(x, task="a"))[1].logits
    )
    model.fold("d", merge=True)
    for slim in (True, False):
        with pytest.raises(ValueError, match="Task 'd' is merged into the backbone's weights; call unfold"):
            model.save_pretrained(tmp_path / "merged", slim=slim)
    with pytest.raises(ValueError, match="Task 'd' is merged into the backbone's weights"):
        model.route(x)
    model.unfold()
    model.unfold()  # nothing to do
    assert model.generate(x, task="a", max_new_tokens=2).shape == (2, 8)


def test_a_copy_of_a_folded_model_is_folded_by_itself(sealed):
    model, x = sealed, prompts(1, 6)
    with torch.no_grad():
        model.fold("d")
        twin = copy.deepcopy(model)
        model.unfold()
        fill(model, seed=9)
        expected = bits(twin(x).logits)
        twin.unfold()
        assert bits(twin(x, task="d").logits) == expected != bits(model(x, task="d").logits)


def test_a_backbone_in_4_bit_is_folded_but_not_merged(backbones):
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16")
    model = hft.HFTForCausalLM.from_backbone(backbones["llama"], {"a": []}, quantization_config=nf4).eval()
    grow(model)
    x = prompts(2, 6)
    before = snapshot(model)
    with torch.no_grad():
        expected = bits(model(x, task="a").logits)
        with pytest.raises(ValueError, match=r"only into weights in 16 or 32 bit .*is a Linear4bit on 'cpu'; fold it"):
            model.fold("a", merge=True)
        assert bits(model(x, task="a").logits) == expected
        model.fold("a")
        assert bits(model(x).logits) == expected
    assert snapshot(model) == before


def test_a_fold_beside_packed_weights_computes_in_the_models_dtype(backbones):
    """Under FSDP packed weights are stored as bfloat16, in which no linear need compute."""
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage="bfloat16", bnb_4bit_compute_dtype="float32")
    model = hft.HFTForCausalLM.from_backbone(
        backbones["llama"], {"a": []}, rank=3, dtype=torch.float32, quantization_config=nf4
    )
    grow(model)
    assert model.base_model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    model.fold("a", rank=30)
    assert {factor.dtype for pair in model._folded_path.tasks[0].kept.values() for factor in pair} == {torch.float32}


def test_training_a_folded_model_is_refused(model, tokenizer, tmp_path):
    from datasets import Dataset

    from hft.trainers import HFTTrainer, HFTTrainingConfig

    model.fold("d")
    rows = {task: Dataset.from_list([{"prompt": "a", "completion": "b"}]) for task in model.hierarchy.names}
    with pytest.raises(ValueError, match="is folded for task 'd'; call unfold"):
        HFTTrainer(model, HFTTrainingConfig(str(tmp_path)), train_dataset=rows, processing_class=tokenizer)


def test_within_a_block_parameters_may_change_between_passes(sealed):
    """`activate` may hold many passes, so nothing is kept from one to the next."""
    model, x = sealed, prompts(1, 6)
    with torch.no_grad(), model.activate("d"):
        first = model.base_model(input_ids=x).last_hidden_state
        model.hft_nodes["layers_1_mlp_up_proj"].pair("b")[1].mul_(2)
        second = model.base_model(input_ids=x).last_hidden_state
    assert bits(first) != bits(second)
    assert bits(second) == bits(model(x, task="d", output_hidden_states=True).hidden_states[-1])


@torch.no_grad()
def test_the_memory_of_what_kept_factors_were_made_of_is_not_given_away():
    """Else another tensor could come to stand in the same place, with the same version."""
    kept, parameter = HFTKept(), torch.zeros(500)
    memory = StorageWeakRef(parameter.untyped_storage())
    factors = kept.of("a", [parameter])
    assert kept.of("a", [parameter]) is factors
    del parameter
    assert not memory.expired()
    kept.clear()
    assert memory.expired()


def test_a_path_of_a_given_rank_is_refused_while_another_task_is_folded(sealed):
    sealed.fold("a", merge=True)
    with pytest.raises(ValueError, match="The model is folded for task 'a'; call unfold"):
        sealed.activate("b", rank=sealed.widest_rank())


def test_a_merge_that_fails_leaves_the_backbone_as_it_was(sealed, monkeypatch):
    before, linears, x = snapshot(sealed), [], prompts(2, 6)

    def fail(weight, *args, original=torch.Tensor.copy_):
        linears.append(weight)
        if len(linears) == 5:
            raise MemoryError
        return original(weight, *args)

    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(torch.Tensor, "copy_", fail)
        sealed.fold("d", merge=True)
    assert len(linears) > 5 and snapshot(sealed) == before
    with torch.no_grad():
        expected = sealed(x, task="e").logits
        sealed.fold("e", merge=True)
        with sealed.activate("e"):
            torch.testing.assert_close(sealed(x).logits, expected, rtol=1e-4, atol=1e-4)
    sealed.unfold()
    assert snapshot(sealed) == before


def test_folding_within_an_active_path_serves_the_folded_task(sealed):
    x = prompts(2, 6)
    with torch.no_grad():
        expected = sealed(x, task="e").logits
        for merge in (False, True):
            with sealed.activate("d"):
                sealed.fold("e", merge=merge)
                torch.testing.assert_close(sealed(x).logits, expected, rtol=1e-4, atol=1e-4)
                sealed.unfold()
