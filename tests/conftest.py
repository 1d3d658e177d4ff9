"""Tiny real backbones built in code, a byte tokenizer with a chat template, and hostile memory."""

import gc
import os


os.environ.setdefault("OMP_NUM_THREADS", "1")  # several threads add in no fixed order
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import hft
from tests.tiny import BACKBONES, fill, tiny_config


ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
SPECIAL = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


LONGEST = (
    "trainer",
    "hub",
    "stopped",
    "recipes_and_cli",
    "resume",
    "processes",
    "same_as_plain",
    "going_on",
    "storage",
)


def pytest_collection_modifyitems(items):
    """The longest files begin, so that in the end no core waits for one of them (with `--no-loadscope-reorder`)."""
    place = {f"test_{name}": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


def pytest_collection_finish():
    """Accelerate collects garbage for each training; what is imported by now need not be looked through each time."""
    gc.freeze()


def _hostile() -> None:
    """The same numbers each time, and NaN in every `torch.empty`, so that what nobody initialises shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True


def pytest_configure(config):
    _hostile()  # for what a module makes once, too


@pytest.fixture(autouse=True)
def _deterministic():
    torch.manual_seed(0)
    _hostile()
    yield
    _hostile()


@pytest.fixture
def quantizable(monkeypatch):
    """bitsandbytes' kernels fill their own memory, and are not all deterministic."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and a chat template."""
    vocabulary = {token: i for i, token in enumerate(SPECIAL + ALPHABET)}
    raw = Tokenizer(models.BPE(vocabulary, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(SPECIAL)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )
    fast.chat_template = TEMPLATE
    return fast


@pytest.fixture(scope="session")
def backbones(tmp_path_factory, tokenizer) -> dict[str, Path]:
    """A folder with a tiny random decoder of each family, and the tokenizer beside it."""
    folders = {}
    for family in BACKBONES:
        torch.manual_seed(1)
        folders[family] = tmp_path_factory.mktemp(family)
        model = AutoModelForCausalLM.from_config(tiny_config(family))
        for name, parameter in model.named_parameters():
            if "norm" not in name:  # large enough for logits to differ visibly
                torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(folders[family])
        tokenizer.save_pretrained(folders[family])
    return folders


@pytest.fixture
def model(backbones) -> hft.HFTForCausalLM:
    """Tiny llama; a diamond a -> (b, c) -> d, ranks that differ, a root e -> f; three open memory pages of 2 slots at
    some of the linears; every node and page speaks."""
    made = hft.HFTForCausalLM.from_backbone(
        backbones["llama"],
        {"a": [], "b": ["a"], "c": ["a"], "d": ["b", "c"], "e": []},
        rank=3,
        memory_config={"slots": 2, "target_modules": ["v_proj", "down_proj"]},
    )
    made.add_task("f", ["e"], rank=5)
    for level in made.hierarchy.levels():
        made.start_stage(level)
    made.set_trainable(made.hierarchy.names)
    fill(made)
    return made
