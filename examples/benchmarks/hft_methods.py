"""HFT as a method of quality.py: on hierarchies that were made by hand, or found."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from baselines import Outcome, Setup
from harness import new_model, refining_together, train_hft, train_open, with_roots
from transformers import set_seed

from hft.trainers import HFTTrainer, plan_hierarchy
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
    return hft_on(setup, {task: [] for task in setup.order}, memory_config={"slots": setup.rank})


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

    def found() -> dict[str, Any]:
        model = new_model(setup.backbone, {})
        settings = ProbeSettings(max_length=setup.training["max_length"], seed=setup.seed)
        plan = plan_hierarchy(
            model, setup.with_options, processing_class=setup.tokenizer, settings=settings, progress=False
        )
        return {"parents": plan.parents, "families": plan.families}

    plan = setup.work.remember("plan", found)
    order = [*plan["families"], *setup.order]
    return hft_on(setup, {task: plan["parents"][task] for task in order}, plan["families"], **options)


def hft_arriving(setup: Setup, **model_options: Any) -> Outcome:
    """HFT where tasks arrive one by one, as for sequential LoRA: each comes with its own rows, and with no others.

    Its parents are what the planner picks of the tasks that are learnt already, from its training rows.
    """
    tree: dict[str, list[str]] = {}
    model = new_model(setup.backbone, tree, rank=setup.rank, **model_options)

    def parents_of(task: str) -> list[str]:
        settings = ProbeSettings(max_length=setup.training["max_length"], seed=setup.seed)
        rows = {task: setup.with_options[task]}
        plan = plan_hierarchy(model, rows, processing_class=setup.tokenizer, settings=settings, progress=False)
        return plan.parents[task]

    for number, task in enumerate(setup.order):
        tree[task] = setup.work.remember(f"parents of {task}", lambda task=task: parents_of(task)) if tree else []
        set_seed(setup.seed + 1000 * number)  # the same numbers, whether an earlier run has found the parents or not
        model.add_task(task, parents=tree[task])
        train_open(model, setup.tokenizer, {task: setup.train[task]}, setup.seed, setup.training, work=setup.work)
        setup.after_task(task, lambda task: model)
    return outcome(model, {"tree": tree, "training": setup.training})


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
        training["page_tasks"] = list(tree) if thirds else setup.order

    def report(model: Any) -> None:
        is_training = model.training
        model.eval()
        for task in model.config.sealed_tasks():
            if task in setup.order:  # not the root of a family
                setup.after_task(task, lambda task: model)
        model.train(is_training)

    class Reporting(HFTTrainer):
        def save_model(self, *args, **kwargs):
            report(self.model)  # before: a run that is cut off comes back to a stage until it is saved
            super().save_model(*args, **kwargs)

    model = train_hft(
        setup.backbone,
        setup.tokenizer,
        tree,
        train,
        setup.seed,
        training,
        Reporting,
        work=setup.work,
        rank=setup.rank,
        **model_options,
    )
    report(model)  # where an earlier run has learnt all
    return outcome(model, {"tree": tree, "training": training})


def outcome(model: Any, notes: dict[str, Any]) -> Outcome:
    """Of one model, which answers all tasks."""
    own = sum(p.numel() for name, p in model.named_parameters() if name.startswith("hft_"))
    return Outcome(lambda task: model, own, own, notes)


NO_MEMORY: dict[str, Any] = {"memory_config": {"read": "off"}}
HFT_METHODS: dict[str, Callable[[Setup], Outcome]] = {
    "hft_chains": hft_chains,
    "hft_flat": hft_flat,
    "hft_shared": hft_shared,
    "hft_families": hft_families,
    "hft_families_pages": functools.partial(hft_families, pages=True),
    "hft_families_thirds": functools.partial(hft_families, thirds=True),
    "hft_root_thirds": functools.partial(hft_root, thirds=True),
    "hft_root_no_memory": functools.partial(hft_root, **NO_MEMORY),
    "hft_root_no_memory_thirds": functools.partial(hft_root, thirds=True, **NO_MEMORY),
    "hft_arriving": hft_arriving,
    "hft_planned": hft_planned,
    "hft_planned_pages": functools.partial(hft_planned, pages=True),
}
