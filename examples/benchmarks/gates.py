"""How should gates reach zero? A child on a related and on an unrelated parent, with several ways to let a gate fall.

    python examples/benchmarks/gates.py --data DIR

sst2 and agnews are learnt first; then yelp with one of them as its parent, 200 samples. Scores are on validation rows.
"""

import shutil
import tempfile
from pathlib import Path

import torch
from ablation import EVAL_ROWS, MAX_INPUT_TOKENS, TRAINING
from harness import cell, parser, prepare, read_rows, sample, saved_model, score, todo, train_hft, train_open, work_of
from transformers import set_seed
from unfinished import Work


WAYS = {
    "fixed": {"gate_learning_rate": 0.0},
    "lr 1e-2": {"gate_learning_rate": 1e-2},
    "lr 5e-2": {"gate_learning_rate": 5e-2},
    "lr 2e-1": {"gate_learning_rate": 2e-1},
    "lr 2e-1, shrink 0.2": {"gate_learning_rate": 2e-1, "gate_shrink": 0.2},
}
PARENTS = {"sst2": ["sst2"], "agnews": ["agnews"]}
CHILD = "yelp"
THRESHOLD = 0.25


def main() -> None:
    arguments = parser(__doc__.splitlines()[0], "gates.jsonl")
    args = arguments.parse_args()
    backbone, tokenizer = prepare(args.backbone)
    rows = {
        (task, split): read_rows(args.data, task, split, tokenizer, MAX_INPUT_TOKENS)
        for task in ("sst2", "agnews", CHILD)
        for split in ("train", "validation")
    }
    settings = [f"{parent}: {way}" for way in WAYS for parent in PARENTS]
    base, base_seed, base_work = Path(tempfile.mkdtemp()), None, Work()
    for setting, seed in todo(args.out, "gates", settings, args.seeds):
        if seed != base_seed:
            train = {task: sample(rows[task, "train"], 200, seed) for task in ("sst2", "agnews")}
            base_work.forget()
            base_seed, base_work = seed, work_of(args.out, "gates", "base", seed)
            model = train_hft(backbone, tokenizer, {key: [] for key in train}, train, seed, TRAINING, work=base_work)
            model.save_pretrained(base)
        parent, way = setting.split(": ")
        with cell(args.out, "gates", setting, seed) as result:
            set_seed(seed)
            model = saved_model(base)
            model.add_task(CHILD, PARENTS[parent])
            train = {CHILD: sample(rows[CHILD, "train"], 200, seed)}
            train_open(model, tokenizer, train, seed, {**TRAINING, **WAYS[way]}, work=result.work)
            rows_of = {CHILD: rows[CHILD, "validation"][:EVAL_ROWS]}
            tasks = score(model, tokenizer, rows_of, lambda task: task, work=result.work)
            gates = model.gates(CHILD)
            zeros = {
                name: int((column == 0).sum()) for name, column in zip(gates.sources, gates.values.T, strict=True)
            }
            result.update(value=tasks[CHILD]["accuracy"], tasks=tasks, gates=gates.mean(), zeros=zeros)
            with torch.no_grad():  # instead of shrinking: what is small in the end is cut off
                small = gates.values.abs() < THRESHOLD
                model.hft_gates.of(CHILD)[small] = 0
            result["threshold"] = {"at": THRESHOLD, "zeros": int(small.sum())}
            if small.any():
                scores = score(model, tokenizer, rows_of, lambda task: task, work=result.work, name="threshold")
                result["threshold"].update(scores[CHILD])
    base_work.forget()
    shutil.rmtree(base)


if __name__ == "__main__":
    main()
