"""What the speed benchmarks share: models whose nodes all speak, LoRAs beside them, and medians of interleaved rounds."""

import argparse
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from harness import NF4, RESULTS, cell, prepare, todo
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import hft
from hft.trainers.compute_dtype import device_here


RANK = 16
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def fill_in(
    description: str, name: str, settings: dict[str, Callable[[str, int], dict]], rounds: int, out: str
) -> None:
    """The command of a speed benchmark: its cells that are missing, each a function of the backbone and the rounds."""
    arguments = argparse.ArgumentParser(description=description)
    arguments.add_argument("--backbone", help="Hub id or folder; SmolLM2-135M-Instruct by default")
    arguments.add_argument("--settings", default=",".join(settings), help="which of them, by commas")
    arguments.add_argument("--rounds", type=int, default=rounds)
    arguments.add_argument("--out", type=Path, default=RESULTS / out)
    args = arguments.parse_args()
    backbone, _ = prepare(args.backbone)
    for setting, seed in todo(args.out, name, args.settings.split(","), 1):
        with cell(args.out, name, setting, seed) as result:
            result.update(settings[setting](backbone, args.rounds))


def last(count: int, model: Any) -> torch.Tensor:
    """`logits_to_keep` for so many positions. As an index: of a slice, a CPU's matmul copies the head once a row."""
    return torch.arange(-count, 0, device=model.device)


def synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def timed(run: Callable[[], object]) -> Callable[[], float]:
    """Runs, and says how many seconds it took."""

    def measure() -> float:
        synchronize()
        begin = time.perf_counter()
        run()
        synchronize()
        return time.perf_counter() - begin

    return measure


def medians(ways: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """The median of what each way measures, one after another in each round, after one round that does not count."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, measure in ways.items():
            seconds = measure()
            if turn:
                found[name].append(seconds)
    return {name: statistics.median(its) for name, its in found.items()}


def interleaved(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median seconds of each way."""
    return medians({name: timed(run) for name, run in ways.items()}, rounds)


def ratios(times: dict[str, float], base: str) -> dict[str, float]:
    """Each way's time over that of `base`."""
    return {name: round(seconds / times[base], 3) for name, seconds in times.items() if name != base}


def speak(model: Any, parts: Iterable[str] = ("hft_nodes", "hft_memory", "lora_", "poly_lora")) -> None:
    """Gives every low-rank factor a voice: a silent one would be a special case."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in parts):
                torch.nn.init.normal_(parameter, std=0.01)


def with_nodes(backbone: str, num_tasks: int, **options: Any) -> hft.HFTForCausalLM:
    """A model in NF4 with sealed roots."""
    tree = {f"t{i}": [] for i in range(num_tasks)}
    how = {"quantization_config": BitsAndBytesConfig(**NF4), "rank": RANK, **options}
    model = hft.HFTForCausalLM.from_backbone(backbone, tree, **how)
    model.seal(model.hierarchy.names)
    speak(model, ["hft_nodes"])
    return model.eval()


def chain(backbone: str, length: int, is_sealed: bool, **options: Any) -> tuple[hft.HFTForCausalLM, str]:
    """A model with one path of so many nodes, each stage with its memory page, and the task at its end.

    Args:
        is_sealed: whether the last task is, too, as for serving; else it is what trains.
        options: as for `from_backbone`; NF4 by default.
    """
    tree = {f"t{i}": [f"t{i - 1}"] if i else [] for i in range(length)}
    how = {"quantization_config": BitsAndBytesConfig(**NF4), "rank": RANK, **options}
    model, last = hft.HFTForCausalLM.from_backbone(backbone, tree, **how), f"t{length - 1}"
    for task in tree:
        model.start_stage([task])
        speak(model)
        model.seal([task] if is_sealed or task != last else [])
    return (model.to(device_here()) if how["quantization_config"] is None else model), last


def plain(backbone: str, **options: Any) -> Any:
    """The backbone in NF4, or as `options` say, with the kernel that is safe for training: as HFT holds it.

    On a CPU with AVX512-BF16 bitsandbytes would repack the weights at the first evaluation, and gradients would be wrong.
    """
    model = AutoModelForCausalLM.from_pretrained(
        backbone, **(options or {"quantization_config": BitsAndBytesConfig(**NF4)})
    )
    for module in model.modules():
        if "support_avx512bf16_for_cpu" in vars(module):
            module.support_avx512bf16_for_cpu = False
    return model.to(device_here()) if options else model


def lora(rank: int = RANK) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=LINEARS, task_type="CAUSAL_LM")


def with_loras(backbone: str, count: int = 1, **options: Any) -> Any:
    """PEFT LoRAs as TRL makes them for a 4-bit model: `get_peft_model`, then what trains is cast to bfloat16. All of them
    are active, and the last one trains."""
    model = get_peft_model(plain(backbone, **options), lora(), adapter_name="t0")
    for i in range(1, count):
        model.add_adapter(f"t{i}", lora())
    names = [f"t{i}" for i in range(count)]
    model.base_model.set_adapter(names)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(torch.bfloat16)
            parameter.requires_grad_(f".{names[-1]}." in name)
    speak(model)
    return model


def prompts(model: Any, rows: int, length: int) -> torch.Tensor:
    """[rows, length] token ids, always the same; the 16 highest are left to those who shift them."""
    vocabulary = min(40000, model.config.get_text_config().vocab_size - 16)
    ids = torch.randint(100, vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))
    return ids.to(model.device)
