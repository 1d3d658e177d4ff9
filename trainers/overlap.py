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
from collections.abc import Mapping

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .families import Overlaps
from .pilots import ProbeSettings, Sample, pilot


FEWEST_GROUPS = 3  # of rows, that an error can be told from
NUM_PARAMETERS = 2**16  # a random choice of so many says as much as all of them


def measure_overlaps(
    model: PreTrainedModel, samples: Mapping[str, Sample], settings: ProbeSettings, bar: tqdm
) -> Overlaps:
    """The overlap of each pair of tasks with enough rows; K backward passes over `settings.gradient_rows` rows each.

    Args:
        model: frozen, in evaluation mode; left as it was.
        samples: of each task.
        settings: how much is measured.
        bar: counts the pilot and the tasks.
    """
    seen = [row for sample in samples.values() for row in sample.pilot[: settings.form_rows]]
    steps = math.ceil(len(seen) / settings.batch_size)
    gradients: dict[str, torch.Tensor] = {}
    bar.set_description("a pilot of all tasks")
    with pilot(model, seen, dataclasses.replace(settings, pilot_steps=steps)) as name:
        bar.update()
        for task, sample in samples.items():
            bar.set_description(f"{task}: its gradient")
            gradient_MP = row_gradients(model, name, sample, settings)
            if len(gradient_MP) >= FEWEST_GROUPS:
                gradients[task] = gradient_MP
            bar.update()
    return overlaps_of(gradients)


def row_gradients(model: PreTrainedModel, name: str, sample: Sample, settings: ProbeSettings) -> torch.Tensor:
    """The mean gradients [M, P] of groups of a task's rows that the pilot has not seen, at the pilot's up projections."""
    rows = (sample.pilot[settings.form_rows :] + sample.tokens)[: settings.gradient_rows]
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
    """The cosine of the mean gradients of each pair, with its standard error by the jackknife over groups.

    Args:
        gradients: task -> [M, P]; M may differ, and is 2 or more.
    """
    units: dict[str, torch.Tensor] = {}
    for task, gradient_MP in gradients.items():
        total_P, num_groups = gradient_MP.sum(0), len(gradient_MP)
        left_out_MP = (total_P - gradient_MP) / (num_groups - 1)
        units[task] = torch.nn.functional.normalize(torch.cat([total_P[None] / num_groups, left_out_MP]), dim=1)
    found: dict[frozenset[str], tuple[float, float]] = {}
    for one, other in itertools.combinations(sorted(units), 2):
        without = (
            units[one][1:] @ units[other][0],
            units[other][1:] @ units[one][0],
        )  # a group of one, or of the other
        variance = sum(float((its - its.mean()).square().sum()) * (len(its) - 1) / len(its) for its in without)
        found[frozenset((one, other))] = float(units[one][0] @ units[other][0]), math.sqrt(variance)
    return Overlaps(found)
