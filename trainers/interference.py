"""Who helps whom, and who is in whose way: scores with a source switched off, and on other tasks' paths."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .evaluation import EvalSet, points_and_error, score_task
from .families import FEWEST_ROWS
from .run_record import Score, as_score


@contextmanager
def switched_off(model: PreTrainedModel, task: str, source: str) -> Iterator[None]:
    """Within the block a task's gates on one source (a node, or `page:<id>`) are 0; then the same bits again."""
    gates_LN = model.hft_gates.of(task)
    column = model.sources(task).labels().index(source)
    kept_LN = gates_LN.detach().clone()
    try:
        with torch.no_grad():
            gates_LN[:, column] = 0
        yield
    finally:
        with torch.no_grad():
            gates_LN.copy_(kept_LN)


def contributions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    data: EvalSet,
    batch_size: int = 16,
    show_progress: bool = False,
) -> tuple[Score, dict[str, Score]]:
    """What each source of a task contributes: the score on the task's path minus the score with the source switched off.

    A node was trained together with its sources, so a drop says what the finished path rests on, not what a task would have
    reached without the source.

    Returns:
        The task's score; and for each source {"score", "se", "rows"} without it, its "drop" with the error "drop_se" (of the
        differences row by row), in points, and its mean "gate".
    """

    def progress(what: str) -> str | None:
        return f"{task} {what}" if show_progress else None

    whole = score_task(model, tokenizer, data, task, batch_size, progress("on its path"))
    means = model.gates(task).mean()
    found: dict[str, Score] = {}
    for source in model.sources(task).labels():
        with switched_off(model, task, source):
            without = score_task(model, tokenizer, data, task, batch_size, progress(f"without {source}"))
        drop, error = points_and_error([a - b for a, b in zip(whole, without, strict=True)])
        found[source] = {**as_score(without), "drop": round(drop, 3), "drop_se": round(error, 3)}
        found[source]["gate"] = round(means[source], 4)
    return as_score(whole), found


def cross_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sets: Mapping[str, EvalSet],
    batch_size: int = 16,
    show_progress: bool = False,
) -> dict[str, dict[str, Score]]:
    """Each task's rows on each task's path: task -> path -> score.

    Off the diagonal it shows whether a path answers another task, too; beside the score stands how much less it is than on
    the task's own path, "drop", with the error "drop_se" (of the differences row by row), in points.
    """
    found: dict[str, dict[str, Score]] = {}
    for task, data in sets.items():
        scores = {}
        for path in sets:
            name = f"{task} on {path}'s path" if show_progress else None
            scores[path] = score_task(model, tokenizer, data, path, batch_size, name)
        found[task] = {}
        for path, its in scores.items():
            found[task][path] = as_score(its)
            if path != task:
                drop, error = points_and_error([a - b for a, b in zip(scores[task], its, strict=True)])
                found[task][path] |= {"drop": round(drop, 3), "drop_se": round(error, 3)}
    return found


def advice(
    parents: Mapping[str, Sequence[str]],
    sources: Mapping[str, Mapping[str, Mapping[str, Any]]],
    cross: Mapping[str, Mapping[str, Mapping[str, Any]]],
) -> list[str]:
    """What the scores say, a sentence each; only differences beyond two standard errors count as differences.

    Args:
        parents: task -> its parents.
        sources: as `contributions` gives them, for each task.
        cross: as `cross_scores` gives them; may be empty.
    """
    said = []
    for task, its in sources.items():
        for source, found in its.items():
            if source == task:
                continue
            what = f"memory {source}" if ":" in source else source
            points = f"{abs(found['drop']):.1f} ± {found['drop_se']:.1f}"
            if found["gate"] == 0:
                said.append(f"{task} lets nothing of {what} in.")
            elif found["rows"] < FEWEST_ROWS:
                continue
            elif _is_needed(found):
                said.append(f"{task} rests on {what}: without it, it loses {points} points.")
            elif -found["drop"] > 2 * found["drop_se"]:
                said.append(
                    f"{what} is in the way of {task}, which gains {points} points without it: refresh its gates "
                    "(`hft refresh`)."
                )
            elif source in parents.get(task, ()) and found["score"] > 0:  # of what is always wrong nothing can be said
                others = [its[up] for up in parents[task] if up != source and up in its]
                needs_one = any(map(_is_needed, others))
                said.append(
                    f"{task} does not measurably use its parent {what} ({found['drop']:+.1f} ± {found['drop_se']:.1f} "
                    f"points): it could {'do without' if needs_one else 'be a root'}."
                )
    for task, row in cross.items():
        if task not in row:
            continue
        worst = min((path for path in row if path != task), key=lambda path: row[path]["score"], default=None)
        if worst is not None and "drop" in row[worst] and _is_needed(row[worst]):  # not in earlier versions' records
            said.append(
                f"{task} falls from {row[task]['score']:.1f} to {row[worst]['score']:.1f} on the path of {worst}, which "
                "answers something else."
            )
    return said


def _is_needed(found: Mapping[str, float]) -> bool:
    """Whether a task clearly scores less without a source, or on another path."""
    return found["drop"] > 2 * found["drop_se"] and found["rows"] >= FEWEST_ROWS
