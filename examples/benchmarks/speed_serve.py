"""The cost of serving: seconds a generated token, and seconds and bytes to load one task of many.

`decode`: greedy tokens after a prompt of 16, one row, on a path of 4 nodes and 4 pages, over the backbone without a task;
timed from token to token, so prompt and routing do not count. NF4 with the kernel that is safe for training for all;
`merged` over a backbone in bfloat16, into which it is merged. `load 1 of 64`: `from_pretrained(tasks=[one])` over all 64
tasks of a slim model, backbone included (`backbone`: a model without tasks), from the page cache.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from harness import NF4
from timing import chain, interleaved, medians, prompts, ratios, with_nodes
from transformers import BitsAndBytesConfig
from transformers.generation.streamers import BaseStreamer

import hft
from hft.files_hft import SHARED_FILE, read_tensors


class Clock(BaseStreamer):
    """Notes when each token came; `generate` gives it the prompt first."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())  # the tokens are on the CPU by now

    def end(self) -> None:
        pass


def a_token(model: Any, count: int = 24, **which: Any) -> Callable[[], float]:
    """Measures the seconds from one generated token to the next; `which` goes to `generate`."""
    ids = prompts(model, 1, 16)
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0, **which}

    def measure() -> float:
        clock = Clock()
        model.generate(input_ids=ids, min_new_tokens=count, max_new_tokens=count, streamer=clock, **options)
        _prompt, first, *_, last = clock.times
        return (last - first) / (count - 1)

    return measure


def folded(model: hft.HFTForCausalLM, task: str, merge: bool = False) -> Callable[[], float]:
    """As `a_token`, with the task folded meanwhile."""

    def measure() -> float:
        model.fold(task, merge=merge)
        seconds = a_token(model)()
        model.unfold()
        return seconds

    return measure


@torch.inference_mode()
def decode(backbone: str, rounds: int) -> dict:
    """Seconds a token in all ways that HFT serves a task, over the backbone's."""
    model, task = chain(backbone, 4, is_sealed=True)
    wide, _ = chain(backbone, 4, is_sealed=True, quantization_config=None, dtype=torch.bfloat16)
    for one in (model, wide):
        one.eval()
    for i in range(4):
        model.add_routes(f"t{i}", (prompts(model, 8, 20) + i).tolist())
    model.hft_router.config.confidence = 0.0
    times = medians(
        {
            "backbone": a_token(model, task="backbone"),
            "task": a_token(model, task=task),
            "folded": folded(model, task),
            "routed": a_token(model),
            "backbone in bfloat16": a_token(wide, task="backbone"),
            "merged": folded(wide, task, merge=True),
        },
        rounds,
    )
    ratio = ratios({name: times[name] for name in ("backbone", "task", "folded", "routed")}, "backbone")
    ratio["merged"] = round(times["merged"] / times["backbone in bfloat16"], 3)
    return {"value": ratio["task"], "ratio": ratio, "times": times}


def load(backbone: str, rounds: int, count: int = 64) -> dict:
    """Loading one of many tasks, over loading all."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with_nodes(backbone, count).save_pretrained(folder)

        def loads(**which: Any) -> Callable[[], object]:
            return lambda: hft.HFTForCausalLM.from_pretrained(
                folder, quantization_config=BitsAndBytesConfig(**NF4), **which
            )

        with mock.patch("hft.slim_hft.read_tensors", wraps=read_tensors) as reader:
            loads(tasks=["t1"])()
            read = sorted(call.args[1] for call in reader.call_args_list)
        plain = lambda: hft.HFTForCausalLM.from_backbone(backbone, quantization_config=BitsAndBytesConfig(**NF4))  # noqa: E731
        times = interleaved({"one": loads(tasks=["t1"]), "all": loads(), "backbone": plain}, rounds)
        size = (folder / "tasks/t1.safetensors").stat().st_size
        shared = (folder / SHARED_FILE).stat().st_size
    return {
        "value": round(times["one"] / times["all"], 3),
        "times": times,
        "files_read": read,
        "bytes_per_task": size,
        "bytes_shared": shared,
    }
