"""What would go wrong without a word is refused, or done right: unusual families, passes, folders and orders of calls."""

import os
import time

import pytest
import torch
from transformers import AutoConfig, GenerationConfig

import hft
from hft.configuration_hft import HFTConfig
from hft.nodes_hft import adapted_linears

from .test_as_transformers import grown  # noqa: F401
from .test_model import prompts
from .test_refresh import rows_like
from .tiny import bits, fill


@pytest.mark.parametrize(
    "family, sizes, why",
    [
        ("xlnet", {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 40}, ", which computes tokens before rows"),
        ("rwkv", {"hidden_size": 32, "num_hidden_layers": 8, "intermediate_size": 40}, " that halves the weights"),
    ],
)
def test_families_that_would_learn_one_thing_and_serve_another_are_refused(tmp_path, family, sizes, why):
    AutoConfig.for_model(family, vocab_size=60, **sizes).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"is a '{family}'{why}"):
        hft.HFTForCausalLM.from_backbone(tmp_path, {"a": []})


def test_a_backbone_with_code_of_its_own_is_refused(backbones, tmp_path):
    AutoConfig.from_pretrained(backbones["llama"]).save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text().replace('"llama"', '"mine"')
    (tmp_path / "config.json").write_text(text.replace("{", '{"auto_map": {"AutoConfig": "mine.Mine"},', 1))
    with pytest.raises(ValueError, match="is a 'mine' that comes with code of its own"):
        hft.HFTForCausalLM.from_backbone(tmp_path, {"a": []}, trust_remote_code=True)


def test_no_node_stands_where_nothing_is_learnt():
    """Linears that only choose positions, or whose weight is used without a call."""

    class Part(torch.nn.Module):
        def __init__(self, **parts):
            super().__init__()
            for name, part in parts.items():
                self.add_module(name, part)

    linear = torch.nn.Linear(2, 2)
    layer = Part(
        attn=Part(q_proj=linear, indexer=Part(wk=torch.nn.Linear(2, 2))), router=Part(classifier=torch.nn.Linear(2, 2))
    )
    assert adapted_linears(Part(layers=torch.nn.ModuleList([layer])), "all-linear") == {"layers.0.attn.q_proj": 0}


def test_an_active_list_is_checked_against_passes_through_parts(grown):  # noqa: F811
    four = prompts(4, 5)
    with torch.no_grad(), grown.activate(["a", "b"]):
        assert len(grown.base_model(input_ids=four[:2]).last_hidden_state) == 2
        for rows in (four, four[:3, :4]):
            with pytest.raises(ValueError, match=r"names tasks for 2 rows, and the pass has [34]"):
                grown.base_model(input_ids=rows)
    with pytest.raises(ValueError, match="`rank` is for one task by name"):
        grown.activate(["a", "b"], rank=64)


def test_what_a_task_reads_does_not_change_while_it_is_active(grown):  # noqa: F811
    grown.add_task("c", ["b"])
    changes = {
        "refresh": lambda: grown.refresh_gates("b", rows_like(grown, "b")),
        "start": lambda: grown.start_stage(["c"]),
        "remove": lambda: grown.remove_task("c"),
        "trim": lambda: grown.trim("c", rows_like(grown, "b"), 0.0),
    }
    for change in changes.values():
        with grown.activate("b"), pytest.raises(ValueError, match=r"Task 'b' is active.*outside `activate`"):
            change()
        with grown.activate("backbone"):
            pass
    grown.start_stage(["c"])
    assert grown.remove_task("c") == ["c"]


def test_a_stage_that_is_started_in_inference_mode_trains(grown):  # noqa: F811
    with torch.inference_mode():
        grown.add_task("c", ["b"])
        grown.start_stage(["c"])
    x = prompts(2, 5)
    grown(x, task="c", labels=x).loss.backward()
    assert all(parameter.grad is not None for parameter in grown.learning_parameters("c").values())


def test_a_refresh_leaves_each_part_in_its_mode(grown):  # noqa: F811
    grown.train()
    grown.backbone.eval()
    grown.refresh_gates("b", rows_like(grown, "b"), num_steps=1)
    assert grown.training and grown.hft_gates.training and not grown.backbone.training


def test_parents_may_be_an_iterator(backbones):
    made = hft.HFTForCausalLM.from_backbone(backbones["llama"], {"a": [], "b": (name for name in ["a"])})
    assert made.hierarchy.parents("b") == ("a",)
    with pytest.raises(ValueError, match="5 cannot be a task's name"):
        made.add_task(5)


def test_a_request_without_a_task_is_one_for_the_folded_one(grown):  # noqa: F811
    x, short = prompts(2, 5), {"max_new_tokens": 3, "do_sample": False}
    grown.fold("b")
    answers = grown.generate(x, **short)
    assert grown.generate(x, generation_config=GenerationConfig(task=None, **short)).tolist() == answers.tolist()


def test_a_float_mask_is_a_mask(grown):  # noqa: F811
    x = prompts(2, 6)
    grown.config.router_config.prefix = [5]
    expected = grown.prompt_features(x)
    assert bits(grown.prompt_features(x, torch.ones(x.shape))) == bits(expected)


def test_files_with_an_adapter_attached_are_not_written(grown, tmp_path):  # noqa: F811
    grown.save_pretrained(tmp_path, slim=False)
    before = sorted(os.listdir(tmp_path))
    grown._hf_peft_config_loaded = True  # as `add_adapter` sets it
    for slim in (True, False):
        with pytest.raises(ValueError, match="A PEFT adapter is attached"):
            grown.save_pretrained(tmp_path, slim=slim)
    assert sorted(os.listdir(tmp_path)) == before


def test_a_full_save_leaves_variants_whole(grown, tmp_path):  # noqa: F811
    grown.save_pretrained(tmp_path, slim=False, variant="fp16", max_shard_size="20KB")
    grown.save_pretrained(tmp_path, slim=False)
    x = prompts(2, 5)
    again = hft.HFTForCausalLM.from_pretrained(tmp_path, variant="fp16", attn_implementation="eager").eval()
    assert bits(again(x, task="b").logits) == bits(grown(x, task="b").logits)


def test_a_model_is_made_of_a_config_and_its_tensors(grown):  # noqa: F811
    again = hft.HFTForCausalLM.from_pretrained(None, config=grown.config, state_dict=grown.state_dict()).eval()
    x = prompts(2, 5)
    assert bits(again(x, task="b").logits) == bits(grown(x, task="b").logits)
    with pytest.raises(ValueError, match="takes a config and all of a state_dict"):
        hft.HFTForCausalLM.from_pretrained(None, config=grown.config)


def test_a_backbone_that_would_be_passed_over_or_is_gone_is_told_of(grown, tmp_path, caplog):  # noqa: F811
    grown.save_pretrained(tmp_path / "full", slim=False)
    with pytest.raises(ValueError, match="holds the full form, its backbone in it"):
        hft.HFTForCausalLM.from_pretrained(tmp_path / "full", backbone=tmp_path)
    grown.config.backbone = str(tmp_path / "gone")
    grown.save_pretrained(tmp_path / "slim")
    assert "which is not there now; who loads it must say where it is" in caplog.text


def test_what_killed_saves_left_goes_after_a_day(grown, tmp_path):  # noqa: F811
    for name, age in ((".writing-new", 0), (".writing-old", 2 * 24 * 60 * 60)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    grown.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob(".w*")] == [".writing-new"]


def test_experts_that_peft_would_not_load_are_no_lora(tmp_path):
    """Laguna's shared experts have another name in PEFT's eyes."""
    config = AutoConfig.for_model(
        "laguna",
        vocab_size=60,
        hidden_size=32,
        intermediate_size=40,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        mlp_layer_types=["dense", "sparse"],
    )
    made = hft.HFTForCausalLM(HFTConfig(text_config=config, rank=2)).eval()
    made.add_task("a")
    fill(made)
    made.seal(["a"])
    with pytest.raises(ValueError, match="PEFT leaves out"):
        hft.export_lora(made, "a", tmp_path)
