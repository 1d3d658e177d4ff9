"""Does the planner find a good hierarchy where rows are messages? The seven cl14 tasks of the ablation, one epoch.

    python examples/benchmarks/planner_chat.py --data DIR        # goes on where an earlier run stopped

`hft plan` and `hft train` read a folder of data as messages, in the backbone's chat template; the other benchmarks have
plain text. `plan` is the planner's hierarchy; the other settings train on one: the planner's (found), the ablation's chains,
one root a hand-made family, one root for all, or none (flat). Scores: accuracies on validation rows, options by likelihood.
"""

from ablation import EVAL_ROWS, MAX_INPUT_TOKENS, TRAINING, TREE, learn
from harness import attention, cell, find_cell, new_model, parser, prepare, read_tasks, todo
from planner_measures import as_chat, by_pair

from hft.trainers import plan_hierarchy
from hft.trainers.families import Overlaps
from hft.trainers.pilots import ProbeSettings


NAME = "planner-chat"
FAMILIES = {"sentiment": ["sst2", "yelp", "amazon"], "inference": ["rte", "mnli", "cb"]}


def on_roots(families: dict[str, list[str]]) -> dict[str, list[str]]:
    """The tasks, each on the root of its family, if it has one."""
    up = {task: root for root, its in families.items() for task in its}
    return {**{root: [] for root in families}, **{task: [up[task]] if task in up else [] for task in TREE}}


# Setting -> its hierarchy and families; of `found` the cell `plan` with seed 0 knows them.
HIERARCHIES = {
    "chains": (TREE, {}),
    "families": (on_roots(FAMILIES), FAMILIES),
    "root": (on_roots({"all": list(TREE)}), {"all": list(TREE)}),
    "flat": ({task: [] for task in TREE}, {}),
}


def main() -> None:
    arguments = parser(__doc__.splitlines()[0], "planner.jsonl")
    arguments.add_argument("--settings", default=",".join(["plan", "found", *HIERARCHIES]), help="which, by commas")
    args = arguments.parse_args()
    backbone, tokenizer = prepare(args.backbone)
    rows, validation = (
        {task: as_chat(its) for task, its in split.items()}
        for split in read_tasks(args.data, TREE, tokenizer, MAX_INPUT_TOKENS, EVAL_ROWS)
    )
    for setting, seed in todo(args.out, NAME, args.settings.split(","), args.seeds):
        plan = find_cell(args.out, NAME, "plan")
        if setting == "found" and plan is None:
            print("found: needs the cell `plan` with seed 0 first")
            continue
        with cell(args.out, NAME, setting, seed) as result:
            if setting == "plan":
                settings = ProbeSettings(max_length=TRAINING["max_length"], seed=seed)
                found = plan_hierarchy(
                    new_model(backbone, {}), rows, processing_class=tokenizer, settings=settings, progress=False
                )
                result.update(value=len(found.families), hierarchy=found.parents, families=found.families)
                result.update(overlaps=by_pair(found.overlaps or Overlaps({})))
                result.update(reasons={f"{edge.parent}>{edge.child}": str(edge) for edge in found.edges})
            else:
                tree, families = (
                    (plan["hierarchy"], plan["families"]) if setting == "found" and plan else HIERARCHIES[setting]
                )
                result.update(learn(backbone, tokenizer, tree, families, rows, validation, seed))
                result.update(attention=attention())


if __name__ == "__main__":
    main()
