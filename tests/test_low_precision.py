"""The invariants over backbones in bfloat16 and NF4, whose scales and packed weights `snapshot` sees, too."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from hft.backbone_hft import keep_weights
from hft.trainers import HFTTrainer, HFTTrainingConfig
from hft.trainers.export import export_peft

from .test_model import prompts
from .test_same_as_plain import NF4, new_model
from .test_trainer import Kill, make, nf4, rows
from .tiny import bits, grow, snapshot


TREE = {"a": [], "b": ["a"]}


@pytest.mark.parametrize("how", ["bfloat16", "nf4"])
def test_2_and_3_it_is_the_backbone_to_the_bit(backbones, quantizable, how):
    more = {"quantization_config": NF4} if how == "nf4" else {}
    plain = AutoModelForCausalLM.from_pretrained(backbones["llama"], dtype=torch.bfloat16, **more).eval()
    keep_weights(plain)  # else bitsandbytes takes another kernel on a CPU with AVX512-BF16
    model, x = new_model(backbones["llama"], how, TREE).eval(), prompts(2, 9)
    grow(model)
    with torch.no_grad():
        expected = bits(plain(x).logits)
        for which in ({}, {"task": "backbone"}, {"task": [None, None]}):
            assert bits(model(x, **which).logits) == expected, which
        assert bits(model(x, task="b").logits) != expected
        model.hft_gates.of("b").zero_()
        assert bits(model(x, task="b").logits) == expected


def test_1_and_5_a_second_training_in_4_bit_leaves_learnt_tasks_alone(backbones, tokenizer, tmp_path, quantizable):
    """TRL rounds what is trainable to bfloat16 over 4 bit, which gates must never be."""
    model = new_model(backbones["llama"], "nf4", TREE)
    grow(model)
    x, tasks = prompts(2, 6), ["a", "b", "backbone", ["b", None]]
    with torch.no_grad():
        logits = [bits(model.eval()(x, task=task).logits) for task in tasks]
    before = snapshot(model)
    assert any(name.endswith(".absmax") for name in before)
    model.add_task("c", ["b"])
    args = HFTTrainingConfig(str(tmp_path), max_steps=2, disable_tqdm=True, learning_rate=0.1, report_to="none")
    HFTTrainer(model, args, train_dataset={"c": rows(1)}, processing_class=tokenizer).train()
    assert before.items() <= snapshot(model).items()
    model._kept.clear()  # what was fused before must not answer for what is there now
    with torch.no_grad():
        assert [bits(model.eval()(x, task=task).logits) for task in tasks] == logits


@pytest.mark.parametrize("how", ["bfloat16", "nf4"])
def test_8_killed_in_its_second_stage_and_resumed(backbones, tokenizer, tmp_path, quantizable, how):
    """Sealed nodes are in bfloat16 on disk, open ones and gates in float32."""
    options = {"bf16": True, "gradient_checkpointing": True, "dtype": torch.bfloat16, "hierarchy": TREE}
    options["quantization"] = nf4() if how == "nf4" else None
    whole = make(backbones, tokenizer, tmp_path / "whole", **options)
    whole.train()
    killed = make(backbones, tokenizer, tmp_path / "cut", **options)
    killed.add_callback(Kill(6, "step"))
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    assert killed.stage.level == 2
    resumed = make(backbones, tokenizer, tmp_path / "cut", **options)
    resumed.train(resume_from_checkpoint=True)
    assert snapshot(resumed.model) == snapshot(whole.model)


def test_6_the_check_of_an_export_leaves_a_model_in_4_bit_as_it_was(backbones, tokenizer, tmp_path, quantizable):
    model, x = new_model(backbones["llama"], "nf4", TREE), prompts(2, 6)
    grow(model)
    with torch.no_grad():
        before = snapshot(model.eval()), bits(model(x, task="b").logits)
        report = export_peft(model, tokenizer, "b", tmp_path / "lora")
        assert report["kl"] < 1e-3
        assert (snapshot(model), bits(model(x, task="b").logits)) == before


def test_weights_are_never_repacked_whatever_the_machine(backbones, tmp_path, quantizable):
    """On a CPU with AVX512-BF16 gradients would be wrong after the first evaluation pass."""
    import bitsandbytes as bnb

    model = new_model(backbones["llama"], "nf4", TREE)
    grow(model)
    model.save_pretrained(tmp_path)
    for its in (model, AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=nf4())):
        linears = [module for module in its.modules() if isinstance(module, bnb.nn.Linear4bit)]
        assert linears and not any(linear.support_avx512bf16_for_cpu for linear in linears)
