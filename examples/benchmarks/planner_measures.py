"""Measures of complexity and of help side by side, on the same rows and pilots; `planner.py` has the truth."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

import hft
from hft.hierarchy_hft import BACKBONE
from hft.refresh_hft import frozen
from hft.trainers.calibration import calibrated_losses
from hft.trainers.evaluation import option_likelihoods, reference
from hft.trainers.planner import TaskProbe, make_plan
from hft.trainers.probes import ProbeSettings, Sample, as_probe, pilot, take_sample


MEASURES = ("calibrated", "options", "tokens", "gradient")  # of help; the first is the planner's


def measure_all(
    model: hft.HFTForCausalLM, tokenizer: Any, rows: Mapping[str, Sequence[dict]], settings: ProbeSettings
) -> dict[str, Any]:
    """The planner's hierarchy; for each measure of help `parent>child` -> number; for each of complexity task -> number.

    Help is the fall of the loss through the parent's pilot: over the options, calibrated and not, and of the answer's
    tokens; or the cosine of the tasks' mean gradients at the start of a node, the tasks' common gradient taken out.
    """
    samples = {task: take_sample(task, its, tokenizer, settings) for task, its in rows.items()}
    raw: dict[str, dict[str, list[Any]]] = {task: {} for task in samples}
    with frozen(model):
        gradients = {task: mean_gradient(model, its.pilot[:32], settings) for task, its in samples.items()}
        for task, its in samples.items():
            raw[task][BACKBONE] = option_likelihoods(model, tokenizer, its.probe, None)
        for source, its in samples.items():
            with pilot(model, its.pilot, settings) as name:
                for task, other in samples.items():
                    raw[task][source] = option_likelihoods(model, tokenizer, other.probe, name)
    plan = make_plan({task: as_probe(task, its, raw[task]) for task, its in samples.items()})
    common = torch.stack(list(gradients.values())).mean(0)
    help_by: dict[str, dict[str, float]] = {measure: {} for measure in MEASURES}
    complexity: dict[str, dict[str, float]] = {}
    for child, its in samples.items():
        losses = {source: losses_of(likelihoods, its.probe) for source, likelihoods in raw[child].items()}
        complexity[child] = complexities(plan.probes[child], losses, its, child)
        for parent in samples.keys() - {child}:
            pair = f"{parent}>{child}"
            for measure in MEASURES[:-1]:
                before, after = losses[BACKBONE][measure], losses[parent][measure]
                help_by[measure][pair] = round(statistics.fmean(before) - statistics.fmean(after), 4)
            one, other = gradients[parent] - common, gradients[child] - common
            help_by["gradient"][pair] = round(float(torch.nn.functional.cosine_similarity(one, other, dim=0)), 4)
    for edge in plan.edges:  # the planner's own, which go against the middle pilot
        help_by["calibrated"][f"{edge.parent}>{edge.child}"] = round(edge.gain, 4)
    return {
        "hierarchy": plan.parents,
        "reasons": {f"{edge.parent}>{edge.child}": edge.reason for edge in plan.edges},
        "help": help_by,
        "complexity": complexity,
    }


def losses_of(likelihoods: Sequence[Sequence[float]], probe: Sequence[dict]) -> dict[str, list[float]]:
    """Three losses a row: over the options, calibrated and not, and of the answer's tokens as they are."""
    options = [row["options"] for row in probe]
    answers = [row["options"].index(reference(row)) for row in probe]
    over = [torch.tensor(its, dtype=torch.float64).log_softmax(0).tolist() for its in likelihoods]
    return {
        "calibrated": calibrated_losses(likelihoods, answers, options),
        "options": [-its[answer] for its, answer in zip(over, answers, strict=True)],
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


def mean_gradient(
    model: hft.HFTForCausalLM, rows: Sequence[Mapping[str, Sequence[int]]], settings: ProbeSettings
) -> torch.Tensor:
    """A task's mean gradient of all up projections where a node starts (B = 0, the same A for all tasks), as one vector."""
    name = "gradient"
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        model.add_task(name, rank=settings.pilot_rank)
    model.set_trainable([name])
    parameters = model.task_parameters(name)
    with torch.enable_grad():
        for begin in range(0, len(rows), 8):
            (torch.stack(model.row_losses(name, rows[begin : begin + 8])).sum() / len(rows)).backward()
    ups = [parameter for key, parameter in parameters.items() if key.rsplit(".", 1)[-1].startswith("B_")]
    vector = torch.cat([up.grad.float().flatten() for up in ups])
    model.set_trainable([])
    model.remove_task(name)
    return vector
