"""Datasets by task: taken apart, checked, and collated so that a micro-batch holds one task."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import ClassLabel, Dataset, Features, IterableDataset, List, Value, concatenate_datasets
from transformers.utils import logging
from trl import is_conversational

from hft.hierarchy_hft import nearest

from .task_files import ROW_KEYS


logger = logging.get_logger(__name__)

TaskDatasets = Mapping[str, Dataset]
# The column of a prepared row's task. Not `task`, which people's own rows have, with numbers of their own.
TASK_ID = "hft_task"


def split_by_task(data: TaskDatasets | Dataset, known: Iterable[str], what: str) -> dict[str, Dataset]:
    """One dataset a task, of plain rows: a format such as torch's is taken off, a transform is not.

    Args:
        data: a dict of them, or one Dataset with a column `task` of names, or with the ids that `tag_rows` gives.
        known: the names of the model's tasks, in the order of their ids.
        what: how to call the data in errors, `"train_dataset"`.

    Raises:
        ValueError: data for an unknown task, an empty dataset, or none at all.
        TypeError: neither form, or a streaming dataset.
    """
    known = list(known)
    if isinstance(data, Dataset):
        if "task" not in data.column_names and not is_tagged(data):
            raise ValueError(
                f"`{what}` is one Dataset without a column 'task' (it has {', '.join(data.column_names)}); "
                "add one with each row's task, or give a dict: {name: Dataset}."
            )
        rows_of: dict[str, list[int]] = {}
        for row, task in enumerate(_names_in(data, known)):
            rows_of.setdefault(task, []).append(row)
        others = [name for name in data.column_names if name != "task"]
        data = {task: data.select(rows).select_columns(others) for task, rows in rows_of.items()}
        if not data:
            raise ValueError(f"`{what}` is empty; each task needs at least one row.")
    if not isinstance(data, Mapping):
        raise TypeError(
            f"`{what}` is a {type(data).__name__}; give {{name: Dataset}}, or a Dataset with a column 'task'."
        )
    for task, dataset in data.items():
        if task not in known:
            raise ValueError(f"`{what}` has data for the unknown task {task!r}. {nearest(task, known)}")
        if isinstance(dataset, IterableDataset) or not isinstance(dataset, Dataset):
            raise TypeError(
                f"`{what}[{task!r}]` is a {type(dataset).__name__}; HFT needs a datasets.Dataset, whose length is known. "
                "For a stream: Dataset.from_list(list(stream.take(n)))."
            )
        if len(dataset) == 0:
            raise ValueError(f"`{what}[{task!r}]` is empty; each task needs at least one row.")
    plain = {
        task: rows if rows.format["type"] in (None, "custom") else rows.with_format(None)
        for task, rows in data.items()
    }
    # Rows under a task's name are that task's, whatever they were prepared for.
    return {task: tag_rows(task, its, known.index(task)) if is_tagged(its) else its for task, its in plain.items()}


def _names_in(data: Dataset, known: Sequence[str]) -> list[Any]:
    """The name of each row's task."""
    column = TASK_ID if is_tagged(data) else "task"
    feature, values = data.features[column], data.with_format(None)[column]
    if column == TASK_ID:
        return [known[value] for value in values]
    if isinstance(feature, ClassLabel):
        return [value if value is None else feature.int2str(value) for value in values]
    return list(values)


def open_sets(sets: Mapping[str, Dataset], open_tasks: Sequence[str]) -> dict[str, Dataset]:
    """The data of the tasks that are still to learn, in their order; of others it is not used, with a warning.

    Raises:
        ValueError: a task without data, or no task at all.
    """
    missing = [task for task in open_tasks if task not in sets]
    if missing:
        raise ValueError(
            f"`train_dataset` has no data for the task {missing[0]!r}; every task that is not sealed needs some."
        )
    if sealed := [task for task in sets if task not in open_tasks]:
        logger.warning(f"The data of {', '.join(sealed)} is not used: sealed tasks do not train again.")
    if not open_tasks:
        raise ValueError("All tasks of this model are sealed; add one with model.add_task(name, parents=[...]).")
    return {task: sets[task] for task in open_tasks}


def tag_rows(task: str, dataset: Dataset, task_id: int, with_others: bool = False) -> Dataset:
    """A task's tokenised rows with its id in a column `TASK_ID`, in one layout for all tasks, so that they concatenate.

    Args:
        task, dataset, task_id: whose rows.
        with_others: whether they keep columns that HFT does not know, for a collator that does.

    Raises:
        ValueError: rows with masks that nobody has made labels of, or that a transform makes anew each time.
    """
    if dataset.format["type"] == "custom":
        raise ValueError(
            f"The rows of task {task!r} have a transform, which would undo that they are prepared; apply it beforehand: "
            "Dataset.map."
        )
    columns = [name for name in ("input_ids", "labels", "seq_lengths") if name in dataset.column_names]
    if "labels" not in columns:
        if masks := [name for name in ("completion_mask", "assistant_masks") if name in dataset.column_names]:
            raise ValueError(
                f"The rows of task {task!r} have the column {masks[0]!r} and no 'labels', so whole rows, prompts included, "
                "would be learnt; give 'labels', with -100 where nothing is to be learnt."
            )
        dataset = dataset.map(lambda row: {"labels": row["input_ids"]})
        columns.append("labels")
    others = [name for name in dataset.column_names if name not in (*columns, TASK_ID)] if with_others else []
    dataset = dataset.select_columns([*columns, *others]).add_column(TASK_ID, [task_id] * len(dataset))
    layout = {name: List(Value("int64")) for name in columns} | {name: dataset.features[name] for name in others}
    return dataset.cast(Features({**layout, TASK_ID: Value("int64")}))


def joined(sets: Mapping[str, Dataset]) -> Dataset:
    """The tagged rows of all tasks, one task after another; ValueError if columns that they kept cannot stand together."""
    try:
        return concatenate_datasets(list(sets.values()))
    except ValueError as error:  # only with `remove_unused_columns=False` there are others than HFT's
        raise ValueError(
            f"The rows of {', '.join(sets)} have columns of one name and different types ({error}); give them one type, or "
            "leave `remove_unused_columns` on."
        ) from error


def is_tagged(data: Any) -> bool:
    """Whether these are rows as `tag_rows` gives them."""
    return isinstance(data, Dataset) and "input_ids" in data.features and TASK_ID in data.features


def alone(rows: Dataset, count: int = 128) -> list[dict[str, list[int]]]:
    """Up to `count` tokenised rows {"input_ids", "labels"}, evenly spaced; what was packed into one row stands alone."""
    found = []
    for row in rows:
        begin = 0
        for length in row.get("seq_lengths") or [len(row["input_ids"])]:
            end = begin + length
            found.append({name: row[name][begin:end] for name in ("input_ids", "labels")})
            begin = end
    found = [row for row in found if _is_predicted(row["labels"], ())]  # else cut off from its answer
    return [found[place] for place in evenly_spaced(len(found), count)]


def evenly_spaced(length: int, count: int) -> list[int]:
    """Up to `count` places among `length`: not the first ones, since files are often sorted."""
    count = min(count, length)
    return [place * length // count for place in range(count)]


def learnable(
    task: str, rows: Dataset, ready: Dataset, max_length: int | None, packing: bool, keeps_start: bool = True
) -> Dataset:
    """The rows that hold an answer, or a part of one; says how many do not, and how many may have lost its end.

    Args:
        task: its name.
        rows: as given.
        ready: tokenised and cut to `max_length`.
        max_length: in tokens.
        packing: whether rows were packed, so that their number says nothing.
        keeps_start: whether it was their ends that were cut off.

    Raises:
        ValueError: if nothing in them could be learnt, so that a task would be sealed at a loss of 0.
    """
    lengths = ready["seq_lengths"] if "seq_lengths" in ready.column_names else [[]] * len(ready)
    if not any(map(_is_predicted, ready["labels"], lengths)):
        raise ValueError(
            f"Nothing is left to learn in the {len(rows)} rows of task {task!r}: all labels are masked, or on a first "
            f"token, which nothing predicts. With `max_length`={max_length}, truncation may have cut off the answers: raise "
            "it, or set truncation_mode='keep_end'."
        )
    found = [place for place, labels in enumerate(ready["labels"]) if any(label != -100 for label in labels)]
    before = len(ready) if packing else len(rows)
    if len(found) < before:
        came_tokenised = "input_ids" in rows.column_names
        was_cut = max_length is not None and (
            not came_tokenised or any(len(ids) > max_length for ids in rows["input_ids"])
        )
        why = f"with `max_length`={max_length}, truncation cut off their whole answer. Raise it, or set "
        why += "truncation_mode='keep_end'"
        logger.warning(
            f"{before - len(found)} of the {before} {'packed ' if packing else ''}rows of task {task!r} were dropped: "
            f"{why if was_cut else 'they have no answer, all their labels are -100'}."
        )
    if keeps_start and not packing and "input_ids" not in rows.column_names:
        ends = [labels[-1] for labels in ready["labels"] if len(labels) == max_length]
        if cut := sum(label != -100 for label in ends):
            logger.warning(
                f"{cut} of the {before} rows of task {task!r} are `max_length`={max_length} tokens long, where answers are "
                "cut off: what is left teaches answers without an end. Raise it, or set truncation_mode='keep_end'."
            )
    return ready.select(found) if len(found) < len(ready) else ready


def _is_predicted(labels: Sequence[int], lengths: Sequence[int]) -> bool:
    """Whether tokens before it predict any label of a row: not those that begin it, or one of the sequences packed in it."""
    firsts = {0, *itertools.accumulate(lengths)}
    return any(label != -100 and place not in firsts for place, label in enumerate(labels))


def check_completions(
    task: str, rows: Dataset, only: bool | None, formatting_func: Callable[[dict], str] | None
) -> None:
    """Whether a task's rows have no labels yet, and go together with a loss of completions only.

    Args:
        task: its name.
        rows: not tokenised yet.
        only: `completion_only_loss`; None: where rows have prompts and completions.
        formatting_func: as for `HFTTrainer`.

    Raises:
        ValueError: a column that would be taken for labels, or whole rows would be learnt.
    """
    if "labels" in rows.column_names:
        raise ValueError(
            f"The rows of task {task!r} have a column 'labels' and are not tokenised; 'labels' are token ids, one for each "
            "of 'input_ids': rename the column, or remove it."
        )
    has_completions = {"prompt", "completion"} <= set(rows.column_names)
    if only and not has_completions:
        raise ValueError(
            f"`completion_only_loss` is set, and the rows of task {task!r} have no prompts and completions, so all of them "
            "would be learnt; leave it out (for messages there is `assistant_only_loss`)."
        )
    if formatting_func is not None and (has_completions if only is None else only):
        raise ValueError(
            f"`formatting_func` is given, and the rows of task {task!r} have prompts and completions, which it would join, "
            "so that prompts were learnt; format them beforehand, or set `completion_only_loss=False`."
        )


def formatted(rows: Dataset, formatting_func: Callable[[dict], str] | None, text_field: str) -> Dataset:
    """Rows as the texts that `formatting_func` makes of them, in the column `text_field`; as they are without it.

    TRL itself would go on with prompts, messages and conversations, and with any other text field, where rows have them.
    """
    if formatting_func is None or "input_ids" in rows.column_names:
        return rows
    replaced = [name for name in rows.column_names if name in ("prompt", "completion", "messages", "conversations")]
    return rows.map(lambda row: {text_field: formatting_func(row)}, remove_columns=replaced)


def check_messages(task: str, rows: Dataset) -> None:
    """Raises ValueError if a task's rows are no messages, of which `assistant_only_loss` could score the assistant's."""
    if not is_conversational(rows[0]):
        raise ValueError(
            f"`assistant_only_loss` is set, and the rows of task {task!r} are no messages ({', '.join(rows[0])}), so all "
            "their tokens would be scored; give messages, or leave the setting out."
        )


def check_tokens(task: str, rows: Dataset) -> None:
    """Raises ValueError if a task's rows are not tokenised, or have labels or a mask of another length than their ids."""
    if "input_ids" not in rows.column_names:
        raise ValueError(
            f"`skip_prepare_dataset` is set, and the rows of task {task!r} ({', '.join(rows.column_names)}) are not "
            "tokenised; give 'input_ids' and 'labels', or leave the setting out."
        )
    masks = [name for name in ("labels", "completion_mask", "assistant_masks") if name in rows.column_names]
    for name in masks:
        for place, (ids, its) in enumerate(zip(rows["input_ids"], rows[name], strict=True)):
            if (own := len(its or ())) != len(ids):
                raise ValueError(
                    f"Row {place} of task {task!r} has {own} {name!r} for {len(ids)} 'input_ids'; give one for each."
                )


def why_unfit(
    task: str, rows: Dataset, text_field: str, formatting_func: Callable[[dict], str] | None, error: Exception
) -> str:
    """Why TRL could not prepare a task's rows, in a sentence.

    Args:
        task, rows: as given.
        text_field: the column of plain texts, `dataset_text_field`.
        formatting_func: what makes texts of rows, if anything does.
        error: that TRL met.
    """
    its_rows = f"rows of task {task!r} ({', '.join(rows.column_names)})"
    if formatting_func is not None and "input_ids" not in rows.column_names:
        return f"`formatting_func` does not suit the {its_rows}: {error!r}; it must make one text of each."
    forms = (["input_ids"], ["prompt", "completion"], ["messages"], ["conversations"])
    columns = next((form for form in forms if form[0] in rows.column_names), [text_field])
    if missing := [name for name in columns if name not in rows.column_names]:
        if set(ROW_KEYS) <= set(rows.column_names):
            return (
                f"The {its_rows} are in the form of `hft train`'s files: train them by a recipe (`hft plan --data FOLDER` "
                "writes one), or make 'prompt' and 'completion' of them."
            )
        return (
            f"The {its_rows} lack {missing[0]!r}; give 'prompt' and 'completion', or 'messages', or texts in "
            f"{text_field!r} (see `dataset_text_field`)."
        )
    for place, row in enumerate(rows.select_columns(columns)):
        if empty := [name for name in columns if row[name] is None or row[name] == []]:
            return f"Row {place} of task {task!r} has nothing in {empty[0]!r}; fill it, or leave the row out."
    return f"The {its_rows} cannot be tokenised: {error!r}; a prompt, completion or text is a string, or a list of messages."


@dataclass
class OneTaskCollator:
    """Collates as `collator` does and adds `task`, a list: B times the id of the one task that all rows have in `TASK_ID`.

    As a tensor it would move to the GPU, and whoever asks for it there would wait for all that the GPU still has to do.

    Args:
        collator: TRL's. If it flattens rows into one (padding-free), B is 1.
    """

    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        tasks = {int(example[TASK_ID]) for example in examples}
        if len(tasks) > 1:
            raise ValueError(
                f"A micro-batch holds rows of the tasks with the ids {sorted(tasks)}, and only one task's path is computed; "
                "leave the order of the rows to HFTTrainer (`get_train_dataloader`), or batch each task by itself."
            )
        batch = self.collator([{name: value for name, value in row.items() if name != TASK_ID} for row in examples])
        batch["task"] = [tasks.pop()] * batch["input_ids"].shape[0]
        return batch
