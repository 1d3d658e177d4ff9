"""Every way to train faster or in less memory computes what plain passes compute: loss and gradients, row by row.

The real trainer takes real steps. At each, the rows are taken out of its batch again, each is passed through the backbone on
its own, and the negative log-likelihoods of its labels are summed: no padding, packing, checkpointing or chunked head.
"""

import contextlib
import importlib.util
import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import trl.trainer.utils
from datasets import Dataset
from transformers import BitsAndBytesConfig

import hft
from hft.trainers import HFTTrainer, HFTTrainingConfig, losses

from .naive import naive_logits
from .test_model import prompts
from .tiny import VOCABULARY, fill, grow


NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16,
                         bnb_4bit_use_double_quant=True)  # fmt: skip
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.03, "nf4": 0.03}  # of a gradient's norm


def rows_of(batch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The token ids and labels of each row [T_i], whether a batch is padded, packed or padding-free."""
    found = []
    for b, (ids, labels) in enumerate(zip(batch["input_ids"], batch["labels"], strict=True)):
        if "position_ids" in batch:
            starts = [*(batch["position_ids"][b] == 0).nonzero().flatten().tolist(), len(ids)]
            for begin, end in itertools.pairwise(starts):
                found.append((ids[begin:end], labels[begin:end]))
        else:
            mask = batch["attention_mask"][b].bool()
            found.append((ids[mask], labels[mask]))
    return found


def plain_step(model, task: str, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Mean loss over the labels, and its gradient by parameter."""
    own = {name: p for name, p in model.learning_parameters(task).items() if p.requires_grad}
    total, count = torch.zeros(()), 0
    model.eval()  # layers are checkpointed in training only
    with model.activate(task):
        for ids, labels in rows_of(batch):
            logits = model.backbone(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
            total = total + F.cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum")
            count += int((labels[1:] != -100).sum())
    model.train()
    loss = total / count
    return loss.detach(), dict(zip(own, torch.autograd.grad(loss, list(own.values())), strict=True))


def error_of(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).detach().norm() / expected.detach().norm())


class Watching(HFTTrainer):
    """Compares each step with plain passes, before the optimizer moves anything."""

    tolerance: float
    seen: list[str]
    num_labels: list[int]

    def training_step(self, model, inputs, *args, **kwargs):
        task = self._task_of(inputs)
        fill_silent(self.model, task)
        loss = super().training_step(model, inputs, *args, **kwargs)
        expected, gradients = plain_step(self.model, task, inputs)
        torch.testing.assert_close(loss, expected, rtol=self.tolerance, atol=0)
        for name, parameter in self.model.learning_parameters(task).items():
            error = error_of(parameter.grad, gradients[name])
            assert error < self.tolerance, f"{name}: {error}"
        self.seen.append(task)
        self.num_labels.append(int((inputs["labels"][:, 1:] != -100).sum()))
        return loss


def fill_silent(model, task: str) -> None:
    """A node that is silent gives its down projection no gradient, whatever is wrong."""
    with torch.no_grad():
        for parameter in model.learning_parameters(task).values():
            if not parameter.any():
                parameter.normal_(std=0.1)


def row_for(task: str, i: int) -> dict[str, str]:
    return {"prompt": f"{task}{i}" + " so" * (i % 4), "completion": f" then {i}" * (1 + i % 2)}


def new_model(backbone, how: str, hierarchy: dict[str, list[str]]) -> hft.HFTForCausalLM:
    """Untrained, over a backbone in float32, bfloat16 or NF4."""
    quantized = {"quantization_config": NF4} if how == "nf4" else {}
    dtype = torch.float32 if how == "float32" else torch.bfloat16
    return hft.HFTForCausalLM.from_backbone(
        backbone, hierarchy, rank=3, memory_config={"slots": 2}, dtype=dtype, **quantized
    )


def train(backbone, tokenizer, folder, how: str, texts=None, **options) -> Watching:
    torch.manual_seed(0)
    model = new_model(backbone, how, {"a": [], "b": ["a"]})
    data = texts or {task: Dataset.from_list([row_for(task, i) for i in range(9)]) for task in "ab"}
    options = {"per_device_train_batch_size": 4, "num_train_epochs": 1, "bf16": False, "save_strategy": "no",
               "disable_tqdm": True, "gradient_checkpointing": False, "learning_rate": 1e-2, "report_to": "none",
               **options}  # fmt: skip
    trainer = Watching(
        model, HFTTrainingConfig(str(folder), **options), train_dataset=data, processing_class=tokenizer
    )
    trainer.tolerance, trainer.seen, trainer.num_labels = TOLERANCE[how], [], []
    trainer.train()
    return trainer


WAYS = {
    "padded": {},
    "checkpointed": {"gradient_checkpointing": True},
    "checkpointed, reentrant": {
        "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}
    },
    "packed": {"packing": True, "max_length": 64},
    "padding-free": {"padding_free": True, "max_length": None},
    "packed and checkpointed": {"packing": True, "max_length": 64, "gradient_checkpointing": True},
}  # fmt: skip


@pytest.mark.parametrize("how", ["float32", "bfloat16", "nf4"])
@pytest.mark.parametrize("way", WAYS)
def test_loss_and_gradients_are_those_of_plain_passes(backbones, tokenizer, tmp_path, quantizable, way, how):
    trainer = train(backbones["llama"], tokenizer, tmp_path, how, **WAYS[way])
    assert set(trainer.seen) == {"a", "b"}
    if "packing" in WAYS[way]:
        assert len(trainer.seen) < 2 * 3  # several rows went into one


@pytest.mark.parametrize("scored", ["all", "labelled, by TRL", "labelled, by us"])
def test_the_chunked_head_computes_the_plain_loss(backbones, tokenizer, tmp_path, monkeypatch, scored):
    """TRL scores only positions with a label on a GPU; on a CPU it would score all, and we choose."""
    utils, num_positions = trl.trainer.utils, []

    def apply(hidden, *args):
        num_positions.append(len(hidden))
        return head.apply(hidden, *args)

    head = utils._ChunkedLogProbFunction
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", SimpleNamespace(apply=apply))
    monkeypatch.setattr(utils, "_use_triton", lambda device: scored == "labelled, by TRL")
    monkeypatch.setattr(utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", 100)  # of 261 words: a remainder
    if scored != "labelled, by us":
        monkeypatch.setattr(losses, "answers_only", lambda *args: contextlib.nullcontext())
    trainer = train(backbones["llama"], tokenizer, tmp_path, "float32")
    assert (num_positions == trainer.num_labels) == (scored != "all")


@pytest.fixture
def trainer(backbones, tokenizer, tmp_path) -> HFTTrainer:
    model = hft.HFTForCausalLM.from_backbone(backbones["llama"], {"a": []})
    config = HFTTrainingConfig(str(tmp_path), bf16=False, report_to="none")
    rows = {"a": Dataset.from_list([row_for("a", 0)])}
    trainer = HFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer)
    model.set_trainable(["a"])
    return trainer


def batch_with(labels_BT: torch.Tensor) -> dict[str, torch.Tensor]:
    ids_BT = prompts(*labels_BT.shape)
    return {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT), "labels": labels_BT,
            "task": torch.zeros(len(ids_BT), dtype=torch.long)}  # fmt: skip


def test_who_wants_logits_gets_all_of_them(trainer):
    batch = batch_with(prompts(2, 7, seed=3))
    alone = trainer.compute_loss(trainer.model, batch)
    with pytest.warns(FutureWarning, match="return_outputs"):
        loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    torch.testing.assert_close(loss, alone)
    expected = trainer.model(batch["input_ids"], task="a").logits
    torch.testing.assert_close(outputs.logits, expected)
    trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: outputs.logits.square().mean()
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), expected.square().mean())


def test_a_batch_without_labels_has_no_loss(trainer):
    model = trainer.model
    loss = trainer.compute_loss(model, batch_with(torch.full((2, 7), -100)))
    loss.backward()
    gradients = [parameter.grad for parameter in model.learning_parameters("a").values()]
    assert loss == 0 and not any(gradient.any() for gradient in gradients if gradient is not None)
    assert not model.base_model._forward_hooks


def test_sequences_of_2048_tokens(backbones, tokenizer, tmp_path):
    texts = {
        task: Dataset.from_list([{"text": f"{task} {i} " * n} for i, n in enumerate((480, 200, 90, 40))])
        for task in "ab"
    }
    options = {"packing": True, "max_length": 2048, "gradient_checkpointing": True, "per_device_train_batch_size": 1}
    trainer = train(backbones["llama"], tokenizer, tmp_path, "float32", texts, **options, max_steps=2)
    assert trainer.seen == ["a", "a", "b", "b"]
    assert max(len(row["input_ids"]) for row in trainer._prepared["a"]) > 1900


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="flash-attn is not installed")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="flash-attention needs a GPU")
def test_flash_attention_computes_the_plain_loss(backbones, tokenizer, tmp_path):
    model = hft.HFTForCausalLM.from_backbone(
        backbones["llama"], {"a": []}, dtype=torch.bfloat16, attn_implementation="flash_attention_2", device_map="cuda"
    )
    grow(model)
    x = prompts(2, 9).cuda()
    flash = model(x, task="a").logits
    model.backbone.set_attn_implementation("eager")
    torch.testing.assert_close(flash, model(x, task="a").logits, rtol=0.05, atol=0.05)


def test_the_paged_8_bit_optimizer_reaches_the_trainer(backbones, tokenizer, tmp_path):
    trainer = train(backbones["llama"], tokenizer, tmp_path, "float32", optim="paged_adamw_8bit")
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer).__name__ == "AdamW" and optimizer.is_paged and optimizer.args.optim_bits == 8


def test_the_paged_8_bit_optimizer_goes_where_adamw_goes(backbones, tokenizer, tmp_path):
    """Three steps of a child's node and gates. A tensor of fewer than 4096 numbers keeps its state in 32 bit."""

    def steps(optim: str) -> tuple[dict[str, torch.Tensor], set[torch.dtype]]:
        """How far each parameter moves, and in what the first moments are kept."""
        model = hft.HFTForCausalLM.from_backbone(
            backbones["llama"], {"a": [], "b": ["a"]}, rank=128, memory_config={"read": "off"}
        )
        fill(model)
        model.seal(["a"])
        before = {name: p.detach().clone() for name, p in model.learning_parameters("b").items()}
        config = HFTTrainingConfig(
            str(tmp_path / optim), optim=optim, max_steps=3, learning_rate=1e-2, per_device_train_batch_size=4,
            bf16=False, save_strategy="no", disable_tqdm=True, report_to="none",
        )  # fmt: skip
        rows = {"b": Dataset.from_list([row_for("b", i) for i in range(9)])}
        trainer = HFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer)
        trainer.train()
        states = trainer.optimizer.optimizer.state.values()
        dtypes = {state["exp_avg" if "exp_avg" in state else "state1"].dtype for state in states}
        return {name: p.detach() - before[name] for name, p in model.learning_parameters("b").items()}, dtypes

    (expected, plain), (moved, mixed) = steps("adamw_torch"), steps("paged_adamw_8bit")
    assert plain == {torch.float32} and mixed == {torch.float32, torch.uint8}
    for name, way in expected.items():
        assert way.any() and error_of(moved[name], way) < 0.02, name


# ---- invariant 4: each fast path against the naive loop ----


def two_open(backbone, how: str) -> hft.HFTForCausalLM:
    """Two open tasks on sealed ones; every node, page and gate has a value of its own."""
    model = new_model(backbone, how, {"a": [], "e": [], "b": ["a"], "d": ["a", "e"]})
    model.start_stage(["a", "e"])
    fill(model)
    model.seal(["a", "e"])
    model.start_stage(["b", "d"])
    fill(model)
    return model


@pytest.fixture
def naive_model(backbones):
    """In float64, where equal means equal."""
    return two_open(backbones["llama"], "float32").double()


def gradients_of(model, logits, weight):
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad((logits * weight).sum(), list(own.values()), allow_unused=True)
    return dict(zip(own, found, strict=True))


@pytest.mark.parametrize("way", ["checkpointed", "checkpointed, mixed", "packed", "packed and checkpointed"])
def test_4_training_paths_are_the_naive_loop(naive_model, way):
    model = naive_model
    rows = ["d", "b", "a"] if "mixed" in way else ["d"] * 3
    x, kwargs = prompts(3, 5), {"use_cache": False}
    if "packed" in way:
        lengths = (4, 1, 6)
        x, rows = prompts(1, sum(lengths)), ["d"]
        kwargs["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None]
    weight = torch.randn(*x.shape, VOCABULARY, dtype=torch.float64)
    naive = naive_logits(model, x, rows, **kwargs)
    expected = gradients_of(model, naive, weight)
    model.train()
    if "checkpointed" in way:
        model.activation_checkpointing_enable()
    logits = model(x, task=rows, **kwargs).logits
    torch.testing.assert_close(logits, naive, rtol=1e-9, atol=1e-9)
    actual = gradients_of(model, logits, weight)
    for name, gradient in expected.items():
        assert (gradient is None) == (actual[name] is None), name
        if gradient is not None:
            assert gradient.abs().max() > 0
            torch.testing.assert_close(actual[name], gradient, rtol=1e-7, atol=1e-8, msg=name)


@pytest.mark.parametrize("how", TOLERANCE)
@pytest.mark.parametrize("rows", [["d", "d"], ["d", None, "b"]], ids=["one task", "mixed"])
def test_4_in_low_precision_only_rounding_is_between(backbones, quantizable, rows, how):
    """The loop runs in float64, over the very numbers that the model holds."""
    model, x = two_open(backbones["llama"], how).train(), prompts(len(rows), 5)
    weight = torch.randn(*x.shape, VOCABULARY)
    logits = model(x, task=rows, use_cache=False).logits
    actual = gradients_of(model, logits, weight)
    if how == "nf4":
        model.dequantize()
    model.double()
    naive = naive_logits(model, x, rows, use_cache=False)
    expected = gradients_of(model, naive, weight)
    assert {name for name, g in actual.items() if g is None} == {name for name, g in expected.items() if g is None}
    errors = {name: error_of(actual[name], gradient) for name, gradient in expected.items() if gradient is not None}
    worst = max(errors, key=errors.get)
    assert error_of(logits, naive) < TOLERANCE[how]
    assert sum(errors.values()) < TOLERANCE[how] * len(errors), errors
    assert errors[worst] < 6 * TOLERANCE[how], f"{worst}: {errors[worst]}"  # where a sum nearly cancels out


@pytest.mark.parametrize("way", ["kept", "kept, mixed", "kept, each its own", "folded", "merged"])
def test_4_serving_paths_are_the_naive_loop(naive_model, way):
    model, x = naive_model, prompts(3, 5)
    model.seal(["b", "d"])
    model.eval()
    rows = {"kept, mixed": ["d", None, "b"], "kept, each its own": ["d", "b", "a"]}.get(way, ["d"] * 3)
    with torch.no_grad():
        naive = naive_logits(model, x, rows)
        if way.startswith("kept"):
            model(x, task=rows)  # makes what the next pass finds
        else:
            model.fold("d", merge=way == "merged")
        tolerance = 1e-6 if way == "merged" else 1e-9  # merged in float32
        torch.testing.assert_close(model(x, task=rows).logits, naive, rtol=tolerance, atol=tolerance)
