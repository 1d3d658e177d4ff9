"""Sharing a slim model: what can be shared, and all its files in one commit."""

import glob
import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from transformers.utils import logging

from .backbone_hft import is_hub_id
from .configuration_hft import HFTConfig
from .files_hft import ROUTER_FILE, SHARED_FILE
from .slim_hft import files_left, read_config


logger = logging.get_logger(__name__)

CARD_FILE = "README.md"
# A model's files: not what else people keep beside it, as checkpoints, exports, data or notes.
TOKENIZER_FILES = [
    *("tokenizer.json", "tokenizer.model", "tokenizer.model.v*", "tokenizer_config.json", "tokenization_*.py"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("*.tiktoken", "tekken.json"),
    *("spiece.model", "spm.model", "bpe.model", "sentencepiece.model", "sentencepiece.bpe.model"),
    *("chat_template.jinja", "additional_chat_templates/*.jinja", "preprocessor_config.json", "processor_config.json"),
]
PICTURE_FILES = [
    f"pictures/{name}.{kind}"
    for name in ("hierarchy", "gates", "matrix", "scores", "loss", "cross", "router")
    for kind in ("png", "svg")
]
OWN_FILES = [
    *("config.json", "generation_config.json", "*_hft.py", SHARED_FILE, ROUTER_FILE),
    *("tasks/*.safetensors", "pages/*.safetensors", *TOKENIZER_FILES),
    *(CARD_FILE, "report.html", *PICTURE_FILES, "run.json", "LICENSE*", "NOTICE*"),
]
# Of a model that was there before: what this one may have nothing in the place of.
_GONE = ["tasks/*.safetensors", "pages/*.safetensors", ROUTER_FILE, "report.html", *PICTURE_FILES]


class HFTUploading:
    """The part of `HFTPreTrainedModel` that pushes it to the Hub."""

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str | None = None,
        tags: Sequence[str] | None = None,
    ) -> CommitInfo:
        """Uploads the slim form in one commit: all its files, or none. What the Hub has already is not sent again.

        Args:
            repo_id: made if it is missing.
            commit_message, commit_description: of the commit.
            private: whether a new repository is private.
            token: to use instead of the one that you logged in with.
            revision: a branch that exists; `main` by default.
            create_pr: as a pull request, which somebody who may write there merges.
            max_shard_size: changes nothing; a task is one file.
            tags: for the repository's card, as are those of `add_model_tags`; a card is made if it has none.

        Raises:
            ValueError: a backbone in a folder of this machine, which nobody else could load; or a part of a model.
            HfHubHTTPError: no permission, or the Hub fails; then nothing has changed there.
        """
        check_shareable(self.config)
        commit = {"commit_description": commit_description, "create_pr": create_pr, "revision": revision}
        tags = [*(self.model_tags or ()), *(tags or ())]
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return upload(folder, repo_id, commit_message or "Upload HFT model", private, token, tags=tags, **commit)


def check_shareable(config: HFTConfig) -> None:
    """Raises ValueError if others could not load the model, since its backbone is a folder of this machine, or if it is a
    part of one: in the place of the whole it would wipe out the rest."""
    if config.left_out:
        raise ValueError(
            f"This is a part of a model (without {', '.join(sorted(config.left_out))}): "
            "unite it with the whole (`hft merge`), or load the whole and use remove_task, and push that."
        )
    if config.backbone is None or not is_hub_id(config.backbone):
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
    tags: Sequence[str] = (),
    **commit: Any,
) -> CommitInfo:
    """Makes a folder's model the newest commit of a model repository; arguments as for `push_to_hub`.

    What else lies in the folder stays there. With tags, and without a card in the folder, the repository's is tagged and put
    there. Tasks that the repository has and the folder lacks go, with a warning.
    """
    api = HfApi(token=token)
    config = read_config(os.fspath(folder))
    own = own_files(folder, config)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if tags and Path(CARD_FILE) not in own:
        _tagged_card(repo_id, config.backbone, tags, token).save(Path(folder, CARD_FILE))
        own.add(Path(CARD_FILE))
    if gone := sorted(_tasks_there(repo_id, token, revision) - set(config.task_names())):
        logger.warning(
            f"{repo_id} has {', '.join(gone)}, which '{folder}' has not, and which its newest commit lacks from now on. If "
            "they are not to go: load the commit before (`revision`), and unite the two with `hft merge`."
        )
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        commit_message=commit_message,
        revision=revision,
        **commit,
        allow_patterns=[glob.escape(path.as_posix()) for path in own],
        delete_patterns=_GONE,
    )


def own_files(folder: str | os.PathLike, config: HFTConfig) -> set[Path]:
    """A model's files in its folder, as paths within it, without those of tasks that were removed."""
    own = files_like(folder, OWN_FILES) - set(files_left(folder, config))
    return own if config.router_config.tasks else own - {Path(ROUTER_FILE)}


def files_like(folder: str | os.PathLike, patterns: Iterable[str]) -> set[Path]:
    """The files in a folder that any of these patterns fits, as paths within it."""
    return {path.relative_to(folder) for name in patterns for path in Path(folder).glob(name) if path.is_file()}


def _tagged_card(repo_id: str, backbone: str | None, tags: Iterable[str], token: str | bool | None) -> ModelCard:
    """The card that a repository has, or one of metadata only, with more tags."""
    try:
        card = ModelCard.load(repo_id, token=token)
    except EntryNotFoundError:
        data = ModelCardData(base_model=backbone, base_model_relation="adapter", library_name="transformers")
        card = ModelCard(f"---\n{data.to_yaml()}\n---\n")
    card.data.tags = list(dict.fromkeys([*(card.data.tags or ()), *tags]))
    return card


def _tasks_there(repo_id: str, token: str | bool | None, revision: str | None) -> set[str]:
    """The tasks of the model that a repository holds; ValueError if it is another kind of model."""
    try:
        file = hf_hub_download(repo_id, "config.json", revision=revision, token=token)
    except EntryNotFoundError:  # a new repository
        return set()
    config = json.loads(Path(file).read_text(encoding="utf-8"))
    if (kind := config.get("model_type", "hft")) != "hft":
        raise ValueError(
            f"'{repo_id}' holds another model, a {kind!r}, which this one would replace; choose another name."
        )
    return {task["name"] for task in config.get("tasks") or []}
