"""One LoRA a task on many tasks, from cells of some of them each."""

import statistics
from collections.abc import Iterable, Mapping


Cells = dict[tuple[str, int], dict]


def joined_singles(name: str, cells: Cells, all_cells: Iterable[Mapping]) -> Cells:
    """Cells of one LoRA a task on all tasks that other methods have, where cells of some of them cover them all.

    A LoRA of its own learns and answers as if the others were not there.

    Args:
        name: `quality-<budget>-<tasks>`.
        cells: its other methods', by setting and seed.
        all_cells: of which those of this budget, rate and seed are put together; of a task that two have, the first by name.
    """
    tasks = next(iter(cells.values()))["test"]["tasks"].keys()
    budget, parts = name.rpartition("-")[0], {}
    for cell in sorted(all_cells, key=lambda cell: cell["name"]):
        if cell["name"].startswith(f"{budget}-") and cell.get("method") == "single":
            parts.setdefault((cell["setting"], cell["seed"]), []).append(cell)
    made = {}
    for (setting, seed), its in parts.items():
        whole = {"name": name, "method": "single", "setting": setting, "seed": seed, "notes": {}}
        whole["learning_rate"] = its[0]["learning_rate"]
        for split in ("validation", "test"):
            found = {task: score for cell in reversed(its) for task, score in cell[split]["tasks"].items()}
            majority = {task: share for cell in its for task, share in cell[split]["majority"].items()}
            found = {task: found[task] for task in tasks if task in found}
            ap = round(statistics.mean(score["accuracy"] for score in found.values()), 3)
            whole[split] = {"ap": ap, "tasks": found, "majority": majority}
        whole["value"] = whole["validation"]["ap"]
        whole["stored"] = whole["trainable"] = its[0]["stored"] // len(its[0]["test"]["tasks"]) * len(tasks)
        if len(whole["test"]["tasks"]) == len(tasks):
            made[setting, seed] = whole
    return made
