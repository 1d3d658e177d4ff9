"""The hierarchy of tasks: who stands on whom. Plain Python, no torch.

A task's *path* is its ancestors and itself, ancestors first; its *level* is one more than the highest level among its
parents (a root has level 1). Stages of training are levels.
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter


BACKBONE = "backbone"  # the reserved word for "no task": generate(..., task="backbone")

# A task's name is part of a parameter's name and of a file's name, on file systems that ignore case too.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_DEVICE = re.compile(r"(con|prn|aux|nul|(com|lpt)[0-9])", re.IGNORECASE)


def nearest(name: str, valid: Iterable[str]) -> str:
    """The sentence that ends an error about an unknown name: the nearest valid one, or all of them.

    Args:
        name: what was given.
        valid: the names that would have been right.
    """
    valid = [str(other) for other in valid]
    close = difflib.get_close_matches(str(name), valid, n=1, cutoff=0.5)
    if close:
        return f"Did you mean {close[0]!r}?"
    return f"Valid: {', '.join(repr(other) for other in valid) or 'none yet'}."


class Hierarchy:
    """A directed acyclic graph of tasks, in an order in which parents come before their children.

    Args:
        parents: task name -> the names of its parents (an empty sequence makes a root). Any order of keys.

    Raises:
        ValueError: a name that cannot be a file's name, two names that differ only in case, a parent that is unknown or
            named twice, or a cycle.

    Example:
        >>> tree = Hierarchy({"yelp": ["sst2"], "sst2": []})
        >>> tree.names, tree.path("yelp"), tree.level("yelp")
        (('sst2', 'yelp'), ('sst2', 'yelp'), 2)
    """

    def __init__(self, parents: Mapping[str, Sequence[str]]):
        one_shot = {task: list(its) for task, its in parents.items() if isinstance(its, Iterator)}
        parents = {**parents, **one_shot}
        for task, its_parents in parents.items():
            _check_name(task)
            if its_parents is None:
                raise ValueError(f"The parents of task {task!r} are None; give a list, [] for a root.")
            if isinstance(its_parents, str):
                raise ValueError(
                    f"The parents of task {task!r} are the string {its_parents!r}; give a list: [{its_parents!r}]."
                )
            for parent in its_parents:
                if parent not in parents:
                    raise ValueError(f"Task {task!r} names the unknown parent {parent!r}. {nearest(parent, parents)}")
                if list(its_parents).count(parent) > 1:
                    raise ValueError(f"Task {task!r} names its parent {parent!r} twice; name each parent once.")
        folded: dict[str, str] = {}
        for task in parents:
            if task.lower() in folded:
                raise ValueError(
                    f"The task names {folded[task.lower()]!r} and {task!r} are duplicates (case does not count, since "
                    "they name files); rename one."
                )
            folded[task.lower()] = task
        try:
            tuple(TopologicalSorter(parents).static_order())
        except CycleError as error:
            circle = " -> ".join(reversed(error.args[1]))
            raise ValueError(f"The hierarchy has a cycle: {circle}. Remove one of these parents.") from None

        self._parents = {task: tuple(its_parents) for task, its_parents in parents.items()}
        self._level: dict[str, int] = {}
        for task in TopologicalSorter(parents).static_order():
            self._level[task] = 1 + max((self._level[parent] for parent in self._parents[task]), default=0)
        # Stable within a level: a task keeps its place when deeper tasks are added.
        self.names: tuple[str, ...] = tuple(sorted(self._parents, key=lambda task: self._level[task]))

    def __contains__(self, task: object) -> bool:
        return task in self._parents

    def __len__(self) -> int:
        return len(self._parents)

    def check(self, task: str) -> None:
        """Raises ValueError, naming the nearest task, if `task` is not one of the hierarchy's."""
        if task not in self._parents:
            raise ValueError(f"Unknown task {task!r}. {nearest(task, self.names)}")

    def parents(self, task: str) -> tuple[str, ...]:
        """The tasks that `task` stands on directly."""
        self.check(task)
        return self._parents[task]

    def level(self, task: str) -> int:
        """1 for a root, else one more than the highest level among the parents."""
        self.check(task)
        return self._level[task]

    def path(self, task: str) -> tuple[str, ...]:
        """The ancestors of `task`, each once however many ways lead to it, parents first, and `task` itself last."""
        self.check(task)
        seen: dict[str, None] = {}
        waiting = [task]
        while waiting:
            left = [parent for parent in self._parents[waiting[-1]] if parent not in seen]
            if left:
                waiting.append(left[0])
            else:
                seen[waiting.pop()] = None
        return tuple(seen)

    def extended(self, parents: Mapping[str, Sequence[str]]) -> "Hierarchy":
        """These tasks and more: task -> its parents, as for a new one; ValueErrors alike."""
        return Hierarchy({**{task: self.parents(task) for task in self.names}, **parents})

    def lowest_common_ancestor(self, tasks: Iterable[str]) -> str | None:
        """The task of the highest level that is on the path of each of these; None if they share nothing, or there are none.

        Of several at that level, the first by name: a part of a model chooses as the whole does.
        """
        paths = [self.path(task) for task in tasks]
        common = sorted(set(paths[0]).intersection(*paths)) if paths else []
        return max(common, key=self.level, default=None)  # the first of equals

    def levels(self) -> list[tuple[str, ...]]:
        """The tasks of level 1, of level 2, and so on."""
        depth = max(self._level.values(), default=0)
        return [tuple(task for task in self.names if self._level[task] == level) for level in range(1, depth + 1)]

    def draw(self, notes: Mapping[str, str] | None = None, weights: Mapping[str, float] | None = None) -> str:
        """The tree as text, a line a task under its first parent; further parents are named on the line.

        Args:
            notes: task name -> what to write behind it.
            weights: task name -> how much of its first parent flows in: the edge is double from 0.75, dashed below 0.25, and
                dotted at 0.
        """
        notes, weights = notes or {}, weights or {}

        def edge(task: str) -> str:
            weight = weights.get(task, 0.5)
            return "═" if weight >= 0.75 else "─" if weight >= 0.25 else "╌" if weight > 0 else "·"

        lines: list[str] = []

        def branch(task: str, stem: str, tail: str) -> None:
            others = self._parents[task][1:]
            also = f" (also on {', '.join(others)})" if others else ""
            note = f"  {notes[task]}" if task in notes else ""
            lines.append(f"{stem}{task}{also}{note}")
            children = [child for child in self.names if self._parents[child][:1] == (task,)]
            for child in children:
                last = child == children[-1]
                branch(child, tail + ("└" if last else "├") + edge(child) + " ", tail + ("   " if last else "│  "))

        lines.append(BACKBONE)
        roots = [task for task in self.names if not self._parents[task]]
        for root in roots:
            last = root == roots[-1]
            branch(root, ("└" if last else "├") + "─ ", "   " if last else "│  ")
        return "\n".join(lines)


def check_new_name(task: str) -> None:
    """Raises ValueError for no name at all, or one that some machine could have no file of, though models with it load."""
    _check_name(task)
    if _DEVICE.fullmatch(task):
        raise ValueError(f"{task!r} cannot be a task's name: Windows has no files of that name.")


def _check_name(task: str) -> None:
    if not isinstance(task, str) or not _NAME.fullmatch(task):
        raise ValueError(
            f"{task!r} cannot be a task's name: use 1 to 64 letters, digits, '_' or '-', beginning with a letter or "
            "digit (the name becomes a file's name)."
        )
    if task.lower() == BACKBONE:
        raise ValueError(f"{task!r} cannot be a task's name: the word is reserved for the plain backbone.")
