"""Families of tasks, found from how alike their gradients are. Plain Python, no torch."""

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


SMALLEST_OVERLAP = 0.3  # of 1; between unrelated tasks of cl14 it is mostly below 0.2


@dataclass(frozen=True)
class Overlaps:
    """How alike the gradients of pairs of tasks are.

    Args:
        of: two tasks -> their cosine, from -1 to 1, and its standard error. A task that could not be measured is in no pair.
    """

    of: Mapping[frozenset[str], tuple[float, float]]

    def between(self, some: Iterable[str], others: Iterable[str]) -> tuple[float, float]:
        """The mean over pairs of one of `some` and one of `others`, and the mean of the errors; -1 if one was not measured.

        The errors of pairs that share a task go together, so that their mean does not become smaller with more pairs.
        """
        found = [self.of.get(frozenset(pair), (-1.0, 0.0)) for pair in itertools.product(some, others)]
        if any(overlap <= -1 for overlap, _ in found):
            return -1.0, 0.0
        return sum(overlap for overlap, _ in found) / len(found), sum(error for _, error in found) / len(found)

    def nearest(self, task: str) -> list[tuple[str, float, float]]:
        """The other tasks with overlap and error, the most alike first."""
        others = [(*(pair - {task}), *values) for pair, values in self.of.items() if task in pair]
        return sorted(others, key=lambda other: (-other[1], other[0]))


def find_families(
    tasks: Iterable[str], overlaps: Overlaps, num_errors: float = 2.0, smallest: float = SMALLEST_OVERLAP
) -> list[list[str]]:
    """Groups of two tasks or more that are alike: average-linkage clustering.

    The two groups with the greatest mean overlap become one, as long as that is above `smallest` and above `num_errors` of
    its standard errors.

    Returns:
        The groups, each in the order of names, and they in the order of their first members.
    """
    groups = [[task] for task in sorted(tasks)]
    between = {pair: overlaps.between(*pair) for pair in itertools.combinations(map(tuple, groups), 2)}
    while between:
        (one, other), (overlap, error) = max(between.items(), key=lambda item: item[1][0])
        if overlap <= max(smallest, num_errors * error):
            break
        merged = tuple(sorted(one + other))
        between = {pair: value for pair, value in between.items() if one not in pair and other not in pair}
        groups = [group for group in groups if tuple(group) not in (one, other)]
        between.update({(tuple(group), merged): overlaps.between(group, merged) for group in groups})
        groups.append(list(merged))
    return sorted(group for group in groups if len(group) > 1)


def family_names(families: Iterable[list[str]], taken: Iterable[str]) -> dict[str, list[str]]:
    """A name for the root of each family, `family1` and so on, that no task has."""
    taken = {name.lower() for name in taken}
    free = (name for number in itertools.count(1) if (name := f"family{number}") not in taken)
    return dict(zip(free, families, strict=False))
