"""Pictures, drawn without a display: PNG or SVG by the file's name."""

import itertools
from collections.abc import Mapping
from pathlib import Path

from hft.gates_hft import HFTGateTable
from hft.hierarchy_hft import BACKBONE, Hierarchy

from .charts import new_figure
from .planner import Plan


def draw_hierarchy(hierarchy: Hierarchy, gates: Mapping[str, HFTGateTable], path: Path) -> None:
    """The hierarchy, roots at the bottom: an edge is as wide as the child's mean gate on the parent's node.

    Dashed edges are nodes that a task borrows beside its path. Beneath a name stand its gates on memory pages.

    Args:
        hierarchy: the tasks.
        gates: of each task.
        path: `.png`, `.svg` or `.pdf`.

    Raises:
        ImportError: without matplotlib.
        ValueError: another kind of file.
    """
    means = {task: table.mean() for task, table in gates.items()}
    _draw(hierarchy, means, path)


def draw_plan(plan: Plan, path: Path) -> None:
    """A planned hierarchy: an edge is as wide as the share of the child's loss that the parent takes away.

    Arguments and errors as for `draw_hierarchy`.
    """
    hierarchy = plan.hierarchy()
    _draw(hierarchy, {task: plan.shares(task) for task in hierarchy.names}, path)


def prepare_picture(path: Path) -> None:
    """Makes a picture's folder; raises ValueError if it cannot have this name, and ImportError without matplotlib."""
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"'{path}' should end in .png, .svg or .pdf.")
    new_figure(1.0, 1.0)
    path.parent.mkdir(parents=True, exist_ok=True)


def _draw(hierarchy: Hierarchy, means: Mapping[str, Mapping[str, float]], path: Path) -> None:
    prepare_picture(path)
    place = _places(hierarchy)
    listed = {name: sum(":" in source for source in means[name]) for name in hierarchy.names}
    most = [max((listed[name] for name in level), default=0) for level in ((), *hierarchy.levels())]
    rise = [1 + 0.14 * (below + above) / 2 for below, above in itertools.pairwise(most)]  # a page takes a line
    height = list(itertools.accumulate(rise, initial=0.0))
    place = {name: (x, height[int(y)]) for name, (x, y) in place.items()}
    width = 1 + max(x for x, _ in place.values())
    column = max(1.9, 0.6 + 0.09 * max(map(len, place)))  # inches, of which a letter takes 0.08
    figure = new_figure(max(5.0, column * width), 1.1 + 1.3 * (1 + height[-1]), layout=None)
    axes = figure.subplots()
    axes.set_axis_off()
    for task in hierarchy.names:
        mean = means[task]
        borrowed = [source for source in mean if source in hierarchy and source not in hierarchy.path(task)]
        for parent in (*(hierarchy.parents(task) or [BACKBONE]), *borrowed):
            (x0, y0), (x1, y1) = place[parent], place[task]
            if parent == BACKBONE:
                axes.plot([x0, x1], [y0, y1], color="0.75", linewidth=1, zorder=1)
                continue
            style = "--" if parent in borrowed else "-"
            weight = mean[parent]
            axes.plot(
                [x0, x1], [y0, y1], style, color="black" if weight else "0.75", linewidth=0.6 + 4 * weight, zorder=1
            )
            axes.text(
                *((x0 + x1) / 2, (y0 + y1) / 2, f"{weight:.2f}"),
                **dict(ha="center", va="center", fontsize=8, zorder=3),
                bbox=dict(boxstyle="round,pad=0.15", facecolor="white", edgecolor="none"),
            )
    for name, (x, y) in place.items():
        pages = [f"{page} {mean:.2f}" for page, mean in means[name].items() if ":" in page] if name in means else []
        axes.text(
            *(x, y, "\n".join([name, *pages])),
            **dict(ha="center", va="center", fontsize=9, zorder=4, linespacing=1.3),
            bbox=dict(boxstyle="round,pad=0.4", facecolor="white" if name != BACKBONE else "0.9", edgecolor="black"),
        )
    axes.margins(0.15, 0.12)
    figure.savefig(path, dpi=150, bbox_inches="tight")


def _places(hierarchy: Hierarchy) -> dict[str, tuple[float, float]]:
    """Where each name stands: children above their first parent, no two at one place."""
    place: dict[str, tuple[float, float]] = {}
    next_column = 0.0

    def put(task: str) -> float:
        nonlocal next_column
        children = [name for name in hierarchy.names if hierarchy.parents(name)[:1] == (task,)]
        columns = [put(child) for child in children]
        if columns:
            x = (columns[0] + columns[-1]) / 2
        else:
            x, next_column = next_column, next_column + 1
        place[task] = (x, float(hierarchy.level(task)))
        return x

    columns = [put(name) for name in hierarchy.names if not hierarchy.parents(name)]
    place[BACKBONE] = ((columns[0] + columns[-1]) / 2 if columns else 0.0, 0.0)
    return place
