"""The estimate against what real tensors take."""

from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

import hft
from hft.trainers.memory_estimate import (
    OPTIMIZER_BYTES_8BIT,
    MemoryEstimate,
    estimate_memory,
    estimate_recipe,
    node_bytes,
    page_bytes,
    quantized_bytes,
)
from hft.trainers.recipes import Recipe

from .test_backbones import SHAPES
from .tiny import grow, tiny_config


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_activations_are_what_autograd_keeps(backbones, family):
    model = hft.HFTForCausalLM.from_backbone(
        backbones[family], {"a": []}, rank=7, dtype=torch.bfloat16, attn_implementation="sdpa"
    )
    own, kept = {parameter.untyped_storage()._cdata for parameter in model.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), model.activate("a"):
        mask = torch.ones(3, 19, dtype=torch.long)
        mask[0, -2:] = 0
        model.base_model(input_ids=torch.ones_like(mask), attention_mask=mask, use_cache=False)
    found = estimate_memory(tiny_config(family), rank=7, path_rank=7, batch_size=3, length=19, load_in_4bit=False)
    assert found.activations == sum(storage.nbytes() for storage in kept.values())
    assert found.backbone == 2 * sum(parameter.numel() for parameter in model.backbone.parameters())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("held", ["load_in_4bit", "load_in_8bit", None])
@pytest.mark.parametrize("family", ["llama", "falcon_h1"])
def test_a_backbones_bytes(tmp_path, tied, held, family):
    """A head that is the embeddings, once more, is held once; linears without nodes (Mamba's last one) are packed, too."""
    shape = {
        **tiny_config(family, **SHAPES.get(family, {})).to_dict(),
        "tie_word_embeddings": tied,
        "dtype": "float32",
    }
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape), dtype=torch.float32)
    plain.save_pretrained(tmp_path)
    how = {held: True, "bnb_4bit_quant_type": "nf4"} if held else {}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(**how) if how else None
    )
    real = sum(parameter.nbytes for parameter in model.parameters())
    for module in model.modules():
        if "Linear4bit" in type(module).__name__:
            real += module.weight.quant_state.absmax.nbytes
        elif "Linear8bit" in type(module).__name__:
            real += module.weight.SCB.nbytes
    recipe = Recipe(backbone=str(tmp_path), hierarchy={"a": []}, quantization=how)
    found = estimate_recipe(recipe, AutoConfig.from_pretrained(tmp_path), on_accelerator=False)
    assert found.backbone == real


def test_a_4_bit_backbone_and_a_tasks_file(backbones, tmp_path):
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16")
    model = hft.HFTForCausalLM.from_backbone(
        backbones["llama"], {"a": []}, rank=5, dtype=torch.bfloat16, quantization_config=nf4
    )
    real = sum(parameter.nbytes for parameter in model.backbone.parameters())
    states = [module.weight.quant_state for module in model.modules() if "Linear4bit" in type(module).__name__]
    real += sum(state.absmax.nbytes for state in states)
    found = estimate_memory(tiny_config("llama"), rank=5, double_quant=False)
    assert states and found.backbone == real
    grow(model)
    model.save_pretrained(tmp_path)
    file = (tmp_path / "tasks/a.safetensors").read_bytes()
    assert node_bytes(model, 5) == len(file) - 8 - int.from_bytes(file[:8], "little")


def test_what_more_of_anything_costs():
    config = tiny_config("llama")
    base = estimate_memory(config, rank=4, slots=2)
    per_rank = base.gradients // 4 // 6
    assert base.training == 4 * 6 * per_rank and base.optimizer == 2 * base.training and base.tasks == 0
    few = estimate_memory(config, rank=4, slots=2, optimizer_bytes=OPTIMIZER_BYTES_8BIT)  # and a scale for 256 of them
    assert few.optimizer == round(base.optimizer / 8 * 2 * (1 + 4 / 256)) and few.training == base.training
    more = estimate_memory(config, rank=4, slots=2, num_training=3, sealed_rank=20, sealed_slots=6)
    assert more.training == 4 * per_rank * (3 * 4 + 2) and more.gradients == base.gradients
    assert more.tasks == 2 * (20 + 6) * per_rank
    both = estimate_memory(config, rank=4, slots=2, num_training=3, num_stepping=2)
    assert both.training == more.training and both.gradients == 4 * per_rank * (2 * 4 + 2)
    assert estimate_memory(config, rank=4, gradient_checkpointing=True).activations < base.activations
    hidden = 4 * 10 * config.hidden_size
    head = 4 * config.hidden_size
    assert estimate_memory(config, rank=4, num_scored=10).logits == (31 * 10 + head) * config.vocab_size + hidden
    assert estimate_memory(config, rank=4, num_scored=10, on_accelerator=True).logits == 2 * 10 * 32768 + hidden
    for held, copied in ((True, 2 * 40 * 32), (False, 0)):  # the widest linear's
        wide = estimate_memory(config, rank=4, num_scored=1, on_accelerator=True, load_in_4bit=held)
        assert wide.logits + wide.working == 3 * 2 * 8 * 256 * 40 + copied and wide.process == 0
    assert base.total == sum(vars(base).values()) and "MiB (backbone 0, " in str(base)
    assert quantized_bytes(64 * 256, True) == 64 * 128 + 256 + 4


def test_an_eight_billion_model_costs_nothing_to_estimate():
    """Llama 3.1 8B: 8.03e9 parameters, of which 1.05e9 in the two embeddings stay in bfloat16."""
    config = AutoConfig.for_model(
        "llama", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False,
    )  # fmt: skip
    found = estimate_memory(
        config, rank=16, batch_size=1, length=2048, gradient_checkpointing=True, num_scored=256, on_accelerator=True
    )
    assert isinstance(found, MemoryEstimate)
    assert found.backbone == pytest.approx(2 * 1.0507e9 + 6.9793e9 * (0.5 + 1 / 64), rel=2e-3)
    assert found.total < 16 * 2**30


def test_linears_that_carry_nothing_cost_nothing():
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=99
    )
    whole = estimate_memory(config, rank=8, length=16)
    nodes = estimate_memory(config, rank=8, length=16, target_modules=["q_proj"], memory_modules=["q_proj"])
    pages = estimate_memory(config, rank=8, length=16, memory_modules=["q_proj"])
    assert nodes.training < pages.training < whole.training and nodes.activations < whole.activations
    assert nodes.backbone == whole.backbone  # in 4 bit, too, whichever carry nodes


def test_the_dtype_of_the_backbone_counts():
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=99
    )
    options = {"rank": 8, "length": 16, "sealed_rank": 16, "load_in_4bit": False}
    narrow, wide = (estimate_memory(config, dtype=dtype, **options) for dtype in (torch.bfloat16, torch.float32))
    assert (wide.backbone, wide.tasks) == (2 * narrow.backbone, 2 * narrow.tasks)
    assert wide.training == narrow.training and narrow.activations < wide.activations <= 2 * narrow.activations
    recipe = Recipe(backbone="x", hierarchy={"a": []}, model={"rank": 8})
    sizes = [
        estimate_recipe(replace(recipe, model={"rank": 8, **more}), config, 16).backbone
        for more in ({}, {"dtype": "auto"}, {"dtype": "float32"})
    ]
    assert sizes == [narrow.backbone, narrow.backbone, wide.backbone]


def test_a_pages_file(backbones, tmp_path):
    memory = {"slots": 4, "target_modules": ["v_proj"]}
    model = hft.HFTForCausalLM.from_backbone(backbones["llama"], {"a": []}, rank=3, memory_config=memory)
    grow(model)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "pages/1.safetensors", "pt") as file:
        assert page_bytes(model, 4) == sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
