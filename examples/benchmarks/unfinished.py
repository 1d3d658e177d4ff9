"""What a cell has done before it ends: kept in a folder, so that a run that was cut off goes on in the middle of it."""

import contextlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from hft.trainers.run_record import write_json


SAVE_STEPS = 25  # a few minutes on the slowest CPU


class Work:
    """The values, trainings, seconds and peak memory of a cell, over all runs that worked at it.

    Args:
        folder: where they are kept; None keeps them in this process only.
        by: what works at it (machine, versions): of another, or another version, nothing is taken over.
        peak: -> the most bytes that this process took so far.

    Attributes:
        trainings: how many of the cell have begun, or are taken over, in this process.
    """

    def __init__(self, folder: Path | None = None, by: Mapping[str, Any] | None = None, peak: Callable[[], int] = int):
        self.folder, self._by, self._peak = folder, dict(by or {}), peak
        self._since, self.trainings = time.time(), 0
        self._kept: dict[str, Any] = {"by": self._by, "seconds": 0.0, "peak": 0, "values": {}, "steps": {}}
        if folder is None:
            return
        with contextlib.suppress(OSError, ValueError):
            before = json.loads((folder / "work.json").read_text())
            if before["by"] == self._by:
                self._kept.update(before)
                return
        shutil.rmtree(folder, ignore_errors=True)

    def remember(self, key: str, compute: Callable[[], Any]) -> Any:
        """A value that JSON can hold, computed once for all runs at the cell."""
        if key not in self._kept["values"]:
            self._kept["values"][key] = json.loads(json.dumps(compute()))
            self.note()
        return self._kept["values"][key]

    def count_steps(self, part: str, steps: int) -> None:
        """Notes how many optimizer steps a part of the cell's newest training has taken."""
        self._kept["steps"][f"{self.trainings}: {part}"] = steps
        self.note()

    def steps(self) -> int:
        """The optimizer steps of all trainings so far."""
        return sum(self._kept["steps"].values())

    def is_begun(self) -> bool:
        """Whether an earlier run has done a part of it."""
        return self._kept["seconds"] > 0

    def seconds(self) -> float:
        """What all runs have taken, without what was lost when they were cut off."""
        return self._kept["seconds"] + time.time() - self._since

    def peak(self) -> int:
        """The most bytes that any of the runs took."""
        return max(self._kept["peak"], self._peak())

    def note(self) -> None:
        """Writes down what there is: from here on a run that is cut off goes on."""
        if self.folder is None:
            return
        self._kept.update(seconds=self.seconds(), peak=self.peak())
        self._since = time.time()
        write_json(self.folder / "work.json", self._kept)

    @contextlib.contextmanager
    def training(self) -> Iterator[Path]:
        """The folder of the cell's next training; those of a cell always come in the same order."""
        self.trainings += 1
        if self.folder is not None:
            self.note()
            yield self.folder / f"training-{self.trainings}"
            self.note()
            return
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)

    def saving(self) -> dict[str, Any]:
        """Training arguments by which a training can go on."""
        if self.folder is None:
            return {"save_strategy": "no"}
        return {"save_strategy": "steps", "save_steps": SAVE_STEPS, "save_total_limit": 1}

    def forget(self) -> None:
        """Removes the folder, as of a cell that has ended."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


class WorkCallback(TrainerCallback):
    """Counts the time and the steps up to each checkpoint, and to a training's end, as done."""

    def __init__(self, work: Work):
        self.work = work

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.work.count_steps(Path(args.output_dir).name, state.global_step)

    on_train_end = on_save
