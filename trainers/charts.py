"""Charts of a run, as matplotlib figures that need no display. Readable without colours: numbers, markers, line styles.

Colours are of the map cividis, which looks alike with and without colour blindness and gets lighter evenly.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hft.gates_hft import HFTGateTable

from .run_record import stage_names
from .transfer import Matrix


COLOURS = "cividis"
_STYLES = [("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"), ("-", "v"), ("--", "x"), (":", "P"), ("-.", "*")]


def new_figure(width: float, height: float, layout: str | None = "constrained") -> Any:
    """An empty figure; inches, and matplotlib's name of a layout.

    Raises:
        ImportError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("A picture needs matplotlib: pip install matplotlib.") from error
    return Figure(figsize=(width, height), layout=layout)


def heat_map(
    values: Sequence[Sequence[float | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    top: float = 100.0,
    form: str = "{:.0f}",
) -> Any:
    """A table of numbers from 0 to `top`, each written into its coloured cell; None leaves the cell empty."""
    figure = new_figure(2.2 + 0.75 * len(columns), 1.3 + 0.42 * len(rows))
    axes = figure.subplots()
    shown = [[float("nan") if value is None else value for value in row] for row in values]
    axes.imshow(shown, cmap=COLOURS, vmin=0.0, vmax=top, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=35, ha="right")
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0)
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            if value is not None:
                dark = value < 0.55 * top
                axes.text(x, y, form.format(value), ha="center", va="center", color="white" if dark else "black")
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize=10)
    return figure


def matrix_chart(matrix: Matrix, before: Mapping[str, float], stages: Sequence[str]) -> Any:
    """The task-by-stage matrix of scores, the backbone's in the first row; `stages` are the names of its stages."""
    names = list(matrix[-1])
    rows = ([dict(before)] if before else []) + [dict(row) for row in matrix]
    labels = (["backbone"] if before else []) + [f"after stage {name}" for name in stages]
    return heat_map([[row.get(name) for name in names] for row in rows], labels, names, "Score of each task (%)")


def confusion_chart(confusion: Mapping[str, Mapping[str, int]]) -> Any:
    """Which task answered the prompts of which, in percent of each row."""
    columns = [*confusion, *sorted({name for row in confusion.values() for name in row} - set(confusion))]
    values = [[100 * row.get(name, 0) / max(sum(row.values()), 1) for name in columns] for row in confusion.values()]
    return heat_map(values, list(confusion), columns, "Who answered (% of the prompts of the task on the left)")


def cross_chart(cross: Mapping[str, Mapping[str, float]]) -> Any:
    """Each task's score (left) on each task's path (below)."""
    columns = list(dict.fromkeys(path for row in cross.values() for path in row))
    values = [[row.get(path) for path in columns] for row in cross.values()]
    return heat_map(values, list(cross), columns, "Score of the task on the left on the path of the task below (%)")


def curves_chart(stages: Sequence[Mapping[str, Any]]) -> Any:
    """The training loss of each task over the optimizer steps, one panel a stage."""
    longest = max((len(task) for stage in stages for task in stage["tasks"]), default=0)
    wide = max(3.4, 1.4 + 0.07 * longest)  # inches a panel; what tells the curves apart stands below it
    figure = new_figure(max(4.0, wide * len(stages)), 3.0 + 0.2 * max(len(stage["tasks"]) for stage in stages))
    panels = figure.subplots(1, len(stages), squeeze=False, sharey=True)[0]
    for axes, stage, name in zip(panels, stages, stage_names(stages), strict=True):
        for place, task in enumerate(stage["tasks"]):
            points = [(entry["step"], entry[f"{task}_loss"]) for entry in stage["log"] if f"{task}_loss" in entry]
            line, marker = _STYLES[place % len(_STYLES)]
            grey = str(0.55 * (place % 3) / 2)
            axes.plot(
                *zip(*points, strict=True), line, marker=marker, color=grey, label=task, linewidth=1.2, markersize=4
            ) if points else axes.plot([], [], line, marker=marker, color=grey, label=f"{task} (not logged)")
        axes.set_title(f"Stage {name}", fontsize=10)
        axes.set_xlabel("optimizer step")
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.22), frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("loss (nats a token)")
    return figure


def scores_chart(matrix: Matrix, stages: Sequence[str]) -> Any:
    """The score of each task over the stages of these names: flat lines are what is not forgotten."""
    figure = new_figure(max(4.0, 1.2 + 1.1 * len(matrix)), max(3.0, 0.8 + 0.17 * len(matrix[-1])))
    axes = figure.subplots()
    for place, task in enumerate(matrix[-1]):
        points = [(stage, row[task]) for stage, row in enumerate(matrix, start=1) if task in row]
        line, marker = _STYLES[place % len(_STYLES)]
        axes.plot(*zip(*points, strict=True), line, marker=marker, color=str(0.55 * (place % 3) / 2), label=task)
    aslant = dict(rotation=30, ha="right") if max(map(len, stages)) > 8 else {}
    axes.set_xticks(range(1, len(matrix) + 1), stages, **aslant)
    axes.set_xlabel("after stage")
    axes.set_ylabel("score (%)")
    axes.set_ylim(0, 102)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def gates_chart(tables: Sequence[HFTGateTable]) -> Any:
    """The absolute gates of each task, layer by layer: what it lets in, where."""
    width, wide, title, row, end = 7.0, 5.2, 0.4, 0.24, 0.6  # inches; fixed, since to fit many panels takes minutes
    heights = [row * max(1, len(table.sources)) for table in tables]
    height = title * len(tables) + sum(heights) + end
    figure = new_figure(width, height, layout=None)
    top = max(1.0, *(float(table.values.abs().max()) for table in tables))
    image, edge = None, height
    for number, (table, tall) in enumerate(zip(tables, heights, strict=True), start=1):
        edge -= title + tall
        axes = figure.add_axes((0.0, edge / height, wide / width, tall / height))
        image = axes.imshow(table.values.abs().T.numpy(), cmap=COLOURS, vmin=0.0, vmax=top, aspect="auto")
        mean = table.mean()
        axes.set_yticks(range(len(table.sources)), [f"{source}  {mean[source]:.2f}" for source in table.sources])
        axes.tick_params(length=0, labelsize=8, labelbottom=number == len(tables))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_title(table.task, fontsize=9, loc="left")
        if number == len(tables):
            axes.set_xlabel("layer")
    bar = min(3.0, height - title - end)  # beside the first panels
    place = ((wide + 0.2) / width, 1 - (title + bar) / height, 0.15 / width, bar / height)
    figure.colorbar(image, cax=figure.add_axes(place), label="|gate|")
    return figure


def save_figure(figure: Any, path: Path) -> None:
    """Writes a PNG, SVG or PDF by the file's name."""
    figure.savefig(path, dpi=150, bbox_inches="tight", metadata={"Date": None} if path.suffix == ".svg" else None)
