"""Does HFT learn several tasks better than one LoRA for all, or one each, and what is forgotten?

    python examples/benchmarks/quality.py --data DIR --tasks family --budget small    # goes on where it stopped

The full budget is for a GPU, which no committed cell had yet. A cell there is up to 32,064 training rows and 13,643 to be
answered, so begin with what the comparison rests on, at one rate:

    python examples/benchmarks/quality.py --data DIR --tasks cl14 --budget full --seeds 1 --rates 1e-3 \
        --methods zero_shot,single,joint,sequential,olora,hft_root_no_memory

A cell is a method at a learning rate with a seed. With seed 0 each method runs at every rate of the grid; the rate with the
best average on validation rows (over the seeds that all its rates have run) is its own, and runs with the further seeds.
Test rows are scored in the same pass; no choice goes by them, and the tables show them for the chosen rate.
"""

import gc
import json
import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from baselines import METHODS, Setup
from harness import (
    RESULTS,
    accuracy,
    attention,
    cell,
    find_cell,
    mean_accuracy,
    own_cells,
    parser,
    prepare,
    read_rows,
    sample,
    score,
)
from hft_methods import CL14, HFT_METHODS
from table import LOW_RESOURCE, own_rate
from unfinished import Work

from hft.trainers.evaluation import score_options


FAMILY = ["yelp", "amazon", "mnli", "cb", "rte", "sst2"]
TASK_SETS = {"cl14": list(CL14), "family": FAMILY, "low_resource": list(LOW_RESOURCE)}
# What is left of general ability is told by two of these that are not trained: of cl14, or of reasoning-gym.
UNSEEN, GAMES = ["copa", "boolq"], {"syllogism": ("Yes", "No"), "ransom_note": ("True", "False")}
GRID = (1e-3, 2e-3)
SMALL = {"samples": 200, "rows": {"validation": 100, "test": 200}, "max_input_tokens": 64, "batch": 8}
BUDGETS: dict[str, dict[str, Any]] = {
    "short": {**SMALL, "epochs": 1},  # too short for most tasks: see the README
    "small": {**SMALL, "epochs": 3},
    "medium": {**SMALL, "samples": 1000, "epochs": 1},  # with half as many steps again as small
    "full": {
        "samples": None,
        "rows": {"validation": None, "test": None},
        "max_input_tokens": 200,
        "batch": 16,
        "epochs": 1,
    },
}
FORGETTING_ROWS = 100  # of each task's test rows: scored when the task was learnt, and again in the end
RANK = 16
ALL = {**METHODS, **HFT_METHODS}


def routed_score(
    model: Any, tokenizer: Any, rows: dict[str, list[dict]], given: dict[str, list[float]], work: Work
) -> dict[str, Any]:
    """Scores where the router names the task of each row.

    Args:
        given: task -> whether each row was right with its task given, which need not be computed again.
        work: of the cell.
    """

    def scored(task: str) -> dict[str, Any]:
        features = model.features_of([tokenizer(row["prompt"])["input_ids"] for row in rows[task]])
        named = [route.task for route in model.route_features(features)]
        right = list(given[task])
        for name in set(named) - {task}:
            places = [i for i, its_name in enumerate(named) if its_name == name]
            which = None if name == "backbone" else name
            of_name = score_options(model, tokenizer, [rows[task][i] for i in places], which)[0]
            for i, is_right in zip(places, of_name, strict=True):
                right[i] = is_right
        found = accuracy([float(name == task) for name in named])["accuracy"]
        return {**accuracy(right), "found": found}

    return {task: work.remember(f"routed: {task}", lambda task=task: scored(task)) for task in rows}


def general_ability(model: Any, tokenizer: Any, rows: dict[str, list[dict]], texts: list[str], work: Work) -> dict:
    """Perplexity a token on news passages, and accuracy on tasks that nothing was trained on; without any task's path."""

    @torch.inference_mode()
    def perplexity() -> float:
        loss, tokens = 0.0, 0
        for text in texts:
            ids = tokenizer(text, return_tensors="pt")["input_ids"].to(model.device)
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            loss += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
            tokens += ids.shape[1] - 1
        return round(math.exp(loss / tokens), 4)

    unseen = score(model, tokenizer, rows, lambda task: None, work=work, name="unseen")
    return {"perplexity": work.remember("perplexity", perplexity), "unseen": unseen}


def majority(rows: list[dict]) -> float:
    """The share of the commonest answer, in %."""
    answers = [row["completion"] for row in rows]
    return round(100 * max(answers.count(answer) for answer in set(answers)) / len(answers), 2)


def read_shuffled(data: str, task: str, split: str, tokenizer: Any, budget: Mapping[str, Any]) -> list[dict]:
    """A split's rows in a random order that is always the same; of validation and test rows as many as the budget has."""
    rows = read_rows(data, task, split, tokenizer, budget["max_input_tokens"])
    random.Random(0).shuffle(rows)
    return rows[: budget["rows"].get(split)]


def game_rows(family: str, size: int = 100) -> list[dict[str, Any]]:
    """Questions of a reasoning-gym family whose answers are one of two words, as rows."""
    try:
        import reasoning_gym
    except ImportError:
        raise SystemExit(f"{family} is a task of reasoning-gym: pip install '.[demo]'") from None
    entries = reasoning_gym.create_dataset(family, size=size, seed=0)
    options = [f" {option}" for option in GAMES[family]]
    return [
        {"prompt": f"{entry['question'].strip()}\nAnswer:", "completion": f" {entry['answer']}", "options": options}
        for entry in entries
    ]


class Benchmark:
    """The data of a budget, and the cells of its result file."""

    def __init__(self, args: Any):
        self.budget, self.name = BUDGETS[args.budget], f"quality-{args.budget}-{args.tasks}"
        self.tasks = TASK_SETS.get(args.tasks) or args.tasks.split(",")
        self.out: Path = args.out
        self.backbone, self.tokenizer = prepare(args.backbone)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

        def read(task: str, split: str) -> list[dict]:
            return read_shuffled(args.data, task, split, self.tokenizer, self.budget)

        self.rows = {split: {t: read(t, split) for t in self.tasks} for split in ("train", "validation", "test")}
        unseen = [task for task in UNSEEN if task not in self.tasks]
        self.unseen = {task: read(task, "validation") for task in unseen}
        self.unseen |= {game: game_rows(game) for game in list(GAMES)[: len(UNSEEN) - len(unseen)]}
        self.texts = [row["prompt"].split("\n", 2)[-1] for row in read("agnews", "validation")[:50]]

    def run(self, method: str, rate: float, seed: int) -> None:
        """One cell, if it is not there yet."""
        setting = f"{method}@{rate:g}"
        if find_cell(self.out, self.name, setting, seed) is not None:
            return
        with cell(self.out, self.name, setting, seed) as result:
            is_hft = method.startswith("hft")
            result.update(method=method, learning_rate=rate, attention=attention())
            result["questions"] = "whole"  # in cells without this, those of boolq had been cut off
            if is_hft:
                result["gates"] = "inherited"  # those that learn; in cells without this, a task's own did, too
            just_learnt: dict[str, list[float]] = {}

            def scores_of(name: str, task: str, rows: list[dict], model: Any, **options: Any) -> dict[str, Any]:
                path = task if is_hft else None
                return score(
                    model, self.tokenizer, {task: rows}, lambda _: path, work=result.work, name=name, **options
                )

            def after_task(task: str, model_of: Any) -> None:
                rows = self.rows["test"][task][:FORGETTING_ROWS]
                scores_of("just learnt", task, rows, model_of(task), right_of=just_learnt)

            with_options = {t: sample(self.rows["train"][t], self.budget["samples"], seed, True) for t in self.tasks}

            setup = Setup(
                self.backbone,
                self.tokenizer,
                self.tasks,
                {t: its.remove_columns("options") for t, its in with_options.items()},
                with_options,
                RANK,
                {
                    "num_train_epochs": self.budget["epochs"],
                    "per_device_train_batch_size": self.budget["batch"],
                    "learning_rate": rate,
                    "lr_scheduler_type": "linear",
                    "warmup_steps": 3,
                    "max_length": self.budget["max_input_tokens"] + 128,
                },
                seed,
                after_task,
                result.work,
            )
            outcome = ALL[method](setup)
            num_rows = {task: len(its) for task, its in setup.train.items()}
            result.update(config={"rank": RANK, "rows": num_rows, **setup.training}, steps=result.work.steps())
            for split in ("validation", "test"):
                scores, right, first = {}, {}, FORGETTING_ROWS if split == "test" else 0
                for task, rows in self.rows[split].items():
                    scores |= scores_of(split, task, rows, outcome.model_of(task), right_of=right, first=first)
                guess = {task: majority(rows) for task, rows in self.rows[split].items()}
                result[split] = {"ap": mean_accuracy(scores), "tasks": scores, "majority": guess}
                if split == "test":
                    of_first = {t: accuracy(its[:FORGETTING_ROWS])["accuracy"] for t, its in right.items()}
                    result[split]["first"] = of_first
                if split == "test" and just_learnt:  # without the last task, which nothing came after
                    points = {
                        t: [accuracy(its)["accuracy"], accuracy(right[t][: len(its)])["accuracy"]]
                        for t, its in just_learnt.items()
                    }
                    lost = [before - after for before, after in list(points.values())[:-1]]
                    result[split].update(just_learnt=points, forgetting=round(sum(lost) / len(lost), 3))
                if split == "test" and is_hft:
                    routed = routed_score(outcome.model_of(""), self.tokenizer, self.rows[split], right, result.work)
                    result[split].update(routed={"ap": mean_accuracy(routed), "tasks": routed})
            result.update(value=result["validation"]["ap"], trainable=outcome.trainable, stored=outcome.stored)
            result.update(notes=outcome.notes)
            if not method.startswith("single"):  # one model a task: there is no one model to ask
                plain = outcome.model_of(self.tasks[-1])
                result["general"] = general_ability(plain, self.tokenizer, self.unseen, self.texts, result.work)
                del plain
            del outcome
        gc.collect()

    def best_rate(self, method: str) -> float:
        """The rate with the best average on validation rows, so far."""
        cells = [
            done for done in own_cells(self.out).values() if (done["name"], done.get("method")) == (self.name, method)
        ]
        return own_rate(cells)


def main() -> None:
    arguments = parser(__doc__.splitlines()[0], "quality.jsonl")
    arguments.add_argument("--tasks", default="family", help=f"{', '.join(TASK_SETS)}, or names by commas")
    arguments.add_argument("--methods", default=",".join(ALL))
    arguments.add_argument("--budget", default="small", choices=list(BUDGETS))
    arguments.add_argument(
        "--rates", default=",".join(f"{rate:g}" for rate in GRID), help="learning rates to choose from"
    )
    arguments.set_defaults(out=RESULTS / "quality.jsonl")
    args = arguments.parse_args()
    methods, rates = args.methods.split(","), [float(rate) for rate in args.rates.split(",")]
    for method in methods:
        if method not in ALL:
            raise SystemExit(f"Unknown method {method!r}; known: {', '.join(ALL)}.")
    benchmark = Benchmark(args)
    for method in methods:
        for rate in rates if method != "zero_shot" else rates[:1]:
            benchmark.run(method, rate, 0)
    for seed in range(1, args.seeds):
        for method in methods:
            if method != "zero_shot":
                benchmark.run(method, benchmark.best_rate(method), seed)
    print(json.dumps({method: benchmark.best_rate(method) for method in methods}))


if __name__ == "__main__":
    main()
