"""What the command `hft` does, a function a command. Each imports what it needs, for which `hft --help` should not wait."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def demo(args: argparse.Namespace, _: dict[str, Any]) -> None:
    from .demo import run_demo

    run_demo(Path(args.out))


def train(args: argparse.Namespace, overrides: dict[str, Any]) -> None:
    import torch
    from datasets import disable_progress_bars
    from transformers import set_seed

    from . import HFTTrainer, HFTTrainingConfig
    from .compute_dtype import advice, is_bfloat16_slow
    from .progress import counted
    from .recipe_data import check_metrics, load_task, test_set
    from .recipe_model import learnt_already, model_of, tokenizer_of
    from .recipes import read_recipe
    from .report import REPORT_FILE

    disable_progress_bars()  # seven short ones a task would hide the one that matters
    recipe = read_recipe(args.recipe, overrides)
    if not recipe.hierarchy:
        raise ValueError("`hierarchy` names no task; give `task: [parents]` lines.")
    config = HFTTrainingConfig(**recipe.training_arguments())
    check_metrics(recipe)
    learnt = learnt_already(recipe)
    if learnt.issuperset(recipe.hierarchy):
        if args.resume or config.resume_from_checkpoint:
            push = f"; to push it: hft push {recipe.from_model} ID" if config.push_to_hub else ""
            return print(f"All tasks of {recipe.from_model} are learnt already: nothing was trained{push}.")
        raise ValueError(
            f"'{recipe.from_model}' has learnt all tasks of this recipe ({', '.join(recipe.hierarchy)}); name a new one "
            "under `hierarchy`."
        )
    set_seed(config.seed)
    tokenizer = tokenizer_of(recipe)
    data = {task: load_task(recipe, task, "train", tokenizer) for task in recipe.hierarchy if task not in learnt}
    needs_checks = config.needs_validation()
    checks = {t: load_task(recipe, t, "validation", tokenizer) for t in data} if needs_checks else None
    samples = recipe.stage_eval_samples
    tests = {t: test_set(recipe, t, "validation", tokenizer, samples) for t in recipe.tasks()} if samples else None
    model = model_of(recipe)
    is_main = config.process_index == 0  # of several, one speaks
    if is_main and is_bfloat16_slow() and model.dtype == torch.bfloat16:
        print(advice(), file=sys.stderr)
    if is_main:
        notes = dict.fromkeys(model.config.sealed_tasks(), "learnt") | {
            t: counted(len(rows), "row") for t, rows in data.items()
        }
        print(model.hierarchy.draw(notes))
    trainer = HFTTrainer(model, config, data, checks, test_sets=tests, processing_class=tokenizer)
    output = trainer.train(resume_from_checkpoint=config.resume_from_checkpoint or args.resume)
    trainer.create_model_card()
    if not is_main:
        return
    if "stopped" in output.metrics:
        print(
            f"Stopped at step {output.metrics['stopped']} of {trainer.stage}; `hft train ... --resume` goes on from there."
        )
        return
    if not output.metrics["stages"]:
        print(
            f"All tasks of {config.output_dir} are learnt already: nothing was trained, whatever else was asked for."
        )
        return
    steps = counted(output.global_step, "step")
    print(f"{steps} in {output.metrics['train_runtime']:.0f} s; the model is in {config.output_dir}")
    if (page := Path(config.output_dir) / REPORT_FILE).exists():
        print(f"Pictures: open {page}")
    where = f" --data {recipe.data}" if recipe.data else ""
    print(f"Next: hft eval {config.output_dir} --recipe {args.recipe}{where}")


def plan(args: argparse.Namespace, _: dict[str, Any]) -> None:
    if args.data is not None:
        from .plan_command import find_plan

        return find_plan(args)
    if args.model is None:
        raise ValueError("Give --data, a folder or recipe to find a hierarchy for, or --model, to draw a saved one.")
    import hft

    from .pictures import draw_hierarchy

    config, gates = hft.read_gates(args.model)
    hierarchy = config.hierarchy()
    if args.task is not None:
        hierarchy.check(args.task)
    notes, weights = {}, {}
    for task in hierarchy.names:
        mean = gates[task].mean()
        if parents := hierarchy.parents(task):
            weights[task] = mean[parents[0]]
        others = [f"{source} {weight:.2f}" for source, weight in mean.items() if source != task]
        state = "" if config.task(task)["sealed"] else "open; "
        notes[task] = f"({state}{', '.join(others) or 'reads nothing else'})"
    print(hierarchy.draw(notes, weights))
    print("A name and a number: how much of that node or memory page flows in (mean gate over the layers).")
    if args.task is not None:
        print(f"\n{gates[args.task]}")
    if args.out is not None:
        draw_hierarchy(hierarchy, gates, args.out)
        print(f"Drawn into {args.out}")


def check_folder(model: str | Path) -> None:
    """Raises FileNotFoundError if a model that a command changes, or writes beside, is no folder of this machine."""
    if not Path(model).is_dir():
        raise FileNotFoundError(
            f"There is no folder '{model}'; of a model on the Hub, make one first: hf download {model} --local-dir FOLDER."
        )


def refresh(args: argparse.Namespace, _: dict[str, Any]) -> None:
    import hft
    from hft.files_hft import check_writable

    from .hft_config import HFTTrainingConfig
    from .loading import load_tokenizer
    from .model_card import renew_model_card
    from .recipe_data import load_task
    from .recipe_model import checkpoint_layers, load_again
    from .row_tokens import has_answer, tokenize_rows
    from .run_record import RunRecord

    check_folder(args.model)
    recipe = _recipe_of(args)
    config, _ = hft.read_gates(args.model)
    own = [task for task in recipe.hierarchy if task not in recipe.mixtures]  # with rows of their own
    tasks = [task for task in config.sealed_tasks() if task in own] if args.task is None else [args.task]
    if not tasks:
        raise ValueError(
            f"'{args.model}' has no sealed task of the recipe's ({', '.join(own)}); is it another model's?"
        )
    check_writable(args.model)
    tokenizer = load_tokenizer(args.model)
    cut = [
        recipe.training.get(key, HFTTrainingConfig.__dataclass_fields__[key].default)
        for key in ("max_length", "truncation_mode")
    ]
    data: dict[str, list[list[dict[str, list[int]]]]] = {}
    for task in tasks:
        config.sealed_task(task)
        data[task] = []
        for split in ("train", "validation"):
            rows = load_task(recipe, task, split, tokenizer)
            rows = tokenize_rows(rows, tokenizer, *cut)
            data[task].append(list(filter(has_answer, rows)))
            if not data[task][-1]:
                raise ValueError(f"`max_length`={cut[0]} cuts off all answers of task {task!r} ({split}): raise it.")
    model = load_again(recipe, args.model, as_trained=True, device_map="auto")
    checkpoint_layers(model, recipe)
    for task, (rows, checks) in data.items():
        result = model.refresh_gates(task, rows, validation=checks, num_steps=args.steps, batch_size=args.batch_size)
        if result.kept:
            model.save_pretrained(args.model)
            renew_model_card(Path(args.model), RunRecord.load(args.model).after_refresh(task))
        print(result, flush=True)


def export(args: argparse.Namespace, _: dict[str, Any]) -> None:
    from .export_command import export_tasks

    export_tasks(args)


def merge(args: argparse.Namespace, _: dict[str, Any]) -> None:
    import hft

    from .merge import merge_models, parse_rename
    from .progress import counted

    config, _gates = hft.read_gates(args.other)
    pairs = [parse_rename(text, config.task_names()) for text in args.rename]
    rename = dict(pairs)
    if len(rename) < len(pairs):
        raise ValueError(f"--rename names a task twice: {', '.join(args.rename)}.")
    new = merge_models(args.one, args.other, args.out, rename)
    config, _gates = hft.read_gates(args.out)
    print(config.hierarchy().draw())
    print(
        f"{counted(len(new), 'task')} came from {args.other}: {', '.join(new) or 'none'}. The union is in {args.out}"
    )


def remove(args: argparse.Namespace, _: dict[str, Any]) -> None:
    import hft
    from hft.slim_hft import files_left

    from .checkpoints import RunFolder, last_checkpoint
    from .curriculum import open_stages
    from .loading import load_model
    from .model_card import renew_model_card
    from .progress import counted
    from .run_record import RunRecord

    check_folder(args.model)
    config, _gates = hft.read_gates(args.model)
    config.hierarchy().check(args.task)
    begun = open_stages(config.hierarchy(), config.sealed_tasks())[:1]
    if begun and set(begun[0].tasks) - {args.task} and last_checkpoint(args.model / begun[0].folder):
        raise ValueError(
            f"{begun[0]} is half trained, and could not go on without {args.task!r}: finish it first (`hft train "
            f"--resume`), or delete '{args.model / begun[0].folder}'."
        )
    model = load_model(args.model)
    removed = model.remove_task(args.task, cascade=args.cascade)
    model.save_pretrained(args.model)
    for path in files_left(args.model, model.config):
        (args.model / path).unlink()  # after the config, which no longer names it
    RunFolder(args.model).forget_checkpoints()  # they hold what was removed
    renew_model_card(args.model, RunRecord.load(args.model).without(removed))
    print(f"Removed {', '.join(removed)}; {counted(len(model.config.tasks), 'task')} left in {args.model}")


def push(args: argparse.Namespace, _: dict[str, Any]) -> None:
    from huggingface_hub import create_repo

    import hft
    from hft.upload_hft import check_shareable, upload

    from .model_card import as_pushed
    from .progress import counted

    check_folder(args.model)
    config, _gates = hft.read_gates(args.model)
    check_shareable(config)
    private = args.private or None  # without it the Hub goes by the account's own default
    repo_id = create_repo(args.repo_id, private=private, exist_ok=True).repo_id
    with as_pushed(args.model, repo_id) as folder:
        commit = upload(folder, repo_id, args.message, private)
    print(f"{counted(len(config.tasks), 'task')} now in {commit.repo_url}, commit {commit.oid}")


def serve(model: str, rest: Sequence[str]) -> int:
    from .serve_command import serve

    return serve(model, rest)


def eval(args: argparse.Namespace, _: dict[str, Any]) -> None:
    from hft.files_hft import check_writable
    from hft.hierarchy_hft import BACKBONE

    from .evaluation import points_and_error, score_task
    from .metrics import metric_name
    from .recipe_data import test_set
    from .run_record import write_json

    if args.out is not None:
        if args.out.is_dir():
            raise ValueError(f"--out is '{args.out}', a folder; name a file in it.")
        check_writable(args.out.parent)  # now, not after all has been measured
    recipe, model, tokenizer, tasks = _with_recipe(args)
    results = {}
    for task in args.task or ():
        model.hierarchy.check(task)
    columns: dict[str, tuple[str, str | None]] = {"backbone": ("backbone", BACKBONE), "hft": ("with its path", "")}
    if model.hft_router.tasks():
        columns["routed"] = ("routed", None)
    chosen = args.task or tasks
    if half := [task for task in chosen if not model.config.task(task)["sealed"]]:
        print(f"Not learnt to the end yet, and scored as they are: {', '.join(half)}", file=sys.stderr)
    sets = {task: test_set(recipe, task, args.split, tokenizer) for task in chosen}  # before any is scored
    width = max(16, *(len(task) + 2 for task in chosen))
    print(f"Scores (%) on {args.split} rows, ± standard error\n")
    print(f"{'task':<{width}}{'rows':>6}" + "".join(f"{title:>16}" for title, _ in columns.values()))
    for task, data in sets.items():
        cells = {}
        for column, (_title, active) in columns.items():
            which = task if active == "" else active
            scores = score_task(model, tokenizer, data, which, args.batch_size, progress=f"{task}, {column}")
            cells[column], cells[f"{column}_se"] = points_and_error(scores)
        results[task] = {"rows": len(data.rows), "metric": metric_name(data.score), **cells}
        shown = [f"{cells[column]:.1f} ± {cells[f'{column}_se']:.1f}" for column in columns]
        print(f"{task:<{width}}{len(data.rows):>6}" + "".join(text.rjust(16) for text in shown), flush=True)
        if args.out is not None:  # as far as it has come
            write_json(args.out, {"model": args.model, "split": args.split, "tasks": results})


def report(args: argparse.Namespace, _: dict[str, Any]) -> None:
    import hft
    from hft.files_hft import check_writable

    from .interference import advice
    from .report import REPORT_FILE, is_report, write_report
    from .run_record import RunRecord

    check_folder(args.model)
    if args.recipe is None and (args.data is not None or args.samples is not None):
        raise ValueError(
            "--data and --samples say on what --recipe measures anew; give --recipe, too, or leave them out."
        )
    args.samples = args.samples or 32
    config, gates = hft.read_gates(args.model)
    if not is_report(args.model):
        raise ValueError(
            f"'{args.model / REPORT_FILE}' is no report of HFT's, and would be overwritten; move it away."
        )
    record = RunRecord.load(args.model).of(config.task_names())
    check_writable(args.model)
    if args.recipe is not None:
        _measure(args, record)
        record.write(args.model)
    page = write_report(config, gates, record, args.model)
    for name, value in record.measures().items():
        print(f"{name.replace('_', ' ')}: {value:.1f}")
    for sentence in advice({task["name"]: task["parents"] for task in config.tasks}, record.sources, record.cross):
        print(sentence)
    print(f"The report is in {page}; its pictures, as PNG and SVG, beside it in {page.parent / 'pictures'}")


def _measure(args: argparse.Namespace, record: Any) -> None:
    """What a report shows beyond a run's own record: contributions, scores on others' paths, the router's choices."""
    from collections import Counter

    from .evaluation import routes_of, score_task
    from .interference import contributions, cross_scores
    from .recipe_data import test_set
    from .run_record import as_score

    recipe, model, tokenizer, tasks = _with_recipe(args)
    sets = {task: test_set(recipe, task, "validation", tokenizer, args.samples) for task in tasks}
    for task, data in sets.items():
        _whole, record.sources[task] = contributions(model, tokenizer, task, data, args.batch_size, True)
        if model.hft_router.tasks():
            record.confusion[task] = dict(Counter(routes_of(model, tokenizer, data.rows)))
            routed = score_task(model, tokenizer, data, None, args.batch_size, f"{task}, routed")
            record.routed[task] = as_score(routed)
    record.cross = cross_scores(model, tokenizer, sets, args.batch_size, True)


def _with_recipe(args: argparse.Namespace) -> tuple[Any, Any, Any, list[str]]:
    """The recipe of the data, the model, its tokenizer, and those of its tasks that the recipe describes."""
    from .loading import load_tokenizer
    from .recipe_data import check_metrics
    from .recipe_model import load_again

    recipe = _recipe_of(args)
    check_metrics(recipe)
    model = load_again(recipe, str(args.model), as_trained=True, device_map="auto")
    tasks = [task for task in model.hierarchy.names if task in recipe.tasks()]
    if not tasks:
        raise ValueError(f"The recipe describes none of the model's tasks ({', '.join(model.hierarchy.names)}).")
    return recipe, model, load_tokenizer(args.model), tasks


def _recipe_of(args: argparse.Namespace) -> Any:
    """The recipe, with the folder of data and the number of rows that the command line names."""
    from datasets import disable_progress_bars

    from .recipes import read_recipe

    disable_progress_bars()
    overrides = {"data": args.data, "eval_samples": args.samples, "train_samples": args.samples}
    return read_recipe(args.recipe, {key: value for key, value in overrides.items() if value is not None})


def generate(args: argparse.Namespace, _: dict[str, Any]) -> None:
    from .generate_command import answer_prompts

    answer_prompts(args)
