"""The report of a run: pictures, and one HTML page that holds them all and needs no network."""

import base64
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from hft.configuration_hft import HFTConfig
from hft.files_hft import replacing
from hft.gates_hft import HFTGateTable

from .charts import (
    confusion_chart,
    cross_chart,
    curves_chart,
    gates_chart,
    matrix_chart,
    save_figure,
    scores_chart,
)
from .interference import advice
from .pictures import draw_hierarchy
from .run_record import RunRecord


REPORT_FILE, TITLE = "report.html", "Hierarchical Fine-Tuning: report"
PICTURES = "pictures"  # the folder beside it

MEANINGS = {
    "average_performance": ("Average performance", "mean score of all tasks at the end"),
    "forgetting": ("Forgetting", "best score since learning minus score at the end (Chaudhry et al. 2018)"),
    "backward_transfer": (
        "Backward transfer",
        "score at the end minus just after learning (Lopez-Paz & Ranzato 2017)",
    ),
    "forward_transfer": ("Forward transfer", "score on the parents' path before learning minus the backbone's"),
}


def write_report(config: HFTConfig, gates: Mapping[str, HFTGateTable], record: RunRecord, folder: Path) -> Path:
    """Writes `report.html` and `pictures/*.png, *.svg` of what a run found out; what was not measured is left out.

    Args:
        config, gates: of the model, as `read_gates` gives them.
        record: see `RunRecord`.
        folder: where to.

    Returns:
        The page.

    Raises:
        ImportError: without matplotlib.
    """
    record = record.of(config.task_names())
    figures = _figures(gates, record)
    with replacing(folder, last=REPORT_FILE) as staging:
        (staging / PICTURES).mkdir()
        for kind in ("png", "svg"):
            draw_hierarchy(config.hierarchy(), gates, staging / PICTURES / f"hierarchy.{kind}")
            for name, (_alt, figure) in figures.items():
                save_figure(figure, staging / PICTURES / f"{name}.{kind}")
        alts = {"hierarchy": "The hierarchy; an edge is as wide as the mean gate on the parent."}
        alts |= {name: alt for name, (alt, _figure) in figures.items()}
        pictures = {name: _Picture(alt, _uri(staging / PICTURES / f"{name}.svg")) for name, alt in alts.items()}
        (staging / REPORT_FILE).write_text(_page(config, record, pictures), encoding="utf-8")
    return Path(folder) / REPORT_FILE


def is_report(folder: Path) -> bool:
    """Whether a folder's report.html is one of HFT's, or there is none: another one would be lost."""
    file = folder / REPORT_FILE
    return not file.exists() or TITLE in file.read_text(encoding="utf-8", errors="replace")


class _Picture:
    def __init__(self, alt: str, uri: str):
        self.alt, self.uri = alt, uri


def _figures(gates: Mapping[str, HFTGateTable], record: RunRecord) -> dict[str, tuple[str, Any]]:
    """Name -> what it shows, and the figure."""
    found: dict[str, tuple[str, Any]] = {}
    if gates:
        alt = "How much of each source a task lets in, layer by layer (beside each: the mean)."
        found["gates"] = (alt, gates_chart(list(gates.values())))
    if matrix := record.matrix():
        before = {task: score["score"] for task, score in record.before.items()}
        stages = record.scored_stages()
        found["matrix"] = ("The score of each task after each stage.", matrix_chart(matrix, before, stages))
        found["scores"] = ("The same as lines: what is flat is not forgotten.", scores_chart(matrix, stages))
    if logged := [stage for stage in record.stages if any("loss" in entry for entry in stage["log"])]:
        found["loss"] = ("The training loss of each task.", curves_chart(logged))
    if record.cross:
        cross = {task: {path: score["score"] for path, score in row.items()} for task, row in record.cross.items()}
        found["cross"] = (
            "Each task on each task's path: off the diagonal, what one does to the other.",
            cross_chart(cross),
        )
    if record.confusion:
        found["router"] = ("Which task the router lets answer.", confusion_chart(record.confusion))
    return found


def _page(config: HFTConfig, record: RunRecord, pictures: Mapping[str, _Picture]) -> str:
    from jinja2 import Environment

    sections = {
        "Hierarchy": ("hierarchy",),
        "Stage by stage": ("matrix", "scores", "loss"),
        "Interference": ("cross",),
        "Gates": ("gates",),
        "Router": ("router",),
    }
    columns, rows = score_table(record)
    template = (resources.files("hft.hub_configs") / "report.html").read_text(encoding="utf-8")
    return (
        Environment(autoescape=True)
        .from_string(template)
        .render(
            title=TITLE,
            backbone=shareable_name(config.backbone),
            machine=record.machine,
            tasks=config.task_names(),
            tree=config.hierarchy().draw(),
            measures=[(MEANINGS[name][0], value, MEANINGS[name][1]) for name, value in record.measures().items()],
            score_columns=columns,
            scores=rows,
            advice=advice({task["name"]: task["parents"] for task in config.tasks}, record.sources, record.cross),
            sections=[
                (heading, [pictures[name] for name in names if name in pictures])
                for heading, names in sections.items()
                if any(name in pictures for name in names)
            ],
            budget=record.budget,
            versions=record.versions,
        )
    )


def score_table(record: RunRecord) -> tuple[list[str], list[dict[str, Any]]]:
    """The heads of the columns that there are numbers for, and a row a task: {"task", "rows", "metric", "cells"}."""
    last = record.last_scores()
    columns = {
        "backbone": record.before,
        "as its stage began": record.start,
        "its path": last,
        "routed": record.routed,
    }
    columns = {head: scores for head, scores in columns.items() if scores}
    tasks = list(dict.fromkeys(task for scores in columns.values() for task in scores))
    rows = []
    for task in tasks:
        cells = [f"{s[task]['score']:.1f} ± {s[task]['se']:.1f}" if task in s else "" for s in columns.values()]
        counts = dict.fromkeys(scores[task]["rows"] for scores in columns.values() if task in scores)
        count = " / ".join(map(str, counts)) if len(counts) > 1 else next(iter(counts))
        metric = record.data.get(task, {}).get("metric", "")
        rows.append({"task": task, "rows": count, "metric": metric, "cells": cells})
    return list(columns), rows


def shareable_name(backbone: str | None) -> str:
    """A backbone's Hub id; never a folder of this machine, or of the one where it was trained."""
    is_local = backbone is None or Path(backbone).exists() or Path(backbone).is_absolute() or "\\" in backbone
    return "a local backbone" if is_local else backbone


def _uri(path: Path) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(path.read_bytes()).decode()
