"""The folder of a run: which checkpoints in it are whole, and where a resumed run goes on."""

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from transformers import PreTrainedModel
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from hft.files_hft import finish_writing

from .curriculum import open_stages


logger = logging.get_logger(__name__)


class RunFolder:
    """A folder that is a model with the stages learnt so far, with the checkpoints of stage n in `stage-n/`.

    Args:
        path: the folder, or one checkpoint in it.
        writes: whether this process is the one that writes there, and may clean up.
    """

    def __init__(self, path: Path, writes: bool = True):
        self.path = path
        self.writes = writes

    def run(self) -> "RunFolder":
        """The folder of the run, of which this may be a checkpoint."""
        return RunFolder(self.path.parent.parent, self.writes) if self.is_checkpoint() else self

    def is_same(self, other: "RunFolder") -> bool:
        """Whether both are the same folder."""
        return self.path.resolve() == other.path.resolve()

    def is_checkpoint(self) -> bool:
        """Whether it is one checkpoint in a run's folder, whole or not, and not a run that is called like one."""
        if not self.path.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-") or any(self.path.glob("stage-*")):
            return False
        return stage_of(self.path) is not None or is_whole(self.path)

    def begin(self, sealed: Collection[str] = ()) -> None:
        """From here on the folder describes a new run; a resume must never pick up another one's checkpoints.

        Those of stages that the run's model has learnt are removed.

        Args:
            sealed: the tasks that the run's model has learnt already.

        Raises:
            ValueError: if there are others, or the folder holds a model with learnt tasks that this one would overwrite, or
                a config.json that cannot be read.
        """
        if (kind := _model_in(self.path).get("model_type", "hft")) != "hft":
            raise ValueError(
                f"'{self.path}' holds another model, a plain {kind!r}, which would be overwritten; take another output_dir."
            )
        go_on = (
            "go on with it by resume_from_checkpoint=True (`hft train --resume`), take another output_dir, or delete"
        )
        finish_writing(self.path)
        old = self._checkpoints()
        there = set(_tasks_in(self.path))  # without those that were removed since
        done = [path for path in old if _are_learnt(set(_tasks_in(path)), there, set(sealed))]
        if others := [checkpoint for checkpoint in old if checkpoint not in done]:
            first = others[0].relative_to(self.path)
            raise ValueError(
                f"'{self.path}' holds checkpoints of an earlier run ({first}); {go_on} its stage-* folders."
            )
        if lost := sorted(set(_tasks_in(self.path, sealed_only=True)) - set(sealed)):
            raise ValueError(
                f"'{self.path}' holds a model that has learnt {', '.join(lost)}, which this run's model has not and which "
                f"would be lost; {go_on} it."
            )
        self._remove(done)
        self._sweep()

    @contextmanager
    def going_back(self, stage: int, step: int) -> Iterator[None]:
        """Around saving a model that is at one of the run's own checkpoints: no later ones are left, nor what they became.

        Else a resume would pick up what was learnt before, the next time that the run is cut off. They stop to be whole
        before the folder's model changes, and go when it has: cut off in between, the run is where it was.

        Args:
            stage: the level of the stage that goes on.
            step: from which step.
        """
        later = [path for path in self._checkpoints() if (stage_of(path), step_of(path)) > (stage, step)]
        for path in later if self.writes else ():
            (path / TRAINER_STATE_NAME).unlink(missing_ok=True)
        yield
        self._remove(later)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Around a run that writes here: no other process of this machine may at the same time.

        The lock is a file in the machine's folder for temporary ones; a killed process holds none. Where it cannot be
        opened, as another user's, nothing is checked.

        Raises:
            OSError: another run writes here.
        """
        with ExitStack() as stack:
            if self.writes:
                name = hashlib.sha256(str(self.path.resolve()).encode()).hexdigest()[:16]
                try:
                    stack.enter_context(FileLock(Path(tempfile.gettempdir()) / f"hft-{name}.lock", timeout=0))
                except Timeout:
                    raise OSError(
                        f"Another command on this machine writes to '{self.path}'; wait for its end, or take another folder."
                    ) from None
                except OSError as error:
                    logger.info(f"'{self.path}' is not locked: {error}.")
            yield

    def forget_checkpoints(self) -> None:
        """Removes all checkpoints, as of a model that has lost a task, which no run could go on from."""
        self._remove(self._checkpoints())

    def _checkpoints(self) -> list[Path]:
        found = sorted(self.path.glob(f"stage-*/{PREFIX_CHECKPOINT_DIR}-*"))
        return [path for path in found if step_of(path) is not None and stage_of(path) is not None]

    def _remove(self, checkpoints: Iterable[Path]) -> None:
        for checkpoint in checkpoints if self.writes else ():
            shutil.rmtree(checkpoint)

    def _sweep(self) -> None:
        """Removes what a kill left of a save that never came to its end."""
        if not self.writes:
            return
        for pattern in (".writing-*", f"stage-*/{PREFIX_CHECKPOINT_DIR}-*/.writing-*"):
            for unfinished in self.path.glob(pattern):
                shutil.rmtree(unfinished, ignore_errors=True)

    def has_begun(self, open_tasks: Collection[str]) -> bool:
        """Whether a run that learns these tasks has saved anything here: else there is at most the model it began with."""
        there = set(_tasks_in(self.path))
        return not there or not there.isdisjoint(open_tasks)

    def restore(self, model: PreTrainedModel, is_own: bool) -> str | None:
        """Takes the sealed stages over into a model of the same tasks; of its own folder also how the open ones began, if
        no checkpoint says more: a run that was cut off in this process has changed them here.

        Args:
            model: an HFT model.
            is_own: whether this is the folder that the run writes to; it may be empty then.

        Returns:
            The checkpoint in the open stage to go on from, if there is one.

        Raises:
            ValueError: a folder that holds no run, or a checkpoint that was cut off.
        """
        if self.is_checkpoint():
            if not is_whole(self.path):
                raise ValueError(
                    f"'{self.path}' is no whole checkpoint (no trainer_state.json); give the run's folder instead."
                )
            model.restore(self.path)
            return str(self.path)
        finish_writing(self.path)
        if is_own:
            self._sweep()
        if (self.path / "config.json").exists():
            model.restore(self.path, "sealed")
        elif not is_own:
            raise ValueError(f"'{self.path}' holds no run to resume (no config.json); give a run's folder, or True.")
        sealed = model.config.sealed_tasks()
        stages = open_stages(model.hierarchy, sealed)
        found = last_checkpoint(self.path / stages[0].folder) if stages else None
        if is_own and stages and found is None and (self.path / "config.json").exists():
            model.restore(self.path)
        logger.info(f"Resuming {self.path}: sealed: {', '.join(sealed) or 'nothing'}; checkpoint: {found or 'none'}.")
        return found


def _tasks_in(folder: Path, sealed_only: bool = False) -> list[str]:
    """The tasks of a saved HFT model in a folder: those that it has learnt, or all."""
    return [task["name"] for task in _model_in(folder).get("tasks") or [] if task["sealed"] or not sealed_only]


def _model_in(folder: Path) -> dict[str, Any]:
    """What the config.json in a folder says; nothing without one."""
    if not (folder / "config.json").is_file():
        return {}
    try:
        saved = json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise ValueError(
            f"'{folder}' holds a config.json that is no JSON ({error}), so what is there cannot be told; take another "
            "output_dir, or delete it."
        ) from error
    return saved if isinstance(saved, dict) else {}


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint of a stage; one that a kill cut off while it was written does not count."""
    if not folder.is_dir():
        return None
    found = [path for path in folder.iterdir() if step_of(path) is not None and is_whole(path)]
    return str(max(found, key=step_of)) if found else None


def _are_learnt(tasks: set[str], there: set[str], sealed: set[str]) -> bool:
    """Whether a checkpoint of these tasks is of no more use: all that its folder's model still has of them are sealed."""
    left = tasks & there if there else tasks
    return bool(left) and left <= sealed


def step_in(checkpoint: str | Path) -> int:
    """The step that a whole checkpoint is of, whatever it is called."""
    return json.loads((Path(checkpoint) / TRAINER_STATE_NAME).read_text())["global_step"]


def step_of(path: str | Path) -> int | None:
    """The step of a checkpoint, by its name; None if it is none, such as a copy that somebody kept."""
    return _number_in(Path(path), PREFIX_CHECKPOINT_DIR)


def stage_of(checkpoint: Path) -> int | None:
    """The level of the stage whose folder a checkpoint is in; None if it is in no stage's."""
    return _number_in(checkpoint.parent, "stage")


def _number_in(path: Path, before: str) -> int | None:
    match = re.fullmatch(rf"{before}-(\d+)", path.name)
    return int(match[1]) if match else None


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end: the Trainer writes its state last."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
    except (OSError, ValueError):
        return False
    return True
