"""Which checkpoints of a stage are whole."""

import json
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint of a stage; one that a kill cut off while it was written does not count."""
    if not folder.is_dir():
        return None
    found = [path for path in folder.iterdir() if path.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-") and is_whole(path)]
    return str(max(found, key=lambda path: int(path.name.rsplit("-", 1)[1]))) if found else None


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end: the Trainer writes its state last."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
    except (OSError, ValueError):
        return False
    return True
