"""One GPU: the memory and speed of HFT beside plain TRL + PEFT QLoRA, same shapes, settings and rows.

    python examples/benchmarks/gpu.py                     # 8B, 1B and 135M shapes, random weights; minutes on an H100
    python examples/benchmarks/gpu.py --shapes tiny       # a try, on a CPU, too

Each cell is a fresh process: a Llama of that shape in NF4, rows of 2048 tokens that are packed of documents without a gap,
micro-batch 2, checkpointed layers, 8-bit AdamW (not paged, which no counter of memory would see), rank 16 on all linears,
bfloat16. HFT holds 8 tasks: four are sealed, and the four that train in turn stand on two of them and write a memory page of
8 slots. `value`: training tokens a second (median step); `peak_allocated_gib`, `peak_reserved_gib`: of the training, weights
included; `predicted_gib`: what `estimate_memory` says.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from harness import RESULTS, cell, read_cells, todo
from random_backbones import SHAPES, config_of, hft_on, random_backbone, word_tokenizer
from transformers import PreTrainedConfig, TrainerCallback
from transformers.utils import logging

from hft import Hierarchy
from hft.attention_hft import has_flash_attention


RANK, SLOTS = 16, 8
SEALED = {"t0": [], "t1": ["t0"], "t2": ["t0"], "t3": ["t0"]}
TRAINED = {f"t{i}": ["t1"] for i in range(4, 8)}
WARM_UP = 4  # steps that do not count: kernels are chosen, optimizer states are made


class StepTimes(TrainerCallback):
    """Seconds of each optimizer step, and the memory's peak from the first one on."""

    def __init__(self):
        self.seconds: list[float] = []
        self.trained = 0  # parameters that a step moves

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # what building the model left over
            torch.cuda.reset_peak_memory_stats()

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self.trained:
            learning = getattr(model, "learning_parameters", None)  # HFT's: of one task of the stage, with the page
            its = model.parameters() if learning is None else learning(model.config.open_tasks()[-1]).values()
            self.trained = sum(parameter.numel() for parameter in its if parameter.requires_grad)
        _wait()
        self.begin = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _wait()
        self.seconds.append(time.perf_counter() - self.begin)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def best_attention() -> str:
    """flash-attention where it is installed, else PyTorch's own with a line that says so."""
    if has_flash_attention():
        return "flash_attention_2"
    print(
        "flash-attn is not installed (or there is no GPU that runs it): sdpa, with a block mask for packed rows",
        flush=True,
    )
    return "sdpa"


def options(folder: str, length: int, steps: int) -> dict[str, Any]:
    """What both trainers are given."""
    return dict(
        output_dir=folder, max_steps=steps, per_device_train_batch_size=2, max_length=length, packing=True, bf16=True,
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}, optim="adamw_8bit",
        learning_rate=1e-4, lr_scheduler_type="constant", save_strategy="no", report_to="none", logging_steps=1,
        disable_tqdm=True, dataloader_pin_memory=torch.cuda.is_available(), use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip


def rows(vocab_size: int, length: int, tokens: int, seed: int) -> Dataset:
    """Documents of token ids, of a whole row to an eighth, which packing puts together without a gap."""
    generator = torch.Generator().manual_seed(seed)
    made: list[list[int]] = []

    def halved(size: int) -> None:
        if size > length // 8 and torch.rand((), generator=generator) < 0.7:
            halved(size // 2)
            halved(size - size // 2)
        else:
            made.append(torch.randint(3, vocab_size, (size,), generator=generator).tolist())

    # TRL packs a thousand documents at a time, so there are at most so many; further steps are of the same rows.
    for _ in range(min(-(-tokens // length), 100)):
        halved(length)
    return Dataset.from_dict({"input_ids": made})


def check_full(packed: Dataset, length: int) -> None:
    """Raises ValueError if a packed row has not its whole length, by which tokens a second are counted."""
    if short := [len(ids) for ids in packed["input_ids"] if len(ids) != length]:
        raise ValueError(f"{len(short)} of {len(packed)} packed rows are shorter than {length} tokens: {short[0]}.")


def train_hft(shape: str, length: int, steps: int, folder: str, times: StepTimes) -> tuple[float, dict[str, Any]]:
    """The last loss, and what the model is like."""
    from hft.trainers import HFTTrainer, HFTTrainingConfig

    config = config_of(shape, best_attention())
    model = hft_on(random_backbone(config, _device()), SEALED, RANK)
    for parameter in model.hft_nodes.parameters():
        torch.nn.init.normal_(parameter, std=0.01)  # sealed nodes that speak
    model.seal(list(SEALED))
    for task, parents in TRAINED.items():
        model.add_task(task, parents)
    model.config.memory_config.slots = SLOTS
    data = {task: rows(config.vocab_size, length, 2 * length * steps, i) for i, task in enumerate(TRAINED)}
    args = HFTTrainingConfig(**options(folder, length, steps), route_samples=0)
    trainer = HFTTrainer(model, args, train_dataset=data, processing_class=word_tokenizer(config.vocab_size))
    trainer.add_callback(times)
    for packed in trainer._prepared.values():
        check_full(packed, length)
    trainer.train()
    return trainer.log_history[-2]["loss"], {
        "attention": model.backbone.config._attn_implementation,
        "predicted_gib": predicted_gib(config, length, torch.cuda.is_available()),
    }


def predicted_gib(config: PreTrainedConfig, length: int, on_accelerator: bool, eight_tasks: bool = True) -> float:
    """What `estimate_memory` says of HFT's cell; or of one task by itself, which is a plain LoRA in float32."""
    from hft.trainers.memory_estimate import OPTIMIZER_BYTES_8BIT, estimate_memory

    path_rank = RANK * len(Hierarchy(SEALED | TRAINED).path("t7")) + SLOTS
    its: dict[str, Any] = dict(path_rank=RANK, slots=0)
    if eight_tasks:
        its = dict(path_rank=path_rank, num_training=len(TRAINED), sealed_rank=RANK * len(SEALED), slots=SLOTS)
    estimate = estimate_memory(
        config, rank=RANK, batch_size=2, length=length, gradient_checkpointing=True, on_accelerator=on_accelerator,
        optimizer_bytes=OPTIMIZER_BYTES_8BIT, **its,
    )  # fmt: skip
    return round(estimate.total / 2**30, 2)


def train_trl(shape: str, length: int, steps: int, folder: str, times: StepTimes) -> tuple[float, dict[str, Any]]:
    """Plain QLoRA: one LoRA of the same rank on the same linears."""
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    config = config_of(shape, best_attention())
    model = random_backbone(config, _device())
    data = rows(config.vocab_size, length, 2 * length * steps, 0)
    lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        model, SFTConfig(**options(folder, length, steps)), train_dataset=data, peft_config=lora,
        processing_class=word_tokenizer(config.vocab_size), callbacks=[times],
    )  # fmt: skip
    check_full(trainer.train_dataset, length)
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    return losses[-1], {"attention": model.config._attn_implementation}


def _one_gpu() -> dict[str, str]:
    """The environment of a cell's process: offline, and of several GPUs it sees the first."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return {**os.environ, "HF_HUB_OFFLINE": "1", "CI": "1", "CUDA_VISIBLE_DEVICES": first}


def _device() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def measure(method: str, shape: str, length: int, steps: int) -> dict[str, Any]:
    """One cell, in this process."""
    disable_progress_bars()
    logging.set_verbosity_error()
    times = StepTimes()
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        train = train_hft if method == "hft" else train_trl
        loss, more = train(shape, length, steps, folder, times)
    counted = times.seconds[WARM_UP:] or times.seconds
    result: dict[str, Any] = {
        "value": round(2 * length / statistics.median(counted), 1), "step_seconds": round(statistics.median(counted), 4),
        "steps": len(times.seconds), "loss": round(loss, 4), "process_seconds": round(time.perf_counter() - begin, 1),
        "length": length, "trained_parameters_a_step": times.trained, **more,
    }  # fmt: skip
    if torch.cuda.is_available():
        result["peak_allocated_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
        result["peak_reserved_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 3)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="8b,1b,135m", help=f"by commas, of {', '.join(SHAPES)}")
    parser.add_argument("--methods", default="hft,trl")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=14, help=f"optimizer steps; the first {WARM_UP} do not count")
    parser.add_argument("--seconds", type=float, default=450, help="no new cell is begun after so many")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu.jsonl")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # in a fresh process: one cell
    args = parser.parse_args()
    if args.length % 8:
        raise SystemExit(
            f"--length is {args.length}; it must be a multiple of 8, which documents divide without a rest."
        )
    if args.one:
        shape, method = args.one.split()
        with cell(args.out, "gpu", args.one, 0) as result:
            result.update(measure(method, shape, args.length, args.steps))
        return
    begin, is_whole = time.time(), True
    settings = [f"{shape} {method}" for shape in args.shapes.split(",") for method in args.methods.split(",")]
    # This process leaves the GPU alone: it would take memory there, too.
    for setting, _ in todo(args.out, "gpu", settings, 1):
        if time.time() - begin > args.seconds:
            print(f"{setting}: left out after {args.seconds:.0f} s; run the command again, which goes on from here")
            continue
        command = [sys.executable, __file__, "--one", setting, "--out", str(args.out)]
        command += ["--length", str(args.length), "--steps", str(args.steps)]
        try:
            subprocess.run(command, check=True, env=_one_gpu())
        except subprocess.CalledProcessError as error:
            print(f"{setting}: failed with code {error.returncode}; its output is above. Going on.", flush=True)
            is_whole = False
    for line in read_cells(args.out):
        peak = line.get("peak_allocated_gib", "no GPU")
        print(f"{line['setting']:<10}{line['value']:>10} tokens/s  peak {peak} GiB  loss {line['loss']}")
    if not is_whole:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
