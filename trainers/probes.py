"""What the planner measures: a short pilot a task, and what each pilot's node is worth to the other tasks.

D hidden size, K tasks.
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hft.hierarchy_hft import BACKBONE
from hft.refresh_hft import frozen, mean_and_error

from .calibration import calibrated_losses
from .evaluation import Row, option_likelihoods, reference, right_options
from .families import Overlaps, Trial, find_families, try_root
from .overlap import measure_overlaps
from .pilots import ProbeSettings, Sample, pilot, take_sample
from .planner import Plan, TaskProbe, check_numbers, make_plan


def plan_hierarchy(
    model: PreTrainedModel,
    datasets: Mapping[str, Sequence[Row]],
    *,
    processing_class: PreTrainedTokenizerBase,
    settings: ProbeSettings | None = None,
    max_parents: int = 2,
    num_errors: float = 2.0,
    families: bool = True,
    progress: bool = True,
) -> Plan:
    """Finds a hierarchy for tasks, or the parents of new tasks among those that a model has learnt.

    Tasks become one family, which stands on a root that learns from the rows of all of them, but for those that clearly
    learn worse by a common pilot than by their own (see `try_root`); of these, groups whose gradients overlap are tried, too
    (see `measure_overlaps`, `find_families`). Edges come from pilots: low-rank nodes, learnt for a few steps from the plain
    backbone, that stand for what a task has to give. The gain of task j from task i is how much lower j's losses are through
    i's pilot than through the backbone (or the middle one of the pilots, see `TaskProbe.base`), on rows that neither has
    learnt from: over each row's options, calibrated (see `calibrated_losses`), so that the mere form of answers does not
    count; for free answers, against the mean over all pilots instead of the backbone, and beyond what these differ by. That
    is a pilot and gradients over `gradient_rows` rows a task, and the steps of all pilots again for the common one. Where
    that leaves tasks without a root: once more for those of groups, and once more to read each such task through at most
    `max_candidates` pilots. The model is left as it was, to the bit.

    Args:
        model: an HFT model; the sealed tasks that it has may become parents, and stay as they are.
        datasets: new task -> prompt-completion rows (strings or messages), if possible with "options".
        processing_class: the tokenizer.
        settings: how much is measured.
        max_parents, num_errors: see `make_plan`.
        families: whether tasks may get a common root; never beside tasks that the model has already.
        progress: whether to show a bar.

    Returns:
        The plan.

    Raises:
        ValueError: no task, a name that is taken, a number out of its range, rows of another form, or fewer than four rows
            with an answer.
    """
    check_numbers(max_parents, num_errors)
    settings = settings or ProbeSettings()
    for task in datasets:
        if task in model.hierarchy:
            raise ValueError(
                f"The task {task!r} is in the model already; plan only new tasks, or choose another name."
            )
    samples = {task: take_sample(task, rows, processing_class, settings) for task, rows in datasets.items()}
    existing = model.hierarchy if len(model.hierarchy) else None
    overlaps: Overlaps | None = None
    trials: list[Trial] = []
    wants_families = families and existing is None
    with frozen(model), tqdm(total=(2 + wants_families) * len(samples), disable=not progress) as bar:
        if wants_families:
            overlaps = measure_overlaps(model, samples, settings, bar)
        raw = read_plain(model, processing_class, samples, bar)
        if overlaps is not None and len(overlaps.of) > 1:
            read_pilots(model, processing_class, samples, {task: [task] for task in samples}, raw, settings, bar)
            tried = {task: samples[task] for task in sorted(overlaps.of)}
            found = find_families(overlaps, num_errors)
            trials = try_roots(model, processing_class, tried, found, raw, settings, num_errors, bar)
        if left := set(samples).difference(*(trial.family for trial in trials)):
            near = nearest_tasks(model, samples, settings.max_candidates)
            missing = {  # whose pilot -> who was not read through it yet and is to be
                source: [t for t in samples if t in left and source in (t, *near[t]) and source not in raw[t]]
                for source in samples
            }
            missing = {source: tasks for source, tasks in missing.items() if tasks}
            if trials:
                _more(bar, len(missing))
            read_pilots(model, processing_class, samples, missing, raw, settings, bar)
    probes = {task: as_probe(task, sample, raw[task]) for task, sample in samples.items()}
    return make_plan(
        probes, max_parents=max_parents, num_errors=num_errors, existing=existing, trials=trials, overlaps=overlaps
    )


# Task -> through whose path its rows were read -> what `read` gave.
Readings: TypeAlias = dict[str, dict[str, list[Any]]]


def read_plain(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, samples: Mapping[str, Sample], bar: tqdm
) -> Readings:
    """Reads each task through the backbone and the model's learnt tasks."""
    old = model.config.sealed_tasks()
    raw: Readings = {task: {} for task in samples}
    for task, sample in samples.items():
        bar.set_description(f"{task}: through the backbone{' and learnt tasks' if old else ''}")
        for source in (BACKBONE, *old):
            raw[task][source] = read(model, tokenizer, sample, None if source == BACKBONE else source)
        bar.update()
    return raw


def read_pilots(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Mapping[str, Sample],
    readers: Mapping[str, Sequence[str]],
    raw: Readings,
    settings: ProbeSettings,
    bar: tqdm,
) -> None:
    """Trains pilots, and adds to `raw` what tasks read through them; the model, which is frozen, is left as it was.

    Args:
        model, tokenizer, samples, settings: as for `plan_hierarchy`.
        readers: whose pilot -> the tasks that are read through it.
        raw: the readings so far.
        bar: counts the pilots.
    """
    for source, tasks in readers.items():
        bar.set_description(f"{source}: pilot")
        with pilot(model, samples[source].pilot, settings) as name:
            bar.set_description(f"{source}: what it gives{' to others' if [source] != list(tasks) else ''}")
            for task in tasks:
                raw[task][source] = read(model, tokenizer, samples[task], name)
        bar.update()


def _more(bar: tqdm, count: int) -> None:
    """There is more to do than the bar was told."""
    bar.total = (bar.total or 0) + count
    bar.refresh()


def try_roots(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Mapping[str, Sample],
    groups: Sequence[Sequence[str]],
    raw: Readings,
    settings: ProbeSettings,
    num_errors: float,
    bar: tqdm,
) -> list[Trial]:
    """Tries one root for all tasks, and then one for what each group has left that did not get it.

    A common pilot draws from all rows alike, as a root does: a task with few rows is seen less often than by its own pilot.

    Args:
        model: frozen; left as it was.
        tokenizer: its.
        samples: of the tasks, two or more.
        groups: of some of them.
        raw: through the backbone, and through each task's own pilot.
        settings: how much is measured.
        num_errors: see `try_root`.
        bar: counts the tasks of each trial.
    """
    through = {
        source: {task: answer_losses(sample, raw[task][source or task]) for task, sample in samples.items()}
        for source in (BACKBONE, None)
    }
    trials: list[Trial] = []
    left = list(samples)
    for wanted in (left, *groups):
        group = [task for task in wanted if task in left]
        if len(group) < 2 or any(trial.tasks == tuple(group) for trial in trials):
            continue
        _more(bar, len(group))
        bar.set_description(f"one pilot for {len(group)} tasks")
        rows = [row for task in group for row in samples[task].pilot]
        steps = settings.pilot_steps * len(group)
        with pilot(model, rows, dataclasses.replace(settings, pilot_steps=steps)) as name:
            common = {
                task: answer_losses(samples[task], read(model, tokenizer, samples[task], name)) for task in group
            }
        bar.update(len(group))
        trials.append(try_root(through[None], common, through[BACKBONE], num_errors))
        left = [task for task in left if task not in trials[-1].family]
    return trials


def answer_losses(sample: Sample, raw: Sequence[Any]) -> list[float]:
    """The loss of each row's answer from what `read` gave, in nats: among its options, if it has some."""
    if not sample.has_options:
        return list(raw)
    places = right_options(sample.probe)
    rows = [torch.tensor(its, dtype=torch.float64).log_softmax(0) for its in raw]
    return [-float(its[place]) for its, place in zip(rows, places, strict=True)]


def read(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sample: Sample, task: str | None) -> list[Any]:
    """What a path says about a task's rows: of each row the likelihoods of its options; without options, its loss.

    Losses are sums over the answer's tokens, in nats.
    """
    if sample.has_options:
        return option_likelihoods(model, tokenizer, sample.probe, task, prompts=sample.prompts)
    losses = model.losses(task or BACKBONE, sample.tokens, 16)
    counts = [sum(label != -100 for label in row["labels"][1:]) for row in sample.tokens]
    return [loss * count for loss, count in zip(losses, counts, strict=True)]


def as_probe(task: str, sample: Sample, raw: Mapping[str, list[Any]]) -> TaskProbe:
    """Losses in which the form of answers does not count, and the task's complexity."""
    others = [source for source in raw if source not in (task, BACKBONE)]
    if sample.has_options:
        options = [row["options"] for row in sample.probe]
        answers = right_options(sample.probe)
        losses = {source: calibrated_losses(its, answers, options) for source, its in raw.items()}
        guess = calibrated_losses([[0.0] * len(row) for row in options], answers, options)
        own = losses.pop(task)
    else:
        losses = {source: list(its) for source, its in raw.items()}
        own, guess = losses.pop(task), losses[BACKBONE]
        others = [source for source in others if math.isfinite(sum(losses[source]))]
        if others:  # any pilot teaches the form of an answer: their mean knows it, and nothing in particular
            losses[BACKBONE] = [statistics.fmean(row) for row in zip(*(losses[one] for one in others), strict=True)]
    note = sample.note
    if not sample.has_options and len(others) in (1, 2):
        note = "; ".join(
            [*([note] if note else []), "free answers and so few other tasks: form and help cannot be told apart"]
        )
    scale = statistics.fmean(guess)
    if len(set(map(reference, sample.probe))) == 1 or not scale > 0:
        return TaskProbe(0.0, 0.0, losses, note, sample.has_options)
    mean, error = mean_and_error(own)
    return TaskProbe(mean / scale, error / scale, losses, note, sample.has_options)


def nearest_tasks(model: PreTrainedModel, samples: Mapping[str, Sample], count: int) -> dict[str, set[str]]:
    """For each task the `count` others with the nearest mean prompt features: cosine after the common mean is taken out."""
    if len(samples) <= count + 1:
        return {task: set(samples) - {task} for task in samples}
    mean_KD = torch.stack([model.features_of(sample.prompts).mean(0) for sample in samples.values()])
    mean_KD = torch.nn.functional.normalize(mean_KD - mean_KD.mean(0), dim=1)
    near_KK = (mean_KD @ mean_KD.T).fill_diagonal_(-torch.inf).topk(count).indices.tolist()
    names = list(samples)
    return {task: {names[i] for i in its} for task, its in zip(names, near_KK, strict=True)}
