"""`hft plan --data`: reads data, measures, and writes what was found."""

import argparse
import sys
from pathlib import Path

from datasets import disable_progress_bars

import hft
from hft.files_hft import check_writable
from hft.slim_hft import read_config

from .compute_dtype import device_here
from .hft_config import TASK_LISTS, TASK_NUMBERS, HFTTrainingConfig
from .pictures import draw_plan, prepare_picture
from .pilots import ProbeSettings
from .plan_costs import plan_costs
from .plan_report import DEFAULTS, as_recipe, as_text, summary_of
from .probes import plan_hierarchy
from .recipe_data import load_task
from .recipe_model import checkpoint_layers, load_again, tokenizer_of
from .recipes import HOW_TO_LOAD, Recipe, read_recipe
from .run_record import RunRecord, write_text
from .task_files import has_split, tasks_in


def find_plan(args: argparse.Namespace) -> None:
    """Finds a hierarchy for the tasks of `args.data`, or parents in a saved model for new ones; prints and writes it.

    What can go wrong with what was asked for goes wrong before anything is measured, and a recipe is written as soon as it
    is found: again, with its costs, once these are known.
    """
    if args.out is not None:
        prepare_picture(args.out)
    disable_progress_bars()
    recipe = planned_recipe(args)
    file = args.yaml or Path("plan.yaml")
    config = HFTTrainingConfig(**recipe.training)
    check_writable(file.parent)
    if file.exists():
        raise ValueError(
            f"'{file}' is here already and may have been edited; delete it, or name another file to write by --yaml."
        )
    folder = Path(recipe.data) if recipe.data else None
    without = [task for task in recipe.hierarchy if folder and not has_split(folder, task, "validation")]
    if without and (recipe.stage_eval_samples or config.needs_validation()):
        key = "stage_eval_samples" if recipe.stage_eval_samples else "eval_strategy` or `rank_tolerance"
        print(
            f"There is no {without[0]}/validation.jsonl ({len(without)} such), and `{key}` goes by it: give one before you "
            "train, or delete that key.",
            file=sys.stderr,
        )
    settings = ProbeSettings(
        pilot_steps=args.steps, probe_rows=args.rows, max_length=recipe.training.get("max_length") or 256
    )
    tokenizer = tokenizer_of(recipe)
    data = {task: load_task(recipe, task, "train", tokenizer) for task in recipe.hierarchy}
    if recipe.from_model is None:
        quantization = recipe.quantization_config()
        model = hft.HFTForCausalLM.from_backbone(recipe.backbone, {}, quantization_config=quantization, **recipe.model)
        if quantization is None and "device_map" not in recipe.model:
            model.to(device_here())  # as training does; bitsandbytes takes it there by itself
    else:
        model = load_again(recipe, recipe.from_model, device_map="auto", attn_implementation="auto")
    checkpoint_layers(model, recipe)
    found = plan_hierarchy(
        model, data, processing_class=tokenizer, settings=settings,
        max_parents=args.max_parents, families=not args.no_families,
    )  # fmt: skip
    print(as_text(found))
    if recipe.from_model is not None:
        print("\n".join(summary_of(found, task) for task in found.hierarchy().names if task in data))
    write_text(file, as_recipe(found, recipe))
    print(f"\nThe recipe is in {file}")
    if args.out is not None:
        draw_plan(found, args.out)
        print(f"Drawn into {args.out}")
    print("\nTiming a few steps of training ...", flush=True)
    costs = plan_costs(found, recipe, model, data, tokenizer).lines()
    print("\nWhat it would take:\n" + "\n".join(costs))
    write_text(file, as_recipe(found, recipe, costs))
    print(f"\nNext: hft train {file}")


def planned_recipe(args: argparse.Namespace) -> Recipe:
    """What is to be planned: the tasks (all roots for now), their data, and with what they would be trained.

    Neither edges nor roots of families are taken over: both are what a plan finds.

    Raises:
        ValueError: no such task, a name that the model has already, or none left.
    """
    if args.data.is_dir():
        recipe = Recipe(hierarchy={}, **DEFAULTS) if args.recipe is None else read_recipe(args.recipe)
        recipe.data, recipe.datasets, tasks = str(args.data), {}, tasks_in(args.data)
    else:
        try:
            recipe = read_recipe(args.data)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error} A folder of that name there is not either.") from error
        tasks = recipe.tasks()
    if args.model is not None:
        recipe.from_model = args.model
    if recipe.from_model is not None and args.backbone is not None:
        raise ValueError(f"--backbone does not go with the recipe's `from_model`, {recipe.from_model}: it has one.")
    if recipe.from_model is not None:
        join_model(recipe, recipe.from_model, is_own=args.recipe is not None or not args.data.is_dir())
    if args.backbone is not None:
        recipe.backbone = args.backbone
    if args.task is not None:
        hft.Hierarchy({task: [] for task in tasks}).check(args.task)
    known = read_config(recipe.from_model).task_names() if recipe.from_model is not None else []
    if args.task in known:
        raise ValueError(f"The task {args.task!r} is in the model already; plan only new tasks.")
    chosen = [task for task in tasks if task not in known and args.task in (None, task)]
    if not chosen:
        raise ValueError(f"The model has all tasks of '{args.data}' already; there is nothing to plan.")
    recipe.hierarchy = {task: [] for task in chosen}
    hft.Hierarchy({task: [] for task in (*known, *chosen)})  # names that cannot be a task's, before hours of measuring
    recipe.datasets = {task: spec for task, spec in recipe.datasets.items() if task in chosen}
    if recipe.mixtures:  # what they were told of families that are found anew
        for key in (*TASK_LISTS, *TASK_NUMBERS):
            recipe.training.pop(key, None)
    recipe.mixtures = {}
    if isinstance(recipe.metric, dict):
        recipe.metric = {task: name for task, name in recipe.metric.items() if task in chosen} or "exact_match"
    for key in TASK_LISTS:
        if recipe.training.get(key):
            recipe.training[key] = [task for task in chosen if task in recipe.training[key]]
    for key in TASK_NUMBERS:
        by_task = recipe.training.pop(key, None) or {}
        if its := {task: by_task[task] for task in chosen if task in by_task}:
            recipe.training[key] = its
    return recipe


def join_model(recipe: Recipe, model: str, is_own: bool) -> None:
    """Leaves of a recipe what tasks that join a saved model may say; changes it.

    Args:
        model: folder or Hub id.
        is_own: whether a person wrote the recipe: else the model's rank holds, and how its backbone was held, and it grows
            in its folder.
    """
    recipe.backbone = None
    recipe.model = {key: its for key, its in recipe.model.items() if key in ("rank", *HOW_TO_LOAD)}
    if is_own:
        return
    del recipe.model["rank"]
    if (held := RunRecord.load(Path(model)).quantization) is not None:
        recipe.quantization = held
    if Path(model).is_dir():
        recipe.training = {**recipe.training, "output_dir": model}
