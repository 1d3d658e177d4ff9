"""Families of tasks: which groups to try a common root for, and what to make of the trial. Plain Python, no torch."""

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias


# Of 1; tasks whose answers are chosen from options that the prompt names have more, others less.
SMALLEST_OVERLAP = 0.5
LOSS_FLOOR = 0.1  # nats an answer; less counts as so much: such a task is as good as solved
# Shares of the loss: what a task may lose by a root, and what all may on average. Another seed of a pilot moves as much.
MOST_RISE_OF_ONE, MOST_RISE_OF_ALL = 0.2, 0.05
FEWEST_ROWS = 8  # below, a standard error says nothing
Group: TypeAlias = tuple[str, ...]


@dataclass(frozen=True)
class Overlaps:
    """How alike the gradients of pairs of tasks are.

    Args:
        of: task -> other task -> their cosine, from -1 to 1, and its standard error; both ways round. A task that could not
            be measured is not there.
    """

    of: Mapping[str, Mapping[str, tuple[float, float]]]

    def between(self, some: Iterable[str], others: Iterable[str]) -> tuple[float, float] | None:
        """The mean over pairs of one of `some` and one of `others`, and the mean of the errors.

        The errors of pairs that share a task go together, so that their mean does not become smaller with more pairs. None
        if a pair was not measured.
        """
        found = [self.of.get(one, {}).get(other) for one, other in itertools.product(some, others)]
        if not found or None in found:
            return None
        overlap, error = (sum(values) / len(found) for values in zip(*found, strict=True))
        return overlap, error

    def nearest(self, task: str) -> list[tuple[str, float, float]]:
        """The other tasks with overlap and error, the most alike first."""
        others = [(other, *values) for other, values in self.of.get(task, {}).items()]
        return sorted(others, key=lambda other: (-other[1], other[0]))


def find_families(overlaps: Overlaps, num_errors: float = 2.0, smallest: float = SMALLEST_OVERLAP) -> list[list[str]]:
    """Groups of two tasks or more that are alike: average-linkage clustering.

    Of the pairs of groups whose mean overlap is above `smallest` and above `num_errors` of its standard errors, the pair
    with the greatest becomes one group, until there is none.

    Returns:
        The groups, each in the order of names, and they in the order of their first members.
    """

    def link(one: Group, other: Group) -> float | None:
        overlap, error = overlaps.between(one, other) or (0.0, 0.0)
        return overlap if overlap > max(smallest, num_errors * error) else None

    groups: list[Group] = [(task,) for task in sorted(overlaps.of)]
    links = {pair: overlap for pair in itertools.combinations(groups, 2) if (overlap := link(*pair)) is not None}
    while links:
        pair = max(links, key=links.__getitem__)
        merged = tuple(sorted(pair[0] + pair[1]))
        groups = [group for group in groups if group not in pair]
        links = {its: overlap for its, overlap in links.items() if not set(its) & set(pair)}
        links.update({(group, merged): overlap for group in groups if (overlap := link(group, merged)) is not None})
        groups.append(merged)
    return sorted(list(group) for group in groups if len(group) > 1)


@dataclass(frozen=True)
class Trial:
    """A root that was tried: a common pilot of some tasks, from the rows of all, in as many steps as all of their own.

    Args:
        tasks: in the order of names.
        family: those of them that get the root; all, some, or none.
        excess: how much more loss is left through it than through a task's own pilot, as a share of the latter; the mean
            over tasks. Negative: less is left.
        error: its standard error, from paired rows. That a pilot learns otherwise with another seed is not in it.
        helps: task -> the share of its plain loss through the backbone that the common pilot takes away, 0 to 1.
    """

    tasks: Group
    family: Group
    excess: float
    error: float
    helps: Mapping[str, float]

    def __str__(self) -> str:
        if not math.isfinite(self.excess):
            return "it could not be measured (a loss is not finite)"
        if not math.isfinite(self.error):
            return "nothing can be told from so few rows"
        more = "more" if self.excess > 0 else "less"
        return (
            f"one pilot of all their rows leaves {100 * abs(self.excess):.1f} ± {100 * self.error:.1f} % {more} loss than a "
            "pilot each"
        )


def try_root(
    own: Mapping[str, Sequence[float]],
    common: Mapping[str, Sequence[float]],
    backbone: Mapping[str, Sequence[float]],
    num_errors: float = 2.0,
) -> Trial:
    """Which tasks should stand on one root: those that do not clearly learn worse by a common pilot than by their own.

    A task clearly does if it loses more than `MOST_RISE_OF_ONE` of its loss, and more than one and a half times `num_errors`
    standard errors (of many tasks some are beyond fewer by chance); it leaves. The others get the root unless the mean over
    them is worse by more than `MOST_RISE_OF_ALL` and by more than `num_errors` errors. In doubt tasks share a root: it costs
    hardly any steps, and they still refine what it has learnt. With fewer than `FEWEST_ROWS` rows all is doubtful.

    Args:
        own: task -> the loss of each of its rows through its own pilot, in nats an answer.
        common: the same through the pilot of all their rows.
        backbone: the same through the plain backbone.
        num_errors: how many standard errors count as worse.
    """
    rises, helps = {}, {}
    for task in sorted(common):
        scale = max(statistics.fmean(own[task]), LOSS_FLOOR)
        fall, error = paired_fall(own[task], common[task])
        rises[task] = (-fall / scale, error / scale if len(common[task]) >= FEWEST_ROWS else math.inf)
        left = statistics.fmean(common[task]) / max(statistics.fmean(backbone[task]), 1e-9)
        helps[task] = min(max(1 - left, 0.0), 1.0) if math.isfinite(left) else 0.0

    def mean(tasks: Iterable[str]) -> tuple[float, float]:
        shares, errors = zip(*(rises[task] for task in tasks), strict=True)
        return statistics.fmean(shares), math.hypot(*errors) / len(errors)

    def is_worse(excess: float, error: float, smallest: float, more_errors: float = 1.0) -> bool:
        return not excess <= max(smallest, more_errors * num_errors * error)  # so is what is not finite

    family = tuple(task for task in rises if not is_worse(*rises[task], MOST_RISE_OF_ONE, 1.5))
    if len(family) < 2 or is_worse(*mean(family), MOST_RISE_OF_ALL):
        family = ()
    return Trial(tuple(rises), family, *mean(rises), helps)


def paired_fall(base: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """The mean fall of the loss from `base` to `other`, and its standard error, from paired rows."""
    falls = [before - after for before, after in zip(base, other, strict=True)]
    mean = sum(falls) / len(falls)
    variance = sum((fall - mean) ** 2 for fall in falls) / max(len(falls) - 1, 1)
    return mean, math.sqrt(variance / len(falls))


def family_names(families: Iterable[list[str]], taken: Iterable[str]) -> dict[str, list[str]]:
    """A name for the root of each family, `family1` and so on, that no task has."""
    taken = {name.lower() for name in taken}
    free = (name for number in itertools.count(1) if (name := f"family{number}") not in taken)
    return dict(zip(free, families, strict=False))
