"""The cost of a training step: of HFT with long paths and with many tasks, against TRL's and PEFT's QLoRA.

A step is forward, backward and AdamW on what trains: 4 rows of 256 tokens, a loss on the last 32 of each row (as on answers;
on all positions the head's cost would hide what differs), an NF4 backbone computing in bfloat16, no checkpointing, and
without the autocast that both trainers switch on by `bf16`.

`train path N`: the last task of a chain of N, whose ancestors and their memory pages are sealed, over one PEFT LoRA of the
same rank on the same linears. HFT trains one node of rank 16, one page of 8 slots and their gates in float32, as HFTTrainer
does; PEFT one LoRA of rank 16 in bfloat16, as TRL casts it. `without memory`: nodes only. `train tasks N`: a stage of N
roots, all of which train, one of them in each step, over the same with 4 tasks.
"""

from collections.abc import Callable
from typing import Any

import torch
from harness import NF4
from timing import RANK, chain, interleaved, last, prompts, ratios, speak, with_loras
from torch.profiler import ProfilerActivity, profile
from transformers import BitsAndBytesConfig

import hft


ROWS, LENGTH, SCORED = 4, 256, 32


def training_step(model: Any, **which: Any) -> Callable[[], None]:
    """A function that takes one optimizer step; `which` goes to the model."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids_BT = prompts(model, ROWS, LENGTH)
    labels_BT, kept = ids_BT[:, -SCORED:], last(SCORED + 1, model)

    def step() -> None:
        logits_BTV = model(input_ids=ids_BT, logits_to_keep=kept, use_cache=False, **which).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits_BTV.float().flatten(0, 1), labels_BT.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def dominated_by(step: Callable[[], None], count: int = 6) -> list[str]:
    """The operators that take most of a step's time themselves, with their share of it."""
    step()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
    with profile(activities=activities) as found:
        step()
    key = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    spent = {event.key: getattr(event, key) for event in found.key_averages()}
    total = sum(spent.values())
    top = sorted(spent, key=spent.__getitem__, reverse=True)[:count]
    return [f"{name} {100 * spent[name] / total:.0f} %" for name in top]


def path(backbone: str, length: int, rounds: int) -> dict:
    """A step on a path of so many nodes, over one of PEFT's LoRA."""
    model, task = chain(backbone, length, is_sealed=False)
    alone, _ = chain(backbone, length, is_sealed=False, memory_config={"read": "off"})
    steps = {
        "hft": training_step(model, task=task),
        "hft without memory": training_step(alone, task=task),
        "peft": training_step(with_loras(backbone)),
    }
    times = interleaved(steps, rounds)
    ratio = ratios(times, "peft")
    return {"value": ratio["hft"], "ratio": ratio, "times": times, "dominated_by": dominated_by(steps["hft"])}


def tasks(backbone: str, count: int, rounds: int) -> dict:
    """A step of one of `count` tasks that train in one stage, over the same of one of 4."""
    steps = {}
    for many in {4, count}:
        tree = {f"t{i}": [] for i in range(many)}
        model = hft.HFTForCausalLM.from_backbone(
            backbone, tree, rank=RANK, quantization_config=BitsAndBytesConfig(**NF4)
        )
        model.start_stage(tree)
        speak(model)
        steps[f"{many} tasks"] = training_step(model, task="t1")
    if count == 4:
        steps["again 4 tasks"] = steps["4 tasks"]  # how far apart equal things are measured
    times = interleaved(steps, rounds)
    ratio = ratios(times, "4 tasks")
    return {"value": next(iter(ratio.values())), "ratio": ratio, "times": times}
