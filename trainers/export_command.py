"""`hft export`: tasks as plain LoRAs or whole models, one or all of them, each read again and compared."""

import argparse
from pathlib import Path
from typing import Any

import hft
from hft.hierarchy_hft import BACKBONE

from .export import NOTES, check_free, check_notes, export_merged, export_peft, write_serving_notes
from .loading import load_model, load_tokenizer


def export_tasks(args: argparse.Namespace) -> None:
    """Checks what is asked for, writes it, and says how far what was written differs from HFT.

    Raises:
        ValueError: options that do not go together, an unknown task, or a folder that holds something else.
    """
    if args.all == (args.task is not None):
        raise ValueError("Give one task by --task, or --all.")
    if args.all and (args.merged or args.to == "merged"):
        raise ValueError("--all writes LoRAs; a merged model is written for one --task at a time.")
    if args.merged and args.to != "gguf":
        raise ValueError("--merged goes with --to gguf; a whole model for transformers is --to merged.")
    is_gguf_backbone = args.to == "gguf" and (args.all or args.task == BACKBONE)
    is_whole = args.to == "merged" or args.merged
    if args.onto != "backbone" and not (is_whole or is_gguf_backbone):
        raise ValueError("--onto says what a whole model is merged onto; a LoRA is merged onto nothing. Leave it out.")
    if args.max_rank is not None and (is_whole or args.task == BACKBONE):
        raise ValueError("--max_rank cuts a LoRA, and a whole model has none. Leave it out.")
    config, _gates = hft.read_gates(args.model)
    tasks = [task for task in config.hierarchy().names if task in config.sealed_tasks()]
    check_free(args.out, None if args.all else args.to)  # before anything is loaded
    if args.all:
        if not tasks:
            raise ValueError(f"'{args.model}' has no task that is learnt and sealed; there is nothing to export.")
        check_notes(args.out)
        for task in tasks:
            check_free(args.out / task, args.to)
    elif (args.to, args.task) != ("gguf", BACKBONE):
        config.sealed_task(args.task)  # an open one has not learnt yet
    tokenizer, model = load_tokenizer(args.model), load_model(args.model, args.load_in_4bit)
    reports = []
    for task in [args.task] if not args.all else [BACKBONE, *tasks] if args.to == "gguf" else tasks:
        folder = args.out / task if args.all else args.out
        report, what = _export_one(args, model, tokenizer, task, folder)
        reports.append(report)
        print(f"{folder}: {task}, {what}; read again: {_agreement(report)}")
        if "llama_cpp" in report:
            print(f"  in llama.cpp: {_agreement(report['llama_cpp'])}")
    if args.all and args.to == "gguf":
        from .gguf_export import write_llama_notes  # it needs the package gguf

        write_llama_notes(args.out, config.backbone, tasks)
    elif args.all:
        write_serving_notes(args.out, config.backbone, tasks, [report["rank"] for report in reports])
    if args.all:
        if left := config.open_tasks():
            print(f"Not learnt yet, and left out: {', '.join(left)}")
        print(f"How to serve them: {args.out / NOTES}")


def _export_one(args: argparse.Namespace, model: Any, tokenizer: Any, task: str, folder: Path) -> tuple[dict, str]:
    """One task in one form: its report, and what was written in words."""
    if args.to == "merged":
        return export_merged(model, tokenizer, task, folder, args.onto), f"merged onto the {args.onto}"
    if args.to == "peft":
        report = export_peft(model, tokenizer, task, folder, args.max_rank)
        what = f"rank {report['path_rank']} in {report['rank']}"
    else:
        try:
            from .gguf_export import export_gguf_lora, export_gguf_model
        except ImportError as error:
            raise ImportError(f"`--to gguf` needs the package gguf: pip install gguf ({error}).") from error
        if args.merged or task == BACKBONE:
            report = export_gguf_model(model, tokenizer, task, folder, args.onto)
            return report, f"a whole model in {report['dtype'].removeprefix('torch.')}, on the {args.onto}"
        backbone = args.out / BACKBONE / f"{BACKBONE}.gguf" if args.all else None
        report = export_gguf_lora(model, tokenizer, task, folder, args.max_rank, backbone, args.onto)
        what = f"a LoRA of rank {report['rank']}"
    return report, what + (f", cut with an error of {report['svd_error']:.3f}" if report["svd_error"] else "")


def _agreement(report: dict[str, Any]) -> str:
    return (
        f"logits differ by {report['max_difference']:.3g}, KL {report['kl']:.2g}, "
        f"same first choice at {100 * report['top1']:.1f} % of positions"
    )
