"""Union: two models that grew apart on the same backbone become one, in which every task computes what it did."""

import copy
import hashlib
import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from hft.configuration_hft import HFTConfig
from hft.files_hft import ROUTER_FILE, SHARED_FILE, page_file, replacing, task_file, write_tensors
from hft.hierarchy_hft import check_new_name, nearest
from hft.path_hft import HFTSources
from hft.slim_hft import lineage, read_config
from hft.upload_hft import TOKENIZER_FILES, files_like, own_files

from .model_card import renew_model_card
from .run_record import RunRecord


def merge_models(one: Path, other: Path, out: Path, rename: Mapping[str, str] | None = None) -> list[str]:
    """Writes a slim model with the tasks of two slim models, without loading a backbone.

    Tasks that both have, such as the ancestors from which both grew, must be the same by their lineage: their own files and
    their parents'. All tasks keep their logits bit for bit. The router's sums are added, so prompts of tasks that both have
    count twice.

    Args:
        one, other: folders of slim models, all of whose tasks are sealed.
        out: a new or empty folder.
        rename: names of `other`'s tasks -> new ones.

    Returns:
        The names of the tasks that came from `other`.

    Raises:
        ValueError: different backbones or settings, an open task, two different tasks of one name, or a file that is not
            what its config says.
        OSError: a missing file, or a folder that cannot be written.
    """
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"'{out}' is not empty; choose a new folder.")
    for folder in (one, other):
        if folder.resolve() in out.resolve().parents:
            raise ValueError(f"'{out}' is in the folder of the model '{folder}' itself; choose one beside it.")
    first, second = read_config(str(one)), read_config(str(other))
    _check_same_ground(one, first, other, second)
    for folder, config in ((one, first), (other, second)):
        _check_lineage(folder, config)
    rename = dict(rename or {})
    for name, new in rename.items():
        if second.task(name)["hash"] in [task["hash"] for task in first.tasks if task["name"] == name]:
            raise ValueError(
                f"Both models have the same task {name!r}: there is one in the union, and it keeps its name."
            )
        for left_out in {name, new} & first.left_out.keys():
            raise ValueError(
                f"The task {left_out!r} is in the whole of which '{one}' is a part, and {name!r} cannot become {new!r} "
                "beside it; unite with the whole, or choose another name."
            )
        if new in second.left_out:
            raise ValueError(
                f"The task {new!r} is in the whole of which '{other}' is a part, and {name!r} cannot become it; unite the "
                "whole, or choose another name."
            )
    common = [
        task["name"] for task in second.tasks if task["name"] not in rename and task["name"] in first.task_names()
    ]
    for name in common:
        if first.task(name)["hash"] != second.task(name)["hash"]:
            raise ValueError(
                f"Both models have a task {name!r}, and they are not the same; give the second one's another name: "
                f"--rename {name}=NEW."
            )
    page_ids = _match_pages(one, first, other, second)
    config, gates = copy.deepcopy(first), load_file(one / SHARED_FILE)
    for page in second.pages:
        if page_ids[page["id"]] not in [known["id"] for known in config.pages]:
            writers = [rename.get(writer, writer) for writer in page["writers"]]
            config.pages.append({**page, "id": page_ids[page["id"]], "writers": writers})
    their_gates, hierarchy = load_file(other / SHARED_FILE), second.hierarchy()
    for task in second.tasks:
        moved = _moved_entry(task, rename, page_ids)
        labels = HFTSources.of(task, hierarchy.path(task["name"])).labels()
        own = {
            f"gates.{moved['name']}.{_moved(label, rename, page_ids)}": their_gates[f"gates.{task['name']}.{label}"]
            for label in labels
        }
        if task["name"] not in common:
            config.tasks.append(moved)
            gates.update(own)
        elif any(key not in gates or not torch.equal(gates[key], gate) for key, gate in own.items()):
            raise ValueError(
                f"The gates of task {task['name']!r} differ: it was refreshed in one of the two models. Refresh it in the "
                "union instead."
            )
    config = HFTConfig.from_dict(config.to_dict())  # checks that it is a hierarchy
    words = _whose_words(one, other)
    with replacing(out) as staging:
        _copy_model(one, first, words, staging)
        for name in second.task_names():
            if name not in common:
                shutil.copyfile(other / task_file(name), staging / task_file(rename.get(name, name)))
        for old, now in page_ids.items():
            (staging / page_file(now)).parent.mkdir(exist_ok=True)
            shutil.copyfile(other / page_file(old), staging / page_file(now))
        write_tensors(gates, staging / SHARED_FILE)
        known = _merge_routers(one, first, other, second, rename)
        if known:
            write_tensors(known, staging / ROUTER_FILE)
        saved = json.loads((one / "config.json").read_text())
        outside = {**second.left_out, **first.left_out}
        left_out = {task: parents for task, parents in outside.items() if task not in config.task_names()}
        saved.update(tasks=config.tasks, pages=config.pages, left_out=left_out)
        if not first.router_config.tasks and second.router_config.tasks:  # the one that has learnt says how it looks
            saved["router_config"] = json.loads((other / "config.json").read_text())["router_config"]
        theirs = {rename.get(name, name) for name in second.router_config.tasks}
        saved["router_config"]["tasks"] = sorted({*first.router_config.tasks, *theirs})
        (staging / "config.json").write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n")
    renew_model_card(out, RunRecord.load(one).united(RunRecord.load(other), rename))
    return [rename.get(name, name) for name in second.task_names() if name not in common]


def _copy_model(source: Path, config: HFTConfig, words: Path, target: Path) -> None:
    """The files of a model, and of nothing else, as files of one's own: those of an archive may be read-only, or links.

    Args:
        source, config: the model.
        words: the folder whose tokenizer and generation config are taken.
        target: where to.
    """
    own = dict.fromkeys(own_files(source, config) - {Path("config.json")}, source)
    own |= dict.fromkeys(files_like(words, [*TOKENIZER_FILES, "generation_config.json"]), words)
    for at, folder in sorted(own.items()):
        (target / at).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / at, target / at)


def _whose_words(one: Path, other: Path) -> Path:
    """The folder whose tokenizer the union takes: the first's, or the only one that there is.

    Raises:
        ValueError: two tokenizers, by which one model's tasks would get other tokens or another form of prompt, or not see
            where an answer ends.
    """
    if not (other / "tokenizer_config.json").exists():
        return one
    if not (one / "tokenizer_config.json").exists():
        return other
    for name, read in (
        ("tokenizer.json", lambda file: _vocabulary(json.loads(file.read_text(encoding="utf-8")))),
        ("chat_template.jinja", lambda file: file.read_text(encoding="utf-8")),
        ("generation_config.json", lambda file: json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")),
    ):
        ours, theirs = (read(folder / name) if (folder / name).exists() else None for folder in (one, other))
        if ours != theirs:
            raise ValueError(
                f"The models differ in {name}, so that prompts and answers of one's tasks would have another form in the "
                "union; give both the same, if they were trained by the same."
            )
    return one


def _vocabulary(saved: Mapping[str, Any]) -> Any:
    """Of a tokenizer.json: not how rows were cut or padded when it was saved."""
    return [saved.get(key) for key in ("model", "added_tokens", "pre_tokenizer", "normalizer")]


def _moved_entry(task: Mapping[str, Any], rename: Mapping[str, str], page_ids: Mapping[int, int]) -> dict[str, Any]:
    """A task's entry with the names and page ids of the union."""
    return {
        **task,
        "name": rename.get(task["name"], task["name"]),
        "parents": [rename.get(up, up) for up in task["parents"]],
        "borrows": [rename.get(node, node) for node in task["borrows"]],
        "pages": [page_ids[page_id] for page_id in task["pages"]],
    }


def _check_same_ground(one: Path, first: HFTConfig, other: Path, second: HFTConfig) -> None:
    for folder, config in ((one, first), (other, second)):
        if not config.slim:
            raise ValueError(f"'{folder}' is saved in the full form; only slim models can be united.")
        if config.open_tasks():
            raise ValueError(
                f"Task {config.open_tasks()[0]!r} of '{folder}' is not sealed; finish its training first."
            )
    for name in ("backbone", "backbone_revision", "dtype", "target_modules"):
        ours, theirs = (_in_order(getattr(config, name)) for config in (first, second))
        if ours != theirs:
            raise ValueError(
                f"The models differ in `{name}`: {ours!r} and {theirs!r}; only models on the same can be united."
            )
    for name in ("read", "target_modules"):
        ours, theirs = (_in_order(getattr(config.memory_config, name)) for config in (first, second))
        if ours != theirs:
            raise ValueError(f"The models' memories differ in `{name}`: {ours!r} and {theirs!r}.")


def _in_order(setting: Any) -> Any:
    """A list of names says the same in any order."""
    return sorted(setting) if isinstance(setting, list) else setting


def _check_lineage(folder: Path, config: HFTConfig) -> None:
    for name in config.hierarchy().names:
        task = config.task(name)
        if lineage(folder / task_file(name), [config.task(up) for up in task["parents"]]) != task.get("hash"):
            raise ValueError(
                f"'{folder / task_file(name)}' is not the file that config.json was written with (its hash differs). "
                "Copy or download the model again."
            )


def _match_pages(one: Path, first: HFTConfig, other: Path, second: HFTConfig) -> dict[int, int]:
    """The second model's page ids -> ids in the union: the same for the same content, else new ones. Each id comes once."""

    def digest(folder: Path, page: Mapping[str, Any]) -> bytes:
        return hashlib.sha256((folder / page_file(page["id"])).read_bytes()).digest()

    known: dict[bytes, list[int]] = {}
    for page in first.pages:
        known.setdefault(digest(one, page), []).append(page["id"])
    next_id = 1 + max((page["id"] for page in first.pages), default=0)
    ids = {}
    for page in second.pages:
        if same := known.get(digest(other, page)):
            ids[page["id"]] = same.pop(0)
        else:
            ids[page["id"]], next_id = next_id, next_id + 1
    return ids


def _moved(label: str, rename: Mapping[str, str], page_ids: Mapping[int, int]) -> str:
    """A source's name in the union."""
    return f"page:{page_ids[int(label[5:])]}" if label.startswith("page:") else rename.get(label, label)


def _merge_routers(
    one: Path, first: HFTConfig, other: Path, second: HFTConfig, rename: Mapping[str, str]
) -> dict[str, torch.Tensor]:
    """The sums of both routers."""
    ours, theirs = (
        load_file(folder / ROUTER_FILE) if config.router_config.tasks else {}
        for folder, config in ((one, first), (other, second))
    )
    if ours and theirs:
        for name in ("layer", "num_features", "prefix", "suffix"):
            mine, its = getattr(first.router_config, name), getattr(second.router_config, name)
            if mine != its:
                raise ValueError(
                    f"The two routers differ in `{name}` ({mine} and {its}), so what they learnt does not add up; teach one "
                    "of them anew with add_routes."
                )
        if not torch.equal(ours["projection"], theirs["projection"]):
            raise ValueError("The two routers use different random features; teach one of them anew with add_routes.")
    theirs = {_renamed(key, rename): tensor for key, tensor in theirs.items()}
    here, there = set(first.task_names()), {rename.get(task, task) for task in second.task_names()}
    ours, theirs = _told_apart(ours, theirs, there - here), _told_apart(theirs, ours, here - there)
    for key, tensor in theirs.items():
        ours[key] = ours[key] + tensor if key in ours and key.startswith(("gram", "cross.")) else ours.get(key, tensor)
    return ours


def _renamed(key: str, rename: Mapping[str, str]) -> str:
    """A tensor's name in the union; where a task gets the name of one that was removed, the removed one's goes."""
    kind, _, task = key.partition(".")
    if task in rename:
        return f"{kind}.{rename[task]}"
    return f"{key}.removed" if task in rename.values() else key


def _told_apart(
    sums: Mapping[str, torch.Tensor], others: Mapping[str, torch.Tensor], only_there: Collection[str]
) -> dict[str, torch.Tensor]:
    """A router's tensors; those of a task that was removed here get a name that no task has, if the other model has one of
    that name and other prompts: nothing says that the two were the same."""
    clash = {
        task
        for task in only_there
        if (key := f"cross.{task}") in sums and not (key in others and torch.equal(sums[key], others[key]))
    }
    return {f"{key}.removed" if key.partition(".")[2] in clash else key: tensor for key, tensor in sums.items()}


def parse_rename(text: str, names: list[str]) -> tuple[str, str]:
    """`OLD=NEW` -> the two names.

    Raises:
        ValueError: another form, or an old name that is not there.
    """
    old, equals, new = text.partition("=")
    if not equals or not new:
        raise ValueError(f"--rename takes OLD=NEW, not {text!r}.")
    if old not in names:
        raise ValueError(f"--rename names the unknown task {old!r}. {nearest(old, names)}")
    check_new_name(new)
    return old, new
