"""How alike tasks are: the overlap of their gradients at a node that already knows the form of all answers.

At an untrained node the gradients of all tasks are alike, since the first thing to learn is how an answer is written. So a
pilot learns from a few rows of every task first; what each task then still wants of the node is its own. (Gradients that
agree or oppose one another as a sign of tasks that help or hinder: Yu et al. 2020, "Gradient Surgery for Multi-Task
Learning"; Fifty et al. 2021, "Efficiently Identifying Task Groupings for Multi-Task Learning".)

K tasks, M groups of rows, P parameters that are looked at.
"""

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .evaluation import reference
from .families import Overlaps
from .pilots import ProbeSettings, Sample, pilot


TokenRow: TypeAlias = Mapping[str, Sequence[int]]
FEWEST_GROUPS = 6  # of rows; with fewer an error says little, and noise hides what there is
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
        bar: counts the pilot and the tasks.
    """
    # In the order of names, so that the pilot is the same whatever the order of the data.
    names = [task for task in sorted(samples) if len(set(map(reference, samples[task].probe))) > 1]
    bar.update(len(samples) - len(names))
    if len(names) < 2:
        bar.update(1 + len(names))
        return Overlaps({})
    rows = {task: evenly(samples[task].pilot) for task in names}
    seen = [row for task in names for row in rows[task][: settings.form_rows]]
    steps = math.ceil(len(seen) / settings.batch_size)
    gradients: dict[str, torch.Tensor] = {}
    bar.set_description("a pilot of all tasks")
    with pilot(model, seen, dataclasses.replace(settings, pilot_steps=steps)) as name:
        bar.update()
        for task in names:
            bar.set_description(f"{task}: its gradient")
            unseen = evenly(rows[task][settings.form_rows :] + samples[task].tokens)[: settings.gradient_rows]
            gradient_MP = group_gradients(model, name, unseen, settings)
            if len(gradient_MP) >= FEWEST_GROUPS and gradient_MP.isfinite().all():
                gradients[task] = gradient_MP
            bar.update()
    return overlaps_of(gradients)


def evenly(rows: Sequence[TokenRow]) -> list[TokenRow]:
    """One row of each answer in turn, as long as there are any.

    Where answers are few, what a pilot got wrong of how common each is would be most of the gradient.
    """
    turns: Counter[tuple[int, ...]] = Counter()
    placed = []
    for row in rows:
        answer = tuple(label for label in row["labels"] if label != -100)
        placed.append((turns[answer], row))
        turns[answer] += 1
    return [row for _, row in sorted(placed, key=lambda one: one[0])]


def group_gradients(
    model: PreTrainedModel, name: str, rows: Sequence[TokenRow], settings: ProbeSettings
) -> torch.Tensor:
    """The mean gradients [M, P] of groups of `settings.batch_size` tokenised rows, at the up projections of a pilot."""
    model.set_trainable([name])
    ups = [factor for key, factor in model.task_parameters(name).items() if key.rsplit(".", 1)[-1].startswith("B_")]
    draw = torch.Generator().manual_seed(settings.seed)
    chosen_P = torch.randint(sum(up.numel() for up in ups), (NUM_PARAMETERS,), generator=draw)
    groups = []
    for begin in range(0, len(rows) - settings.batch_size + 1, settings.batch_size):
        with torch.enable_grad():
            loss = torch.stack(model.row_losses(name, rows[begin : begin + settings.batch_size])).mean()
            gradients = torch.autograd.grad(loss, ups)
        groups.append(torch.cat([gradient.float().flatten().cpu() for gradient in gradients])[chosen_P])
    model.set_trainable([])
    return torch.stack(groups) if groups else torch.zeros(0, NUM_PARAMETERS)


def overlaps_of(gradients: Mapping[str, torch.Tensor]) -> Overlaps:
    """The cosine of the mean gradients of each pair, with its standard error by the jackknife over groups of rows.

    Noise makes a mean gradient longer, and so an overlap smaller: by half, where signal and noise of both means are equal.

    Args:
        gradients: task -> [M, P]; M may differ, and is 2 or more.
    """
    if not gradients:
        return Overlaps({})
    mean_KP = torch.nn.functional.normalize(torch.stack([its.mean(0) for its in gradients.values()]), dim=1)
    overlap_KK = mean_KP @ mean_KP.T
    variances = []  # of a task's overlaps with all, from its own groups
    for gradient_MP in gradients.values():
        count = len(gradient_MP)
        without_MP = (gradient_MP.sum(0) - gradient_MP) / (count - 1)
        left_MK = torch.nn.functional.normalize(without_MP, dim=1) @ mean_KP.T
        variances.append((left_MK - left_MK.mean(0)).square().sum(0) * (count - 1) / count)
    variance_KK = torch.stack(variances)
    error_KK = (variance_KK + variance_KK.T).sqrt()
    found: dict[str, dict[str, tuple[float, float]]] = {task: {} for task in gradients}
    for (i, one), (j, other) in itertools.permutations(enumerate(gradients), 2):
        found[one][other] = float(overlap_KK[i, j]), float(error_KK[i, j])
    return Overlaps(found)
