"""Does the planner find a good hierarchy? The seven cl14 tasks of the ablation.

    python examples/benchmarks/planner.py --data DIR             # goes on where an earlier run stopped

measures: complexities and gains of all pairs, each kind of loss side by side, and the plan of each.
alone, PARENT>CHILD: the truth: the child's accuracy with 200 rows, without and with a parent that was trained on 200 rows.
found: the ablation's training on the hierarchy that the planner finds, to compare with its settings full, flat, reversed.
"""

import statistics

from ablation import EVAL_ROWS, MAX_INPUT_TOKENS, TRAINING, TREE
from harness import NF4, cell, mean_accuracy, parser, prepare, read_cells, read_tasks, sample, score, todo, train_hft
from transformers import BitsAndBytesConfig

import hft
from hft.hierarchy_hft import BACKBONE
from hft.trainers.calibration import calibrated_losses
from hft.trainers.evaluation import option_likelihoods, reference
from hft.trainers.planner import TaskProbe, make_plan
from hft.trainers.probes import ProbeSettings, pilot, take_sample, untouched


# Related and unrelated, easy and hard, both ways round.
PAIRS = [
    ("sst2", "yelp"), ("yelp", "amazon"), ("amazon", "yelp"), ("yelp", "sst2"), ("agnews", "yelp"), ("rte", "amazon"),
    ("rte", "cb"), ("mnli", "cb"), ("cb", "rte"), ("sst2", "cb"), ("agnews", "rte"), ("mnli", "agnews"),
]  # fmt: skip
MEASURES = ("calibrated", "options", "tokens")
ROWS = 200


def losses_of(likelihoods, probe) -> dict[str, list[float]]:
    """Three losses a row: over the options, calibrated and not, and of the answer's tokens as they are."""
    options = [row["options"] for row in probe]
    answers = [row["options"].index(reference(row)) for row in probe]
    import torch

    over = [torch.tensor(its, dtype=torch.float64).log_softmax(0).tolist() for its in likelihoods]
    return {
        "calibrated": calibrated_losses(likelihoods, answers, options),
        "options": [-its[answer] for its, answer in zip(over, answers, strict=True)],
        "tokens": [-its[answer] for its, answer in zip(likelihoods, answers, strict=True)],
    }


def measures(backbone, tokenizer, rows, seed: int) -> dict:
    """Each measure's losses of all pairs, as gains with errors, complexities, and the hierarchy that they lead to."""
    settings = ProbeSettings(max_length=192, seed=seed)
    model = hft.HFTForCausalLM.from_backbone(backbone, {}, quantization_config=BitsAndBytesConfig(**NF4))
    samples = {task: take_sample(task, its, tokenizer, settings) for task, its in rows.items()}
    raw = {task: {} for task in samples}
    with untouched(model):
        for task, its in samples.items():
            raw[task][BACKBONE] = option_likelihoods(model, tokenizer, its.probe, None)
        for source, its in samples.items():
            with pilot(model, its.pilot, settings) as name:
                for task, other in samples.items():
                    raw[task][source] = option_likelihoods(model, tokenizer, other.probe, name)
    result = {}
    for measure in MEASURES:
        probes = {}
        for task, its in samples.items():
            losses = {source: losses_of(likelihoods, its.probe)[measure] for source, likelihoods in raw[task].items()}
            own, base = losses.pop(task), statistics.fmean(losses[BACKBONE])
            probes[task] = TaskProbe(
                statistics.fmean(own) / base, statistics.stdev(own) / len(own) ** 0.5 / base, losses, its.note
            )
        plan = make_plan(probes)
        result[measure] = {
            "hierarchy": plan.parents,
            "complexity": {task: round(probe.complexity, 4) for task, probe in probes.items()},
            "gains": {f"{e.parent}>{e.child}": [round(e.gain, 4), round(e.error, 4)] for e in plan.edges},
        }
    return result


def main() -> None:
    arguments = parser(__doc__.splitlines()[0], "planner.jsonl")
    settings = ["measures", *(f"alone: {task}" for task in TREE), *(f"{up}>{down}" for up, down in PAIRS), "found"]
    arguments.add_argument("--settings", default=",".join(settings), help="which of them, by commas")
    args = arguments.parse_args()
    backbone, tokenizer = prepare(args.backbone)
    rows, validation = read_tasks(args.data, TREE, tokenizer, MAX_INPUT_TOKENS, EVAL_ROWS)
    for setting, seed in todo(args.out, "planner", args.settings.split(","), args.seeds):
        if setting == "measures":
            with cell(args.out, "planner", setting, seed) as result:
                found = measures(backbone, tokenizer, {task: rows[task] for task in TREE}, seed)
                result.update(value=sum(map(len, found[MEASURES[0]]["hierarchy"].values())), measures=found)
            continue
        if setting == "found":
            seen = [c for c in read_cells(args.out) if (c["setting"], c["seed"]) == ("measures", seed)]
            if not seen:
                print(f"found, seed {seed}: needs the cell `measures` first")
                continue
            tree = seen[0]["measures"][MEASURES[0]]["hierarchy"]
        elif setting.startswith("alone: "):
            tree = {setting.removeprefix("alone: "): []}
        else:
            parent, child = setting.split(">")
            tree = {parent: [], child: [parent]}
        with cell(args.out, "planner", setting, seed) as result:
            train = {task: sample(rows[task], ROWS, seed) for task in tree}
            model = train_hft(backbone, tokenizer, tree, train, seed, TRAINING)
            last = list(tree) if setting == "found" else list(tree)[-1:]
            tasks = score(model, tokenizer, {task: validation[task] for task in last}, lambda task: task)
            result.update(value=mean_accuracy(tasks), tasks=tasks, hierarchy=tree)


if __name__ == "__main__":
    main()
