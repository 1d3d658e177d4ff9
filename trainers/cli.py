"""The command `hft`."""

import argparse
import io
import logging
import re
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from hft.hub_configs import shipped_recipes

from . import commands
from .cpu_memory import use_memory_well


# How `hft plan --data` finds a hierarchy, if nothing else is said.
_USUAL = {"steps": 24, "rows": 48, "max_parents": 2, "no_families": False}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        The exit code: 0; 2 if what was asked for is wrong (a key, a task name, a hierarchy, a file that is not there); 1 if
        it cannot be done here; 130 if Ctrl-C stopped it.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that cannot show a tree's branches is no reason to stop
            stream.reconfigure(errors="replace")
    parser = _parser()
    argv = sys.argv[1:] if argv is None else argv
    args, rest = parser.parse_known_args(argv)
    if args.command is None:
        parser.print_help()
        return 2
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # at its import it misses an optional kernel
    try:
        if args.command == "generate":  # argparse gives prompts that follow an option to nobody
            while rest and rest[0] != "--" and not _is_option(rest[0]):
                args.prompt.append(rest.pop(0))
            if rest[:1] == ["--"]:  # all that follows is a prompt, whatever it looks like
                args.prompt += rest[1:]
                rest = []
        if args.command in ("train", "serve"):
            _check_order(argv, "recipe" if args.command == "train" else "model")
        if args.command == "serve":
            return commands.serve(args.model, rest)
        if rest and args.command != "train":
            raise ValueError(f"`hft {args.command}` does not know {rest[0]!r}; see `hft {args.command} --help`.")
        if args.command == "doctor":
            from .doctor import doctor

            return doctor()
        _check_counts(args)
        if args.command == "plan":
            _check_plan(args)
        overrides = _overrides(rest)
        use_memory_well()
        with _alone(args):
            getattr(commands, args.command)(args, overrides)
    except (ValueError, FileNotFoundError, StrictDataclassError) as error:
        print(f"hft: error: {error}", file=sys.stderr)
        return 2
    except (OSError, ImportError) as error:
        print(f"hft: error: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        if not (words := _outside(error)):
            raise
        print(f"hft: error: {words}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        more = (
            "; `hft train ... --resume` goes on from the last checkpoint, if there is one"
            if args.command == "train"
            else ""
        )
        print(f"\nhft: stopped{more}.", file=sys.stderr)
        return 130
    return 0


def _alone(args: argparse.Namespace) -> AbstractContextManager[None]:
    """Around a command that changes or uploads what is in a model's folder: a training there would change it, too."""
    if args.command not in ("refresh", "remove", "report", "push") or not Path(args.model).is_dir():
        return nullcontext()
    from .checkpoints import RunFolder

    return RunFolder(Path(args.model)).held()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hft", description="Hierarchical Fine-Tuning: many tasks, one GPU, none forgotten."
    )
    commands_of = parser.add_subparsers(dest="command")

    def add(name: str, help: str, **more: Any) -> argparse.ArgumentParser:
        return commands_of.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.", **more)

    demo = add("demo", help="six small tasks on a real 4-bit model in minutes; no network needed")
    demo.add_argument("--out", default="hft-demo", help="folder for report.json and the model (hft-demo)")

    add("doctor", help="what this machine has, whether it works, and what to install")

    train = add(
        "train",
        help="train a recipe",
        epilog="Every key of a recipe, of HFTTrainingConfig and of BitsAndBytesConfig may follow: --learning_rate 5e-4",
    )
    names = ", ".join(shipped_recipes())
    train.add_argument("recipe", help=f"a YAML file, or the name of one that ships with the package: {names}")
    train.add_argument("--resume", action="store_true", help="go on where an interrupted run stopped")

    plan = add("plan", help="draw a saved model's hierarchy; with --data, find one for tasks")
    plan.add_argument("--model", help="folder or Hub id of an HFT model; with --data: where new tasks are to stand")
    plan.add_argument("--data", type=Path, help="a folder with <task>/train.jsonl, or a recipe: find a hierarchy")
    plan.add_argument("--task", help="also print all gates of this task; with --data: plan only this one")
    plan.add_argument("--out", type=Path, help="draw it into this .png, .svg or .pdf file, too")
    plan.add_argument("--recipe", help="with --data, a folder: backbone and settings; its hierarchy is ignored")
    plan.add_argument("--yaml", type=Path, help="with --data: write this recipe (plan.yaml)")
    plan.add_argument("--backbone", help="with --data, without --model: instead of the recipe's")
    plan.add_argument("--steps", type=int, help="with --data: optimizer steps of a pilot (24)")
    plan.add_argument("--rows", type=int, help="with --data: rows a task that losses are measured on (48)")
    plan.add_argument("--no_families", action="store_true", help="with --data: tasks get no common roots")
    plan.add_argument("--max_parents", type=int, help="with --data: parents of a task, at most (2)")
    plan.set_defaults(**_USUAL)

    refresh = add("refresh", help="let old tasks learn anew what to let in; kept only where it helps")
    refresh.add_argument("model", help="folder of an HFT model; changed only if it helps")
    refresh.add_argument("--task", help="a sealed task; by default each that has rows of its own")
    refresh.add_argument("--recipe", required=True, help="the recipe that describes the data")
    refresh.add_argument("--data", help="folder with <task>/<split>.jsonl, instead of the recipe's data")
    refresh.add_argument("--samples", type=int, default=96, help="rows to learn from, and as many to decide by (96)")
    refresh.add_argument("--steps", type=int, default=30)
    refresh.add_argument("--batch_size", type=int, default=8)

    serve = add(
        "serve",
        help="transformers' OpenAI-compatible server, for HFT models; needs transformers[serving]",
        epilog="All other arguments are those of `transformers serve`: hft serve MODEL --port 8000",
    )
    serve.add_argument("model", help="folder or Hub id of an HFT model")

    export = add("export", help="write tasks as plain LoRAs or whole models, checked against HFT")
    export.add_argument("model", help="folder or Hub id of an HFT model")
    export.add_argument("out", type=Path, help="folder to write to; with --all, a folder a task in it")
    export.add_argument("--task", help="which task; with --to gguf also backbone")
    export.add_argument("--all", action="store_true", help="all tasks, as LoRAs")
    export.add_argument(
        "--to",
        default="peft",
        choices=["peft", "merged", "gguf"],
        help="a PEFT LoRA, a whole 16-bit model, or a LoRA for llama.cpp",
    )
    export.add_argument("--merged", action="store_true", help="with --to gguf: a whole model for llama.cpp")
    export.add_argument("--onto", default="backbone", choices=["backbone", "dequantized"], help="merged onto what")
    export.add_argument("--max_rank", type=int, help="cut the LoRA to this rank; the error is reported")
    export.add_argument("--load_in_4bit", action="store_true", help="hold the backbone in NF4, as it was trained")

    merge = add("merge", help="unite two models that grew apart on the same backbone")
    merge.add_argument("one", type=Path, help="folder of a slim HFT model")
    merge.add_argument("other", type=Path, help="another one")
    merge.add_argument("--out", type=Path, required=True, help="a new folder for the union")
    merge.add_argument("--rename", action="append", default=[], metavar="OLD=NEW", help="a task of the other model")

    remove = add("remove", help="remove a task from a saved model")
    remove.add_argument("model", type=Path, help="folder of a slim HFT model; changed")
    remove.add_argument("--task", required=True, help="which task")
    remove.add_argument("--cascade", action="store_true", help="also all that depends on it")

    push = add("push", help="upload a saved model to the Hub in one commit")
    push.add_argument("model", type=Path, help="folder of an HFT model")
    push.add_argument("repo_id", help="me/my-hft; made if it is missing")
    push.add_argument("--private", action="store_true", help="if the repository is made, make it private")
    push.add_argument("--message", default="Upload HFT model", help="the commit's")

    evaluate = add("eval", help="score a saved model on a recipe's data")
    evaluate.add_argument("model", help="folder or Hub id of an HFT model")
    evaluate.add_argument("--recipe", required=True, help="the recipe that describes the data")
    evaluate.add_argument("--data", help="folder with <task>/<split>.jsonl, instead of the recipe's data")
    evaluate.add_argument("--split", default="validation", choices=["train", "validation", "test"])
    evaluate.add_argument("--task", action="append", help="only this task; may be repeated")
    evaluate.add_argument("--samples", type=int, help="rows a task, instead of the recipe's eval_samples")
    evaluate.add_argument("--batch_size", type=int, default=16)
    evaluate.add_argument("--out", type=Path, help="write the scores to this JSON file")

    report = add("report", help="one HTML page of a run, with its pictures, and who helps whom")
    report.add_argument(
        "model", type=Path, help="folder of an HFT model; report.html and pictures/ are written into it"
    )
    report.add_argument("--recipe", help="measure anew on its validation rows: who contributes what, who answers")
    report.add_argument("--data", help="folder with <task>/<split>.jsonl, instead of the recipe's data")
    report.add_argument("--samples", type=int, help="with --recipe: validation rows a task to measure on (32)")
    report.add_argument("--batch_size", type=int, default=16)

    generate = add("generate", help="answer prompts with a saved model")
    generate.add_argument("model", help="folder or Hub id of an HFT model")
    generate.add_argument("prompt", nargs="*", help="one or more prompts; without any, one a line of standard input")
    generate.add_argument("--task", help="whose path to take, or backbone; without it, the router chooses")
    generate.add_argument("--max_new_tokens", type=int, default=64)
    generate.add_argument(
        "--load_in_4bit",
        action=argparse.BooleanOptionalAction,
        help="hold the backbone in NF4, or in 16 or 32 bit; without it, as it was trained in that folder",
    )
    return parser


def _is_option(word: str) -> bool:
    """As argparse tells them from arguments: "-x" is one, and "-5" or "- milk" is a prompt."""
    return word.startswith("-") and " " not in word and not re.fullmatch(r"-\d+|-\d*\.\d+", word)


def _check_counts(args: argparse.Namespace) -> None:
    """Raises ValueError for a number of something that is below 1."""
    for name in ("batch_size", "max_new_tokens", "max_parents", "max_rank", "rows", "samples", "steps"):
        if (value := getattr(args, name, None)) is not None and value < 1:
            raise ValueError(f"--{name} is {value}; it must be 1 or more.")


def _check_order(words: Sequence[str], what: str) -> None:
    """Raises ValueError if a key's value was taken for the recipe or the model."""
    for word in words[1:]:
        if not word.startswith("--"):
            return
        if word not in ("--resume", "--help") and "=" not in word:
            first = f"hft {words[0]} {what.upper()} {word} VALUE"
            raise ValueError(f"{word} stands before the {what}; give the {what} first: {first}.")


def _check_plan(args: argparse.Namespace) -> None:
    """Raises ValueError for options of `hft plan` that do not go together, before anything is measured."""
    if args.model is not None and args.backbone is not None:
        raise ValueError("--backbone does not go with --model: it has one; leave one of them out.")
    if args.yaml is not None and args.data is None:
        raise ValueError("--yaml names the recipe that is written for the tasks of --data; give --data, too.")
    if args.recipe is not None and args.data is None:
        raise ValueError("--recipe says how the tasks of --data train; give --data, too, or leave it out.")
    if args.data is None and (given := [key for key, usual in _USUAL.items() if getattr(args, key) != usual]):
        raise ValueError(
            f"--{given[0]} says how a hierarchy is found for the tasks of --data; give --data, too, or leave it out."
        )
    if args.recipe is not None and not args.data.exists() and str(args.data) not in shipped_recipes():
        raise FileNotFoundError(f"--data is '{args.data}', and there is no such folder.")
    if args.recipe is not None and not args.data.is_dir():
        raise ValueError(
            f"--data '{args.data}' is no folder, so it is taken as a recipe, and --recipe '{args.recipe}' is another one; "
            "give one of them, or a folder of data."
        )
    if args.yaml is not None and args.yaml.is_dir():
        raise ValueError(f"--yaml is '{args.yaml}', a folder; name a file in it.")


def _outside(error: Exception) -> str:
    """What a disk, a network or a template did that came as no OSError, in words; empty for anything else."""
    if type(error).__module__.startswith("httpx"):
        return f"The Hub cannot be reached: {error}."
    if type(error).__module__.startswith("jinja2"):
        return f"The chat template cannot be used: {error}."
    return str(error) if re.search(r"\(os error \d+\)", str(error)) else ""  # of tokenizers, safetensors


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
        from .recipes import read_value  # with it comes TRL

        key = key.replace("-", "_")
        values[key] = read_value(key, value)
    return values


if __name__ == "__main__":
    sys.exit(main())
