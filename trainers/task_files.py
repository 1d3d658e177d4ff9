"""A folder of tasks: `<task>/<split>.jsonl`, plain or gzipped (`.jsonl.gz`), an object a line."""

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

from datasets import Dataset, List, Value
from pyarrow import ArrowException
from transformers.utils import logging

from .row_tokens import is_text


logger = logging.get_logger(__name__)

ROW_KEYS = ("instruction", "options", "input", "output")
_ENDINGS = (".jsonl.gz", ".jsonl")


def tasks_in(folder: Path) -> list[str]:
    """The tasks of a folder, by name: its subfolders with training rows.

    Raises:
        ValueError: there is none.
    """
    names = sorted({path.parent.name for ending in _ENDINGS for path in folder.glob(f"*/train{ending}")})
    if not names:
        raise ValueError(f"'{folder}' holds no tasks; each is a folder in it with a train.jsonl or train.jsonl.gz.")
    return names


def has_split(folder: Path, task: str, split: str) -> bool:
    """Whether there is a file for a split of a task."""
    return bool(_files_of(folder, task, split))


def _files_of(folder: Path, task: str, split: str) -> list[Path]:
    return [file for ending in _ENDINGS if (file := folder / task / f"{split}{ending}").exists()]


def find_split(folder: Path, task: str, split: str) -> Path:
    """The file that holds a split of a task.

    Raises:
        FileNotFoundError: there is none.
        ValueError: there are two, of which one may be out of date.
    """
    files = _files_of(folder, task, split)
    if not files:
        wanted = f"There is no '{folder / task / split}.jsonl' (or .jsonl.gz) for task {task!r}"
        if others := [other for other in ("train", "validation", "test") if has_split(folder, task, other)]:
            needs = ", or delete `stage_eval_samples`, which needs it" if split == "validation" else ""
            raise FileNotFoundError(f"{wanted}, which has {' and '.join(others)}; add that file{needs}.")
        raise FileNotFoundError(f"{wanted}; is `data` the right folder?")
    if len(files) > 1:
        raise ValueError(f"There are both '{files[0]}' and '{files[1].name}' for task {task!r}; remove one.")
    return files[0]


def read_rows(file: Path, task: str) -> Dataset:
    """The rows of a file. Texts stay as they are: a date or a number in quotes is text.

    Args:
        file: of JSON lines, each with the keys `instruction` (text), `options` (a list of texts, empty for free answers),
            `input` and `output` (texts). Further keys become columns, which a scorer may need.
        task: whose rows they are, for errors.

    Raises:
        ValueError: a line that is no such row, named by its number; or no row at all.

    Warns of answers that are empty, and of such as are none of their row's options.
    """
    rows, number = [], 0
    odd: dict[str, list[int]] = {}  # what -> the lines
    opened = gzip.open if file.suffix == ".gz" else open
    try:
        with opened(file, "rb") as lines:  # each decoded by itself, so that the number is right
            for number, line in enumerate(lines, start=1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if text.strip():
                    rows.append(_checked(json.loads(text)))
                    if what := _oddness(rows[-1]):
                        odd.setdefault(what, []).append(number)
    except (ValueError, OSError, EOFError, zlib.error) as error:  # no JSON, no text, no gzip
        where = f"Line {number} of " if number else ""
        raise ValueError(f"{where}'{file}' (task {task!r}) cannot be read: {error}.") from error
    if not rows:
        raise ValueError(f"'{file}' (task {task!r}) is empty; it needs at least one row.")
    for what, lines in odd.items():
        logger.warning_once(
            f"'{file}' (task {task!r}): the answer {what} in {len(lines)} of {len(rows)} rows, first in line {lines[0]}."
        )
    columns = dict.fromkeys(key for row in rows for key in row)
    try:
        data = Dataset.from_dict({key: [row.get(key) for row in rows] for key in columns})
    except (ArrowException, OverflowError) as error:
        further = ", ".join(repr(key) for key in columns if key not in ROW_KEYS)
        raise ValueError(
            f"'{file}' (task {task!r}) cannot be read: a further key ({further}) has values of several kinds, or too large "
            f"ones: {error}."
        ) from error
    return data.cast_column("options", List(Value("string")))  # where all are empty, their type is unknown


def _oddness(row: dict[str, Any]) -> str:
    """What is odd about a row's answer, in words that follow "the answer"; else empty."""
    if not row["output"].strip():
        return "is empty"
    return "is none of the row's `options`" if row["options"] and row["output"] not in row["options"] else ""


def _checked(row: Any) -> dict[str, Any]:
    """Raises ValueError if this is no row, in words that follow "cannot be read:"."""
    if not isinstance(row, dict):
        raise ValueError(f"it must be an object, {{{', '.join(ROW_KEYS)}}}")
    for key in ROW_KEYS:
        value = row.get(key)
        if value is None:
            raise ValueError(
                f"it lacks the key {key!r}; each row needs {', '.join(ROW_KEYS)} (`options: []` for free answers)"
            )
        if key != "options" and not isinstance(value, str):
            raise ValueError(f"{key!r} is {value!r:.80}; it must be text: put numbers in quotes")
        if key == "options" and not (isinstance(value, list) and all(isinstance(option, str) for option in value)):
            raise ValueError(f"{key!r} is {value!r:.80}; it must be a list of texts: put numbers in quotes")
        if key == "options" and len(set(value)) < len(value):
            raise ValueError(f"{key!r} is {value!r:.80}; each option stands once")
        if not is_text("".join(value)):
            raise ValueError(
                f"{key!r} is {value!r:.80}, with half of a surrogate pair (\\ud800 to \\udfff), which is no text"
            )
    return row
