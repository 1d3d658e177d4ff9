"""How should tasks learn on a root that has learnt from all their rows? Six cl14 tasks, validation rows only.

    python examples/benchmarks/refining.py --data DIR            # goes on where an earlier run stopped

A root learns for two epochs or 2.7 of three, without memory; then the tasks learn on it, each its own node, for some of an
epoch and at a learning rate of their own. Scores are accuracies on 100 validation rows, options by likelihood.
"""

import ablation
from harness import (
    attention,
    cell,
    mean_accuracy,
    parser,
    prepare,
    rows_of_roots,
    sample,
    saved_model,
    score,
    todo,
    train_hft,
    train_open,
    work_of,
)
from hft_methods import NO_MEMORY
from quality import BUDGETS, FAMILY, RANK, read_shuffled
from transformers import set_seed


TRAINING = {**ablation.TRAINING, "gate_learning_rate": 5e-2, "route_samples": 0}
SMALL = BUDGETS["small"]
# Setting -> epochs of the root, and how its tasks' training differs; None: the root alone.
SETTINGS = {
    "root 2": (2.0, None),
    "root 2, tasks 1 at 2e-3": (2.0, {"num_train_epochs": 1.0}),
    "root 2, tasks 1 at 5e-4": (2.0, {"num_train_epochs": 1.0, "learning_rate": 5e-4}),
    "root 2, tasks 1 at 2e-4": (2.0, {"num_train_epochs": 1.0, "learning_rate": 2e-4}),
    "root 2.7": (2.7, None),
    "root 2.7, tasks 0.3 at 5e-4": (2.7, {"num_train_epochs": 0.3, "learning_rate": 5e-4}),
    "root 2.7, tasks 0.3 at 2e-4": (2.7, {"num_train_epochs": 0.3, "learning_rate": 2e-4, "gate_learning_rate": 5e-3}),
}


def main() -> None:
    arguments = parser(__doc__.splitlines()[0], "refining.jsonl")
    arguments.add_argument("--settings", default=";".join(SETTINGS), help="which of them, by semicolons")
    args = arguments.parse_args()
    backbone, tokenizer = prepare(args.backbone)
    rows, validation = (
        {task: read_shuffled(args.data, task, split, tokenizer, SMALL) for task in FAMILY}
        for split in ("train", "validation")
    )
    for setting, seed in todo(args.out, "refining", args.settings.split(";"), args.seeds):
        epochs, own = SETTINGS[setting]
        train = {task: sample(rows[task], SMALL["samples"], seed) for task in FAMILY}
        root_work = work_of(args.out, "refining-shared", f"root {epochs:g}", seed)  # for all settings that stand on it
        assert root_work.folder is not None
        folder = root_work.folder / "root"
        with cell(args.out, "refining", setting, seed) as result:
            if not (folder / "config.json").exists():
                training = {**TRAINING, "num_train_epochs": epochs}
                all_rows = rows_of_roots(train, {"all": FAMILY})
                made = train_hft(
                    backbone,
                    tokenizer,
                    {"all": []},
                    all_rows,
                    seed,
                    training,
                    work=root_work,
                    rank=RANK,
                    **NO_MEMORY,
                )
                made.save_pretrained(folder)
            set_seed(seed)
            model = saved_model(folder)
            if own is not None:
                for task in FAMILY:
                    model.add_task(task, ["all"])
                train_open(model, tokenizer, train, seed, {**TRAINING, **own}, work=result.work)
            model.eval()
            name = (lambda task: "all") if own is None else (lambda task: task)
            tasks = score(model, tokenizer, validation, name, work=result.work)
            result.update(value=mean_accuracy(tasks), tasks=tasks, attention=attention())


if __name__ == "__main__":
    main()
