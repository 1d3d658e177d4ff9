"""torch.compile: one graph for all tasks and stages, which computes what eager passes compute.

Backend "aot_eager" traces and partitions as inductor does, without its minutes of C++; the slow tests run inductor itself.
"""

import copy
import re
import shutil

import pytest
import torch
import torch._dynamo
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import BitsAndBytesConfig, StaticCache

import hft
from hft.trainers import HFTTrainer, HFTTrainingConfig

from .test_model import prompts
from .test_trainer import data, make
from .tiny import fill, grow, snapshot


INDUCTOR = pytest.param(
    "inductor",
    marks=[
        pytest.mark.slow,
        pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++ on a CPU, and g++ is missing"),
    ],
)
BACKENDS = ["aot_eager", INDUCTOR]


@pytest.fixture(autouse=True)
def _never_again(monkeypatch):
    """What is compiled a second time is an error; and hostile memory would be part of the graph."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    torch.use_deterministic_algorithms(False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_folded_model_switches_tasks_within_one_graph(model, backend):
    """Ranks of the tasks' paths differ: 3 to 14, and pages of 2 slots at some of the linears."""
    model.seal(model.hierarchy.names)
    model.eval()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x, rank = prompts(2, 6), model.widest_rank()
    with torch.no_grad():
        for task in ("d", "e", "a", "f", "d"):
            expected = model(x, task=task, use_cache=False).logits
            model.fold(task, rank=rank)
            torch.testing.assert_close(compiled(x, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)
            model.unfold()


@pytest.mark.parametrize("backend", BACKENDS)
def test_decoding_token_by_token_is_one_graph(model, backend):
    model.seal(model.hierarchy.names)
    model.eval()
    step = torch.compile(model, backend=backend, fullgraph=True)
    x = prompts(2, 6)
    with torch.no_grad():
        for task in ("d", "f"):
            expected = model.generate(x, task=task, max_new_tokens=6, do_sample=False, eos_token_id=None)
            model.fold(task, rank=model.widest_rank())
            cache = StaticCache(config=model.config.get_text_config(), max_cache_len=12)
            logits = model(x, past_key_values=cache).logits
            found = [logits[:, -1].argmax(-1, keepdim=True)]
            for place in range(6, 11):
                positions = torch.full((2, 1), place)
                logits = step(found[-1], past_key_values=cache, position_ids=positions).logits
                found.append(logits[:, -1].argmax(-1, keepdim=True))
            model.unfold()
            assert torch.cat([x, *found], 1).tolist() == expected.tolist()


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_all_tasks_come_from_one_graph(model, backend, checkpointed):
    model.train()
    if checkpointed:
        model.activation_checkpointing_enable()
        model.disable_input_require_grads()  # as the trainer does: not needed, and no part of a graph
    twin = copy.deepcopy(model)
    model.base_model.compile(backend=backend, fullgraph=True)
    x, head = prompts(2, 6), model.get_output_embeddings()

    def gradients(one, task, **options):
        one.zero_grad()
        with one.activate(task, **options):
            hidden = one.base_model(input_ids=x, use_cache=False).last_hidden_state
        torch.nn.functional.cross_entropy(head(hidden)[:, :-1].flatten(0, 1), x[:, 1:].flatten()).backward()
        return {name: p.grad for name, p in one.named_parameters() if p.grad is not None}

    for task in ("a", "d", "e", "f", "a"):
        with torch.compiler.set_stance("force_eager"):
            expected = gradients(twin, task)
        actual = gradients(model, task, rank=model.widest_rank())
        assert actual.keys() == expected.keys() and any(name.endswith(f"_{task}") for name in actual)
        for name, gradient in expected.items():
            torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-6, msg=f"{task}: {name}")


@pytest.mark.parametrize("checkpointed", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_training_compiles_once_and_learns_the_same(backbones, tokenizer, tmp_path, backend, checkpointed):
    """Five tasks in three stages, packed to one length; also scored and routed, which is not compiled."""
    options = {
        "packing": True,
        "max_length": 48,
        "packing_strategy": "wrapped",
        "gradient_checkpointing": checkpointed,
    }
    torch._dynamo.config.error_on_recompile = False  # TRL compiles some of its own
    plain = make(backbones, tokenizer, tmp_path / "1", **options, max_steps=4)
    plain.train()
    compiled = make(
        backbones, tokenizer, tmp_path / "2", **options, max_steps=4, torch_compile=True, torch_compile_backend=backend
    )
    counter = CompileCounterWithBackend(backend)
    compiled._compiled._call = torch.compile(compiled.model.base_model._call_impl, backend=counter)
    compiled.train()
    assert counter.frame_count == 1
    weights = dict(plain.model.named_parameters())
    for name, weight in compiled.model.named_parameters():
        torch.testing.assert_close(weight, weights[name], rtol=1e-3, atol=1e-3, msg=name)
    losses = [[log["loss"] for log in one.log_history if "loss" in log] for one in (plain, compiled)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    x = prompts(2, 6)
    with torch.no_grad():
        compiled.model(x, task="x")  # the model itself is as it was
    assert counter.frame_count == 1


@pytest.mark.slow
def test_nf4_trains_compiled(backbones, tokenizer, tmp_path):
    pytest.importorskip("bitsandbytes")
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16")

    def trained(folder, **options):
        torch.manual_seed(0)
        model = hft.HFTForCausalLM.from_backbone(
            backbones["llama"], {"a": [], "b": ["a"]}, rank=3, quantization_config=nf4, dtype=torch.bfloat16
        )
        args = HFTTrainingConfig(
            str(tmp_path / folder), max_steps=3, packing=True, max_length=32, packing_strategy="wrapped",
            disable_tqdm=True, logging_steps=1, report_to="none", per_device_train_batch_size=2, **options,
        )  # fmt: skip
        trainer = HFTTrainer(model, args, train_dataset={t: data()[t] for t in "ab"}, processing_class=tokenizer)
        trainer.train()
        return [log["loss"] for log in trainer.log_history if "loss" in log]

    torch._dynamo.config.error_on_recompile = False  # TRL compiles some of its own
    expected = trained("1")
    assert trained("2", torch_compile=True, torch_compile_backend="aot_eager") == pytest.approx(expected, rel=0.02)


def test_what_cannot_have_one_graph_is_refused():
    for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):  # the old and the new
        with pytest.raises(ValueError, match="`torch_compile` does not go with reentrant checkpointing; leave"):
            HFTTrainingConfig(torch_compile=True, **{name: {"use_reentrant": True}})


def test_a_rank_that_is_too_small_is_refused(model):
    model.seal(model.hierarchy.names)
    before = snapshot(model)
    for call in (lambda: model.fold("d", rank=12), lambda: model.activate("d", rank=12)):
        with pytest.raises(ValueError, match=re.escape("`rank` is 12, but the path of task 'd' has rank 18")):
            call()
    assert snapshot(model) == before and model.widest_rank() == 18
    with pytest.raises(ValueError, match="Unknown task 'dd'"):
        model.activate("dd", rank=20)


def test_the_widest_rank_holds_all_stages_to_come(backbones):
    model = hft.HFTForCausalLM.from_backbone(
        backbones["llama"], {"a": [], "b": ["a"], "c": ["b"]}, rank=3, memory_config={"slots": 2}
    )
    before = model.widest_rank()
    grow(model)
    fill(model)
    assert before == model.widest_rank() == 3 * 3 + 3 * 2
    model.fold("c", rank=before)
