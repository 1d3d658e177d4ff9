"""The slim form on disk: a safetensors file a task, a page, and one for the rest; never a half-written folder."""

import errno
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils import cached_file


SHARED_FILE = "model.safetensors"  # all tasks' gates

ROUTER_FILE = "router.safetensors"  # what the router knows, of a size that does not grow with the data

WRITING = ".writing-"  # begins the names of folders of files that are not whole yet
WRITTEN = ".written-"  # and of those whose files are to be moved to their places
_A_DAY = 24 * 60 * 60  # seconds: no save takes longer
_PLAN = ".plan.json"  # which they are, and what to remove


def task_file(task: str) -> str:
    """Where a task's node is: `tasks/<task>.safetensors`."""
    return f"tasks/{task}.safetensors"


def page_file(page_id: int) -> str:
    """Where a memory page is: `pages/<id>.safetensors`."""
    return f"pages/{page_id}.safetensors"


@contextmanager
def replacing(directory: str | os.PathLike, last: str = "config.json", stale: Iterable[str] = ()) -> Iterator[Path]:
    """A new empty folder to write into, whose files replace those in `directory` when the block ends without an error.

    All of them do, or none: what the block wrote is whole once its folder has another name, and moves from there. If that is
    cut off, `finish_writing` does the rest, before anything is read or written next. Each file appears under its name
    whole, `last` after all others (a new config.json before them). Files that the block did not write stay.

    Args:
        directory: the folder to write to; made if missing.
        last: the file that says what the others are.
        stale: patterns of files to remove at the end, except those that the block wrote.

    Raises:
        OSError: if the folder cannot be made or written to, or a place is taken, a file's by a folder or a folder's by a
            file; nothing in it has changed then.
    """
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        finish_writing(directory)
        for left in directory.glob(f"{WRITING}*"):  # by a process that was killed
            if time.time() - left.stat().st_mtime > _A_DAY:
                shutil.rmtree(left, ignore_errors=True)
        staging = Path(tempfile.mkdtemp(prefix=WRITING, dir=directory))
    except OSError as error:
        raise OSError(
            f"Cannot write to the folder '{directory}' ({error.strerror}); choose another one or change its permissions."
        ) from error
    try:
        yield staging
        files = sorted(path.relative_to(staging).as_posix() for path in staging.rglob("*") if path.is_file())
        for name in files:
            target = directory / name
            if target.is_dir():
                raise IsADirectoryError(f"'{target}' is a folder, and a file is to be written there; move it away.")
            if target.parent.exists() and not target.parent.is_dir():
                raise NotADirectoryError(
                    f"'{target.parent}' is a file, and a folder is to be made there; move it away."
                )
        # A config.json that was not there is what readers look for first, and they do the rest.
        new = last == "config.json" and not (directory / last).exists()
        plan = {"files": sorted(files, key=lambda name: (name == last) != new), "stale": list(stale)}
        (staging / _PLAN).write_text(json.dumps(plan))
        os.rename(staging, directory / staging.name.replace(WRITING, WRITTEN))
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    finish_writing(directory, is_own=True)


def finish_writing(directory: str | os.PathLike, subfolder: str | None = None, is_own: bool = False) -> bool:
    """Moves to their places the files of a `replacing` that was cut off once all was written.

    Args:
        directory: any folder. Another process may be doing the same.
        subfolder: the one in it that is meant.
        is_own: whether this process wrote them: else they may be anybody's, and no place outside the folder is touched.

    Returns:
        Whether there were any.

    Raises:
        OSError: they cannot be moved; they will be next time.
        ValueError: they would be moved out of the folder.
    """
    directory, found = Path(directory) / (subfolder or ""), False
    for written in sorted(directory.glob(f"{WRITTEN}*")):
        if (written / _PLAN).is_file():  # else all has been moved
            found = True
            plan = json.loads((written / _PLAN).read_text())
            for name in () if is_own else (*plan["files"], *plan["stale"]):
                _check_within(directory, name, written)
            for name in plan["files"]:
                (directory / name).parent.mkdir(parents=True, exist_ok=True)
                with suppress(FileNotFoundError):  # moved already
                    _move(written / name, directory / name)
            for pattern in plan["stale"]:
                for path in directory.glob(pattern):
                    if path.relative_to(directory).as_posix() not in plan["files"]:
                        path.unlink(missing_ok=True)
        shutil.rmtree(written, ignore_errors=True)
    return found


def _check_within(directory: Path, name: str, written: Path) -> None:
    parent = (directory / name).parent  # of a pattern, too: its stars are in the last part
    if os.path.isabs(name) or ".." in Path(name).parts or not parent.resolve().is_relative_to(directory.resolve()):
        raise ValueError(
            f"'{written}' is what is left of a save that was cut off, and says to change '{name}', outside '{directory}'. "
            "If the folder is not yours, do not trust it; else move what is in it to its place, and delete it."
        )


def _move(source: Path, target: Path) -> None:
    """As `os.replace`, onto another disk, too: the target is the old file, or the new one, whole."""
    try:
        os.replace(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        near = target.with_name(f"{WRITING}{target.name}")
        shutil.copyfile(source, near)
        os.replace(near, target)
        source.unlink()


def check_writable(directory: str | os.PathLike) -> None:
    """Makes a folder if it is missing; raises OSError now, not after hours, if it cannot be written to."""
    with replacing(directory):
        pass


@contextmanager
def disk_errors(what: str | os.PathLike) -> Iterator[None]:
    """Inside, the errors of safetensors and PyTorch where a disk is full are an OSError that names the place, as all are."""
    try:
        yield
    except (SafetensorError, RuntimeError, OSError) as error:
        is_full = isinstance(error, SafetensorError) or getattr(error, "errno", None) == errno.ENOSPC
        if not is_full and not re.search("inline_container|iostream", str(error)):  # PyTorch's writer
            raise
        raise OSError(f"Cannot write {what}: {error}. What was saved before is whole.") from error


def write_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Writes a safetensors file.

    Args:
        tensors: by name, any device; views are copied.
        path: in a folder that `replacing` gave.

    Raises:
        OSError: if the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with disk_errors(path.name):
        save_file(whole, path, {"format": "pt"})


def read_tensors(
    repo: str | os.PathLike, filename: str, expected: Iterable[str], may_hold_more: bool = False, **download: Any
) -> dict[str, torch.Tensor]:
    """Reads tensors of one safetensors file of a model and checks that it holds what it must.

    Args:
        repo: a folder or a Hub id.
        filename: the file in it.
        expected: the names that it must hold.
        may_hold_more: whether others beside them are no error; they are read, too.
        download: `revision`, `token`, `cache_dir`, ... as for `transformers.utils.cached_file`.

    Raises:
        OSError: if the file is missing or cut short.
        ValueError: if it holds other tensors than expected.
    """
    path = cached_file(repo, filename, _raise_exceptions_for_missing_entries=False, **download)
    if path is None:
        raise OSError(
            f"'{repo}' lists {filename} in its config.json, but the file is missing. Copy or download the model again."
        )
    expected = set(expected)
    try:
        with safe_open(path, "pt") as file:
            held = set(file.keys())
            odd = sorted(expected - held) or sorted(set() if may_hold_more else held - expected)
            # Copies, where PyTorch would lay them: some products of a CPU round by the place of their factors in memory.
            tensors = {} if odd else {name: file.get_tensor(name).clone() for name in sorted(held)}
    except (SafetensorError, OSError) as error:
        raise OSError(
            f"'{path}' is no whole safetensors file ({error}); it was cut short or damaged. Copy or download it again."
        ) from error
    if odd:
        what = "lacks" if odd[0] in expected else "holds the unexpected"
        raise ValueError(
            f"'{path}' does not fit its config.json: it {what} {odd[0]!r} ({len(odd)} such). "
            "Is it a file of another model, or of another backbone?"
        )
    return tensors
