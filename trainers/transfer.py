"""What learning stage after stage did to the tasks: average performance, forgetting, backward and forward transfer.

The matrix R has a row a stage, in order: each task learnt so far -> its score after that stage. T tasks were learnt in all.
Scores may have any unit; so have the measures. Several tasks may be learnt in one stage; where a paper averages over the
T - 1 tasks before the last, that is here: over those learnt before the last stage.
"""

from collections.abc import Mapping, Sequence
from typing import Literal


Matrix = Sequence[Mapping[str, float]]
# What a sum over tasks is divided by: the tasks learnt before the last stage (as in the papers), or all T.
Over = Literal["T-1", "T"]


def average_performance(matrix: Matrix) -> float:
    """The mean over all tasks after the last stage (average accuracy A_T of Lopez-Paz & Ranzato 2017)."""
    return sum(matrix[-1].values()) / len(matrix[-1])


def forgetting(matrix: Matrix, over: Over = "T-1") -> float:
    """How much of the best score that each task ever had since it was learnt is gone at the end, averaged over tasks.

    The forgetting measure of Chaudhry et al. 2018 (https://arxiv.org/abs/1801.10112, section 3), with the maximum over all
    stages from the one that learnt the task to the last but one.

    Args:
        matrix: R.
        over: `"T-1"` as in the paper; `"T"` divides by all tasks, those of the last stage having forgotten nothing.

    Returns:
        0.0 if no task was learnt before the last stage.
    """
    return _mean_over(
        {t: max(row[t] for row in matrix[:-1] if t in row) - matrix[-1][t] for t in _earlier(matrix)}, matrix, over
    )


def backward_transfer(matrix: Matrix, over: Over = "T-1") -> float:
    """How much learning later tasks changed the earlier ones: the score at the end minus that right after learning.

    BWT of Lopez-Paz & Ranzato 2017 (https://arxiv.org/abs/1706.08840, section 2). Negative: forgotten; positive: a refresh
    of gates helped. Arguments as for `forgetting`.
    """
    return _mean_over(
        {t: matrix[-1][t] - next(row[t] for row in matrix if t in row) for t in _earlier(matrix)}, matrix, over
    )


def forward_transfer(start: Mapping[str, float], before: Mapping[str, float]) -> float:
    """What tasks could do before they learnt, thanks to those before them: their score as their stage began minus the
    backbone's, on average.

    FWT of Lopez-Paz & Ranzato 2017 (see `backward_transfer`), whose baseline is a random initialisation; ours is the frozen
    backbone, on whose level a task without parents starts.

    Args:
        start: task -> score on its path before its first step, for the tasks that have parents.
        before: task -> the backbone's score.

    Returns:
        0.0 if there are no such tasks.
    """
    return sum(start[t] - before[t] for t in start) / len(start) if start else 0.0


def _earlier(matrix: Matrix) -> list[str]:
    """The tasks learnt before the last stage."""
    return [task for task in matrix[-1] if any(task in row for row in matrix[:-1])]


def _mean_over(values: Mapping[str, float], matrix: Matrix, over: Over) -> float:
    if over not in ("T-1", "T"):
        raise ValueError(f"`over` is {over!r}; it is 'T-1' (the tasks learnt before the last stage) or 'T' (all).")
    count = len(values) if over == "T-1" else len(matrix[-1])
    return sum(values.values()) / count if values else 0.0


def format_matrix(matrix: Matrix, names: Sequence[str]) -> str:
    """The task-by-stage matrix as text: a row a stage, a column a task, a dash where the task is not learnt yet."""
    width = max(6, *(len(name) for name in names))
    lines = [" " * 14 + "  ".join(name.rjust(width) for name in names)]
    for stage, row in enumerate(matrix, start=1):
        cells = [f"{row[name]:.1f}" if name in row else "-" for name in names]
        lines.append(f"after stage {stage} " + "  ".join(cell.rjust(width) for cell in cells))
    return "\n".join(lines)
