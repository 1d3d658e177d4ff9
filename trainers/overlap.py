"""How alike tasks are: the overlap of their gradients where a node starts.

A large part of a gradient is the form of a task: that answers are one of a few words that the prompt names. Few rows teach
that badly, and all tasks of one form teach it to one another, so it counts. So do the words of answers; which of them is
right hardly does. (Gradients that agree or oppose one another as a sign of tasks that help or hinder: Yu et al. 2020,
"Gradient Surgery for Multi-Task Learning"; Fifty et al. 2021, "Efficiently Identifying Task Groupings for Multi-Task
Learning".)

K tasks, M groups of rows, P parameters that are looked at.
"""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch.nn.functional import normalize
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .families import Overlaps
from .pilots import ProbeSettings, Sample, pilot


TokenRow: TypeAlias = Mapping[str, Sequence[int]]
FEWEST_GROUPS = 4  # of rows, that an error can be told from
NUM_PARAMETERS = 2**16  # a random choice of so many: 256 KiB a group of rows


def measure_overlaps(
    model: PreTrainedModel, samples: Mapping[str, Sample], settings: ProbeSettings, bar: tqdm
) -> Overlaps:
    """The overlap of each pair of tasks; forward and backward over `settings.gradient_rows` rows of each task.

    Left out are tasks with fewer than `FEWEST_GROUPS * settings.batch_size` rows, with nothing but one answer, or with a
    gradient that is not finite.

    Args:
        model: frozen, in evaluation mode; left as it was.
        samples: of each task.
        settings: how much is measured.
        bar: counts the tasks.
    """
    gradients: dict[str, torch.Tensor] = {}
    for task in sorted(samples):  # the order of the data does not matter
        bar.set_description(f"{task}: its gradient")
        sample = samples[task]
        rows = evenly(sample.pilot + sample.tokens)[: settings.gradient_rows]
        if len(set(map(answer_of, rows))) > 1 and len(rows) >= FEWEST_GROUPS * settings.batch_size:
            gradient_MP = group_gradients(model, rows, settings)
            if gradient_MP.isfinite().all():
                gradients[task] = gradient_MP
        bar.update()
    return overlaps_of(gradients)


def answer_of(row: TokenRow) -> tuple[int, ...]:
    """The tokens of a row's answer."""
    return tuple(label for label in row["labels"] if label != -100)


def evenly(rows: Sequence[TokenRow]) -> list[TokenRow]:
    """One row of each answer in turn, as long as there are any: which answers are common is no likeness of tasks."""
    turns: Counter[tuple[int, ...]] = Counter()
    placed = []
    for row in rows:
        answer = answer_of(row)
        placed.append((turns[answer], row))
        turns[answer] += 1
    return [row for _, row in sorted(placed, key=lambda one: one[0])]


def group_gradients(model: PreTrainedModel, rows: Sequence[TokenRow], settings: ProbeSettings) -> torch.Tensor:
    """The mean gradients [M, P] of groups of `settings.batch_size` tokenised rows, at an untrained node's up projections.

    The node's down projections are random, and always the same.
    """
    groups = []
    with pilot(model, rows, dataclasses.replace(settings, pilot_steps=0)) as name:
        model.set_trainable([name])
        factors = model.task_parameters(name).items()
        ups = [factor for key, factor in factors if key.rsplit(".", 1)[-1].startswith("B_")]
        draw = torch.Generator().manual_seed(settings.seed)
        chosen_P = torch.randint(sum(up.numel() for up in ups), (NUM_PARAMETERS,), generator=draw, device="cpu")
        for begin in range(0, len(rows) - settings.batch_size + 1, settings.batch_size):
            gradients = model.loss_gradients(name, rows[begin : begin + settings.batch_size], ups)
            groups.append(torch.cat([gradient.float().flatten().cpu() for gradient in gradients])[chosen_P])
        model.set_trainable([])
    return torch.stack(groups)


def overlaps_of(gradients: Mapping[str, torch.Tensor]) -> Overlaps:
    """The cosine of the mean gradients of each pair, with its standard error: the jackknife's, over groups of rows.

    Args:
        gradients: task -> [M, P]; M may differ, and is 2 or more.
    """
    if not gradients:
        return Overlaps({})
    unit_KP = normalize(torch.stack([its.mean(0) for its in gradients.values()]), dim=1)
    overlap_KK = unit_KP @ unit_KP.T
    variances = []  # of a task's overlaps with all, from its own groups
    for gradient_MP in gradients.values():
        count = len(gradient_MP)
        left_MK = normalize((gradient_MP.sum(0) - gradient_MP) / (count - 1), dim=1) @ unit_KP.T
        variances.append((left_MK - left_MK.mean(0)).square().sum(0) * (count - 1) / count)
    variance_KK = torch.stack(variances)
    error_KK = (variance_KK + variance_KK.T).sqrt()
    found: dict[str, dict[str, tuple[float, float]]] = {task: {} for task in gradients}
    for (i, one), (j, other) in itertools.permutations(enumerate(gradients), 2):
        found[one][other] = float(overlap_KK[i, j]), float(error_KK[i, j])
    return Overlaps(found)
