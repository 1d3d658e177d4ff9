"""Roots that learn from the rows of the tasks that stand on them, and how these share epochs with them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset, concatenate_datasets

from hft.hierarchy_hft import Hierarchy, nearest

from .task_data import TASK_ID


ROOT_SHARE, REFINING_RATE = 0.9, 0.1

Mixtures = Mapping[str, Sequence[str]]  # task -> the tasks whose rows are its rows


def members_of(mixtures: Mixtures) -> list[str]:
    """The tasks whose rows are a mixture's, too."""
    return [task for its in mixtures.values() for task in its]


def passes_of(mixtures: Mixtures, root_share: float = ROOT_SHARE) -> dict[str, float]:
    """Of an epoch over a mixture's rows it takes `root_share`, and its tasks the rest: task -> passes over its rows."""
    return dict.fromkeys(members_of(mixtures), round(1 - root_share, 6)) | dict.fromkeys(mixtures, root_share)


def check_mixtures(mixtures: Any, root_share: Any = ROOT_SHARE, refining_rate: Any = REFINING_RATE) -> None:
    """Raises ValueError for what is no mixture whatever the hierarchy is, and for numbers out of their range."""
    if not isinstance(mixtures, Mapping):
        raise ValueError(f"`mixtures` is {mixtures!r}; give `task: [tasks]`.")
    for task, members in mixtures.items():
        is_list = isinstance(members, (list, tuple)) and all(isinstance(member, str) for member in members)
        if not is_list or not members:
            raise ValueError(f"`mixtures[{task!r}]` is {members!r}; give a list of tasks.")
        if len(set(members)) < len(members):
            raise ValueError(f"`mixtures[{task!r}]` is {members!r}; name each task once.")
    if not isinstance(root_share, float) or not 0 < root_share < 1:
        raise ValueError(f"`root_share` is {root_share!r}; it must be above 0 and below 1.")
    if type(refining_rate) not in (int, float) or not 0 < refining_rate < math.inf:
        raise ValueError(f"`refining_rate` is {refining_rate!r}; it must be above 0.0, as 0.1.")


def check_standing(mixtures: Mixtures, tree: Hierarchy) -> None:
    """Raises ValueError for unknown tasks, and for one that does not stand on what learns from its rows."""
    for task, members in mixtures.items():
        for name in (task, *members):
            if name not in tree:
                raise ValueError(f"`mixtures[{task!r}]` names the unknown task {name!r}. {nearest(name, tree.names)}")
        if mixtures.keys() & set(members):
            raise ValueError(f"`mixtures` gives {task!r} the rows of {members}; it cannot have a mixture's.")
        for name in members:
            if task not in tree.path(name):
                raise ValueError(
                    f"`mixtures[{task!r}]` has the rows of {name!r}, which does not stand on it; make it a parent "
                    f"of {name!r}, or take these rows out."
                )


def with_mixtures(mixtures: Mixtures, sets: Mapping[str, Dataset], what: str) -> dict[str, Dataset]:
    """The datasets by task, and of mixtures that have none those of all their tasks in one, in a random order.

    Args:
        mixtures: those that need rows.
        sets: task -> its rows.
        what: how to call the data in errors, `"train_dataset"`.

    Raises:
        ValueError: a task of a mixture without rows, or with other columns than the others.
    """
    made = {}
    for root, members in mixtures.items():
        if root in sets:
            continue
        for task in members:
            if task not in sets:
                raise ValueError(f"`{what}` has no rows of {task!r}, from which {root!r} learns (`mixtures`).")
            if sets[task].features != sets[members[0]].features:
                raise ValueError(
                    f"{root!r} learns from the rows of {members[0]!r} and {task!r} (`mixtures`), and these have the columns "
                    f"{sets[members[0]].features} and {sets[task].features}; give them the same ones "
                    "(Dataset.select_columns, cast)."
                )
        rows = concatenate_datasets([sets[task] for task in members]).shuffle(seed=0)
        made[root] = (
            rows.remove_columns(TASK_ID) if TASK_ID in rows.column_names else rows
        )  # no longer of one of these
    return {**sets, **made}
