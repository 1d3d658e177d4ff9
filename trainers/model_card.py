"""The model card."""

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers.utils import cached_file, is_matplotlib_available, logging
from yaml import YAMLError

from hft.configuration_hft import HFTConfig
from hft.gates_hft import HFTGateTable
from hft.slim_hft import read_gates
from hft.upload_hft import CARD_FILE, PICTURE_FILES, own_files

from .report import REPORT_FILE, is_report, score_table, shareable_name, write_report
from .run_record import RunRecord, write_text


logger = logging.get_logger(__name__)
THIS_REPOSITORY, UNNAMED = "<this repository>", "hft-model"  # of a card whose repository is not known yet
CARD_TITLE = "# A Hierarchical Fine-Tuning (HFT) model"  # of the template: no card without it is ours to write anew


def write_model_card(
    config: HFTConfig,
    gates: Mapping[str, HFTGateTable],
    folder: str | os.PathLike,
    record: RunRecord | None = None,
    repo_id: str | None = None,
) -> None:
    """Writes README.md, and where matplotlib is installed the report with the pictures that the card shows.

    A README.md that is no such card stays as it is, with a warning.

    The metadata name the backbone with its relation and licence, the datasets that came from the Hub, and the results.

    Args:
        config, gates: of the model, as `read_gates` gives them.
        folder: where to; made if missing.
        record: what its training found out.
        repo_id: where it will be, for the snippets; it may be unknown.
    """
    record = (record or RunRecord()).of(config.task_names())
    has_pictures = is_matplotlib_available() and is_report(Path(folder))
    if has_pictures:
        write_report(config, gates, record, Path(folder))
    if (file := Path(folder) / CARD_FILE).exists() and not _is_card(file):
        logger.warning(f"'{file}' is no card of HFT's and stays as it is; there is no card, then.")
        return
    columns, rows = score_table(record)
    template = resources.files("hft.hub_configs") / "model_card.md"
    with resources.as_file(template) as path:
        card = ModelCard.from_template(
            _metadata(config, record, repo_id),
            template_path=str(path),
            tree=config.hierarchy().draw(),
            tasks=config.sealed_tasks(),
            open_tasks=config.open_tasks(),
            backbone=shareable_name(config.backbone),
            repository=repo_id or THIS_REPOSITORY,
            columns=columns,
            rows=rows,
            measures=record.measures(),
            data=record.data,
            budget=record.budget,
            versions=record.versions,
            machine=record.machine,
            held=_held(record.quantization or {}),
            held_by=", ".join(f"{key}={value!r}" for key, value in (record.quantization or {}).items()),
            has_pictures=has_pictures,
            has_matrix=bool(record.matrix()),
            routed=tuple(sorted(config.router_config.tasks)),
            is_chat=_is_chat(Path(folder)),
        )
    write_text(file, str(card))


def _held(quantization: Mapping[str, Any]) -> str:
    """In how many bits a backbone was held, in words; empty if not in few."""
    if quantization.get("load_in_4bit"):
        return f"4 bit ({quantization.get('bnb_4bit_quant_type', 'fp4')})"
    return "8 bit" if quantization.get("load_in_8bit") else ""


def _is_card(file: Path) -> bool:
    return CARD_TITLE in file.read_text(encoding="utf-8", errors="replace")


def _is_chat(folder: Path) -> bool:
    """Whether prompts go through a chat template: not if there is a tokenizer without one."""
    file = folder / "tokenizer_config.json"
    return (
        not file.exists()
        or (folder / "chat_template.jinja").exists()
        or "chat_template" in json.loads(file.read_text())
    )


def renew_model_card(folder: Path, record: RunRecord) -> None:
    """Brings a folder's record, and its card and report if it has any, up to a model that has other tasks or gates now."""
    if record != RunRecord():
        record.write(folder)
    has_report, has_card = (folder / REPORT_FILE).exists(), (folder / CARD_FILE).exists()
    config, gates = read_gates(folder)
    if has_report := has_report and is_report(folder):  # of the model that was
        for picture in (*PICTURE_FILES, REPORT_FILE):
            (folder / picture).unlink(missing_ok=True)
    if has_card and _is_card(folder / CARD_FILE):
        write_model_card(config, gates, folder, record)
    elif has_report and is_matplotlib_available():
        write_report(config, gates, record, folder)


@contextlib.contextmanager
def as_pushed(folder: Path, repo_id: str) -> Iterator[Path]:
    """Within the block, a folder with a model's own files as they are to be uploaded; the model's own stays as it is.

    A card of HFT's names the repository there; one of another hierarchy than the model has now is written anew.
    """
    config, gates = read_gates(folder)
    file = folder / CARD_FILE
    text = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
    is_ours, fits = CARD_TITLE in text, config.hierarchy().draw() in text
    with tempfile.TemporaryDirectory() as made:
        staging, own = Path(made), own_files(folder, config)
        if is_ours and not fits:
            own -= {Path(name) for name in (CARD_FILE, REPORT_FILE, *PICTURE_FILES)}
        for at in own:
            (staging / at).parent.mkdir(parents=True, exist_ok=True)
            try:
                os.symlink((folder / at).resolve(), staging / at)
            except OSError:  # as on Windows, where not everybody may
                shutil.copyfile(folder / at, staging / at)
        if is_ours and fits:
            (staging / CARD_FILE).unlink()
            text = re.sub(r'(from_pretrained\(")[^"]+', rf"\g<1>{repo_id}", text)
            text = re.sub(r"(model-index:\n- name: ).*", rf"\g<1>{repo_id.split('/')[-1]}", text, count=1)
            (staging / CARD_FILE).write_text(text, encoding="utf-8")
        elif is_ours:
            write_model_card(config, gates, staging, RunRecord.load(folder), repo_id)
        yield staging


def _metadata(config: HFTConfig, record: RunRecord, repo_id: str | None) -> ModelCardData:
    backbone = config.backbone if shareable_name(config.backbone) == config.backbone else None
    sources = {its["source"] for its in record.data.values() if "source" in its} | set(record.card.get("datasets", ()))
    tags = ["hft", "continual-learning", *(["qlora"] if (record.quantization or {}).get("load_in_4bit") else [])]
    last = record.last_scores()
    places = {task: (its.get("source"), its.get("config")) for task, its in record.data.items()}
    results = []
    for task, score in last.items():
        source, part = places.get(task, (None, None))
        if list(places.values()).count((source, part)) > 1:  # results of one dataset would become one entry
            source, part = None, None
        results.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=source or task,
                dataset_config=part,
                dataset_name=task,
                metric_type=record.data.get(task, {}).get("metric", "score"),
                metric_value=score["score"],
            )
        )
    return ModelCardData(
        base_model=backbone,
        base_model_relation="adapter" if backbone else None,
        license=_licence(config.backbone, config.backbone_revision),
        datasets=sorted(sources) or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys([*tags, *record.card.get("tags", ())])),
        model_name=(repo_id or UNNAMED).split("/")[-1] if results else None,
        eval_results=results or None,
    )


def _licence(backbone: str | None, revision: str | None) -> str | None:
    """What the backbone's own card says; None where it has none, or cannot be read here: it may be another machine's."""
    if backbone is None:
        return None
    try:
        path = cached_file(backbone, "README.md", revision=revision, _raise_exceptions_for_missing_entries=False)
        return ModelCard.load(path, ignore_metadata_errors=True).data.license if path else None
    except (OSError, ValueError, YAMLError):  # no such folder or repository, no access, no network; no card
        return None
