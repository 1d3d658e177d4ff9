"""Decoders that are not like Llama: they load, save, fold and export as themselves, or are refused in a sentence."""

import re

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import hft
from hft.lora_io_hft import path_factors
from hft.trainers.export import add_path

from .test_model import prompts
from .tiny import bits, grow, snapshot, tiny_config


TREE = {"a": [], "b": ["a"]}
_MAMBA = dict(mamba_n_heads=8, mamba_d_state=4, mamba_n_groups=1, head_dim=8)
SHAPES = {
    # a buffer that is filled by a module without parameters
    "falcon_h1": dict(**_MAMBA, mamba_d_head=8, mamba_d_ssm=64, mamba_chunk_size=4),
    # files whose keys begin with `backbone.`
    "nemotron_h": dict(
        mamba_num_heads=8, mamba_head_dim=8, ssm_state_size=4, n_groups=1, chunk_size=4, head_dim=8, n_routed_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=16, moe_shared_expert_intermediate_size=16, num_hidden_layers=3,
        layers_block_type=["mamba", "attention", "mlp"],
    ),
    # files with other names than the modules'
    "exaone": {},
    # a prefix that names none of its parts
    "llama4_text": dict(
        num_local_experts=4, head_dim=8, intermediate_size_mlp=40, interleave_moe_layer_step=2, no_rope_layers=[1, 0],
        attention_chunk_size=4,
    ),
    # a mixture of experts, one layer of which is dense
    "qwen3_moe": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8, mlp_only_layers=[1]),
    # linears that share weights, and names that are numbers
    "zamba2": dict(
        num_hidden_layers=4, num_key_value_heads=4, layer_types=["linear_attention", "hybrid"] * 2, hybrid_layer_ids=[1, 3],
        mamba_d_state=4, n_mamba_heads=8, mamba_headdim=8, mamba_ngroups=1, chunk_size=4, num_mem_blocks=1, adapter_rank=4,
    ),
}  # fmt: skip


@pytest.fixture
def quiet(monkeypatch):
    """Kernels of Mamba's may read what they do not fill."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)


def published(family: str, folder) -> str:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **SHAPES[family]))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder / family)
    return str(folder / family)


def logits(model, **task) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(prompts(2, 6), use_cache=False, **task).logits


@pytest.mark.parametrize("family", SHAPES)
def test_it_is_itself_with_tasks_and_without_wherever_it_is_read(family, tmp_path, quiet):
    base = published(family, tmp_path)
    options = {"target_modules": ["q_proj", "o_proj"]} if family == "zamba2" else {}
    model = hft.HFTForCausalLM.from_backbone(base, TREE, rank=2, memory_config={"slots": 2, **options}, **options)
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert bits(logits(model)) == bits(logits(plain))
    grow(model)
    expected = logits(model, task="b")
    assert not torch.allclose(expected, logits(model), atol=1e-3)
    assert model.base_model is not model.backbone
    for slim in (True, False):
        model.save_pretrained(tmp_path / f"{slim}", slim=slim)
        again = hft.HFTForCausalLM.from_pretrained(tmp_path / f"{slim}")
        assert bits(logits(again, task="b")) == bits(expected), slim
    before = snapshot(model)
    if family == "zamba2":
        with pytest.raises(ValueError, match="share one weight, and what is added to each differs, so a path"):
            model.fold("b", merge=True)
    else:
        model.fold("b", merge=True)
        torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-4)
        model.unfold()
    assert snapshot(model) == before
    if family == "qwen3_moe":
        with pytest.raises(
            ValueError, match=re.escape("PEFT leaves out 'down_proj', 'gate_proj', 'up_proj' of a 'qwen3_moe'")
        ):
            hft.export_lora(model, "b", tmp_path / "lora")
        assert not (tmp_path / "lora").exists()
    else:
        hft.export_lora(model, "b", tmp_path / "lora")
        adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "lora")
        torch.testing.assert_close(logits(adapted), expected, rtol=1e-3, atol=1e-4)
    if family == "llama4_text":
        add_path(plain, path_factors(model, "b"))
        torch.testing.assert_close(logits(plain), expected, rtol=1e-3, atol=1e-4)


def test_names_that_other_modules_end_in_are_given_in_full(tmp_path, quiet):
    base = published("zamba2", tmp_path)
    model = hft.HFTForCausalLM.from_backbone(base, TREE, rank=2, memory_config={"slots": 2})
    assert {name.rsplit(".", 1)[-1] for name in model._layer_of} > {"0", "1", "q_proj"}
    grow(model)
    hft.export_lora(model, "b", tmp_path / "lora")
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "lora")
    torch.testing.assert_close(logits(adapted), logits(model, task="b"), rtol=1e-3, atol=1e-4)


def test_a_state_goes_from_token_to_token(tmp_path):
    torch.manual_seed(0)
    config = AutoConfig.for_model("rwkv", vocab_size=99, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    model = hft.HFTForCausalLM.from_backbone(tmp_path, TREE, memory_config={"read": "off"}).eval()
    x = torch.randint(5, 90, (1, 6))
    options = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert model.generate(x, task="backbone", **options).tolist() == plain.generate(x, **options).tolist()


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("t5", "is a 't5', an encoder and a decoder; HFT stands on decoders"),
        ("whisper", "is a 'whisper', an encoder and a decoder; HFT stands on decoders"),
        ("bert", "is a 'bert' whose tokens see those to come, so it cannot generate"),
        ("qwen2_vl", "is a 'qwen2_vl', which takes more than text; give a text model"),
    ],
)
def test_what_is_no_decoder_is_refused(family, message, tmp_path):
    AutoConfig.for_model(family).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=re.escape(message)):
        hft.HFTForCausalLM.from_backbone(tmp_path, TREE)


def test_layers_that_cannot_be_checkpointed_are_named(tmp_path):
    config = AutoConfig.for_model("ctrl", vocab_size=99, n_embd=32, dff=40, n_layer=2, n_head=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = hft.HFTForCausalLM.from_backbone(tmp_path, TREE)
    with pytest.raises(ValueError, match="The layers of a 'ctrl' cannot be checkpointed in transformers; train with"):
        model.activation_checkpointing_enable()


class InPlace(LlamaForCausalLM):
    """A user's own decoder, whose initialisation writes over what is loaded unless transformers leaves it out."""

    config_class = type("InPlaceConfig", (LlamaConfig,), {"model_type": "in_place"})

    def _init_weights(self, module):
        if isinstance(module, torch.nn.Linear):
            module.weight.data.normal_(std=0.5)


def test_a_decoder_of_ones_own_keeps_what_is_loaded(tmp_path):
    AutoConfig.register("in_place", InPlace.config_class, exist_ok=True)
    AutoModelForCausalLM.register(InPlace.config_class, InPlace, exist_ok=True)
    values = {name: value for name, value in tiny_config("llama").to_dict().items() if name != "model_type"}
    InPlace(InPlace.config_class(**values)).save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(plain) is InPlace
    assert bits(logits(hft.HFTForCausalLM.from_backbone(tmp_path, TREE))) == bits(logits(plain))


def test_a_mapping_of_ones_own_comes_beside_the_familys(tmp_path, quiet):
    base = published("nemotron_h", tmp_path)
    expected = logits(AutoModelForCausalLM.from_pretrained(base))
    for mapping in (None, {"^no_such": "other"}):
        model = hft.HFTForCausalLM.from_backbone(base, TREE, key_mapping=mapping)
        assert bits(logits(model)) == bits(expected)


def test_two_paths_are_never_merged_into_one_weight(tmp_path, quiet):
    base = published("zamba2", tmp_path)
    model = hft.HFTForCausalLM.from_backbone(base, TREE, rank=2)
    grow(model)
    plain = AutoModelForCausalLM.from_pretrained(base)
    before = {name: bits(parameter) for name, parameter in plain.named_parameters()}
    with pytest.raises(ValueError, match="share one weight, and what is added to each differs, so a path"):
        add_path(plain, path_factors(model, "b"))
    assert before == {name: bits(parameter) for name, parameter in plain.named_parameters()}
