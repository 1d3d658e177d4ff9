"""Measures of complexity and of help side by side, on the same rows and pilots; `planner.py` has the truth."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm.auto import tqdm

import hft
from hft.hierarchy_hft import BACKBONE
from hft.refresh_hft import frozen
from hft.trainers.calibration import calibrated_losses
from hft.trainers.evaluation import option_likelihoods, right_options
from hft.trainers.families import Overlaps, find_families
from hft.trainers.overlap import measure_overlaps
from hft.trainers.pilots import ProbeSettings, Sample, pilot, take_sample
from hft.trainers.planner import Plan, TaskProbe, make_plan
from hft.trainers.probes import answer_losses, as_probe, try_roots


MEASURES = ("calibrated", "options", "tokens", "gradient")  # of help; the planner goes by the first and the last


def measure_all(
    model: hft.HFTForCausalLM, tokenizer: Any, rows: Mapping[str, Sequence[dict]], settings: ProbeSettings
) -> dict[str, Any]:
    """The planner's hierarchy; for each measure of help `parent>child` -> number; for each of complexity task -> number.

    Help is the fall of the loss through the parent's pilot: over the options, calibrated and not, and of the answer's
    tokens; or the overlap of the tasks' gradients.
    """
    samples = {task: take_sample(task, its, tokenizer, settings) for task, its in rows.items()}
    raw: dict[str, dict[str, list[Any]]] = {task: {} for task in samples}
    with frozen(model), tqdm(disable=True) as bar:
        overlaps = measure_overlaps(model, samples, settings, bar)
        for task, its in samples.items():
            raw[task][BACKBONE] = option_likelihoods(model, tokenizer, its.probe, None)
        for source, its in samples.items():
            with pilot(model, its.pilot, settings) as name:
                for task, other in samples.items():
                    raw[task][source] = option_likelihoods(model, tokenizer, other.probe, name)
        trials = try_roots(model, tokenizer, samples, find_families(overlaps), raw, settings, 2.0, bar)
    probes = {task: as_probe(task, its, raw[task]) for task, its in samples.items()}
    plan = make_plan(probes, trials=trials)
    of_all = make_plan(probes)  # edges of families' members, too
    help_by: dict[str, dict[str, float]] = {measure: {} for measure in MEASURES}
    complexity: dict[str, dict[str, float]] = {}
    for child, its in samples.items():
        losses = {source: losses_of(likelihoods, its) for source, likelihoods in raw[child].items()}
        complexity[child] = complexities(plan.probes[child], losses, its, child)
        for parent in samples.keys() - {child}:
            pair = f"{parent}>{child}"
            for measure in MEASURES[:-1]:
                before, after = losses[BACKBONE][measure], losses[parent][measure]
                help_by[measure][pair] = round(statistics.fmean(before) - statistics.fmean(after), 4)
            if child in overlaps.of.get(parent, {}):
                help_by["gradient"][pair] = round(overlaps.of[parent][child][0], 4)
    for edge in of_all.edges:  # the planner's own gains, which go against the middle pilot
        help_by["calibrated"][f"{edge.parent}>{edge.child}"] = round(edge.gain, 4)
    return {
        **of_plan(plan),
        "overlap_errors": {
            f"{one}>{other}": round(error, 4) for one, its in overlaps.of.items() for other, (_, error) in its.items()
        },
        "reasons": {f"{edge.parent}>{edge.child}": edge.reason for edge in of_all.edges},
        "help": help_by,
        "complexity": complexity,
    }


def in_other_words(rows: Sequence[dict], words: Mapping[str, str]) -> list[dict]:
    """The same rows with other answers, also where the prompt names them; `words`: what holds another comes first."""

    def renamed(text: str) -> str:
        for old, new in words.items():
            text = text.replace(old, new)
        return text

    return [
        {
            "prompt": renamed(row["prompt"]),
            "completion": renamed(row["completion"]),
            "options": [renamed(option) for option in row["options"]],
        }
        for row in rows
    ]


def exchanged(rows: Sequence[dict], answers: Mapping[str, str]) -> list[dict]:
    """The same rows with wrong answers: each answer by the one that `answers` has for it, if any; prompts as they were."""
    return [
        {**row, "completion": f" {answers.get(row['completion'].strip(), row['completion'].strip())}"} for row in rows
    ]


def as_chat(rows: Sequence[dict]) -> list[dict]:
    """The same rows as messages, which take a chat template's form: the backbone's own way to answer is a sentence."""
    return [
        {
            "prompt": [{"role": "user", "content": row["prompt"].removesuffix("\nAnswer:")}],
            "completion": [{"role": "assistant", "content": row["completion"].strip()}],
            "options": [option.strip() for option in row["options"]],
        }
        for row in rows
    ]


def overlaps_between(
    model: hft.HFTForCausalLM, tokenizer: Any, rows: Mapping[str, Sequence[dict]], settings: ProbeSettings
) -> Overlaps:
    """The overlaps of tasks' gradients."""
    samples = {task: take_sample(task, its, tokenizer, settings) for task, its in rows.items()}
    with frozen(model), tqdm(disable=True) as bar:
        return measure_overlaps(model, samples, settings, bar)


def by_pair(overlaps: Overlaps) -> dict[str, list[float]]:
    """`one>other` -> the overlap of their gradients, and its error."""
    return {
        f"{one}>{other}": [round(value, 4) for value in values]
        for one, its in overlaps.of.items()
        for other, values in its.items()
    }


def of_plan(plan: Plan) -> dict[str, Any]:
    """The hierarchy that was found, its families, and the roots that were tried, for a cell."""
    trials = [
        {
            "tasks": list(trial.tasks),
            "excess": round(trial.excess, 4),
            "error": round(trial.error, 4),
            "family": list(trial.family),
        }
        for trial in plan.trials
    ]
    return {"hierarchy": plan.parents, "families": plan.families, "trials": trials}


def losses_of(likelihoods: Sequence[Sequence[float]], sample: Sample) -> dict[str, list[float]]:
    """Three losses a row: over the options, calibrated and not, and of the answer's tokens as they are."""
    answers = right_options(sample.probe)
    return {
        "calibrated": calibrated_losses(likelihoods, answers, [row["options"] for row in sample.probe]),
        "options": answer_losses(sample, likelihoods),
        "tokens": [-its[answer] for its, answer in zip(likelihoods, answers, strict=True)],
    }


def complexities(
    probe: TaskProbe, losses: Mapping[str, Mapping[str, Sequence[float]]], sample: Sample, task: str
) -> dict[str, float]:
    """Candidates for a task's complexity."""
    plain, own = losses[BACKBONE], losses[task]
    lengths = [sum(label != -100 for label in row["labels"]) for row in sample.tokens]
    a_token = [loss / length for loss, length in zip(plain["tokens"], lengths, strict=True)]
    found = {
        "left by the pilot, calibrated": probe.complexity,
        "left by the pilot, tokens": statistics.fmean(own["tokens"]) / statistics.fmean(plain["tokens"]),
        "loss a token": statistics.fmean(a_token),
        "spread of the loss": statistics.stdev(a_token),
        "answer length": statistics.fmean(lengths),
        "option loss": statistics.fmean(plain["options"]),
    }
    return {name: round(value, 4) for name, value in found.items()}
