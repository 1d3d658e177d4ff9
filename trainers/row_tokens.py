"""Rows as token ids: one rule where a prompt ends, for training, planning, refreshing gates, routing and scoring.

It is TRL's: prompt and answer are tokenised as one text, and the answer begins where that departs from the prompt alone. A
tokenizer may join the prompt's last blank to the answer's first word, or put a blank of its own before a text that begins.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from .metrics import Row


Messages = Sequence[Mapping[str, str]]


def template_arguments(row: Row) -> dict[str, Any]:
    """What a row hands to the chat template beside its messages, as TRL does: `tools`, which may be JSON text, and its own
    `chat_template_kwargs`."""
    tools = row.get("tools")
    return {"tools": json.loads(tools) if isinstance(tools, str) else tools, **(row.get("chat_template_kwargs") or {})}


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str | Messages, **template: Any) -> list[int]:
    """A prompt's token ids as `generate` gets them; messages end with the template's call for an answer.

    Args:
        tokenizer: with a chat template if the prompt is messages.
        prompt: a string, or a list of messages.
        template: what messages hand to the chat template besides, see `template_arguments`.
    """
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    return tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, tokenize=True, return_dict=False, **template
    )


def prompt_and_answers(
    tokenizer: PreTrainedTokenizerBase, prompt: str | Messages, answers: Sequence[str], **template: Any
) -> tuple[list[int], list[list[int]]]:
    """The token ids of a prompt, and of each answer to it with what ends it, as a task learns them.

    That is the end of text; after messages, what the chat template puts there, up to its last special token: `<|im_end|>`,
    `<end_of_turn>`, whatever the tokenizer's own end of text is. Where answers begin at different places, each has what they
    do not all share. Arguments as for `prompt_ids`.
    """
    ids = prompt_ids(tokenizer, prompt, **template)
    if isinstance(prompt, str):
        wholes = [_joined(tokenizer, prompt, answer) for answer in answers]
    else:
        wholes = []
        for answer in answers:
            whole = _of_messages(tokenizer, [*prompt, {"role": "assistant", "content": answer}], template)
            wholes.append(_ended(tokenizer, whole, common_length(ids, whole)))
    begin = min((common_length(ids, whole) for whole in wholes), default=len(ids))
    return ids[:begin], [whole[begin:] for whole in wholes]


def opening_length(tokenizer: PreTrainedTokenizerBase, templates: Iterable[Mapping[str, Any]] = ({},)) -> int:
    """How many tokens the chat template writes between its call for an answer and any answer: Qwen3's `<think></think>`.

    A task learns them as a part of its answers, so what generates an answer generates them, too.

    Args:
        tokenizer: with a chat template.
        templates: what rows hand to it, see `template_arguments`; the longest opening counts.
    """
    question = [{"role": "user", "content": "a"}]
    lengths = [0]
    for template in {repr(its): its for its in templates}.values():
        try:
            _, (one, other) = prompt_and_answers(tokenizer, question, ["0 1", "y z"], **template)
        except TemplateError:  # one that wants more than a question
            continue
        lengths.append(common_length(one, other))
    return max(lengths)


def tokenize_rows(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    truncation_mode: str = "keep_end",
) -> list[dict[str, list[int]]]:
    """Prompt-completion rows -> {"input_ids", "labels"}: -100 on the prompt; the end of text after a plain completion.

    Args:
        rows: strings, or lists of messages, as TRL takes them, with `tools` if need be.
        tokenizer: with a chat template if rows are messages.
        max_length, truncation_mode: as for `cut_rows`.
    """
    ready = []
    for row in rows:
        template = template_arguments(row)
        if isinstance(row["prompt"], str):
            whole = _joined(tokenizer, row["prompt"], row["completion"])
        else:
            whole = _of_messages(tokenizer, [*row["prompt"], *row["completion"]], template)
        begin = common_length(prompt_ids(tokenizer, row["prompt"], **template), whole)
        ready.append({"input_ids": whole, "labels": [-100] * begin + whole[begin:]})
    return cut_rows(ready, max_length, truncation_mode)


def cut_rows(
    rows: Iterable[Mapping[str, Sequence[int]]], max_length: int | None, truncation_mode: str
) -> list[dict[str, list[int]]]:
    """Tokenised rows of at most `max_length` tokens, None for any number; `"keep_start"` drops the end of longer ones, and
    `"keep_end"` their beginning, as TRL does."""
    if max_length is None:
        return [{name: list(values) for name, values in row.items()} for row in rows]
    kept = slice(max_length) if truncation_mode == "keep_start" else slice(-max_length, None)
    return [{name: list(values[kept]) for name, values in row.items()} for row in rows]


def has_answer(row: Mapping[str, Sequence[int]]) -> bool:
    """Whether a tokenised row holds an answer, or a part of one: when it is cut, it may not."""
    return any(label != -100 for label in row["labels"])


def is_text(letters: str) -> bool:
    """Whether UTF-8 can say it: not halves of surrogate pairs, as bytes become that are no letters."""
    return not any("\ud800" <= letter <= "\udfff" for letter in letters)


def common_length(ids: Sequence[int], others: Sequence[int]) -> int:
    """How many of their first tokens are the same."""
    pairs = enumerate(zip(ids, others, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(ids), len(others)))


def shortened(text: str, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> str:
    """A text of about `max_tokens` tokens at most: a longer one loses the middle of its longest line, or else its own.

    A row's passage is its longest line; its question, candidate answer or second sentence stands in a line of its own, which
    stays whole, wherever it is, if cutting the passage is enough. And both ends of a text tell more than its middle (Sun et
    al. 2019, https://arxiv.org/abs/1905.05583, section 5.3.1).
    """
    lines = text.split("\n")
    ids = [tokenizer(line, add_special_tokens=False)["input_ids"] for line in lines]
    if (over := sum(map(len, ids)) + len(lines) - 1 - max_tokens) <= 0:
        return text
    longest = max(range(len(lines)), key=lambda place: len(ids[place]))
    if len(ids[longest]) > over:
        lines[longest] = _without_middle(ids[longest], len(ids[longest]) - over, tokenizer)
        return "\n".join(lines)
    return _without_middle(tokenizer(text, add_special_tokens=False)["input_ids"], max_tokens, tokenizer)


def _without_middle(ids: Sequence[int], left: int, tokenizer: PreTrainedTokenizerBase) -> str:
    ends = ids[: left - left // 2], ids[len(ids) - left // 2 :]
    texts = (tokenizer.decode(its).strip().strip("\ufffd") for its in ends)  # halves of letters
    return " ".join(text for text in texts if text)


def _joined(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> list[int]:
    eos = _end_of_text(tokenizer)
    return tokenizer(prompt + completion + ("" if completion.endswith(eos) else eos))["input_ids"]


def _end_of_text(tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.eos_token is None:
        raise ValueError("The tokenizer has no end-of-text token (`eos_token`), with which answers end; set it.")
    return tokenizer.eos_token


def _of_messages(tokenizer: PreTrainedTokenizerBase, messages: Messages, template: Mapping[str, Any]) -> list[int]:
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **template)


def _ended(tokenizer: PreTrainedTokenizerBase, ids: list[int], begin: int) -> list[int]:
    """A conversation up to the last special token of the answer that begins there, or with the end of text."""
    special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    ends = [place for place, token_id in enumerate(ids) if place >= begin and token_id in special]
    if ends:
        return ids[: ends[-1] + 1]
    return [*ids, tokenizer.convert_tokens_to_ids(_end_of_text(tokenizer))]
