"""What the router learns from: the prompts of training rows."""

from collections.abc import Iterable, Mapping

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging
from trl import maybe_convert_to_chatml

from .metrics import Row
from .row_tokens import Messages, prompt_ids, template_arguments
from .task_data import evenly_spaced


logger = logging.get_logger(__name__)


def learn_routes(
    model: PreTrainedModel,
    tasks: Iterable[str],
    train_sets: Mapping[str, Dataset],
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    is_formatted: bool = False,
) -> None:
    """Lets an HFT model's router know tasks by prompts of their rows.

    Args:
        model: an HFT model.
        tasks: those to learn.
        train_sets: task -> rows, see `prompts_of`.
        tokenizer: the model's.
        count: prompts a task, at most.
        is_formatted: whether a `formatting_func` made the rows that were learnt of these, but for those that are tokenised.
    """
    tasks, routing = list(tasks), model.config.router_config
    if tasks and not routing.tasks:
        routing.prefix, routing.suffix = template_tokens(tokenizer)
    formatted = [task for task in tasks if is_formatted and "input_ids" not in train_sets[task].column_names]
    if formatted:
        logger.warning(
            f"The router does not learn to know {', '.join(formatted)}: `formatting_func` does not say where a prompt ends. "
            "Give prompts and completions instead, or leave the tasks out of `route_tasks`."
        )
    for task in (its for its in tasks if its not in formatted):
        found = prompts_of(train_sets[task], tokenizer, count)
        prompts = [list(prompt) for prompt in dict.fromkeys(map(tuple, found))]  # each once
        if len(prompts) < 2:
            logger.warning(
                f"Of task {task!r} there are fewer than two different prompts, so the router does not learn to know it."
            )
            continue
        model.add_routes(task, prompts)


def prompts_of(rows: Dataset, tokenizer: PreTrainedTokenizerBase, count: int) -> list[list[int]]:
    """The prompts of up to `count` rows, evenly spaced, as token ids, as `generate` will get them.

    Rows may be prompt-completion or a conversation, whose last answer is not part of the prompt, or be tokenised already,
    with labels or a mask. Other forms, such as plain text, have no prompts: an empty list.
    """
    some = rows.select(evenly_spaced(len(rows), count))
    for column, masked in (("labels", -100), ("completion_mask", 0)):
        if column in some.column_names:
            starts = [next((i for i, its in enumerate(row) if its != masked), len(row)) for row in some[column]]
            return [ids[:start] for ids, start in zip(some["input_ids"], starts, strict=True) if start]
    if "conversations" in some.column_names:
        some = some.map(maybe_convert_to_chatml)
    return [prompt_ids(tokenizer, prompt, **template_arguments(row)) for row in some if (prompt := _prompt_in(row))]


def _prompt_in(row: Row) -> str | Messages | None:
    """What comes before a row's answer; of a conversation that ends without one, all of it."""
    if "prompt" in row:
        return row["prompt"]
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        return None
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def template_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What the chat template puts before and after every prompt of one user message; nothing without a template."""
    if tokenizer.chat_template is None:
        return [], []
    one, other = (
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        for text in ("0 1 2", "x y")
    )
    if one == other:  # a template that shows no message
        return [], []
    before = next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    after = next(i for i, (a, b) in enumerate(zip(reversed(one), reversed(other), strict=False)) if a != b)
    return one[:before], one[len(one) - after :]
