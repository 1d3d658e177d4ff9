"""The model card."""

import os
from importlib import resources
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel
from transformers.utils import cached_file, is_matplotlib_available

from .report import score_table, shareable_name, write_report
from .run_record import RunRecord


def write_model_card(
    model: PreTrainedModel,
    folder: str | os.PathLike,
    record: RunRecord | None = None,
    repo_id: str | None = None,
) -> None:
    """Writes README.md, and where matplotlib is installed the report with the pictures that the card shows.

    The metadata name the backbone with its relation and licence, the datasets that came from the Hub, and the results.

    Args:
        model: an HFT model.
        folder: where to; made if missing.
        record: what its training found out.
        repo_id: where it will be, for the snippets; it may be unknown.
    """
    config, record = model.config, record or RunRecord()
    has_pictures = is_matplotlib_available()
    gates = {task: model.gates(task) for task in config.task_names()}
    if has_pictures:
        write_report(config, gates, record, Path(folder))
    columns, rows = score_table(record)
    template = resources.files("hft.hub_configs") / "model_card.md"
    with resources.as_file(template) as path:
        card = ModelCard.from_template(
            _metadata(model, record, repo_id),
            template_path=str(path),
            tree=model.hierarchy.draw(),
            tasks=config.task_names(),
            backbone=shareable_name(config.backbone),
            repository=repo_id or "<this repository>",
            columns=columns,
            rows=rows,
            measures=record.measures(),
            data=record.data,
            budget=record.budget,
            versions=record.versions,
            machine=record.machine,
            has_pictures=has_pictures,
            has_matrix=bool(record.matrix()),
            routed=model.hft_router.tasks(),
        )
    Path(folder).mkdir(parents=True, exist_ok=True)
    card.save(Path(folder) / "README.md")


def _metadata(model: PreTrainedModel, record: RunRecord, repo_id: str | None) -> ModelCardData:
    config = model.config
    backbone = config.backbone if shareable_name(config.backbone) == config.backbone else None
    sources = {its["source"] for its in record.data.values() if "source" in its}
    last = record.stages[-1].get("scores", {}) if record.stages else {}
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=record.data.get(task, {}).get("source", task),
            dataset_name=task,
            metric_type=record.data.get(task, {}).get("metric", "score"),
            metric_value=score["score"],
        )
        for task, score in last.items()
    ]
    return ModelCardData(
        base_model=backbone,
        base_model_relation="adapter" if backbone else None,
        license=_licence(config.backbone, config.backbone_revision),
        datasets=sorted(sources) or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["hft", "continual-learning", "qlora"],
        model_name=(repo_id or "hft-model").split("/")[-1] if results else None,
        eval_results=results or None,
    )


def _licence(backbone: str | None, revision: str | None) -> str | None:
    """What the backbone's own card says; None where it has none, or cannot be read without a network."""
    if backbone is None:
        return None
    quiet = {name: False for name in ("missing_entries", "gated_repo", "connection_errors")}
    path = cached_file(
        backbone,
        "README.md",
        revision=revision,
        **{f"_raise_exceptions_for_{name}": off for name, off in quiet.items()},
    )
    return ModelCard.load(path, ignore_metadata_errors=True).data.license if path else None
