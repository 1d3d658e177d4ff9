"""Sharing a slim model: what can be shared, and all its files in one commit."""

import os

from huggingface_hub import CommitInfo, HfApi

from .configuration_hft import HFTConfig
from .files_hft import WRITING, WRITTEN
from .slim_hft import files_left, read_config


def check_shareable(config: HFTConfig) -> None:
    """Raises ValueError if others could not load the model, since its backbone is a folder of this machine, or if it is a
    part of one: in the place of the whole it would wipe out the rest."""
    if config.left_out:
        raise ValueError(
            f"This is a part of a model (without {', '.join(sorted(config.left_out))}): "
            "unite it with the whole (`hft merge`), or load the whole and use remove_task, and push that."
        )
    if config.backbone is None or os.path.isdir(config.backbone):
        raise ValueError(
            f"The backbone is '{config.backbone}', a folder of this machine: others could not load the model. Build it on a "
            "Hub id, or set `backbone` in its config to the id that the folder came from."
        )


def upload(
    folder: str | os.PathLike,
    repo_id: str,
    commit_message: str,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
) -> CommitInfo:
    """Makes a folder's files the newest commit of a model repository; arguments as for `push_to_hub`."""
    api = HfApi(token=token)
    removed = [path.as_posix() for path in files_left(folder, read_config(os.fspath(folder)))]
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        commit_message=commit_message,
        revision=revision,
        ignore_patterns=["stage-*", f"{WRITING}*", f"{WRITTEN}*", *removed],
        delete_patterns=["tasks/*.safetensors", "pages/*.safetensors"],  # of tasks that were removed
    )
