"""Does torch.compile pay? Speed of compiled passes over eager ones, interleaved in one process.

    python examples/benchmarks/speed_compile.py [--settings decode,train]

Each value is a ratio of median times over interleaved rounds, eager over compiled: above 1, compiling is faster. `decode`:
one token of one row after 64, with a static cache and a folded task; `prefill`: a prompt of 256; `train`: forward
and backward of 2 x 256 tokens. Compiled once for two tasks of different rank; a second graph would be an error.
"""

import time
from collections.abc import Callable

import torch
from timing import fill_in, interleaved, prompts
from transformers import StaticCache

import hft


def two_tasks(backbone: str) -> hft.HFTForCausalLM:
    """A root and its child, in bfloat16, whose nodes and page speak; open."""
    model = hft.HFTForCausalLM.from_backbone(backbone, {"a": [], "b": ["a"]}, rank=16, dtype=torch.bfloat16)
    model.to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
    for task in ("a", "b"):
        model.start_stage([task])
    for parameter in (*model.hft_nodes.parameters(), *model.hft_memory.parameters()):
        torch.nn.init.normal_(parameter, std=0.01)
    model.set_trainable(["a", "b"])
    return model


def serve(backbone: str, rounds: int, length: int, cached: int) -> dict:
    """One pass of `length` tokens after `cached` ones, for each of the two tasks in turn."""
    model = two_tasks(backbone)
    model.seal(["a", "b"])
    model.eval()
    rank = model.widest_rank()
    compiled = torch.compile(model, fullgraph=True)
    ids = prompts(model, 1, length)
    room = cached + length * (4 * rounds + 8)  # each pass adds to the cache
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=room) if cached else None
    positions = torch.arange(cached, cached + length, device=model.device)[None]
    options = {"cache": cache, "position_ids": positions, "use_cache": cached > 0, "logits_to_keep": 1}
    results, seconds = {}, {}
    with torch.no_grad():
        if cache is not None:
            model(prompts(model, 1, cached), task="a", cache=cache)
        for task in ("a", "b"):
            model.fold(task, rank=rank)
            begin = time.perf_counter()
            compiled(ids, **options)
            seconds[task] = round(time.perf_counter() - begin, 1)
            ways = {"compiled": lambda: compiled(ids, **options), "eager": lambda: model(ids, **options)}
            results[task] = interleaved(ways, rounds)
            model.unfold()
    return {"value": ratio(results), "times": results, "first_pass_seconds": seconds}


def train(backbone: str, rounds: int) -> dict:
    """Forward and backward of the decoder and the head on 2 x 256 tokens, for each of the two tasks in turn."""
    model = two_tasks(backbone).train()
    rank = model.widest_rank()
    compiled = torch.compile(model.base_model, fullgraph=True)
    ids = prompts(model, 2, 256)
    results, seconds = {}, {}

    def step(decoder: Callable, task: str, **options) -> None:
        with model.activate(task, **options):
            hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state
        logits = model.get_output_embeddings()(hidden)[:, :-1].flatten(0, 1).float()
        torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()).backward()
        model.zero_grad()

    for task in ("a", "b"):
        begin = time.perf_counter()
        step(compiled, task, rank=rank)
        seconds[task] = round(time.perf_counter() - begin, 1)
        ways = {
            "compiled": lambda task=task: step(compiled, task, rank=rank),
            "eager": lambda task=task: step(model.base_model, task),
        }
        results[task] = interleaved(ways, rounds)
    return {"value": ratio(results), "times": results, "first_pass_seconds": seconds}


def ratio(results: dict[str, dict[str, float]]) -> float:
    """Eager time over compiled time, both tasks together."""
    eager, compiled = (sum(times[way] for times in results.values()) for way in ("eager", "compiled"))
    return round(eager / compiled, 3)


def main() -> None:
    settings: dict[str, Callable[[str, int], dict]] = {
        "decode": lambda backbone, rounds: serve(backbone, rounds, 1, 64),
        "prefill": lambda backbone, rounds: serve(backbone, rounds, 256, 0),
        "train": train,
    }
    torch._dynamo.config.error_on_recompile = True
    fill_in(__doc__.splitlines()[0], "compile", settings, 5, "speed-compile.jsonl")


if __name__ == "__main__":
    main()
