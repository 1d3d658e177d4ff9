"""The data of a recipe's tasks: a folder of JSON lines, or any dataset of the Hub, as rows that train and are scored."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets, load_dataset
from transformers import PreTrainedTokenizerBase

from hft.hierarchy_hft import nearest

from .evaluation import EvalSet
from .metrics import find_metric
from .recipes import NEEDED_KEYS, Recipe
from .row_tokens import shortened
from .task_files import find_split, read_rows


_FOR_TEMPLATES = ("tools", "chat_template_kwargs")  # what a row hands to the chat template: a recipe's rows nothing


def load_task(
    recipe: Recipe, task: str, split: str, tokenizer: PreTrainedTokenizerBase, scored: bool = False
) -> Dataset:
    """One split of a task as prompt-completion rows in chat form.

    A description in `datasets` reads any dataset of the Hub: `path`, `name` and `splits` ({split: its name there}) say
    where it is; `instruction` and `options` (in the order of the labels) are the task's words; `input` is a template over
    the row's columns; `label` names the column with the label's index.

    Args:
        recipe: where the data is and how much of it.
        task: one of the hierarchy's.
        split: `"train"`, `"validation"` or `"test"`.
        tokenizer: to cut passages at `max_input_tokens`.
        scored: whether rows keep the columns that a scorer may need.

    Raises:
        ValueError: no data is described for the task, or a row or the description lacks a key.
        OSError: the data is not where it should be.
    """
    if task in recipe.mixtures:
        parts = [load_task(recipe, member, split, tokenizer) for member in recipe.mixtures[task]]
        parts = [part.select_columns(["prompt", "completion", "options"]) for part in parts]
        return concatenate_datasets(parts).shuffle(seed=0)
    samples = recipe.train_samples if split == "train" else recipe.eval_samples
    if recipe.data is not None:
        rows = read_rows(find_split(Path(recipe.data), task, split), task)
    else:
        if task not in recipe.datasets:
            raise ValueError(f"Task {task!r} has no data: describe it under `datasets`, or give `data`, a folder.")
        rows = _from_description(recipe.datasets[task], task, split)
    if samples is not None:
        rows = rows.shuffle(seed=0).select(range(min(samples, len(rows))))
    convert = functools.partial(to_chat, tokenizer=tokenizer, max_input_tokens=recipe.max_input_tokens)
    gone = ["instruction", "input", "output", *_FOR_TEMPLATES] if scored else rows.column_names
    gone = [name for name in gone if name in rows.column_names]
    return rows.map(convert, remove_columns=gone, desc=f"Reading {task} ({split})")


def check_metrics(recipe: Recipe) -> None:
    """Raises ValueError if a metric is unknown, which else would show when all is trained."""
    for name in [recipe.metric] if isinstance(recipe.metric, str) else recipe.metric.values():
        find_metric(name)


def test_set(
    recipe: Recipe, task: str, split: str, tokenizer: PreTrainedTokenizerBase, samples: int | None = None
) -> EvalSet:
    """What a task is tested on: the rows that `load_task` gives, at most `samples` of them, and the recipe's metric.

    Raises:
        ValueError: an unknown metric; and as `load_task`.
    """
    name = recipe.metric if isinstance(recipe.metric, str) else recipe.metric.get(task, "exact_match")
    metric = find_metric(name)
    rows = load_task(recipe, task, split, tokenizer, scored=True)
    if samples is not None and samples < len(rows):  # files are often sorted by answer
        rows = rows.shuffle(seed=0).select(range(samples))
    return EvalSet(list(rows), metric, recipe.max_new_tokens)


def _from_description(spec: Mapping[str, Any], task: str, split: str) -> Dataset:
    for key in NEEDED_KEYS:
        if spec.get(key) is None:
            raise ValueError(f"`datasets[{task!r}]` lacks the key {key!r}.")
    splits = spec.get("splits", {})
    rows = load_dataset(spec["path"], spec.get("name"), split=splits.get(split, split))
    try:
        spec["input"].format(**rows[0])
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(
            f"`input` of task {task!r} names {error}. {nearest(str(error).strip(chr(39)), rows.column_names)}"
        ) from None
    except ValueError as error:  # of braces
        raise ValueError(f"`input` of task {task!r} is {spec['input']!r}, which is no template: {error}.") from None
    if spec["label"] not in rows.column_names:
        raise ValueError(f"`label` of task {task!r} is {spec['label']!r}. {nearest(spec['label'], rows.column_names)}")

    def read(row: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(row[spec["label"]], int):  # a truth value is one, too
            raise ValueError(
                f"A row of task {task!r} ({split}) has the label {row[spec['label']]!r}; a label is the index of one of "
                "`options`."
            )
        if not 0 <= row[spec["label"]] < len(spec["options"]):
            raise ValueError(
                f"A row of task {task!r} ({split}) has the label {row[spec['label']]}, and there are {len(spec['options'])} "
                "options; a hidden label (-1) marks a split that cannot be scored: name another under `splits`."
            )
        return {
            "instruction": spec["instruction"],
            "options": spec["options"],
            "input": spec["input"].format(**row),
            "output": spec["options"][row[spec["label"]]],
        }

    return rows.map(read, remove_columns=rows.column_names)


def to_chat(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, max_input_tokens: int | None) -> dict[str, Any]:
    """{instruction, options, input, output} -> a user's message, an assistant's, and the options."""
    passage = row["input"].strip()
    if max_input_tokens is not None:
        passage = shortened(passage, tokenizer, max_input_tokens)
    options = f"\nOptions: {', '.join(row['options'])}" if row["options"] else ""
    return {
        "prompt": [{"role": "user", "content": f"{row['instruction']}{options}\n{passage}"}],
        "completion": [{"role": "assistant", "content": row["output"]}],
        "options": row["options"],
    }
