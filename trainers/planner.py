"""The hierarchy found from measurements: trials make families, complexity orders tasks, help picks parents.

Plain Python, no torch.

The measurements come from `probes.py`; the same numbers always give the same plan.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hft.hierarchy_hft import BACKBONE, Hierarchy

from .families import FEWEST_ROWS, Overlaps, Trial, family_names, paired_fall


FEWEST_PILOTS = 4  # that have a middle which two relatives do not fill
SMALLEST_GAIN = 0.01  # nats; less is rounding, whatever its error
# By how much two standard errors of so few numbers are too few: Student's t at 97.7 %, over 2; its degrees of freedom.
_STUDENT = {1: 6.98, 2: 2.26, 3: 1.65, 4: 1.43, 5: 1.32, 6: 1.26, 7: 1.21, 8: 1.18}


@dataclass(frozen=True)
class TaskProbe:
    """What was measured of one task.

    Args:
        complexity: the share of the uncertainty about an answer that a short pilot leaves: 0 is solved. Of options, 1 is
            what a guess leaves; of free answers what the backbone leaves, which does not know their form.
        complexity_error: its standard error, taken as if what a guess or the backbone leaves were known exactly.
        losses: whose path the task's rows were read through -> the loss of each row, in nats an answer; the same rows in the
            same order for all. "backbone" is always there, and every task that may become a parent.
        note: what is odd about the task's data; empty if nothing.
        has_options: whether the answer is one of some; else it is free.
    """

    complexity: float
    complexity_error: float
    losses: Mapping[str, Sequence[float]]
    note: str = ""
    has_options: bool = True

    def base(self) -> Sequence[float]:
        """The loss of each row that a parent has to beat: through the backbone, or through the middle one of the pilots.

        The lower of the two: a backbone may know a task and only not say it; then any pilot makes it answer, and what any
        pilot gives is nobody's help. With few pilots there is no middle.
        """
        pilots = [its for source, its in self.losses.items() if source != BACKBONE and math.isfinite(sum(its))]
        backbone = self.losses[BACKBONE]
        if len(pilots) < FEWEST_PILOTS:
            return backbone
        middle = [statistics.median(row) for row in zip(*pilots, strict=True)]
        return min(backbone, middle, key=_mean)


@dataclass(frozen=True)
class Edge:
    """A parent that was considered for a task.

    Args:
        parent, child: their names.
        taken: whether the child stands on the parent in the plan.
        gain: how much lower the child's loss is through the parent's node than `TaskProbe.base`, in nats an answer.
        error: the standard error of the gain, from differences row by row; for free answers also from how much the other
            pilots differ among themselves.
        reason: why it was taken, or why not.
    """

    parent: str
    child: str
    taken: bool
    gain: float
    error: float
    reason: str

    def __str__(self) -> str:
        return f"{self.parent} ({self.gain:+.3f} ± {self.error:.3f}): {self.reason}"


@dataclass(frozen=True)
class Plan:
    """A hierarchy and the reasons for it.

    Args:
        parents: task -> its parents, the most helpful first.
        probes: task -> what was measured of it.
        edges: all parents that were measured, by child, most gain first.
        families: root -> the tasks that stand on it, from whose rows it learns.
        overlaps: how alike the tasks' gradients are; None if families were not looked for.
        trials: the roots that were tried, in this order.
    """

    parents: dict[str, list[str]]
    probes: Mapping[str, TaskProbe]
    edges: tuple[Edge, ...] = field(repr=False)
    families: Mapping[str, list[str]] = field(default_factory=dict)
    overlaps: Overlaps | None = field(default=None, repr=False)
    trials: tuple[Trial, ...] = field(default=(), repr=False)

    def hierarchy(self) -> Hierarchy:
        """The tasks as a `Hierarchy`, simple ones first within a level."""
        return Hierarchy(self.parents)

    def edges_of(self, child: str) -> list[Edge]:
        """What was considered for one task, taken edges first, then by gain."""
        return sorted((edge for edge in self.edges if edge.child == child), key=lambda edge: not edge.taken)

    def trial(self, root: str) -> Trial:
        """What was measured of a family's root."""
        return next(trial for trial in self.trials if list(trial.family) == self.families[root])

    def share(self, child: str, parent: str) -> float:
        """How much of the child's loss its parent takes away, 0 to 1.

        For a parent by `TaskProbe.losses`, against `TaskProbe.base`; for a root see `Trial.helps`.
        """
        if parent in self.families:
            return self.trial(parent).helps[child]
        edge = next(edge for edge in self.edges if (edge.child, edge.parent) == (child, parent))
        base = _mean(self.probes[child].base())
        return min(max(edge.gain / base, 0.0), 1.0) if base > 0 else 0.0

    def shares(self, task: str) -> dict[str, float]:
        """`share` of each parent that was taken; 0 for a task that was there before."""
        return {up: self.share(task, up) if task in self.probes else 0.0 for up in self.parents[task]}


def make_plan(
    probes: Mapping[str, TaskProbe],
    *,
    max_parents: int = 2,
    num_errors: float = 2.0,
    existing: Hierarchy | None = None,
    trials: Sequence[Trial] = (),
    overlaps: Overlaps | None = None,
) -> Plan:
    """Gives families their roots, and picks parents.

    The tasks of a family stand on a root of their own, which learns from the rows of all of them, and on nothing else: what
    a parent would add to the root cannot be measured before it is there. To other tasks an edge leads
    from a less to a more complex task; where two complexities are equal within their error, the edge with the greater gain
    decides, and none that would close a cycle is taken. A parent's gain must be beyond `num_errors` standard errors, and a
    further parent must still help when the answers through both are averaged. An edge that another path already implies is
    dropped.

    Args:
        probes: of the tasks to place.
        max_parents: of one task, at most; 1 or more.
        num_errors: how many standard errors a gain must be above 0; 0 or more. Each candidate is tested by itself: of 16
            that do not help, one is above two in about a third of all cases.
        existing: tasks that are learnt already and may become parents, whatever their complexity; they stay as they are.
        trials: what `try_root` found; the families are those of them that got a root.
        overlaps: what was tried by, for the report.

    Raises:
        ValueError: no tasks, a number out of its range, or a task that is new and existing at once.
    """
    _check(probes, max_parents, num_errors, existing)
    parents = {task: list(existing.parents(task)) for task in existing.names} if existing is not None else {}
    old = set(parents)
    order = sorted(probes, key=lambda task: (probes[task].complexity, task))
    families = family_names([list(trial.family) for trial in trials if trial.family], (*parents, *order))
    root_of = {task: root for root, members in families.items() for task in members}
    parents.update({root: [] for root in families})
    parents.update({task: [root_of[task]] if task in root_of else [] for task in order})
    gains = {
        (parent, child): _gain(probe, parent)
        for child, probe in probes.items()
        for parent in probe.losses
        if parent in parents and parent != child and child not in root_of
    }
    reasons: dict[tuple[str, str], str] = {}
    candidates = []
    best_first = sorted(gains, key=lambda pair: (-gains[pair][0] if math.isfinite(gains[pair][0]) else math.inf, pair))
    for parent, child in best_first:
        if why_not := _why_not(probes, old, parent, child, gains[parent, child], num_errors):
            reasons[parent, child] = why_not
        else:
            candidates.append((parent, child))
    _take(candidates, probes, parents, reasons, max_parents, num_errors)
    _drop_implied(order, parents, reasons)
    place = {task: i for i, task in enumerate(order)}
    edges = tuple(
        Edge(parent, child, parent in parents[child], *gains[parent, child], reasons[parent, child])
        for parent, child in sorted(best_first, key=lambda pair: place[pair[1]])
    )
    return Plan(parents, dict(probes), edges, families, overlaps, tuple(trials))


def _gain(probe: TaskProbe, parent: str) -> tuple[float, float]:
    """How much lower a task's loss is through a parent than `TaskProbe.base`, and the standard error.

    Of free answers a pilot teaches the form, more or less of it: a gain on all rows, of which these say nothing. So the
    other pilots' spread counts as an error of each; with fewer than two of them it is not known, and infinite.
    """
    mean, error = paired_fall(probe.base(), probe.losses[parent])
    if probe.has_options:
        return mean, error
    others = [_mean(its) for source, its in probe.losses.items() if source not in (BACKBONE, parent)]
    others = [its for its in others if math.isfinite(its)]
    if len(others) < 2:
        return mean, math.inf
    student = _STUDENT.get(len(others) - 1, 1.15)
    return mean, math.hypot(error, student * statistics.stdev(others) * (1 + 1 / len(others)) ** 0.5)


def check_numbers(max_parents: int, num_errors: float) -> None:
    """Raises ValueError if a number is out of its range, see `make_plan`."""
    if max_parents < 1:
        raise ValueError(f"`max_parents` is {max_parents}; it must be 1 or more.")
    if not num_errors >= 0:
        raise ValueError(f"`num_errors` is {num_errors}; it must be 0 or more.")


def _check(probes: Mapping[str, TaskProbe], max_parents: int, num_errors: float, existing: Hierarchy | None) -> None:
    if not probes:
        raise ValueError("There are no tasks to plan; give the data of at least one.")
    check_numbers(max_parents, num_errors)
    for task in probes:
        if existing is not None and task in existing:
            raise ValueError(
                f"The task {task!r} is in the model already; plan only new tasks, or choose another name."
            )


def _why_not(
    probes: Mapping[str, TaskProbe],
    old: set[str],
    parent: str,
    child: str,
    gain: tuple[float, float],
    num_errors: float,
) -> str:
    """Why a pair cannot be an edge, or an empty string."""
    mean, error = gain
    num_rows = len(probes[child].losses[BACKBONE])
    if not math.isfinite(mean):
        return "its gain could not be measured (a loss is not finite)"
    if parent not in old and is_more_complex(probes[parent], probes[child]):
        return f"it is more complex ({probes[parent].complexity:.2f}, {child} {probes[child].complexity:.2f})"
    if num_rows < FEWEST_ROWS:
        return f"too few rows to tell ({num_rows}; {FEWEST_ROWS} or more are needed)"
    if math.isinf(error):
        return "free answers and too few other tasks: form and help cannot be told apart"
    if mean <= max(num_errors * error, SMALLEST_GAIN):
        return "it does not help" if mean <= SMALLEST_GAIN else f"no gain beyond {num_errors:g} standard errors"
    return ""


def is_more_complex(one: TaskProbe, other: TaskProbe) -> bool:
    """Whether one task is more complex than another by more than the standard error of the difference.

    A task with options and one with free answers cannot be compared.
    """
    if one.has_options != other.has_options:
        return False
    return one.complexity - other.complexity > math.hypot(one.complexity_error, other.complexity_error)


def _take(
    candidates: list[tuple[str, str]],
    probes: Mapping[str, TaskProbe],
    parents: dict[str, list[str]],
    reasons: dict[tuple[str, str], str],
    max_parents: int,
    num_errors: float,
) -> None:
    """Takes edges, most gain first: each task's best parent, then further ones. Writes `parents` and `reasons`."""
    for first in (True, False):
        for parent, child in candidates:
            if (parent, child) in reasons:
                continue
            if _stands_on(parents, parent, child):
                reasons[parent, child] = f"it stands on {child} itself, from which the edge gains more"
            elif first and not parents[child]:
                parents[child].append(parent)
                reasons[parent, child] = "it helps most"
            elif not first:
                reasons[parent, child] = _further(parent, child, probes, parents, max_parents, num_errors)


def _further(
    parent: str,
    child: str,
    probes: Mapping[str, TaskProbe],
    parents: dict[str, list[str]],
    max_parents: int,
    num_errors: float,
) -> str:
    """Adds a further parent if it is worth it; says why, or why not."""
    have = parents[child]
    for other in have:
        if _stands_on(parents, other, parent):
            return f"already on the path, through {other}"
    if len(have) >= max_parents:
        return f"{' and '.join(have)} help{'s' if len(have) == 1 else ''} more, and `max_parents` is {max_parents}"
    losses = probes[child].losses
    mean, error = paired_fall(_mixed([losses[up] for up in have]), _mixed([losses[up] for up in (*have, parent)]))
    if mean <= max(num_errors * error, SMALLEST_GAIN):
        return f"it adds nothing to {' and '.join(have)} ({mean:+.3f} ± {error:.3f} together)"
    have.append(parent)
    return f"it adds to {' and '.join(have[:-1])} ({mean:+.3f} ± {error:.3f} together)"


def _drop_implied(order: Sequence[str], parents: dict[str, list[str]], reasons: dict[tuple[str, str], str]) -> None:
    """Removes edges to tasks that are on the path through another parent anyway."""
    for child in order:
        for parent in list(parents[child]):
            for other in parents[child]:
                if other != parent and _stands_on(parents, other, parent):
                    parents[child].remove(parent)
                    reasons[parent, child] = f"already on the path, through {other}"
                    break


def _stands_on(parents: Mapping[str, Sequence[str]], task: str, ancestor: str) -> bool:
    """Whether `ancestor` is among the ancestors of `task`."""
    seen, waiting = {task}, [task]
    while waiting:
        for parent in parents[waiting.pop()]:
            if parent == ancestor:
                return True
            if parent not in seen:
                seen.add(parent)
                waiting.append(parent)
    return False


def _mixed(losses: Sequence[Sequence[float]]) -> list[float]:
    """The loss of each row if the probabilities of several sources are averaged."""
    if len(losses) == 1:
        return list(losses[0])
    mixed = []
    for row in zip(*losses, strict=True):
        least = min(row)
        mixed.append(least - math.log(sum(math.exp(least - loss) for loss in row) / len(row)))
    return mixed


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
