"""The headline figures, computed from the committed result files.

python examples/benchmarks/summary.py            # as text
python examples/benchmarks/summary.py --json     # one flat JSON object; keys are absent where nothing was run
"""

import argparse
import itertools
import json
import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from joined import joined_singles


RESULTS = Path(__file__).parent / "results"


def read(name: str) -> dict[tuple[str, int], dict]:
    """(setting, seed) -> cell, of all committed cells of that name that were run on the default backbone."""
    lines = [line for path in sorted(RESULTS.glob("*.jsonl")) for line in path.read_text().splitlines()]
    all_cells = [cell for cell in map(json.loads, lines) if "backbone" not in cell]
    cells = [cell for cell in all_cells if cell["name"] == name]
    if name.startswith("quality-"):
        cells = [cell if "questions" in cell else without_cut_questions(cell) for cell in cells]
    its = {(cell["setting"], cell["seed"]): cell for cell in cells}
    return joined_singles(name, its, all_cells) | its if its and name.endswith("-cl14") else its


def without_cut_questions(cell: dict) -> dict:
    """A cell of when passages were cut at their beginning, and with them boolq's questions: without that task's scores."""

    def without(scores: Any) -> Any:
        if not isinstance(scores, dict):
            return scores
        left = {key: without(value) for key, value in scores.items() if key != "boolq"}
        if "ap" in left and "boolq" in scores["tasks"]:
            left["ap"] = round(statistics.mean(task["accuracy"] for task in left["tasks"].values()), 3)
        return left

    found = without({key: cell[key] for key in ("validation", "test", "general") if key in cell})
    return {**cell, **found, **({"value": found["validation"]["ap"]} if "validation" in found else {})}


def difference(cells: Mapping[tuple[str, int], dict], one: str, other: str) -> tuple[float, float, int] | None:
    """The mean difference of two settings over the seeds that both were run with, its standard error, and their number.

    Both settings of a seed see the same rows in training and validation. None with fewer than two such seeds.
    """
    seeds = [seed for setting, seed in cells if setting == one and (other, seed) in cells]
    gaps = [cells[one, seed]["value"] - cells[other, seed]["value"] for seed in sorted(seeds)]
    if len(gaps) < 2:
        return None
    return statistics.mean(gaps), statistics.stdev(gaps) / len(gaps) ** 0.5, len(gaps)


def mean_loss(cell: Mapping[str, dict]) -> float:
    """Nats an answer on validation rows, the mean over a cell's tasks."""
    return statistics.mean(task["loss"] for task in cell["tasks"].values())


def ablation_cells(samples: int | str) -> dict[tuple[str, int], dict]:
    """(setting, seed) -> cell of the ablation, `samples` training rows a task; `refreshed` are scored within `full`."""
    cells = read(f"ablation-{samples}")
    again = {
        ("refreshed", seed): cell["refreshed"]
        for (setting, seed), cell in cells.items()
        if setting == "full" and "refreshed" in cell
    }
    return cells | again


def ablation() -> dict[str, float]:
    """Full method minus each setting, in accuracy points; `ablation.all.` with all training rows, else 200 a task."""
    from table import ABLATION, ABLATION_BASES, SAMPLES

    figures = {}
    for samples in SAMPLES.values():
        cells, within = ablation_cells(samples), "all." if samples == "all" else ""
        bases = {name: ABLATION_BASES.get(name, "full") for name in ABLATION if name != "full"}
        for setting, base in [*bases.items(), ("flat", "root"), ("random_parents", "root")]:
            if found := difference(cells, base, setting):
                name = f"ablation.{within}{base}_minus_{setting}".replace("+", "_")
                figures[name] = round(found[0], 3)
                figures[f"{name}_se"] = round(found[1], 3)
    return figures


def _put(figures: dict[str, float], key: str, values: list[float]) -> None:
    """The mean over seeds, and beside it, with two seeds or more, its standard error."""
    figures[key] = round(statistics.mean(values), 3)
    if len(values) > 1:
        figures[f"{key}_se"] = round(statistics.stdev(values) / len(values) ** 0.5, 3)


def quality() -> dict[str, float]:
    """Average performance and forgetting on test rows of each method at its own learning rate, and HFT against others.

    `hft` is HFT with the hierarchy that validation rows choose, see `own_hierarchy`.
    """
    from table import (
        ARRIVING,
        BASELINES,
        HIERARCHIES,
        LOW_RESOURCE,
        learnable,
        lost_points,
        own_hierarchy,
        runs,
        test_scores,
        transfer,
    )

    figures: dict[str, float] = {}
    few_rows: list[tuple[int, list[float]]] = []  # of each set: how many tasks with few rows, and what HFT gains there
    budgets, sets = ("short", "small", "medium", "full"), ("family", "cl14", "low_resource")
    for budget, tasks in itertools.product(budgets, sets):
        cells, prefix = read(f"quality-{budget}-{tasks}"), f"quality.{budget}.{tasks}"
        if not cells:
            continue
        of: dict[str, dict[int, dict]] = {}
        above, single = learnable(cells), runs(cells, "single")
        if above:
            figures[f"{prefix}.learnable_tasks"] = len(above)
        best = own_hierarchy(cells)
        routed = [f"{method}_routed" for method in (*HIERARCHIES, *ARRIVING)]
        stands_for = {method: method for method in (*BASELINES, *HIERARCHIES, *ARRIVING, *routed)}
        if best is not None:
            stands_for |= {"hft": best, "hft_routed": f"{best}_routed"}
        plans = [cell["notes"]["tree"] for cell in cells.values() if cell["method"] == "hft_planned_pages"]
        if plans and all(map(is_one_root, plans)) and not runs(cells, "hft_planned"):
            stands_for["hft_planned"] = "hft_root_no_memory"  # the same tree, rows and steps; another random start
        for method, its_name in stands_for.items():
            if not (its := runs(cells, its_name)):
                continue
            of[method] = {cell["seed"]: cell for cell in its}
            scores = [test_scores(cell, method) for cell in its]
            for key, some in (("ap", list(scores[0])), ("ap_learnable", above)):
                if some:
                    means = [statistics.mean(one[task] for task in some) for one in scores]
                    _put(figures, f"{prefix}.{key}_{method}", means)
            if lost := lost_points(its, method):
                _put(figures, f"{prefix}.forgetting_{method}", lost)
            if method not in (*BASELINES, *ARRIVING, "hft"):
                continue
            if moved := [found for cell in its if (found := transfer(cell, single))]:
                for i, key in enumerate(("bwt", "fwt")):
                    if values := [one[i] for one in moved if one[i] is not None]:
                        _put(figures, f"{prefix}.{key}_{method}", values)
            if able := [cell["general"] for cell in its if "general" in cell]:
                _put(figures, f"{prefix}.perplexity_{method}", [one["perplexity"] for one in able])
                for task in sorted(set.intersection(*(set(one["unseen"]) for one in able))):
                    _put(
                        figures, f"{prefix}.unseen_{task}_{method}", [one["unseen"][task]["accuracy"] for one in able]
                    )
        pairs = [
            *itertools.product(("hft", *HIERARCHIES, *ARRIVING), ("joint", "single")),
            # Of the same kind, and told no task's name, either, when they answer.
            *itertools.product(
                (*ARRIVING, *(f"{method}_routed" for method in ARRIVING)), ("sequential", "sequential_replay", "olora")
            ),
        ]
        for ours, other in pairs:
            if seeds := of.get(ours, {}).keys() & of.get(other, {}).keys():
                its = {seed: statistics.mean(test_scores(of[ours][seed], ours).values()) for seed in seeds}
                gaps = [round(its[seed], 3) - of[other][seed]["test"]["ap"] for seed in seeds]
                _put(figures, f"{prefix}.{ours}_minus_{other}", gaps)
        if budget == "small" and "hft" in of and "single" in of:
            both = [
                [test_scores(of[m][seed], m) for m in ("hft", "single")]
                for seed in of["hft"].keys() & of["single"].keys()
            ]
            few = [task for task in LOW_RESOURCE if both and task in both[0][0]]
            if few:
                gaps = [statistics.mean(ours[task] - alone[task] for task in few) for ours, alone in both]
                few_rows.append((len(few), gaps))
    if few_rows:  # of the set with the most seeds, and of these with the most such tasks
        _, gaps = max(few_rows, key=lambda its: (len(its[1]), its[0]))
        _put(figures, "quality.small.hft_minus_single_low_resource", gaps)
    return figures


def is_one_root(tree: Mapping[str, list[str]]) -> bool:
    """Whether all tasks but one stand on that one."""
    (root, *others) = [task for task, parents in tree.items() if not parents]
    return not others and all(parents == [root] for task, parents in tree.items() if task != root)


def routing() -> dict[str, float]:
    """The router on the test rows of all fourteen tasks, in %."""
    from table import runs

    cells = {setting: cell for (setting, _), cell in read("routing-test").items()}
    figures = {}
    for form, key in (("as they are", ""), ("shared", "_shared_instruction"), ("stripped", "_stripped")):
        if form in cells:
            figures[f"routing.accuracy{key}"] = cells[form]["value"]
    if trained := runs(read("quality-short-cl14"), "hft_chains_routed"):
        gaps = [cell["test"]["routed"]["ap"] - cell["test"]["ap"] for cell in trained]
        figures["routing.ap_routed_minus_given"] = round(statistics.mean(gaps), 3)
    if "as they are" in cells:
        figures["routing.false_activation_general"] = cells["as they are"]["false_activation"]
    return figures


def speed() -> dict[str, float]:
    """Ratios of times, measured in one process, interleaved; seconds and bytes of one task of 64."""
    cells = {setting: cell for (setting, _), cell in read("speed").items()}
    names = {
        "routed prefill": "routing.prefill_ratio",
        "mixed 8": "speed.mixed8_vs_peft",
        "train path 4": "speed.train_ratio_path4",
        "train tasks 64": "speed.train_ratio_64_tasks",
        "decode": "speed.decode_ratio",
    }
    figures = {key: cells[setting]["value"] for setting, key in names.items() if setting in cells}
    if "decode" in cells:
        figures["speed.decode_ratio_folded"] = cells["decode"]["ratio"]["folded"]
        figures["speed.decode_ratio_merged"] = cells["decode"]["ratio"]["merged"]
    if "load 1 of 64" in cells:
        figures["speed.load_seconds_1_of_64"] = round(cells["load 1 of 64"]["times"]["one"], 3)
        figures["speed.bytes_per_task"] = cells["load 1 of 64"]["bytes_per_task"]
    return figures


def planner() -> dict[str, float]:
    """The planner's measures of help against measured gains, what its parents cost, and its estimates."""
    cells = read("planner")
    truth: dict[tuple[str, str, int], float] = {}
    falls: dict[tuple[str, str, int], float] = {}
    for (setting, seed), cell in cells.items():
        parent, is_pair, child = setting.partition(">")
        if is_pair and (f"alone: {child}", seed) in cells and ("measures", seed) in cells:
            alone = cells[f"alone: {child}", seed]
            truth[parent, child, seed] = cell["value"] - alone["value"]
            falls[parent, child, seed] = alone["tasks"][child]["loss"] - cell["tasks"][child]["loss"]
    figures: dict[str, float] = {}
    if len(truth) >= 10:
        pairs = sorted(truth)
        measured = {seed: cells["measures", seed] for *_, seed in pairs}
        for measure in measured[pairs[0][2]]["help"]:
            found = [measured[seed]["help"][measure][f"{parent}>{child}"] for parent, child, seed in pairs]
            for gains, what in ((truth, ""), (falls, "_with_losses")):
                name = f"planner.rank_correlation{what}" + ("" if measure == "gradient" else f"_{measure}")
                ranks = _ranks([gains[pair] for pair in pairs]), _ranks(found)
                figures[name] = round(statistics.correlation(*ranks), 3)
        regrets = []
        for child, seed in sorted({pair[1:] for pair in pairs}):
            gains = {parent: truth[parent, child, seed] for parent, *rest in pairs if rest == [child, seed]}
            if child in (found := cells.get(("families", seed), {"tasks": {}}))["tasks"]:
                (root,) = found["hierarchy"][child]
                gains[root] = found["tasks"][child]["accuracy"] - cells[f"alone: {child}", seed]["value"]
            its = [parent for parent in measured.get(0, measured[seed])["hierarchy"][child] if parent in gains]
            regrets.append(max(0.0, *gains.values()) - (gains[its[0]] if its else 0.0))
        figures["planner.parent_regret_points"] = round(statistics.mean(regrets), 3)
    needs = {
        (setting.removeprefix("alone: "), seed): cell["need"]
        for (setting, seed), cell in cells.items()
        if "need" in cell and ("measures", seed) in cells
    }
    if len(needs) >= 5:
        task, seed = next(iter(needs))
        for measure in cells["measures", seed]["complexity"][task]:
            found = [cells["measures", seed]["complexity"][task][measure] for task, seed in needs]
            name = re.sub(r"\W+", "_", measure)
            for what in ("steps", "rank"):
                ranks = _ranks(found), _ranks([need[what] for need in needs.values()])
                if len(set(ranks[0])) > 1 and len(set(ranks[1])) > 1:
                    figures[f"planner.{what}_needed_by_{name}"] = round(statistics.correlation(*ranks), 3)
    short = ablation_cells(200)
    trained = {key: cell for key, cell in short.items() if key[0] in ("root", "full") and ("root", key[1]) in short}
    losses = {key: {"value": mean_loss(cell)} for key, cell in trained.items()}
    for what, its in (("ap", trained), ("loss", losses)):
        if gap := difference(its, "root", "full"):
            figures[f"planner.{what}_found_minus_chains_short"] = round(gap[0], 3)
            figures[f"planner.{what}_found_minus_chains_short_se"] = round(gap[1], 3)
    figures |= found_minus_hand()
    if ("fourteen", 0) in cells:
        figures["planner.seconds_14_tasks"] = cells["fourteen", 0]["value"]
    errors = [cell["errors"] for (setting, _), cell in cells.items() if setting.startswith("estimate")]
    for what, key in (("time", "seconds"), ("memory", "bytes")) if errors else ():  # the largest of all checks
        figures[f"planner.{what}_estimate_error"] = max((its[key] for its in errors), key=abs)
    return figures


def found_minus_hand() -> dict[str, float]:
    """HFT on the planner's hierarchy minus HFT on hand-made families, test rows, three epochs: accuracy points and nats.

    Of the ways in which a family's root and its tasks have shared their steps, validation rows choose the families'. The
    planner makes one family of these six tasks in each seed, so the cells of one root for all are its own, too.
    """
    from table import chosen, own_hierarchy

    cells, figures = read("quality-small-family"), {}
    hand = own_hierarchy(cells, ("hft_families", "hft_families_pages", "hft_families_thirds"))
    if hand is None:
        return figures
    found, made = (
        {cell["seed"]: cell["test"] for cell in chosen(cells, method)} for method in ("hft_root_no_memory", hand)
    )
    if seeds := sorted(found.keys() & made.keys()):
        _put(figures, "planner.ap_found_minus_hand", [found[seed]["ap"] - made[seed]["ap"] for seed in seeds])
        losses = [mean_loss(found[seed]) - mean_loss(made[seed]) for seed in seeds]
        _put(figures, "planner.loss_found_minus_hand", losses)
    return figures


def growth() -> dict[str, float]:
    """Bytes of the nodes of fourteen tasks, cut as they were sealed."""
    cells = read("growth")
    return {
        f"speed.bytes_14_tasks_at_{setting}": max(cell["cumulative"].values()) for (setting, _), cell in cells.items()
    }


def _ranks(values: list[float]) -> list[float]:
    """Places in order, equal values at their mean place."""
    return [sum(other < value for other in values) + (values.count(value) - 1) / 2 for value in values]


def compiled() -> dict[str, float]:
    """Eager time over compiled time, for a token decoded and a step trained."""
    cells = {setting: cell for (setting, _), cell in read("compile").items()}
    return {
        f"speed.compiled_{setting}": cells[setting]["value"] for setting in ("decode", "train") if setting in cells
    }


def gpu() -> dict[str, float]:
    """Peak memory and speed on one GPU, beside plain TRL and PEFT on the same shape; only cells that had a GPU."""
    cells = {setting: cell for (setting, _), cell in read("gpu").items() if "peak_allocated_gib" in cell}
    figures: dict[str, float] = {}
    for shape in ("8b", "1b", "135m"):
        if f"{shape} hft" in cells:
            figures[f"gpu.peak_gib_{shape}"] = cells[f"{shape} hft"]["peak_allocated_gib"]
        if f"{shape} trl" in cells:
            figures[f"gpu.peak_gib_{shape}_trl"] = cells[f"{shape} trl"]["peak_allocated_gib"]
        if f"{shape} hft" in cells and f"{shape} trl" in cells:
            ratio = cells[f"{shape} hft"]["value"] / cells[f"{shape} trl"]["value"]
            figures[f"gpu.tokens_per_second_vs_trl_{shape}"] = round(ratio, 3)
    return figures


def headline() -> dict[str, float]:
    """All figures of which there are results."""
    return {**ablation(), **quality(), **routing(), **speed(), **compiled(), **gpu(), **planner(), **growth()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one flat JSON object")
    figures = headline()
    if parser.parse_args().json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            print(f"{name:<44}{value:>10}")


if __name__ == "__main__":
    main()
