"""A tokenizer as the metadata of a GGUF file: byte-level BPE whose pre-tokenizer llama.cpp knows by name."""

import json
import tempfile
from typing import Any

from gguf import GGUFWriter, SpecialVocab, TokenType
from transformers import PreTrainedTokenizerBase


# How Llama 3 and Qwen 2 and 3 split a text before merging bytes; they differ in how many digits stay together.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The steps of a pre-tokenizer -> llama.cpp's name for it. llama.cpp's own converter goes by a hash of a tokenised text.
PRE_TOKENIZERS = {
    (("ByteLevel", True),): "gpt-2",
    (("Digits", True), ("ByteLevel", True)): "smollm",
    (("Split", _SPLIT % ""), ("ByteLevel", False)): "qwen2",
    (("Split", _SPLIT % "{1,3}"), ("ByteLevel", False)): "llama-bpe",
}


def pre_tokenizer_name(backend: dict[str, Any]) -> str:
    """llama.cpp's name for the way a tokenizer splits a text before it merges.

    Args:
        backend: what is in `tokenizer.json`.

    Raises:
        ValueError: a tokenizer that is no byte-level BPE, or one that splits in a way that has no name here.
    """
    first = backend["pre_tokenizer"] or {"type": "no pre-tokenizer"}
    steps = tuple(_step(step) for step in first.get("pretokenizers", [first]))
    normalizer = (backend["normalizer"] or {"type": "NFC"})["type"]
    name = PRE_TOKENIZERS.get(steps)
    # llama.cpp looks whole words up before it merges where the name is Llama 3's, and nowhere else.
    whole_words = backend["model"].get("ignore_merges", False)
    if (
        name is None
        or backend["model"]["type"] != "BPE"
        or normalizer != "NFC"
        or whole_words != (name == "llama-bpe")
    ):
        raise ValueError(
            f"The tokenizer ({backend['model']['type']}, {' then '.join(str(step[0]) for step in steps)}"
            f"{', whole words first' if whole_words else ''}) is none that HFT "
            f"can write into a GGUF file (byte-level BPE that splits as {', '.join(PRE_TOKENIZERS.values())}); export "
            "with --to merged and use llama.cpp's own converter."
        )
    return name


def pre_tokenizer_of(tokenizer: PreTrainedTokenizerBase) -> tuple[dict[str, Any], str]:
    """A fast tokenizer as its JSON file has it, and what llama.cpp calls its way to split texts.

    Raises:
        ValueError: another kind of tokenizer; and as `pre_tokenizer_name`.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"The tokenizer is a {type(tokenizer).__name__}, not one of the package tokenizers, and a GGUF file needs its "
            "merges; export with --to peft or --to merged."
        )
    described = json.loads(backend.to_str())
    return described, pre_tokenizer_name(described)


def add_vocabulary(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, size: int) -> None:
    """Tokens, merges, special tokens and the chat template.

    Args:
        writer: of a whole model's file.
        tokenizer: a fast one.
        size: rows of the embedding; tokens beyond the tokenizer's are filled up as unused.

    Raises:
        ValueError: as `pre_tokenizer_of`; a tokenizer without merges, or with more tokens than the embedding has rows.
    """
    backend, name = pre_tokenizer_of(tokenizer)
    if not backend["model"]["merges"] or len(tokenizer) > size:
        raise ValueError(
            f"The tokenizer has {len(backend['model']['merges'])} merges and {len(tokenizer)} tokens, and the embedding "
            f"{size} rows; a GGUF file needs merges, and a row for each token."
        )
    tokens, types = [f"[PAD{i}]" for i in range(size)], [TokenType.UNUSED] * size
    for token, i in tokenizer.get_vocab().items():
        tokens[i], types[i] = token, TokenType.NORMAL
    for added in backend["added_tokens"]:
        types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        special = SpecialVocab(folder, load_merges=True, n_vocab=size)
    ids = tokenizer("a")["input_ids"]
    # Said in any case, since llama.cpp's default depends on the pre-tokenizer.
    special.add_special_token = {"bos": ids[0] == tokenizer.bos_token_id, "eos": ids[-1] == tokenizer.eos_token_id}
    special.add_to_gguf(writer, quiet=True)


def _step(step: dict[str, Any]) -> tuple[str, Any]:
    """A step of a pre-tokenizer, with what in it decides where a text is split."""
    kind = step["type"]
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return kind, step["use_regex"]
    if kind == "Digits":
        return kind, step["individual_digits"]
    if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return kind, step["pattern"].get("Regex")
    return kind, None
