"""Do the memory's slots hold what is shared? Two unrelated tasks write a page; unrelated tasks come later.

    python examples/benchmarks/memory.py --data DIR

sst2 (sentiment) and agnews (topic) are learnt first and write page 1 together. Then, each on its own and as a root: yelp and
mnli, which (a) read page 1 from the start, or let it in from 0, or are learnt in a model without it. For each task the share
of (b) memory and nodes in what is added at each layer, and (c) the score with page 1 switched off. Validation rows.
"""

import tempfile

import torch
from ablation import EVAL_ROWS, MAX_INPUT_TOKENS, TRAINING
from harness import cell, parser, prepare, read_tasks, sample, saved_model, score, todo, train_hft, train_open
from transformers import set_seed

import hft
from hft.trainers.interference import switched_off


FIRST = ("sst2", "agnews")
LATER = ("yelp", "mnli")
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


def score_without(model: hft.HFTForCausalLM, tokenizer, rows, task: str, page: int) -> dict:
    """The task's score with its gates on a page at 0."""
    with switched_off(model, task, f"page:{page}"):
        return score(model, tokenizer, {task: rows}, lambda task: task)[task]


def main() -> None:
    args = parser(__doc__.splitlines()[0], "memory.jsonl").parse_args()
    backbone, tokenizer = prepare(args.backbone)
    rows, validation = read_tasks(args.data, FIRST + LATER, tokenizer, MAX_INPUT_TOKENS, EVAL_ROWS)
    settings = ["first", *(f"{task}: {way}" for task in LATER for way in WAYS)]
    base = tempfile.TemporaryDirectory()
    base_seed = None
    for setting, seed in todo(args.out, "memory", settings, args.seeds):
        if seed != base_seed:
            train = {task: sample(rows[task], 200, seed) for task in FIRST}
            model = train_hft(backbone, tokenizer, {task: [] for task in FIRST}, train, seed, TRAINING)
            model.save_pretrained(base.name)
            base_seed = seed
        with cell(args.out, "memory", setting, seed) as result:
            if setting == "first":
                tasks = score(model, tokenizer, {task: validation[task] for task in FIRST}, lambda task: task)
                for task in FIRST:
                    tasks[task]["without page 1"] = score_without(model, tokenizer, validation[task], task, 1)
                added = {task: norms(model, task) for task in FIRST}
                value = sum(tasks[task]["accuracy"] - tasks[task]["without page 1"]["accuracy"] for task in FIRST) / 2
                result.update(value=round(value, 3), tasks=tasks, added=added)
                continue
            task, way = setting.split(": ")
            train = {task: sample(rows[task], 200, seed)}
            if WAYS[way] is None:
                model = train_hft(backbone, tokenizer, {task: []}, train, seed, TRAINING)
            else:
                set_seed(seed)
                model = saved_model(base.name)
                model.hft_gates.root_page_start = WAYS[way]["root_init"]
                model.add_task(task)
                train_open(model, tokenizer, train, seed, TRAINING)
            tasks = score(model, tokenizer, {task: validation[task]}, lambda task: task)
            if WAYS[way] is not None:
                tasks[task]["without page 1"] = score_without(model, tokenizer, validation[task], task, 1)
            result.update(value=tasks[task]["accuracy"], tasks=tasks, added={task: norms(model, task)})
            result.update(gates=model.gates(task).mean())
    base.cleanup()


if __name__ == "__main__":
    main()
