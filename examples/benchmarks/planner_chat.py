"""Does the planner find a good hierarchy where rows are messages? One epoch of 200 rows a task.

    python examples/benchmarks/planner_chat.py --data DIR        # goes on where an earlier run stopped

`hft plan` and `hft train` read a folder of data as messages, in the backbone's chat template; the other benchmarks have
plain text. `--tasks alike` are the seven cl14 tasks of the ablation; `unlike` are three of them and three of reasoning-gym,
whose answers are free. `plan` is the planner's hierarchy; the other settings train on one: the planner's (found), the
ablation's chains, one root for all, one a hand-made family, one a group whose gradients overlap, or none (flat). Scores:
accuracies on validation rows, options by likelihood; of free answers those that get reasoning-gym's full marks.
"""

from collections.abc import Mapping
from typing import Any

from ablation import EVAL_ROWS, MAX_INPUT_TOKENS, SAMPLES, TRAINING, TREE, learn
from harness import attention, cell, find_cell, new_model, parser, prepare, read_tasks, todo
from planner_measures import as_chat, by_pair, of_plan

from hft.trainers import plan_hierarchy
from hft.trainers.demo import TASKS, TEST_SEED, TRAIN_SEED, make_rows
from hft.trainers.evaluation import EvalSet
from hft.trainers.families import Overlaps
from hft.trainers.metrics import find_metric
from hft.trainers.pilots import ProbeSettings


NAMES = {"alike": "planner-chat", "unlike": "planner-unlike"}
EXERCISES = {"find": "find", "reverse": "reverse", "add": "add-larger"}  # -> what the demo calls them
NUM_EXERCISES = 100  # to test on
FAMILIES = {
    "alike": {"sentiment": ["sst2", "yelp", "amazon"], "inference": ["rte", "mnli", "cb"]},
    "unlike": {"labels": ["sst2", "rte", "agnews"], "exercises": list(EXERCISES)},
}
GRADIENTS = {"family1": ["agnews", "amazon", "yelp"], "family2": ["cb", "mnli", "rte"]}  # of `alike`; of `unlike` none
ORDER = {"alike": list(TREE), "unlike": ["sst2", "rte", "agnews", *EXERCISES]}


def on_roots(tasks: list[str], families: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """The tasks, each on the root of its family, if it has one."""
    up = {task: root for root, its in families.items() for task in its}
    return {**{root: [] for root in families}, **{task: [up[task]] if task in up else [] for task in tasks}}


def hierarchies(tasks: str) -> dict[str, tuple[dict[str, list[str]], dict[str, list[str]]]]:
    """Setting -> its hierarchy and families; of `found` the cell `plan` with seed 0 knows them."""
    order, families = ORDER[tasks], FAMILIES[tasks]
    alike = {"chains": (TREE, {}), "gradients": (on_roots(order, GRADIENTS), GRADIENTS)}
    return {
        **(alike if tasks == "alike" else {}),
        "families": (on_roots(order, families), families),
        "root": (on_roots(order, {"all": order}), {"all": order}),
        "flat": ({task: [] for task in order}, {}),
    }


def exercises(count: int, seed: int, seen: Mapping[str, set[str]]) -> dict[str, list[dict[str, Any]]]:
    """Questions of reasoning-gym that were not `seen`."""
    return {task: make_rows(TASKS[name], count, seed, seen[task]) for task, name in EXERCISES.items()}


def main() -> None:
    arguments = parser(__doc__.splitlines()[0], "planner.jsonl")
    arguments.add_argument("--tasks", choices=NAMES, default="alike")
    arguments.add_argument("--settings", help="which, by commas; all by default")
    args = arguments.parse_args()
    name, trees = NAMES[args.tasks], hierarchies(args.tasks)
    settings = args.settings.split(",") if args.settings else ["plan", "found", *trees]
    backbone, tokenizer = prepare(args.backbone)
    labelled = [task for task in ORDER[args.tasks] if task in TREE]
    rows, validation = (
        {task: as_chat(its) for task, its in split.items()}
        for split in read_tasks(args.data, labelled, tokenizer, MAX_INPUT_TOKENS, EVAL_ROWS)
    )
    tests = {}
    if args.tasks == "unlike":
        seen: dict[str, set[str]] = {task: set() for task in EXERCISES}
        rows |= exercises(SAMPLES, TRAIN_SEED, seen)
        tests = {
            task: EvalSet(its, find_metric(f"reasoning_gym:{TASKS[EXERCISES[task]].family}"), 16)
            for task, its in exercises(NUM_EXERCISES, TEST_SEED, seen).items()
        }
    for setting, seed in todo(args.out, name, settings, args.seeds):
        plan = find_cell(args.out, name, "plan")
        if setting == "found" and plan is None:
            print("found: needs the cell `plan` with seed 0 first")
            continue
        with cell(args.out, name, setting, seed) as result:
            if setting == "plan":
                probes = ProbeSettings(max_length=TRAINING["max_length"], seed=seed)
                found = plan_hierarchy(
                    new_model(backbone, {}), rows, processing_class=tokenizer, settings=probes, progress=False
                )
                result.update(value=len(found.families), **of_plan(found))
                result.update(overlaps=by_pair(found.overlaps or Overlaps({})))
                result.update(reasons={f"{edge.parent}>{edge.child}": str(edge) for edge in found.edges})
                continue
            tree, families = (plan["hierarchy"], plan["families"]) if setting == "found" and plan else trees[setting]
            result.update(learn(backbone, tokenizer, tree, families, rows, validation, seed, result.work, tests))
            result.update(attention=attention())


if __name__ == "__main__":
    main()
