"""What the planner measures: a short pilot a task, and what each pilot's node is worth to the other tasks.

D hidden size, K tasks.
"""

import contextlib
import dataclasses
import random
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hft.hierarchy_hft import BACKBONE
from hft.refresh_hft import frozen

from .calibration import calibrated_losses
from .evaluation import Row, option_likelihoods, prompt_ids, reference
from .planner import Plan, TaskProbe, make_plan
from .task_data import tokenize_rows


PILOT = "pilot"  # the scratch task's name; a letter is added while it is taken


@dataclasses.dataclass(frozen=True)
class ProbeSettings:
    """How much is measured.

    Args:
        pilot_rows, pilot_steps, batch_size: what a pilot learns from, its optimizer steps and their rows.
        pilot_rank, learning_rate: of its node.
        probe_rows: rows a task that losses are measured on; no pilot learns from them.
        max_length: longer rows lose their beginning; tokens.
        max_candidates: how many parents are measured for a task: those whose prompts are nearest to its own in the features
            that the router goes by. All of them up to this number + 1 tasks.
        seed: of the choice and order of rows and of the pilots' factors.
    """

    pilot_rows: int = 128
    pilot_steps: int = 24
    batch_size: int = 8
    pilot_rank: int = 8
    learning_rate: float = 2e-3
    probe_rows: int = 48
    max_length: int = 256
    max_candidates: int = 16
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Sample:
    """The rows of a task that the planner looks at.

    Args:
        pilot: tokenised rows to learn from.
        probe: rows to measure on, as given.
        tokens: the same, tokenised.
        has_options: whether each of them names options, so that losses can be taken over these alone.
        note: what is odd about the data; empty if nothing.
    """

    pilot: list[dict[str, list[int]]]
    probe: list[Row]
    tokens: list[dict[str, list[int]]]
    has_options: bool
    note: str


def plan_hierarchy(
    model: PreTrainedModel,
    datasets: Mapping[str, Sequence[Row]],
    *,
    processing_class: PreTrainedTokenizerBase,
    settings: ProbeSettings | None = None,
    max_parents: int = 2,
    num_errors: float = 2.0,
    progress: bool = True,
) -> Plan:
    """Finds a hierarchy for tasks, or the parents of new tasks among those that a model has learnt.

    A pilot (a low-rank node, learnt for a few steps from the plain backbone) stands for what a task has to give. The gain of
    task j from task i is how much lower j's losses are through i's pilot than through the backbone (or the middle one of
    the pilots, see `TaskProbe.base`), on rows that neither has learnt from: over each row's options, calibrated (see
    `calibrated_losses`), so that the mere form of answers does not count; for free answers, against the mean over all pilots
    instead of the backbone. K pilots, and forward passes for K
    times `max_candidates` pairs. The model is left as it was, to the bit.

    Args:
        model: an HFT model; the sealed tasks that it has may become parents, and stay as they are.
        datasets: new task -> prompt-completion rows (strings or messages), if possible with "options".
        processing_class: the tokenizer.
        settings: how much is measured.
        max_parents, num_errors: see `make_plan`.
        progress: whether to show a bar.

    Returns:
        The plan.

    Raises:
        ValueError: no task, a name that is taken, rows of another form, or fewer than four rows with an answer.
    """
    settings = settings or ProbeSettings()
    for task in datasets:
        if task in model.hierarchy:
            raise ValueError(
                f"The task {task!r} is in the model already; plan only new tasks, or choose another name."
            )
    samples = {task: take_sample(task, rows, processing_class, settings) for task, rows in datasets.items()}
    probes = measure(model, processing_class, samples, settings, progress)
    existing = model.hierarchy if len(model.hierarchy) else None
    return make_plan(probes, max_parents=max_parents, num_errors=num_errors, existing=existing)


def take_sample(task: str, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, settings: ProbeSettings) -> Sample:
    """Chooses rows for the pilot and others to measure on; the same for the same rows and seed.

    Raises:
        ValueError: rows of another form, or fewer than four with an answer.
    """
    rows = list(rows)
    for row in rows[:1]:
        if "prompt" not in row or "completion" not in row:
            raise ValueError(
                f"The rows of task {task!r} have {', '.join(row)}; planning needs `prompt` and `completion`."
            )
    labelled = [row for row in rows if row["prompt"] and row["completion"] and reference(row)]
    if len(labelled) < 4:
        raise ValueError(
            f"Task {task!r} has {len(labelled)} rows with an answer, of {len(rows)}; a plan needs four or more."
        )
    notes = [f"{len(rows) - len(labelled)} rows without an answer were left out"] if len(labelled) < len(rows) else []
    random.Random(settings.seed).shuffle(labelled)
    num_probe = min(settings.probe_rows, len(labelled) // 2)
    probe, pilot = labelled[:num_probe], labelled[num_probe : num_probe + settings.pilot_rows]
    if len({reference(row) for row in labelled}) == 1:
        notes.append("all answers are equal: there is nothing to learn but their form")
    elif num_probe < 16:
        notes.append(f"only {num_probe} rows to measure on: errors are large")
    has_options = all(
        len(row.get("options") or ()) > 1 and reference(row) in row["options"] and "" not in row["options"]
        for row in probe
    )
    return Sample(
        tokenize_rows(pilot, tokenizer, settings.max_length),
        probe,
        tokenize_rows(probe, tokenizer, settings.max_length),
        has_options,
        "; ".join(notes),
    )


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Mapping[str, Sample],
    settings: ProbeSettings,
    progress: bool = True,
) -> dict[str, TaskProbe]:
    """Trains a pilot a task and measures all pairs; the model is left as it was."""
    old = model.config.sealed_tasks()
    raw: dict[str, dict[str, list[Any]]] = {task: {} for task in samples}
    with frozen(model), tqdm(total=2 * len(samples), disable=not progress) as bar:
        candidates = nearest_tasks(model, tokenizer, samples, settings.max_candidates)
        for task, sample in samples.items():
            bar.set_description(f"{task}: through the backbone{' and learnt tasks' if old else ''}")
            for source in (BACKBONE, *old):
                raw[task][source] = read(model, tokenizer, sample, None if source == BACKBONE else source)
            bar.update()
        for source, sample in samples.items():
            bar.set_description(f"{source}: pilot")
            with pilot(model, sample.pilot, settings) as name:
                bar.set_description(f"{source}: what it gives to others")
                for task in samples:
                    if task == source or source in candidates[task]:
                        raw[task][source] = read(model, tokenizer, samples[task], name)
            bar.update()
    return {task: as_probe(task, sample, raw[task]) for task, sample in samples.items()}


def read(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sample: Sample, task: str | None) -> list[Any]:
    """What a path says about a task's rows: of each row the likelihoods of its options; without options, its loss.

    Losses are sums over the answer's tokens, in nats.
    """
    if sample.has_options:
        return option_likelihoods(model, tokenizer, sample.probe, task)
    losses = []
    with torch.inference_mode():
        for begin in range(0, len(sample.tokens), 16):
            losses += model.row_losses(task or BACKBONE, sample.tokens[begin : begin + 16])
    counts = [sum(label != -100 for label in row["labels"]) for row in sample.tokens]
    return [float(loss) * count for loss, count in zip(losses, counts, strict=True)]


def as_probe(task: str, sample: Sample, raw: Mapping[str, list[Any]]) -> TaskProbe:
    """Losses in which the form of answers does not count, and the task's complexity."""
    others = [source for source in raw if source not in (task, BACKBONE)]
    if sample.has_options:
        options = [row["options"] for row in sample.probe]
        answers = [row["options"].index(reference(row)) for row in sample.probe]
        losses = {source: calibrated_losses(its, answers, options) for source, its in raw.items()}
        guess = calibrated_losses([[0.0] * len(row) for row in options], answers, options)
        own = losses.pop(task)
    else:
        losses = {source: list(its) for source, its in raw.items()}
        own, guess = losses.pop(task), losses[BACKBONE]
        if others:  # any pilot teaches the form of an answer: their mean knows it, and nothing in particular
            losses[BACKBONE] = [statistics.fmean(row) for row in zip(*(losses[one] for one in others), strict=True)]
    note = sample.note
    if not sample.has_options and len(others) == 1:
        note = "; ".join(
            [*([note] if note else []), "free answers and one other task: form and help cannot be told apart"]
        )
    scale = statistics.fmean(guess)
    if len(set(map(reference, sample.probe))) == 1 or not scale > 0:
        return TaskProbe(0.0, 0.0, losses, note)
    return TaskProbe(statistics.fmean(own) / scale, statistics.stdev(own) / len(own) ** 0.5 / scale, losses, note)


def nearest_tasks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, samples: Mapping[str, Sample], count: int
) -> dict[str, set[str]]:
    """For each task the `count` others with the nearest mean prompt features: cosine after the common mean is taken out."""
    if len(samples) <= count + 1:
        return {task: set(samples) - {task} for task in samples}
    rows = {task: [prompt_ids(tokenizer, row["prompt"]) for row in sample.probe] for task, sample in samples.items()}
    mean_KD = torch.stack([model.features_of(its).mean(0) for its in rows.values()])
    mean_KD = torch.nn.functional.normalize(mean_KD - mean_KD.mean(0), dim=1)
    near_KK = (mean_KD @ mean_KD.T).fill_diagonal_(-torch.inf).topk(count).indices.tolist()
    names = list(samples)
    return {task: {names[i] for i in its} for task, its in zip(names, near_KK, strict=True)}


@contextlib.contextmanager
def pilot(
    model: PreTrainedModel, rows: Sequence[Mapping[str, Sequence[int]]], settings: ProbeSettings
) -> Iterator[str]:
    """A scratch task that has learnt these rows for a few steps from the plain backbone; it is gone after the block."""
    name = PILOT
    while name in model.hierarchy:
        name += "x"
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        model.add_task(name, rank=settings.pilot_rank)
    try:
        model.set_trainable([name])
        factors = [factor for key, factor in model.task_parameters(name).items() if not key.startswith("hft_gates.")]
        optimizer = torch.optim.AdamW(factors, lr=settings.learning_rate, weight_decay=0.0)
        order: list[int] = []
        draw = random.Random(settings.seed)
        for step in range(settings.pilot_steps):
            while len(order) < settings.batch_size:
                order += draw.sample(range(len(rows)), len(rows))
            chosen, order = order[: settings.batch_size], order[settings.batch_size :]
            warm, left = (step + 1) / 3, 1 - step / settings.pilot_steps
            optimizer.param_groups[0]["lr"] = settings.learning_rate * min(1.0, warm, left)
            with torch.enable_grad():
                torch.stack(model.row_losses(name, [rows[i] for i in chosen])).mean().backward()
            torch.nn.utils.clip_grad_norm_(factors, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        model.set_trainable([])
        yield name
    finally:
        model.remove_task(name)
