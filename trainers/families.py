"""Families of tasks, found from how alike their gradients are. Plain Python, no torch."""

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias


# Of 1; tasks whose answers are chosen from options that the prompt names have more, others less.
SMALLEST_OVERLAP = 0.5
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


def family_names(families: Iterable[list[str]], taken: Iterable[str]) -> dict[str, list[str]]:
    """A name for the root of each family, `family1` and so on, that no task has."""
    taken = {name.lower() for name in taken}
    free = (name for number in itertools.count(1) if (name := f"family{number}") not in taken)
    return dict(zip(free, families, strict=False))
