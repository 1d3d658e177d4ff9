"""Do the memory's slots hold what is shared? Tasks write a page together; other tasks come later.

    python examples/benchmarks/memory.py --data DIR --world unrelated    # or related

Tasks are learnt first and write page 1 together. Then others, each on its own and as a root, which (a) read page 1 from the
start, or let it in from 0, or are learnt in a model without it. For each task the share of (b) memory and nodes in what is
added at each layer, and (c) the score with page 1 switched off. Validation rows.

In the world `unrelated` sst2 (sentiment) and agnews (topic) come first, then yelp and mnli. In the world `related` two tasks
of sentiment and two of inference come first and share optimizer steps on a page as large as a node, which their own nodes
refine; then a third of each, and agnews.
"""

import tempfile
from dataclasses import dataclass, field
from typing import Any

import torch
from ablation import EVAL_ROWS, MAX_INPUT_TOKENS, TRAINING
from harness import (
    cell,
    parser,
    prepare,
    read_tasks,
    refining_together,
    sample,
    saved_model,
    score,
    todo,
    train_hft,
    train_open,
    work_of,
)
from transformers import set_seed
from unfinished import Work

import hft
from hft.trainers.interference import switched_off


@dataclass
class World:
    """Who comes when.

    Args:
        name: of its cells.
        first: the tasks that write page 1.
        later: those that may read it.
        training: arguments of the training of the first.
        slots: of page 1.
    """

    name: str
    first: tuple[str, ...]
    later: tuple[str, ...]
    training: dict[str, Any] = field(default_factory=lambda: TRAINING)
    slots: int = 8


TOGETHER = ("sst2", "yelp", "rte", "mnli")
WORLDS = {
    "unrelated": World("memory", ("sst2", "agnews"), ("yelp", "mnli")),
    "related": World(
        "memory-related", TOGETHER, ("amazon", "cb", "agnews"), refining_together(TRAINING, TOGETHER), 16
    ),
}
WAYS = {"reads page 1": {"root_init": 1.0}, "from 0": {"root_init": 0.0}, "without page 1": None}


@torch.no_grad()
def norms(model: hft.HFTForCausalLM, task: str) -> dict[str, list[float]]:
    """How much each source adds at each layer: the sum over the layer's linears of |g| * ||B A||, Frobenius norms."""
    sources, gates_LN = model.sources(task), model.hft_gates.of(task)
    total_LN = torch.zeros(gates_LN.shape)
    for column, name in enumerate((*sources.nodes, *sources.pages)):
        for key, nodes in model.hft_nodes.items():
            factors = nodes if column < len(sources.nodes) else dict(model.hft_memory.items()).get(key)
            if factors is not None:
                down_RI, up_OR = (factor.float() for factor in factors.pair(name))
                norm = ((up_OR.T @ up_OR) * (down_RI @ down_RI.T)).sum().clamp(min=0).sqrt()
                total_LN[nodes.layer, column] += gates_LN[nodes.layer, column].abs() * norm
    columns = total_LN.T.tolist()
    return {label: [round(x, 3) for x in column] for label, column in zip(sources.labels(), columns, strict=True)}


def score_without(
    model: hft.HFTForCausalLM, tokenizer: Any, rows: list[dict], task: str, page: int, work: Work
) -> dict:
    """The task's score with its gates on a page at 0."""
    with switched_off(model, task, f"page:{page}"):
        return score(model, tokenizer, {task: rows}, lambda task: task, work=work, name=f"without {page}")[task]


def main() -> None:
    arguments = parser(__doc__.splitlines()[0], "memory.jsonl")
    arguments.add_argument("--world", default="unrelated", choices=list(WORLDS))
    args = arguments.parse_args()
    world = WORLDS[args.world]
    first, memory = world.first, {"slots": world.slots}
    backbone, tokenizer = prepare(args.backbone)
    rows, validation = read_tasks(args.data, first + world.later, tokenizer, MAX_INPUT_TOKENS, EVAL_ROWS)
    settings = ["first", *(f"{task}: {way}" for task in world.later for way in WAYS)]
    base = tempfile.TemporaryDirectory()
    base_seed, base_work = None, Work()
    for setting, seed in todo(args.out, world.name, settings, args.seeds):
        if seed != base_seed:
            train = {task: sample(rows[task], 200, seed) for task in first}
            tree = {task: [] for task in first}
            base_work.forget()
            base_seed, base_work = seed, work_of(args.out, world.name, "base", seed)
            model = train_hft(
                backbone, tokenizer, tree, train, seed, world.training, work=base_work, memory_config=memory
            )
            model.save_pretrained(base.name)
        with cell(args.out, world.name, setting, seed) as result:
            if setting == "first":
                work, its_rows = result.work, {task: validation[task] for task in first}
                tasks = score(model, tokenizer, its_rows, lambda task: task, work=work)
                for task in first:
                    tasks[task]["without page 1"] = score_without(model, tokenizer, its_rows[task], task, 1, work)
                added = {task: norms(model, task) for task in first}
                fall = sum(its["accuracy"] - its["without page 1"]["accuracy"] for its in tasks.values())
                result.update(value=round(fall / len(first), 3), tasks=tasks, added=added)
                continue
            task, way = setting.split(": ")
            train = {task: sample(rows[task], 200, seed)}
            if WAYS[way] is None:
                model = train_hft(
                    backbone, tokenizer, {task: []}, train, seed, TRAINING, work=result.work, memory_config=memory
                )
            else:
                set_seed(seed)
                model = saved_model(base.name)
                model.hft_gates.root_page_start = WAYS[way]["root_init"]
                model.add_task(task)
                train_open(model, tokenizer, train, seed, TRAINING, work=result.work)
            tasks = score(model, tokenizer, {task: validation[task]}, lambda task: task, work=result.work)
            if WAYS[way] is not None:
                tasks[task]["without page 1"] = score_without(model, tokenizer, validation[task], task, 1, result.work)
            result.update(value=tasks[task]["accuracy"], tasks=tasks, added={task: norms(model, task)})
            result.update(gates=model.gates(task).mean())
    base_work.forget()
    base.cleanup()


if __name__ == "__main__":
    main()
