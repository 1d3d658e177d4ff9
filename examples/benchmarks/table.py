"""The README's tables, made from the committed result files; a test compares them.

python examples/benchmarks/table.py ablation --budget small    # `full` has all training rows
python examples/benchmarks/table.py quality --budget small --tasks family    # `short` has less training
python examples/benchmarks/table.py tasks --budget small --tasks family
python examples/benchmarks/table.py more --budget small --tasks family
python examples/benchmarks/table.py hierarchies --budget small --tasks family
python examples/benchmarks/table.py memory    # memory_related
python examples/benchmarks/table.py speed
"""

import argparse
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from summary import ablation_cells, mean_loss, read


OWN_GATES = "+own_gates"  # cells of when a task's gates on its own node and page learnt, too; at 5e-2
ABLATION = {
    "full": "the full method, on hand-made chains",
    "refreshed": "each task's gates learnt anew in the end",
    "no_memory": "without memory",
    "no_gates": "all gates stay at 1",
    "mixed": "a step holds several tasks, in micro-batches of one each",
    "flat": "without parents",
    "flat_no_memory": "... without memory",
    "flat_mixed": "... a step holds several tasks, in micro-batches of one each",
    "flat_mixed_no_memory": "... ... without memory",
    "flat_refined": "... ... on a page of 16 slots, which nodes refine at 0.3 of its rate",
    "random_parents": "random parents (of four edges three as made by hand)",
    "other_parents": "random parents, none as made by hand",
    "reversed": "every edge turned round",
    "sequential": "a stage's tasks one after another",
    "root": "the planner's hierarchy: one root for all, nine tenths of the steps on it",
    "root_no_gates": "... all gates stay at 1",
    "full+rate_5e-2": "gates learn at 5e-2",
    f"full{OWN_GATES}": "... and those on a task's own node learn, too",
    f"reversed{OWN_GATES}": "... ... every edge turned round",
    f"sequential{OWN_GATES}": "... ... a stage's tasks one after another",
    f"topk{OWN_GATES}": "... ... memory read sparsely (top-k; since removed)",
}
# What a setting differs from in one part (a step on one task may be one micro-batch or four); of the others: the full one.
ABLATION_BASES = {
    "flat_no_memory": "flat",
    "flat_mixed": "flat",
    "flat_mixed_no_memory": "flat_mixed",
    "flat_refined": "flat_mixed",
    "root_no_gates": "root",
    f"full{OWN_GATES}": "full+rate_5e-2",
    **{f"{setting}{OWN_GATES}": f"full{OWN_GATES}" for setting in ("reversed", "sequential", "topk")},
}
SAMPLES = {"small": 200, "full": "all"}
LOW_RESOURCE = ("cb", "copa", "rte", "wic")
BASELINES = {
    "zero_shot": "the backbone",
    "single": "one LoRA a task",
    "joint": "joint LoRA",
    "joint_wide": "joint LoRA, as many parameters as HFT with pages",
    "single_float32": "one LoRA a task, trained in float32",
    "joint_float32": "joint LoRA, trained in float32",
    "sequential": "sequential LoRA",
    "sequential_replay": "sequential LoRA, 2 % replay",
    "olora": "O-LoRA",
    "osf": "OSF (backbone in bfloat16)",
    "arrow": "Arrow over one LoRA a task",
}
# HFT's, of which validation rows choose one.
HIERARCHIES = {
    "hft_chains": "chains",
    "hft_flat": "no hierarchy",
    "hft_shared": "no hierarchy, one page in shared steps",
    "hft_families": "a root a family",
    "hft_families_pages": "a root a family, pages",
    "hft_families_thirds": "a root a family, thirds, pages",
    "hft_planned": "the planner's",
    "hft_planned_pages": "the planner's, pages",
    "hft_root_no_memory": "one root for all",
    "hft_root_no_memory_thirds": "one root for all, thirds",
    "hft_root_thirds": "one root for all, thirds, pages",
}
# HFT where tasks are not there at once, in a row of its own.
ARRIVING = {"hft_arriving": "HFT, tasks one by one"}


SPEED = {
    **{f"train path {n}": f"a training step on a path of {n}, over one PEFT LoRA's" for n in (1, 4, 8)},
    **{f"train tasks {n}": f"a training step with {n} tasks, over one with 4" for n in (4, 16, 64)},
    "decode": "a token on a path of 4 nodes, over the backbone's",
    "routed prefill": "the first token after 256: asking the router and the task given, over the task given",
    **{f"mixed {n}": f"{n} rows with {n} tasks: PEFT's `adapter_names` over ours" for n in (2, 8, 16)},
    "load 1 of 64": "loading one task of 64, over loading all",
    "instead": "a training step with 4 active PEFT LoRAs, over one's",
}
# What we aim at, of those that have a goal.
SPEED_GOALS = {
    "train path 4": "≤ 1.05",
    "train tasks 64": "≤ 1.02",
    "decode": "≤ 1.10; folded, routed 1.00",
    "mixed 8": "≥ 3",
}


def mean_se(values: Sequence[float], digits: int = 1) -> str:
    """`mean ± standard error`, the latter with two values or more."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values) / len(values) ** 0.5:.{digits}f}" if len(values) > 1 else mean


def ablation(budget: str = "small") -> str:
    """Settings in rows: mean accuracy and mean loss over seven tasks, and how much better those of their base are."""
    cells = ablation_cells(SAMPLES[budget])
    lines = ["| setting | seeds | accuracy | points lost by it | loss | nats lost by it |"]
    lines.append("|---|---|---|---|---|---|")
    for setting, title in ABLATION.items():
        base = ABLATION_BASES.get(setting, "full")
        seeds = sorted(seed for name, seed in cells if name == setting and (base, seed) in cells)
        if not seeds:
            continue
        shown = []
        for measure, sign, digits in ((lambda cell: cell["value"], 1, 1), (mean_loss, -1, 3)):
            its = [measure(cells[setting, seed]) for seed in seeds]
            gaps = [sign * (measure(cells[base, seed]) - value) for seed, value in zip(seeds, its, strict=True)]
            shown += [mean_se(its, digits), mean_se(gaps, digits) if setting != "full" else ""]
        lines.append(f"| {title} | {len(seeds)} | {' | '.join(shown)} |")
    return "\n".join(lines)


def quality(budget: str, tasks: str) -> str:
    """Methods in rows, each at its own learning rate: average performance on test rows, forgetting, parameters to keep."""
    cells = read(f"quality-{budget}-{tasks}")
    above = learnable(cells)
    few = f"average over {', '.join(above)}" if above else "average over the learnable"
    lines = [
        f"| method | seeds | average (test) | {few} | forgetting | stored parameters |",
        "|---|---|---|---|---|---|",
    ]
    for method, title in titles(cells, routed=True).items():
        if not (its := runs(cells, method)):
            continue
        scores = [test_scores(cell, method) for cell in its]
        part = mean_se([statistics.mean(its[task] for task in above) for its in scores]) if above else ""
        lost = lost_points(its, method)
        forgetting, stored = mean_se(lost) if lost else "", f"{its[0]['stored'] / 1e6:.1f} M"
        lines.append(f"| {title} | {len(its)} | {mean_se(averages(scores))} | {part} | {forgetting} | {stored} |")
    return "\n".join(lines)


def titles(cells: Mapping[tuple[str, int], dict], routed: bool = False) -> dict[str, str]:
    """Method -> its name in the tables: the baselines, HFT on the hierarchy that validation rows choose, and one by one.

    Args:
        routed: with HFT routed, too.
    """
    best = own_hierarchy(cells)
    found = BASELINES.copy()
    for method, title in (({} if best is None else {best: "HFT"}) | ARRIVING).items():
        found |= {method: title, **({f"{method}_routed": f"{title}, routed"} if routed else {})}
    return found


def hierarchies(budget: str, tasks: str) -> str:
    """HFT's hierarchies in rows, the best on validation rows first: averages on these, on test rows, and routed."""
    cells = read(f"quality-{budget}-{tasks}")
    its = {method: found for method in HIERARCHIES if (found := chosen(cells, method))}
    lines = ["| HFT's hierarchy | seeds | average (validation) | average (test) | routed |", "|---|---|---|---|---|"]
    for method in sorted(its, key=lambda method: -statistics.mean(cell["value"] for cell in its[method])):
        shown = [mean_se([cell["value"] for cell in its[method]])]
        for way in (method, f"{method}_routed"):
            found = runs(cells, way)
            mean = mean_se(averages([test_scores(cell, way) for cell in found])) if found else ""
            shown.append(mean if len(found) in (0, len(its[method])) else f"{mean} ({len(found)} of them)")
        lines.append(f"| {HIERARCHIES[method]} | {len(its[method])} | {' | '.join(shown)} |")
    return "\n".join(lines)


def lost_points(cells: Sequence[Mapping], method: str) -> list[float]:
    """The forgetting of those that measured it; none of a method called `..._routed`: it was measured with tasks given."""
    if method.endswith("_routed"):
        return []
    return [cell["test"]["forgetting"] for cell in cells if "forgetting" in cell["test"]]


def averages(scores: Sequence[Mapping[str, float]]) -> list[float]:
    """Of each run the mean over its tasks."""
    return [statistics.mean(its.values()) for its in scores]


def quality_tasks(budget: str, tasks: str) -> str:
    """Tasks in rows: the commonest answer's share, whether one LoRA learns the task at all, and methods' test scores."""
    cells = read(f"quality-{budget}-{tasks}")
    named = titles(cells)
    its = {method: found for method in named if (found := runs(cells, method))}
    above = learnable(cells)
    lines = ["| task | majority | learnable | " + " | ".join(named[method] for method in its) + " |"]
    lines.append("|---" * (3 + len(its)) + "|")
    for task, guess in (its["single"][0]["test"]["majority"] if "single" in its else {}).items():
        scores = [mean_se([test_scores(cell, method)[task] for cell in found]) for method, found in its.items()]
        lines.append(f"| {task} | {guess:.1f} | {'yes' if task in above else 'no'} | {' | '.join(scores)} |")
    return "\n".join(lines)


def quality_more(budget: str, tasks: str) -> str:
    """Methods in rows: transfer, general ability without any task's path, what was trained, time and memory."""
    cells = read(f"quality-{budget}-{tasks}")
    single = runs(cells, "single")
    unseen = next((list(cell["general"]["unseen"]) for cell in cells.values() if "general" in cell), [])
    lines = [
        f"| method | backward transfer | forward transfer | perplexity | {' | '.join(unseen)} | trained | minutes | GiB |",
        "|---" * (7 + len(unseen)) + "|",
    ]
    for method, title in titles(cells).items():
        if not (its := runs(cells, method)):
            continue
        moved = [transfer(cell, single) for cell in its]
        known = [[one[i] for one in moved if one and one[i] is not None] for i in range(2)]
        shown = [mean_se(values) if values else "" for values in known]
        able = [cell["general"] for cell in its if "general" in cell]
        measured = [
            [one["perplexity"] for one in able],
            *([one["unseen"][t]["accuracy"] for one in able if t in one["unseen"]] for t in unseen),
        ]
        if method == "zero_shot" or method.startswith("hft"):  # the same in each seed: the plain backbone
            measured = [values[:1] for values in measured]
        shown += [mean_se(values) if values else "" for values in measured]
        # Not of CPUs without products of bfloat16 numbers, nor of cells that were put together.
        usual = [cell for cell in its if "through float32" not in cell.get("machine", "through float32")]
        minutes = mean_se([cell["seconds"] / 60 for cell in usual], 0) if usual else ""
        peak = f"{statistics.median(cell['peak_gib'] for cell in usual):.1f}" if usual else ""
        lines.append(f"| {title} | {' | '.join(shown)} | {its[0]['trainable'] / 1e6:.1f} M | {minutes} | {peak} |")
    return "\n".join(lines)


def transfer(cell: Mapping, single: Sequence[Mapping]) -> tuple[float | None, ...]:
    """Of a method that sees a sequence: backward transfer, and forward transfer against one LoRA a task, in points.

    Backward: what tasks gained (or, below 0, lost) from when they were learnt to the end, but for the last, which nothing
    came after. Forward: how much better a task is, as soon as it is learnt, than its own LoRA of the same seed, on the same
    rows: those that are scored twice, or for HFT, whose tasks stay as they were learnt, all. None if the LoRA's scores on
    these were not kept. Empty if the method sees no sequence, or that LoRA was not run.
    """
    own = {its["seed"]: its for its in single}.get(cell["seed"])
    if own is None or "just_learnt" not in cell["test"]:
        return ()
    first = {task: score for task, (score, _last) in cell["test"]["just_learnt"].items()}
    alone = own["test"].get("first")
    if cell["method"].startswith("hft") and all(now == then for now, then in cell["test"]["just_learnt"].values()):
        first, alone = test_scores(cell, cell["method"]), test_scores(own, "single")
    gains = [score - alone[task] for task, score in first.items()] if alone is not None else []
    return 0.0 - cell["test"]["forgetting"], statistics.mean(gains) if gains else None


def memory(name: str = "memory") -> str:
    """Tasks in rows, as they were learnt: the score with and without page 1, and what share of the update it makes up."""
    cells = read(name)
    lines = ["| task | learnt | accuracy | with page 1 off | share of page 1 in the update |", "|---|---|---|---|---|"]
    for setting in dict.fromkeys(setting for setting, _ in cells):
        its = [cell for (name, _), cell in sorted(cells.items()) if name == setting]
        way = "first, writing page 1 together" if setting == "first" else f"later, {setting.split(': ')[1]}"
        for task in its[0]["tasks"]:
            scores = [cell["tasks"][task] for cell in its]
            off = [score["without page 1"]["accuracy"] for score in scores if "without page 1" in score]
            shares = [100 * share_of_page_1(cell["added"][task]) for cell in its] if off else []
            shown = [mean_se([score["accuracy"] for score in scores]), mean_se(off) if off else "",
                     f"{mean_se(shares)} %" if shares else ""]  # fmt: skip
            lines.append(f"| {task} | {way} | {' | '.join(shown)} |")
    return "\n".join(lines)


def share_of_page_1(added: Mapping[str, list[float]]) -> float:
    """Page 1's part of the norms of all that is added, over all layers."""
    return sum(added["page:1"]) / sum(map(sum, added.values()))


def test_scores(cell: Mapping, method: str) -> dict[str, float]:
    """A cell's accuracies on test rows, with the router's tasks for a method called `..._routed`."""
    scores = cell["test"]["routed"] if method.endswith("_routed") else cell["test"]
    return {task: its["accuracy"] for task, its in scores["tasks"].items()}


def learnable(cells: Mapping[tuple[str, int], dict]) -> list[str]:
    """The tasks that one LoRA a task lifts above the commonest answer by more than two standard errors, on validation rows.

    The standard error is that of the rows, which are the same for all seeds, or over seeds if that is larger.
    """
    its = [cell["validation"] for cell in chosen(cells, "single")]
    above = []
    for task in its[0]["tasks"] if its else ():
        scores = [found["tasks"][task]["accuracy"] for found in its]
        error = statistics.mean(found["tasks"][task]["se"] for found in its)
        if len(its) > 1:
            error = max(error, statistics.stdev(scores) / len(scores) ** 0.5)
        if statistics.mean(scores) - its[0]["majority"][task] > 2 * error:
            above.append(task)
    return above


def runs(cells: Mapping[tuple[str, int], dict], method: str) -> list[dict]:
    """As `chosen`; of a method called `..._routed` those in which the router was asked, which the first ones were not."""
    its = chosen(cells, method.removesuffix("_routed"))
    return [cell for cell in its if "routed" in cell["test"]] if method.endswith("_routed") else its


def chosen(cells: Mapping[tuple[str, int], dict], method: str) -> list[dict]:
    """A method's cells at its own learning rate, by seed."""
    its = [cell for cell in cells.values() if cell["method"] == method]
    if not any(cell["seed"] == 0 for cell in its):
        return []
    rate = own_rate(its)
    return sorted((cell for cell in its if cell["learning_rate"] == rate), key=lambda cell: cell["seed"])


def own_hierarchy(cells: Mapping[tuple[str, int], dict], among: Iterable[str] = HIERARCHIES) -> str | None:
    """The best of HFT's hierarchies on validation rows, on average over the seeds of those that have run most of them."""
    values = {method: {cell["seed"]: cell["value"] for cell in chosen(cells, method)} for method in among}
    most = max(map(len, values.values()))
    if most == 0:
        return None
    found = {method: its for method, its in values.items() if len(its) == most}
    seeds = set.intersection(*map(set, found.values()))
    return max(found, key=lambda method: statistics.mean(found[method][seed] for seed in seeds))


def own_rate(cells: Sequence[Mapping]) -> float:
    """The learning rate of a method's cells that is best on validation rows: their average, over the seeds of all rates.

    With one seed a rate wins by luck: an average of six tasks, 100 rows each, is good to two points.
    """
    values: dict[float, dict[int, float]] = {}
    for cell in cells:
        values.setdefault(cell["learning_rate"], {})[cell["seed"]] = cell["value"]
    tuned = {rate: its for rate, its in values.items() if 0 in its}
    seeds = set.intersection(*(set(its) for its in tuned.values()))
    return max(tuned, key=lambda rate: statistics.mean(tuned[rate][seed] for seed in seeds))


def speed() -> str:
    """What was timed in rows: the ratio, and what else was measured with it."""
    cells = {setting: cell for (setting, _), cell in read("speed").items()}
    lines = ["| what | ratio | goal | with it |", "|---|---|---|---|"]
    for setting, title in SPEED.items():
        if setting in cells:
            cell = cells[setting]
            beside = [f"{name} {ratio:.2f}" for name, ratio in _flat(cell.get("ratio", {})) if ratio != cell["value"]]
            if setting == "routed prefill":  # whose rows may have different tasks
                times = cell["times"]
                beside.append(f"two prompts on the tasks that it finds {times['routed'] / times['given']:.2f}")
            if "bytes_per_task" in cell:
                beside.append(f"{cell['times']['one']:.1f} s, {cell['bytes_per_task'] / 1e6:.1f} MB a task")
            if setting.startswith("mixed"):  # no way to run adapters is faster than to run none
                bounds = {name: its["peft"] / its["backbone"] for name, its in cell["times"].items()}
                beside.append(
                    "PEFT over the plain backbone: "
                    + ", ".join(f"{bound:.2f} {name}" for name, bound in bounds.items())
                )
            beside += [f"{name}: does not run" for name in cell.get("does_not_run", ())]
            goal = SPEED_GOALS.get(setting, "")
            lines.append(f"| {title} | {cell['value']:.2f} | {goal} | {', '.join(beside)} |")
    return "\n".join(lines)


def _flat(ratios: Mapping[str, Any], within: str = "") -> list[tuple[str, float]]:
    found = []
    for name, value in ratios.items():
        found += _flat(value, f"{within}{name}: ") if isinstance(value, dict) else [(f"{within}{name}", value)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made = {
        "ablation": lambda: ablation(args.budget),
        "memory": memory,
        "memory_related": lambda: memory("memory-related"),
        "speed": speed,
        "quality": lambda: quality(args.budget, args.tasks),
        "hierarchies": lambda: hierarchies(args.budget, args.tasks),
        "more": lambda: quality_more(args.budget, args.tasks),
        "tasks": lambda: quality_tasks(args.budget, args.tasks),
    }
    parser.add_argument("table", choices=list(made))
    parser.add_argument("--budget", default="small")
    parser.add_argument("--tasks", default="family")
    args = parser.parse_args()
    print(made[args.table]())


if __name__ == "__main__":
    main()
