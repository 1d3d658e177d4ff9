"""The command `hft`."""

import argparse
import ctypes
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import StrictDataclassError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        The exit code: 0; 2 if what was asked for is wrong (a key, a task name, a hierarchy); 1 if it cannot be done here.
    """
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if args.command is None:
        parser.print_help()
        return 2
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # at its import it misses an optional kernel
    try:
        if args.command == "generate":  # argparse gives prompts that follow an option to nobody
            while rest and not rest[0].startswith("--"):
                args.prompt.append(rest.pop(0))
        if args.command == "serve":
            return _serve(args.model, rest)
        if rest and args.command != "train":
            raise ValueError(f"`hft {args.command}` does not know {rest[0]!r}; see `hft {args.command} --help`.")
        overrides = _overrides(rest)
        _keep_freed_memory()
        commands = {
            "demo": _demo,
            "plan": _plan,
            "train": _train,
            "refresh": _refresh,
            "eval": _eval,
            "generate": _generate,
        }
        commands[args.command](args, overrides)
    except (ValueError, FileNotFoundError, StrictDataclassError) as error:
        print(f"hft: error: {error}", file=sys.stderr)
        return 2
    except (OSError, ImportError) as error:
        print(f"hft: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nhft: stopped; `hft train ... --resume` goes on from the last checkpoint.", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hft", description="Hierarchical Fine-Tuning: many tasks, one GPU, none forgotten."
    )
    commands = parser.add_subparsers(dest="command")

    demo = commands.add_parser("demo", help="six small tasks on a real 4-bit model in minutes; no network needed")
    demo.add_argument("--out", default="hft-demo", help="folder for report.json and the model (hft-demo)")

    train = commands.add_parser(
        "train",
        help="train a recipe",
        epilog="Every key of the recipe, of SFTConfig, HFTConfig and BitsAndBytesConfig may follow: --learning_rate 5e-4",
    )
    train.add_argument("recipe", help="a YAML file, or the name of one that ships with the package: cl14-small")
    train.add_argument("--resume", action="store_true", help="go on where an interrupted run stopped")

    plan = commands.add_parser("plan", help="draw a saved model's hierarchy, with its gates")
    plan.add_argument("--model", required=True, help="folder or Hub id of an HFT model")
    plan.add_argument("--task", help="also print all gates of this task, layer by layer")
    plan.add_argument("--out", type=Path, help="draw it into this .png, .svg or .pdf file, too")

    refresh = commands.add_parser("refresh", help="let an old task learn anew what to let in; kept only if it helps")
    refresh.add_argument("model", help="folder of an HFT model; changed only if it helps")
    refresh.add_argument("--task", required=True, help="a sealed task")
    refresh.add_argument("--recipe", required=True, help="the recipe that describes the data")
    refresh.add_argument("--data", help="folder with <task>/<split>.jsonl.gz, instead of the recipe's data")
    refresh.add_argument("--samples", type=int, default=96, help="training rows to learn from (96)")
    refresh.add_argument("--steps", type=int, default=30)
    refresh.add_argument("--batch_size", type=int, default=8)

    serve = commands.add_parser(
        "serve",
        help="transformers' OpenAI-compatible server, for HFT models; needs transformers[serving]",
        epilog="All other arguments are those of `transformers serve`: hft serve MODEL --port 8000",
    )
    serve.add_argument("model", help="folder or Hub id of an HFT model")

    evaluate = commands.add_parser("eval", help="score a saved model on a recipe's data")
    evaluate.add_argument("model", help="folder or Hub id of an HFT model")
    evaluate.add_argument("--recipe", required=True, help="the recipe that describes the data")
    evaluate.add_argument("--data", help="folder with <task>/<split>.jsonl.gz, instead of the recipe's data")
    evaluate.add_argument("--split", default="validation", choices=["train", "validation", "test"])
    evaluate.add_argument("--task", action="append", help="only this task; may be repeated")
    evaluate.add_argument("--samples", type=int, help="rows a task, instead of the recipe's eval_samples")
    evaluate.add_argument("--batch_size", type=int, default=16)
    evaluate.add_argument("--out", help="write the scores to this JSON file")

    generate = commands.add_parser("generate", help="answer prompts with a saved model")
    generate.add_argument("model", help="folder or Hub id of an HFT model")
    generate.add_argument("prompt", nargs="*", help="one or more prompts; without any, one a line of standard input")
    generate.add_argument("--task", help="whose path to take, or backbone; without it, the router chooses")
    generate.add_argument("--max_new_tokens", type=int, default=64)
    generate.add_argument("--load_in_4bit", action="store_true", help="hold the backbone in NF4")
    return parser


def _overrides(rest: Sequence[str]) -> dict[str, Any]:
    """`--key value` and `--key=value` pairs, values read as YAML."""
    values: dict[str, Any] = {}
    words = list(rest)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise ValueError(f"{word!r} stands where a --key should.")
        key, has_value, value = word[2:].partition("=")
        if not has_value:
            if not words:
                raise ValueError(f"--{key} needs a value.")
            value = words.pop(0)
        try:
            values[key.replace("-", "_")] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ValueError(f"--{key} has the value {value!r}, which is no YAML.") from None
    return values


def _keep_freed_memory() -> None:
    """Lets glibc reuse large blocks instead of giving each back to the kernel, which would zero its pages again.

    On two cores, training steps with TRL's loss took 14 s instead of 28 s for ten (SmolLM2-135M, NF4).
    """
    from torch import accelerator

    if accelerator.is_available() or not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        m_trim_threshold, m_mmap_threshold = -1, -3
        for setting in (m_trim_threshold, m_mmap_threshold):
            mallopt(setting, 2**31 - 1)


def _demo(args: argparse.Namespace, _: dict[str, Any]) -> None:
    from .demo import run_demo  # imports take seconds that `hft --help` should not

    run_demo(Path(args.out))


def _train(args: argparse.Namespace, overrides: dict[str, Any]) -> None:
    from datasets import disable_progress_bars
    from transformers import AutoTokenizer, set_seed

    import hft

    from . import HFTTrainer, HFTTrainingConfig
    from .recipes import load_task, read_recipe

    disable_progress_bars()  # seven short ones a task would hide the one that matters
    recipe = read_recipe(args.recipe, overrides)
    config = HFTTrainingConfig(**recipe.training)
    set_seed(config.seed)
    try:
        tokenizer = AutoTokenizer.from_pretrained(recipe.backbone)
    except OSError as error:
        raise OSError(f"The backbone '{recipe.backbone}' could not be loaded: {error}") from error
    data = {task: load_task(recipe, task, "train", tokenizer) for task in recipe.hierarchy}
    model = hft.HFTForCausalLM.from_backbone(
        recipe.backbone, recipe.hierarchy, quantization_config=recipe.quantization_config(), **recipe.model
    )
    print(model.hierarchy.draw({task: f"{len(rows)} rows" for task, rows in data.items()}))
    trainer = HFTTrainer(model, config, train_dataset=data, processing_class=tokenizer)
    output = trainer.train(resume_from_checkpoint=args.resume or config.resume_from_checkpoint)
    trainer.create_model_card()
    print(
        f"{output.global_step} steps in {output.metrics['train_runtime']:.0f} s; the model is in {config.output_dir}"
    )
    where = f" --data {recipe.data}" if recipe.data else ""
    print(f"Next: hft eval {config.output_dir} --recipe {args.recipe}{where}")


def _plan(args: argparse.Namespace, _: dict[str, Any]) -> None:
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


def _refresh(args: argparse.Namespace, _: dict[str, Any]) -> None:
    from datasets import disable_progress_bars
    from transformers import AutoTokenizer

    import hft

    from .recipes import load_task, read_recipe
    from .task_data import tokenize_rows

    disable_progress_bars()
    overrides = {"data": args.data, "train_samples": args.samples, "eval_samples": args.samples}
    recipe = read_recipe(args.recipe, {key: value for key, value in overrides.items() if value is not None})
    config, _ = hft.read_gates(args.model)
    config.sealed_task(args.task)
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
    rows, checks = (
        tokenize_rows(load_task(recipe, args.task, split, tokenizer), tokenizer, recipe.training.get("max_length"))
        for split in ("train", "validation")
    )
    model = hft.HFTForCausalLM.from_pretrained(
        args.model, quantization_config=recipe.quantization_config(), device_map="auto"
    )
    result = model.refresh_gates(args.task, rows, validation=checks, num_steps=args.steps, batch_size=args.batch_size)
    if result.kept:
        model.save_pretrained(args.model)
    print(result)


def _serve(model: str, rest: Sequence[str]) -> int:
    """`transformers serve` looks an architecture up in the package transformers itself; there it finds HFT's, too."""
    import transformers

    import hft

    transformers.HFTForCausalLM = hft.HFTForCausalLM
    try:
        from transformers.cli.transformers import main as transformers_main
    except ImportError as error:
        raise ImportError(
            f"`hft serve` needs the packages of transformers' server: pip install 'transformers[serving]' ({error})."
        ) from error
    sys.argv = ["transformers", "serve", model, *rest]
    transformers_main()
    return 0


def _eval(args: argparse.Namespace, _: dict[str, Any]) -> None:
    from datasets import disable_progress_bars
    from transformers import AutoTokenizer

    import hft
    from hft.hierarchy_hft import BACKBONE

    from .evaluation import EvalSet, mean_and_error, score_task
    from .recipes import load_task, read_recipe

    disable_progress_bars()
    overrides = {"data": args.data, "eval_samples": args.samples, "train_samples": args.samples}
    recipe = read_recipe(args.recipe, {key: value for key, value in overrides.items() if value is not None})
    model = hft.HFTForCausalLM.from_pretrained(
        args.model, quantization_config=recipe.quantization_config(), device_map="auto"
    )
    tasks = args.task or [task for task in model.hierarchy.names if task in recipe.hierarchy]
    for task in tasks:
        model.hierarchy.check(task)
    if not tasks:
        raise ValueError(f"The recipe describes none of the model's tasks ({', '.join(model.hierarchy.names)}).")
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
    results = {}
    print(f"{'task':<16}{'rows':>6}{'backbone':>16}{'with its path':>18}")
    for task in tasks:
        rows = load_task(recipe, task, args.split, tokenizer)
        data = EvalSet(list(rows), max_new_tokens=recipe.max_new_tokens)
        cells = {}
        for column, active in (("backbone", BACKBONE), ("hft", task)):
            scores = score_task(model, tokenizer, data, active, args.batch_size, progress=f"{task}, {column}")
            cells[column], cells[f"{column}_se"] = mean_and_error(scores)
        results[task] = {"rows": len(rows), **cells}
        before, after = (f"{cells[c]:.1f} ± {cells[f'{c}_se']:.1f}" for c in ("backbone", "hft"))
        print(f"{task:<16}{len(rows):>6}{before:>16}{after:>18}", flush=True)
    if args.out:
        text = json.dumps(
            {"model": args.model, "split": args.split, "metric": "exact match", "tasks": results}, indent=2
        )
        partial = Path(f"{args.out}.partial")
        partial.write_text(text + "\n")
        os.replace(partial, args.out)


def _generate(args: argparse.Namespace, _: dict[str, Any]) -> None:
    from transformers import AutoTokenizer, BitsAndBytesConfig

    import hft

    from .evaluation import generate_answers

    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16")
    model = hft.HFTForCausalLM.from_pretrained(
        args.model, quantization_config=nf4 if args.load_in_4bit else None, device_map="auto"
    )
    if args.task is not None:
        model.hierarchy.check(args.task)
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
    prompts = args.prompt or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not prompts:
        raise ValueError("There is no prompt: give one as an argument, or one a line on standard input.")
    if tokenizer.chat_template is not None:
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
    for answer in generate_answers(model, tokenizer, prompts, args.task, args.max_new_tokens):
        print(answer)


if __name__ == "__main__":
    sys.exit(main())
