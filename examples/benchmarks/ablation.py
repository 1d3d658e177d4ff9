"""Does each part of HFT earn its place? Seven cl14 tasks, each setting with one part switched off or changed.

    python examples/benchmarks/ablation.py --data DIR            # goes on where an earlier run stopped

Two families (sentiment: sst2 -> yelp -> amazon; inference: rte -> mnli -> cb) and one unrelated task (agnews). Scores are
accuracies on validation rows, options by likelihood.
"""

import functools
import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any

from harness import (
    accuracy,
    attention,
    cell,
    mean_accuracy,
    parser,
    prepare,
    read_tasks,
    refining_together,
    sample,
    score,
    todo,
    train_hft,
    with_roots,
)
from unfinished import Work

import hft
from hft.gates_hft import HFTGateTable
from hft.trainers import HFTTrainer
from hft.trainers.curriculum import BlockSampler
from hft.trainers.evaluation import EvalSet, score_task
from hft.trainers.row_tokens import tokenize_rows


TREE = {
    "sst2": [],
    "yelp": ["sst2"],
    "amazon": ["yelp"],
    "rte": [],
    "mnli": ["rte"],
    "cb": ["mnli"],
    "agnews": [],
}
FLAT = {task: [] for task in TREE}
ROOT = {"all": [], **{task: ["all"] for task in TREE}}  # what the planner finds
MAX_INPUT_TOKENS = 64
EVAL_ROWS = 200
SAMPLES = 200
DECIDING_ROWS = 100  # whether a refresh of gates is kept
TRAINING = {
    "num_train_epochs": 1,
    "per_device_train_batch_size": 8,
    "learning_rate": 2e-3,  # of 1e-3, 2e-3, 4e-3 the best on the validation rows of yelp and cb
    "lr_scheduler_type": "linear",
    "warmup_steps": 3,
    "max_length": 192,
}


class InSequence(HFTTrainer):
    """Within a stage, all blocks of one task come before the next task's."""

    def make_sampler(self) -> BlockSampler:
        sampler = super().make_sampler()
        return SequentialSampler(sampler.num_rows, sampler.block_size, sampler.seed, sampler.passes)


class SharingAnyway(HFTTrainer):
    """A stage's tasks share optimizer steps even where they write no page."""

    def make_sampler(self) -> BlockSampler:
        sampler = super().make_sampler()
        return self.args.sampler(sampler.num_rows, sampler.block_size, self.stage.tasks)


class SequentialSampler(BlockSampler):
    def turns(self, epoch: int) -> list[str]:
        return sorted(super().turns(epoch), key=list(self.num_rows).index)


def random_parents(seed: int, but: Mapping[str, list[str]] = FLAT) -> dict[str, list[str]]:
    """Each task keeps its level; its parent is any task of the level below, `but` those named for it.

    With none named, three of the four edges stay as made by hand.
    """
    draw, levels = random.Random(seed), hft.Hierarchy(TREE).levels()
    tree: dict[str, list[str]] = {task: [] for task in levels[0]}
    for below, level in itertools.pairwise(levels):
        tree.update({task: [draw.choice([up for up in below if up not in but[task]])] for task in level})
    return tree


def reversed_tree() -> dict[str, list[str]]:
    """Each edge turned round."""
    tree = {task: [] for task in TREE}
    for task, parents in TREE.items():
        for parent in parents:
            tree[parent].append(task)
    return tree


def learn(
    backbone: str,
    tokenizer: Any,
    tree: Mapping[str, list[str]],
    families: Mapping[str, Sequence[str]],
    rows: Mapping[str, list[dict]],
    validation: dict[str, list[dict]],
    seed: int,
    work: Work,
    tests: Mapping[str, EvalSet] | None = None,
) -> dict[str, Any]:
    """Scores of the tasks after one epoch of `SAMPLES` rows each on a hierarchy, roots of families included, for a cell.

    Those of `validation` choose among options; those of `tests` answer freely, and full marks count.
    """
    train = {task: sample(its, SAMPLES, seed) for task, its in rows.items()}
    train, training = with_roots(train, families, TRAINING)
    model = train_hft(backbone, tokenizer, tree, train, seed, training, work=work)
    tasks = score(model, tokenizer, validation, lambda task: task, work=work)
    for task, data in (tests or {}).items():
        marks = work.remember(f"test: {task}", lambda task=task, data=data: score_task(model, tokenizer, data, task))
        tasks[task] = accuracy([float(mark == 1) for mark in marks])
    return {"value": mean_accuracy(tasks), "tasks": tasks, "hierarchy": dict(tree)}


def refresh(
    model: hft.HFTForCausalLM, tokenizer: Any, rows: Mapping[str, list[dict]], samples: int, seed: int
) -> dict[str, Any]:
    """Learns each task's gates anew over all nodes and pages, on its `samples` training rows; up to 100 others decide.

    Returns:
        For each task what its refresh found out, in nats a token.
    """
    found = {}
    for task, its in rows.items():
        some = tokenize_rows(sample(its, samples + DECIDING_ROWS, seed), tokenizer, TRAINING["max_length"])
        result = model.refresh_gates(task, some[:samples], validation=some[samples:] or None, seed=seed)
        changes = {name: round(getattr(result, name), 4) for name in ("before", "after", "error")}
        found[task] = {"kept": result.kept, **changes, "gates": mean_gates(result.gates)}
    return found


def mean_gates(gates: HFTGateTable) -> dict[str, float]:
    """Source -> mean gate over the layers, rounded for a cell."""
    return {source: round(mean, 4) for source, mean in gates.mean().items()}


# The same rows a step in four micro-batches, which may be of different tasks where these write a page together.
MIXED = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}

# ... on a page as large as a node, which the tasks' own nodes only refine.
REFINED = refining_together(TRAINING, TREE)

# Setting -> hierarchy for a seed, and what differs from the full method.
SETTINGS = {
    "full": (lambda seed: TREE, {}),
    "no_memory": (lambda seed: TREE, {"memory_config": {"read": "off"}}),
    "no_gates": (lambda seed: TREE, {"gating_config": {"trainable": False}}),
    "mixed": (lambda seed: TREE, {"training": MIXED}),
    "flat": (lambda seed: FLAT, {}),
    "flat_mixed": (lambda seed: FLAT, {"training": MIXED}),
    "flat_mixed_no_memory": (
        lambda seed: FLAT,
        {"memory_config": {"read": "off"}, "training": MIXED, "trainer_class": SharingAnyway},
    ),
    "flat_no_memory": (lambda seed: FLAT, {"memory_config": {"read": "off"}, "training": MIXED}),
    "flat_refined": (lambda seed: FLAT, {"memory_config": {"slots": 16}, "training": REFINED}),
    "random_parents": (random_parents, {}),
    "other_parents": (functools.partial(random_parents, but=TREE), {}),
    "reversed": (lambda seed: reversed_tree(), {}),
    "sequential": (lambda seed: TREE, {"trainer_class": InSequence}),
    "root": (lambda seed: ROOT, {"families": {"all": list(TREE)}}),
    "root_no_gates": (lambda seed: ROOT, {"families": {"all": list(TREE)}, "gating_config": {"trainable": False}}),
}


def main() -> None:
    arguments = parser(__doc__.splitlines()[0], "ablation.jsonl")
    arguments.add_argument("--settings", default=",".join(SETTINGS), help="which of them, by commas")
    arguments.add_argument("--samples", type=int, default=SAMPLES, help="training rows a task; 0 for all")
    args = arguments.parse_args()
    name = f"ablation-{args.samples or 'all'}"
    backbone, tokenizer = prepare(args.backbone)
    rows, validation = read_tasks(args.data, TREE, tokenizer, MAX_INPUT_TOKENS, EVAL_ROWS)
    for setting, seed in todo(args.out, name, args.settings.split(","), args.seeds):
        hierarchy, options = SETTINGS[setting]
        tree, options = hierarchy(seed), dict(options)
        with cell(args.out, name, setting, seed) as result:
            train = {task: sample(rows[task], args.samples or None, seed) for task in TREE}
            training = {**TRAINING, **options.pop("training", {})}
            train, training = with_roots(train, options.pop("families", {}), training)
            model = train_hft(backbone, tokenizer, tree, train, seed, training, work=result.work, **options)
            tasks = score(model, tokenizer, validation, lambda task: task, work=result.work)
            gates = {task: mean_gates(model.gates(task)) for task in TREE}
            result.update(value=mean_accuracy(tasks), tasks=tasks, hierarchy=tree, gates=gates, training=training)
            result.update(attention=attention())
            # Of the same model, so that the two scores differ by nothing else.
            if setting in ("full", "root") and args.samples:
                changes = refresh(model, tokenizer, rows, args.samples, seed)
                tasks = score(model, tokenizer, validation, lambda task: task)
                result["refreshed"] = {"value": mean_accuracy(tasks), "tasks": tasks, "changes": changes}


if __name__ == "__main__":
    main()
