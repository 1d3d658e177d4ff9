"""What a run leaves to be read: `run.json` beside the model, from which the report and the model card are made."""

import functools
import json
import platform
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from hft.files_hft import replacing

from .evaluation import points_and_error
from .transfer import average_performance, backward_transfer, forgetting, forward_transfer


RECORD_FILE = "run.json"
PACKAGES = ("modeling-hft", "torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "datasets")
# Of the training's arguments, those that a reader needs to repeat it; none of them can be a path.
BUDGET = (
    "num_train_epochs",
    "task_passes",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "mixed_steps",
    "learning_rate",
    "task_learning_rates",
    "page_tasks",
    "mixtures",
    "root_share",
    "refining_rate",
    "gate_learning_rate",
    "rank_tolerance",
    "lr_scheduler_type",
    "max_length",
    "packing",
    "optim",
    "seed",
)

Score = dict[str, Any]  # {"score": points, "se": its standard error, "rows": how many}


def as_score(scores: list[float]) -> Score:
    """The mean of scores from 0 to 1, in points, with its standard error."""
    mean, error = points_and_error(scores)
    return {"score": round(mean, 3), "se": round(error, 3), "rows": len(scores)}


@dataclass
class RunRecord:
    """All that a run found out. Every field may be empty; nothing in it names a path of the machine.

    Args:
        budget: the training's arguments.
        data: task -> how many rows it learnt from, its metric, and the Hub id and config of its dataset.
        before: task -> the score of the plain backbone.
        start: task -> the score on its path as its stage began, for tasks with parents.
        stages: one a stage: {"level", "tasks", "steps", "seconds", "log", "scores": task -> score, "trims": task -> what
            `HFTTrim` says}, bottom-up.
        routed: task -> {"score", "se", "rows"} when the router chooses; `confusion`: task -> who answered -> rows.
        sources: task -> source -> {"score", "se", "drop", "drop_se", "gate"}: with that source switched off.
        cross: task -> path -> score of the task's rows on another task's path.
        refreshed: tasks whose gates were learnt anew after they were scored.
        rates: level of a stage -> the learning rates that it was begun with, the optimizer, the seed, the accumulation, and
            how many processes.
        quantization: the keys of BitsAndBytesConfig by which the backbone was held; {}: in 16 or 32 bit; None: not known.
        card: what the model card's metadata name beside all this: {"tags": [...], "datasets": [their Hub ids]}.
        machine, versions: what it ran on.
    """

    budget: dict[str, Any] = field(default_factory=dict)
    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    before: dict[str, Score] = field(default_factory=dict)
    start: dict[str, Score] = field(default_factory=dict)
    stages: list[dict[str, Any]] = field(default_factory=list)
    routed: dict[str, Score] = field(default_factory=dict)
    confusion: dict[str, dict[str, int]] = field(default_factory=dict)
    sources: dict[str, dict[str, Score]] = field(default_factory=dict)
    cross: dict[str, dict[str, Score]] = field(default_factory=dict)
    refreshed: list[str] = field(default_factory=list)
    rates: dict[str, dict[str, Any]] = field(default_factory=dict)
    quantization: dict[str, Any] | None = None
    card: dict[str, list[str]] = field(default_factory=dict)
    machine: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> "RunRecord":
        """Reads a folder's record; an empty one if there is none.

        Raises:
            ValueError: a file that is no record.
        """
        path = Path(folder) / RECORD_FILE
        if not path.exists():
            return cls()
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            record = cls(**{name: values[name] for name in (f.name for f in fields(cls)) if name in values})
            for scores in (
                record.before,
                record.start,
                record.routed,
                *(its.get("scores", {}) for its in record.stages),
            ):
                if bare := [task for task, score in scores.items() if not {"score", "se", "rows"} <= score.keys()]:
                    raise ValueError(f"a score of {bare[0]!r} lacks its number, error or rows")
            return record
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"'{path}' is no record of a run ({error}); delete it, and only the report is lost."
            ) from error

    def save(self, folder: Path) -> None:
        """Writes `run.json` of a training that ran here, whole or not at all."""
        self.machine, self.versions = machine(), versions()
        self.write(folder)

    def write(self, folder: Path) -> None:
        """Writes `run.json` as it is: the machine is that of the training."""
        write_json(Path(folder) / RECORD_FILE, asdict(self))

    def add_stage(self, stage: dict[str, Any]) -> None:
        """Takes a stage's results in, in place of older ones of the same tasks. What the router does now is not known."""
        self.routed, self.confusion = {}, {}
        self.stages = [old for old in self.stages if not set(old["tasks"]) & set(stage["tasks"])] + [stage]
        self.refreshed = [task for task in self.refreshed if task not in stage.get("scores", {})]

    def past_of(self, tasks: Collection[str]) -> "RunRecord":
        """What a new training of a model that has learnt these tasks goes on with: what is known of them, stage by stage."""
        return replace(self.of(tasks), budget={}, rates={})

    def of(self, tasks: Collection[str]) -> "RunRecord":
        """What is known of these tasks: others are no longer there."""
        known = {
            task
            for kind in (self.data, self.before, self.start, self.routed, self.sources, self.cross)
            for task in kind
        }
        known |= {task for stage in self.stages for task in stage["tasks"]}
        return self.without(known - set(tasks))

    def without(self, tasks: Collection[str]) -> "RunRecord":
        """The record of a model that these tasks were removed from. What the router did is not known any more."""

        def rest(its: Mapping[str, Any]) -> dict[str, Any]:
            return {task: value for task, value in its.items() if task not in tasks}

        logged = {f"{task}_loss" for task in tasks}
        stages = [
            {
                **stage,
                "tasks": [task for task in stage["tasks"] if task not in tasks],
                "log": [{key: value for key, value in entry.items() if key not in logged} for entry in stage["log"]],
                **{name: rest(stage[name]) for name in ("scores", "trims") if name in stage},
            }
            for stage in self.stages
        ]
        return replace(
            self,
            data=rest(self.data),
            before=rest(self.before),
            start=rest(self.start),
            stages=[stage for stage in stages if stage["tasks"]],
            routed={} if tasks else self.routed,
            confusion={} if tasks else self.confusion,
            sources={task: rest(its) for task, its in rest(self.sources).items()},
            cross={task: rest(its) for task, its in rest(self.cross).items()},
            refreshed=[task for task in self.refreshed if task not in tasks],
        )

    def after_refresh(self, task: str) -> "RunRecord":
        """The record of a model in which a task's gates were learnt anew: how it answers now is not known yet."""
        return replace(
            self,
            routed={},
            sources={name: its for name, its in self.sources.items() if name != task},
            cross={
                name: {path: score for path, score in its.items() if path != task}
                for name, its in self.cross.items()
                if name != task
            },
            refreshed=[*self.refreshed, *([task] if task in self.last_scores() else [])],
        )

    def united(self, other: "RunRecord", rename: Mapping[str, str]) -> "RunRecord":
        """The record of two models that became one: what each task learnt from, and what was known before it.

        Args:
            other: of the model that joins.
            rename: its names -> names in the union.
        """

        def both(name: str) -> dict[str, Any]:
            joining = {rename.get(task, task): value for task, value in getattr(other, name).items()}
            return {**joining, **getattr(self, name)}

        held = self.quantization if self.quantization == other.quantization else None
        return RunRecord(data=both("data"), before=both("before"), start=both("start"), quantization=held)

    def matrix(self) -> list[dict[str, float]]:
        """The task-by-stage matrix of scores, see `transfer`; only the stages that were scored."""
        return [{task: score["score"] for task, score in row.items()} for row in self._scores()]

    def scored_stages(self) -> list[str]:
        """The names of the matrix's stages: a stage that was not scored, as of a family's root alone, is not in it."""
        return stage_names([stage for stage in self.stages if self._known(stage)])

    def last_scores(self) -> dict[str, dict[str, Any]]:
        """What tasks scored after the last stage that was tested, unless their gates have changed since."""
        return dict((self._scores() or [{}])[-1])

    def _known(self, stage: Mapping[str, Any]) -> dict[str, Score]:
        """A stage's scores, but of tasks whose gates have changed since."""
        return {task: score for task, score in stage.get("scores", {}).items() if task not in self.refreshed}

    def _scores(self) -> list[dict[str, Score]]:
        """After each stage that was scored: all tasks that ever were, since what is sealed goes on scoring the same, but
        for those that were refreshed."""
        rows, known = [], {}
        for stage in self.stages:
            if scores := self._known(stage):
                known = {**known, **scores}
                rows.append(known)
        return rows

    def measures(self) -> dict[str, float]:
        """Average performance, forgetting, backward and forward transfer, in points; empty without a matrix."""
        matrix = self.matrix()
        if not matrix:
            return {}
        before = {task: score["score"] for task, score in self.before.items()}
        start = {task: score["score"] for task, score in self.start.items() if task in before}
        return {
            "average_performance": average_performance(matrix),
            "forgetting": forgetting(matrix),
            "backward_transfer": backward_transfer(matrix),
            "forward_transfer": forward_transfer(start, before),
        }


def stage_names(stages: Sequence[Mapping[str, Any]]) -> list[str]:
    """The level of each stage, and its tasks, too, where another one, of a later training, has the same."""
    levels = [stage["level"] for stage in stages]
    return [
        str(level) if levels.count(level) == 1 else f"{level}: {', '.join(stage['tasks'])[:24]}"
        for level, stage in zip(levels, stages, strict=True)
    ]


def write_json(path: Path, values: Any) -> None:
    """Writes a JSON file, whole or not at all; makes its folder."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all; makes its folder."""
    with replacing(path.parent, last=path.name) as staging:
        (staging / path.name).write_text(text, encoding="utf-8")


def machine() -> str:
    """What the process runs on, in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Of Python and the packages that matter."""
    found = {package: _version(package) for package in PACKAGES}
    return {"python": platform.python_version(), **{package: number for package, number in found.items() if number}}


@functools.cache  # each saving writes them down, and to look them up takes longer than that
def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
