"""The claim: HFT learns several tasks better than one LoRA for all, or one each, and forgets nothing.

    python examples/benchmarks/quality.py --data DIR --tasks family --budget small    # goes on where it stopped

A cell is a method at a learning rate with a seed. With seed 0 each method runs at every rate of the grid; the rate with the
best average on validation rows (over the seeds that all its rates have run) is its own, and runs with the further seeds.
Test rows are scored in the same pass and looked at by `table.py` only, for the chosen rate.
"""

import dataclasses
import functools
import gc
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from baselines import METHODS, Outcome, Setup
from harness import (
    RESULTS,
    accuracy,
    attention,
    cell,
    find_cell,
    mean_accuracy,
    new_model,
    parser,
    prepare,
    read_cells,
    read_rows,
    refining_together,
    sample,
    score,
    train_hft,
    with_roots,
)
from table import own_rate

from hft.trainers import HFTTrainer, plan_hierarchy
from hft.trainers.evaluation import score_options
from hft.trainers.pilots import ProbeSettings


CL14 = {
    **{"yelp": ["sst2"], "amazon": ["yelp"], "mnli": ["rte"], "cb": ["mnli"], "copa": [], "qqp": [], "rte": []},
    **{
        "imdb": ["sst2"],
        "sst2": [],
        "dbpedia": [],
        "agnews": ["dbpedia"],
        "multirc": ["boolq"],
        "boolq": [],
        "wic": [],
    },
}  # in the order of the benchmark's order 4
FAMILIES = {
    "sentiment": ["yelp", "amazon", "imdb", "sst2"],
    "inference": ["mnli", "cb", "rte"],
    "topics": ["dbpedia", "agnews"],
    "reading": ["multirc", "boolq"],
}
FAMILY = ["yelp", "amazon", "mnli", "cb", "rte", "sst2"]
UNSEEN = ["copa", "boolq"]  # never trained with `family`: what is left of general ability
GRID = (1e-3, 2e-3)
SMALL = {"samples": 200, "rows": {"validation": 100, "test": 200}, "max_input_tokens": 64, "batch": 8}
BUDGETS: dict[str, dict[str, Any]] = {
    "short": {**SMALL, "epochs": 1},  # too short for most tasks: see the README
    "small": {**SMALL, "epochs": 3},
    "medium": {**SMALL, "samples": 1000, "epochs": 1},  # as many rows as small has steps for, and two thirds more
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


def hierarchy(tasks: list[str]) -> dict[str, list[str]]:
    """The hand-made one, of these tasks."""
    return {task: [up for up in CL14[task] if up in tasks] for task in tasks}


def hft_chains(setup: Setup) -> Outcome:
    """HFT with a hand-made hierarchy: a chain a family, from few answers to many; the caller names the task."""
    return hft_on(setup, hierarchy(setup.order))


def hft_flat(setup: Setup) -> Outcome:
    """HFT without a hierarchy: each task stands on the backbone, and writes the one memory page with all others."""
    return hft_on(setup, {task: [] for task in setup.order})


def hft_shared(setup: Setup) -> Outcome:
    """HFT without a hierarchy: all tasks write one memory page in shared steps, and refine it on their own nodes."""
    setup = dataclasses.replace(setup, training=refining_together(setup.training, setup.order))
    return hft_on(setup, {task: [] for task in setup.order}, memory_config={"slots": RANK})


def hft_families(setup: Setup, **options: Any) -> Outcome:
    """HFT where related tasks stand on a root that learns from all of them, and then refine that."""
    families = {name: [task for task in its if task in setup.order] for name, its in FAMILIES.items()}
    families = {name: its for name, its in families.items() if len(its) > 1}
    up = {task: [name for name, its in families.items() if task in its] for task in setup.order}
    return hft_on(setup, {**{name: [] for name in families}, **up}, families, **options)


def hft_root(setup: Setup, **options: Any) -> Outcome:
    """HFT where all tasks stand on one root that learns from all of them, and then refine that."""
    root = {"all": setup.order}
    return hft_on(setup, {"all": [], **{task: ["all"] for task in setup.order}}, root, **options)


def hft_planned(setup: Setup, **options: Any) -> Outcome:
    """HFT with the hierarchy that the planner finds in the training rows."""
    model = new_model(setup.backbone, {})
    settings = ProbeSettings(max_length=setup.training["max_length"], seed=setup.seed)
    plan = plan_hierarchy(
        model, setup.with_options, processing_class=setup.tokenizer, settings=settings, progress=False
    )
    order = [*plan.families, *setup.order]
    return hft_on(setup, {task: plan.parents[task] for task in order}, plan.families, **options)


def hft_on(
    setup: Setup,
    tree: dict[str, list[str]],
    families: Mapping[str, Sequence[str]] | None = None,
    thirds: bool = False,
    pages: bool = False,
    **model_options: Any,
) -> Outcome:
    """HFT on a hierarchy.

    Args:
        setup: what all methods share.
        tree: the hierarchy.
        families: its roots that learn from the rows of the tasks on them.
        thirds: these take two of three steps, the tasks the third at the same learning rate, and all write pages; else they
            share as a recipe's `mixtures` do.
        pages: the tasks on such roots write memory pages, too.
        model_options: as for `new_model`.
    """
    train, training = dict(setup.train), {**setup.training, "gate_learning_rate": 5e-2}
    shares = {"root_share": 2 / 3, "refining_rate": 1.0} if thirds else {}
    train, training = with_roots(train, families or {}, training, **shares)
    if thirds or pages:
        training["page_tasks"] = None if thirds else setup.order

    class Reporting(HFTTrainer):
        def stage_ended(self, stage, trims):
            self.model.eval()
            for task in stage.tasks:
                if task in setup.order:  # not the root of a family
                    setup.after_task(task, lambda task: self.model)

    model = train_hft(
        setup.backbone, setup.tokenizer, tree, train, setup.seed, training, Reporting, rank=setup.rank, **model_options
    )
    own = sum(p.numel() for name, p in model.named_parameters() if name.startswith("hft_"))
    return Outcome(lambda task: model, own, own, {"tree": tree})


NO_MEMORY = {"memory_config": {"read": "off"}}
ALL = {
    **METHODS,
    "hft_chains": hft_chains,
    "hft_flat": hft_flat,
    "hft_shared": hft_shared,
    "hft_families": hft_families,
    "hft_families_pages": functools.partial(hft_families, pages=True),
    "hft_families_thirds": functools.partial(hft_families, thirds=True),
    "hft_root_thirds": functools.partial(hft_root, thirds=True),
    "hft_root_no_memory": functools.partial(hft_root, **NO_MEMORY),
    "hft_root_no_memory_thirds": functools.partial(hft_root, thirds=True, **NO_MEMORY),
    "hft_planned": hft_planned,
    "hft_planned_pages": functools.partial(hft_planned, pages=True),
}


def routed_score(
    model: Any, tokenizer: Any, rows: dict[str, list[dict]], given: dict[str, list[float]]
) -> dict[str, Any]:
    """Scores where the router names the task of each row.

    Args:
        given: task -> whether each row was right with its task given, which need not be computed again.
    """
    results = {}
    for task, its in rows.items():
        features = model.features_of([tokenizer(row["prompt"])["input_ids"] for row in its])
        named = [route.task for route in model.route_features(features)]
        right = list(given[task])
        for name in set(named) - {task}:
            places = [i for i, its_name in enumerate(named) if its_name == name]
            which = None if name == "backbone" else name
            for i, is_right in zip(
                places, score_options(model, tokenizer, [its[i] for i in places], which)[0], strict=True
            ):
                right[i] = is_right
        found = accuracy([float(name == task) for name in named])["accuracy"]
        results[task] = {**accuracy(right), "found": found}
    return results


@torch.inference_mode()
def general_ability(model: Any, tokenizer: Any, rows: dict[str, list[dict]], texts: list[str]) -> dict[str, Any]:
    """Perplexity a token on news passages, and accuracy on tasks that nothing was trained on; without any task's path."""
    loss, tokens = 0.0, 0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"].to(model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        loss += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        tokens += ids.shape[1] - 1
    unseen = score(model, tokenizer, rows, lambda task: None)
    return {"perplexity": round(float(torch.tensor(loss / tokens).exp()), 4), "unseen": unseen}


def majority(rows: list[dict]) -> float:
    """The share of the commonest answer, in %."""
    answers = [row["completion"] for row in rows]
    return round(100 * max(answers.count(answer) for answer in set(answers)) / len(answers), 2)


def read_shuffled(data: str, task: str, split: str, tokenizer: Any, budget: Mapping[str, Any]) -> list[dict]:
    """A split's rows in a random order that is always the same; of validation and test rows as many as the budget has."""
    rows = read_rows(data, task, split, tokenizer, budget["max_input_tokens"])
    random.Random(0).shuffle(rows)
    return rows[: budget["rows"].get(split)]


class Benchmark:
    """The data of a budget, and the cells of its result file."""

    def __init__(self, args: Any):
        self.budget, self.name = BUDGETS[args.budget], f"quality-{args.budget}-{args.tasks}"
        self.tasks = {"family": FAMILY, "cl14": list(CL14)}.get(args.tasks) or args.tasks.split(",")
        self.out: Path = args.out
        self.backbone, self.tokenizer = prepare(args.backbone)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

        def read(task: str, split: str) -> list[dict]:
            return read_shuffled(args.data, task, split, self.tokenizer, self.budget)

        self.rows = {split: {t: read(t, split) for t in self.tasks} for split in ("train", "validation", "test")}
        self.unseen = {task: read(task, "validation") for task in UNSEEN if task not in self.tasks}
        self.texts = [row["prompt"].split("\n", 2)[-1] for row in read("agnews", "validation")[:50]]

    def run(self, method: str, rate: float, seed: int) -> None:
        """One cell, if it is not there yet."""
        setting = f"{method}@{rate:g}"
        if find_cell(self.out, self.name, setting, seed) is not None:
            return
        with cell(self.out, self.name, setting, seed) as result:
            is_hft = method.startswith("hft")
            result.update(method=method, learning_rate=rate, attention=attention())
            if is_hft:
                result["gates"] = "inherited"  # those that learn; in cells without this, a task's own did, too
            just_learnt: dict[str, list[float]] = {}

            def after_task(task: str, model_of: Any) -> None:
                rows = {task: self.rows["test"][task][:FORGETTING_ROWS]}
                score(model_of(task), self.tokenizer, rows, lambda task: task if is_hft else None, just_learnt)

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
            )
            outcome = ALL[method](setup)
            for split in ("validation", "test"):
                scores, right = {}, {}
                for task, rows in self.rows[split].items():
                    which = task if is_hft else None
                    model = outcome.model_of(task)
                    scores.update(
                        score(
                            model,
                            self.tokenizer,
                            {task: rows},
                            lambda _, which=which: which,
                            right,
                            first=FORGETTING_ROWS if split == "test" else 0,
                        )
                    )
                guess = {task: majority(rows) for task, rows in self.rows[split].items()}
                result[split] = {"ap": mean_accuracy(scores), "tasks": scores, "majority": guess}
                if split == "test" and just_learnt:  # without the last task, which nothing came after
                    points = {
                        t: [accuracy(its)["accuracy"], accuracy(right[t][: len(its)])["accuracy"]]
                        for t, its in just_learnt.items()
                    }
                    lost = [before - after for before, after in list(points.values())[:-1]]
                    result[split].update(just_learnt=points, forgetting=round(sum(lost) / len(lost), 3))
                if split == "test" and is_hft:
                    routed = routed_score(outcome.model_of(""), self.tokenizer, self.rows[split], right)
                    result[split].update(routed={"ap": mean_accuracy(routed), "tasks": routed})
            result.update(value=result["validation"]["ap"], trainable=outcome.trainable, stored=outcome.stored)
            result.update(notes=outcome.notes)
            model = outcome.model_of(self.tasks[-1])
            if method != "single":  # one model a task: there is no one model to ask
                result["general"] = general_ability(model, self.tokenizer, self.unseen, self.texts)
            del model, outcome
        gc.collect()

    def best_rate(self, method: str) -> float:
        """The rate with the best average on validation rows, so far."""
        cells = [done for done in read_cells(self.out) if (done["name"], done.get("method")) == (self.name, method)]
        return own_rate(cells)


def main() -> None:
    arguments = parser(__doc__.splitlines()[0], "quality.jsonl")
    arguments.add_argument("--tasks", default="family", help="cl14, family, or names by commas")
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
