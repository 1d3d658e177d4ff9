"""What the slim files of an HFT model hold: nodes, memory pages and gates, by names that are a contract."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.utils import cached_file

from .backbone_hft import is_hub_id
from .configuration_hft import HFTConfig
from .files_hft import (
    ROUTER_FILE,
    SHARED_FILE,
    finish_writing,
    page_file,
    read_tensors,
    task_file,
    write_tensors,
)
from .gates_hft import HFTGateTable
from .nodes_hft import beside
from .path_hft import HFTSources


_GATE = "gates."  # begins the names of what the shared file holds


class HFTSlimFiles:
    """The part of `HFTStorage` that reads and writes what tasks have learnt."""

    @torch.inference_mode(False)
    @torch.no_grad()
    def _read_tasks(
        self,
        repo: str | os.PathLike,
        tasks: Iterable[Mapping[str, Any]],
        pages: Iterable[Mapping[str, Any]],
        **download: Any,
    ) -> None:
        """Fills nodes, gates and memory pages, given by their entries, from the slim files of a folder or repository; all
        of them, or none."""
        tasks = list(tasks)
        names = [task["name"] for task in tasks]
        parts = {task_file(task): self._node_tensors(task) for task in names}
        parts.update({page_file(page["id"]): self._page_tensors(page["id"]) for page in pages})
        parts[SHARED_FILE] = self._gate_tensors(names)
        read = {
            file: read_tensors(repo, file, own, may_hold_more=file == SHARED_FILE, **download)
            for file, own in parts.items()
        }
        for file, own in parts.items():
            for name, parameter in own.items():
                tensor = read[file][name]
                if tensor.shape != parameter.shape:
                    raise ValueError(
                        f"'{repo}' holds {name!r} in {file} with shape {list(tensor.shape)}, and this model needs "
                        f"{list(parameter.shape)}. Is it another backbone?"
                    )
        self._check_lineage(repo, tasks, **download)
        for file, own in parts.items():
            for name, parameter in own.items():
                if file == SHARED_FILE:
                    parameter.copy_(read[file][name])  # a view
                else:
                    parameter.data = read[file][name].to(parameter.device)  # takes the dtype of the file

    def _check_lineage(self, repo: str | os.PathLike, tasks: Iterable[Mapping[str, Any]], **download: Any) -> None:
        """Raises ValueError if the file of a sealed task is not the one that was sealed, on the parents that it had."""
        entries = {entry["name"]: entry for entry in (*self.config.tasks, *tasks)}
        for task in tasks:
            parents = [entries[name] for name in task["parents"]]
            if not task["sealed"] or any("hash" not in entry for entry in (task, *parents)):
                continue
            file = task_file(task["name"])
            if lineage(Path(cached_file(repo, file, **download)), parents) != task["hash"]:
                raise ValueError(
                    f"{file} in '{repo}' is not what was sealed as task {task['name']!r} (another SHA-256 than config.json "
                    "says): a file, or a list of parents, of another model or version. Copy or download it again."
                )

    def _read_router(self, repo: str | os.PathLike, tasks: Sequence[str], **download: Any) -> None:
        """Takes over what the router of a saved model, in either form, knows: these tasks, by its config."""
        if tasks:
            self.hft_router.load(_router_tensors(repo, tasks, **download), tasks)

    def _write_router(self, folder: Path) -> None:
        if self.hft_router.tasks():
            write_tensors(self.hft_router.tensors(), folder / ROUTER_FILE)

    def _write_tasks(self, folder: Path) -> None:
        """Writes all tasks and pages into a folder that `replacing` gave."""
        write_tensors(self._gate_tensors(self.hierarchy.names), folder / SHARED_FILE)
        for page in self.config.pages:
            write_tensors(_as_sealed(page, self._page_tensors(page["id"])), folder / page_file(page["id"]))
        for task in self.hierarchy.names:  # parents first
            entry = self.config.task(task)
            write_tensors(_as_sealed(entry, self._node_tensors(task)), folder / task_file(task))
            if entry["sealed"]:
                entry["hash"] = lineage(folder / task_file(task), [self.config.task(up) for up in entry["parents"]])

    def _check_place(self, folder: str | os.PathLike, slim: bool, variant: str | None) -> bool:
        """Raises ValueError where a save would lose something, see `save_pretrained`; else whether the backbone is where its
        name says, as far as that can be told without a network."""
        if slim and variant:
            raise ValueError("The slim form has no variants; save_pretrained(..., slim=False, variant=...) has.")
        if slim and self.config.backbone is None:
            raise ValueError(
                "This model was not built on a saved backbone, so a slim form could not name one; save it whole: "
                "save_pretrained(..., slim=False)."
            )
        if self.config.backbone and os.path.realpath(folder) == os.path.realpath(self.config.backbone):
            raise ValueError(f"'{folder}' is the backbone's own folder, which would be overwritten; choose another.")
        check_keeps_others(self.config, folder)
        backbone = self.config.backbone or ""
        finds_backbone = os.path.isdir(backbone) or is_hub_id(backbone)
        if slim and form_in(folder) == "full" and not finds_backbone:
            raise ValueError(
                f"'{folder}' holds a model in the full form, backbone included, and '{self.config.backbone}', where "
                "the slim form would look for the backbone, is not there; save with slim=False, or to another folder."
            )
        if variant and form_in(folder) == "slim":
            raise ValueError(
                f"'{folder}' holds a slim model, whose config.json a variant of the full form would overwrite; "
                "choose another folder."
            )
        return finds_backbone

    def _node_tensors(self, task: str) -> dict[str, nn.Parameter]:
        """A task's node by the names that it has in its file, `layers.0.self_attn.q_proj.A`: a contract."""
        return self._factor_tensors(self.hft_nodes, task)

    def _page_tensors(self, page_id: int) -> dict[str, nn.Parameter]:
        """A memory page by the names that it has in its file, `layers.0.self_attn.q_proj.K`: a contract."""
        return self._factor_tensors(self.hft_memory, str(page_id))

    def _factor_tensors(self, modules: nn.ModuleDict, name: str) -> dict[str, nn.Parameter]:
        tensors = {}
        for linear in self._layer_of:
            if factors := beside(modules, linear):
                tensors[f"{linear}.{factors.DOWN}"], tensors[f"{linear}.{factors.UP}"] = factors.pair(name)
        return tensors

    def _gate_tensors(self, tasks: Iterable[str]) -> dict[str, torch.Tensor]:
        """Views of the gates by the names that they have in the shared file, `gates.<task>.<source>` [L]: a contract.

        One tensor a source, so that a reader with an older config finds what it knows of.
        """
        return {
            f"{_GATE}{task}.{source}": self.hft_gates.of(task).detach()[:, column]
            for task in tasks
            for column, source in enumerate(self.sources(task).labels())
        }

    def restore(self, folder: str | os.PathLike, part: Literal["all", "sealed", "open"] = "all") -> None:
        """Takes over what the tasks of a slim folder have learnt and which are sealed, into this model of the same tasks.

        Args:
            folder: written by `save_pretrained` of a model with the same tasks. Tasks that are sealed here or there may
                have been trimmed to other ranks.
            part: `"sealed"` leaves tasks as they are that are open here and there; one that is sealed here and open there
                becomes open again, as the folder has it. `"open"` takes only tasks that are open here and there, with the
                page that they write.

        Raises:
            ValueError: another `part`, a folder whose tasks are others, or tensors of other shapes; a folded model; or
                within `activate`.
            OSError: if a file is missing or cut short. Then, as ever, nothing has changed.
        """
        if part not in ("all", "sealed", "open"):
            raise ValueError(f"`part` is {part!r}; it is 'all', 'sealed' or 'open'.")
        self._check_unfolded()
        self._check_inactive()
        saved = read_config(os.fspath(folder))
        both_open = {*saved.open_tasks()} & {*self.config.open_tasks()}

        def shape(config: HFTConfig) -> list[tuple[Any, ...]]:
            return [
                (task["name"], task["parents"], *([task["rank"]] if task["name"] in both_open else []))
                for task in config.tasks
            ]

        if shape(saved) != shape(self.config):
            there, here = (
                ", ".join(
                    f"{name} on {' and '.join(ups) or 'nothing'}" + (f" (rank {its[0]})" if its else "")
                    for name, ups, *its in shape(config)
                )
                for config in (saved, self.config)
            )
            raise ValueError(
                f"'{folder}' holds other tasks than this model: {there}; and here: {here}. Build the model with the same "
                "hierarchy and ranks, or take another folder."
            )
        # Of the folder: these tasks, the pages that they write, and what is sealed. Of this model: the pages of the rest.
        taken = [task for task in saved.tasks if part == "all" or (task["name"] in both_open) == (part == "open")]
        read = {page for task in taken for page in task["pages"]}
        pages = [page for page in saved.pages if (page["id"] in read if not page["sealed"] else part != "open")]
        tasks_by_name = {entry["name"]: entry for entry in (*self.config.tasks, *taken)}
        kept = [page for page in self.config.pages if part == "open" or (part == "sealed" and not page["sealed"])]
        pages_by_id = {entry["id"]: entry for entry in (*kept, *pages)}
        router = saved.router_config.tasks if part != "open" else []
        router_tensors = _router_tensors(folder, router) if router else None
        if router_tensors is not None:
            self.hft_router.check(router_tensors)
        with self._same_room_on_error():
            self.config.tasks = list(tasks_by_name.values())
            self.config.pages = list(pages_by_id.values())
            self._make_room()
            self._read_tasks(folder, taken, pages)
        self._forget_factors()  # they may be of what was there
        if part != "open":
            self._restore_router(saved, router_tensors)
        self.set_trainable(self.config.open_tasks())

    @contextmanager
    def _same_room_on_error(self) -> Iterator[None]:
        """If the block ends with an error, the config's entries and the parameters are those of before."""
        modules = (*self.hft_nodes.values(), *self.hft_memory.values(), self.hft_gates)
        parameters = [dict(module._parameters) for module in modules]
        entries, hierarchy = (list(self.config.tasks), list(self.config.pages)), self.hierarchy
        try:
            yield
        except BaseException:
            (self.config.tasks, self.config.pages), self.hierarchy = entries, hierarchy
            for module, its in zip(modules, parameters, strict=True):
                module._parameters = its
            raise

    def _restore_router(self, saved: HFTConfig, tensors: Mapping[str, torch.Tensor] | None) -> None:
        self.hft_router.clear()
        for name in ("prefix", "suffix"):  # all that it learns besides its sums and whose they are
            setattr(self.hft_router.config, name, list(getattr(saved.router_config, name)))
        if tensors is not None:
            self.hft_router.load(tensors, saved.router_config.tasks)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any):
        """As torch's, for the full form.

        Raises:
            ValueError: a folded model; or the gates of a slim folder, which transformers' `Trainer` would take for a
                checkpoint's weights, and go on with nodes that have learnt nothing.
        """
        if slim := next((name for name in state_dict if name.startswith(_GATE)), None):
            raise ValueError(
                f"{slim!r} is of the slim form, whose model.safetensors holds gates only: take it over with "
                "model.restore(folder), and resume with HFTTrainer, not transformers' Trainer."
            )
        self._check_unfolded()
        return super().load_state_dict(state_dict, *args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any):
        """As torch's; ValueError while a task is merged into the backbone's weights, which are not its own then."""
        self._check_unmerged()
        return super().state_dict(*args, **kwargs)


def _as_sealed(entry: Mapping[str, Any], tensors: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """The factors of an entry in the dtype in which they were sealed, whatever the model was converted to since.

    It holds them as they are: so a task's file, and its hash, never change.
    """
    dtype = getattr(torch, entry["dtype"]) if "dtype" in entry else None
    return {name: tensor.detach().to(dtype) for name, tensor in tensors.items()}


def _router_tensors(repo: str | os.PathLike, tasks: Iterable[str], **download: Any) -> dict[str, torch.Tensor]:
    """What the router of a saved model, in either form, knows of these tasks and of those that were removed."""
    names = ["projection", "gram", *(f"{kind}.{task}" for kind in ("cross", "held_out") for task in tasks)]
    return read_tensors(repo, ROUTER_FILE, names, may_hold_more=True, **download)


def lineage(file: Path, parents: Iterable[Mapping[str, Any]]) -> str:
    """What a sealed task is made of: SHA-256 over its file and the hashes of its parents' entries, in hexadecimal."""
    digest = hashlib.sha256(file.read_bytes())
    for parent in parents:
        digest.update(parent["hash"].encode())
    return digest.hexdigest()


def read_gates(repo: str | os.PathLike, **download: Any) -> tuple[HFTConfig, dict[str, HFTGateTable]]:
    """The config and all gates of a slim model, without its backbone.

    Args:
        repo: folder or Hub id.
        download: `revision`, `token`, `cache_dir`, ... as for `from_pretrained`.

    Raises:
        OSError: if a file is missing or cut short.
        ValueError: no HFT model, or one in the full form.
    """
    config = read_config(os.fspath(repo), **download)
    if not config.slim:
        raise ValueError(
            f"'{repo}' is saved in the full form, and this reads slim models: load it with from_pretrained, and "
            "save it with save_pretrained(folder)."
        )
    hierarchy = config.hierarchy()
    labels = {name: HFTSources.of(config.task(name), hierarchy.path(name)).labels() for name in hierarchy.names}
    keys = [f"{_GATE}{task}.{source}" for task, sources in labels.items() for source in sources]
    tensors = read_tensors(repo, SHARED_FILE, keys, may_hold_more=True, **download)
    return config, {
        task: HFTGateTable(task, sources, torch.stack([tensors[f"{_GATE}{task}.{source}"] for source in sources], 1))
        for task, sources in labels.items()
    }


def files_left(folder: str | os.PathLike, config: HFTConfig) -> list[Path]:
    """The files of tasks and pages in a folder, as paths within it, that its model no longer has."""
    kept = {*map(task_file, config.task_names()), *(page_file(page["id"]) for page in config.pages)}
    held = (
        path.relative_to(folder) for kind in ("tasks", "pages") for path in Path(folder).glob(f"{kind}/*.safetensors")
    )
    return [path for path in held if path.as_posix() not in kept]


def check_keeps_others(config: HFTConfig, folder: str | os.PathLike) -> None:
    """Raises ValueError if a folder holds tasks that this part of a model was loaded without."""
    saved = _config_in(folder) if config.left_out else {}
    if lost := sorted(task["name"] for task in saved.get("tasks", []) if task["name"] in config.left_out):
        raise ValueError(
            f"'{folder}' also holds {', '.join(lost)}, which this model was loaded without and which would be lost; save "
            "to a new folder, and unite the two with `hft merge`."
        )


def form_in(folder: str | os.PathLike) -> Literal["slim", "full"] | None:
    """The form of the HFT model in a folder; None if there is none."""
    saved = _config_in(folder)
    if saved.get("model_type") != HFTConfig.model_type:
        return None
    return "slim" if saved.get("slim", True) else "full"


def _config_in(folder: str | os.PathLike) -> dict[str, Any]:
    """The config.json of whatever model is in a folder; empty if there is none."""
    return PreTrainedConfig.get_config_dict(folder)[0] if os.path.isfile(os.path.join(folder, "config.json")) else {}


def read_config(repo: str, **download: Any) -> HFTConfig:
    """The config of an HFT model; OSError if there is none, ValueError if it is another kind of model."""
    finish_writing(repo, download.get("subfolder"))
    try:
        files, _ = PreTrainedConfig.get_config_dict(repo, **download)
    except OSError as error:
        if os.path.isdir(repo):
            raise
        raise OSError(f"There is no folder '{repo}', and as a Hub id it cannot be read: {error}") from error
    if not files:
        raise OSError(f"'{repo}' holds no model (no config.json).")
    if files.get("model_type") != HFTConfig.model_type:
        raise ValueError(
            f"'{repo}' is no HFT model but a plain {files.get('model_type')!r}; "
            f"build on it with HFTForCausalLM.from_backbone('{repo}', hierarchy=...)."
        )
    return HFTConfig.from_dict(files)
