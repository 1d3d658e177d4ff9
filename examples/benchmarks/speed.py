"""How fast is it? Ratios of times, against the plain backbone and against PEFT, interleaved in one process.

    python examples/benchmarks/speed.py [--settings "mixed 8"]

Each value is a ratio of medians over interleaved rounds. `mixed N`: a forward pass of a batch of N rows with N different
tasks, PEFT's `adapter_names` over ours (above 1: ours is faster). `routed prefill`: generating one token from a prompt with
the task given, plus routing it, over the former. `train path N`, `train tasks N`: see speed_train.py; `decode`,
`load 1 of 64`: speed_serve.py; `instead`: speed_peers.py.
"""

from collections.abc import Callable
from contextlib import nullcontext

import speed_peers
import speed_serve
import speed_train
import torch
from harness import NF4
from peft import LoraConfig, get_peft_model
from timing import LINEARS, RANK, fill_in, interleaved, last, prompts, with_nodes
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hft.path_hft import generating


@torch.inference_mode()
def mixed(backbone: str, num_tasks: int, rounds: int) -> dict:
    """A batch in which every row has another task: ours against PEFT's `adapter_names`."""
    ours = with_nodes(backbone, num_tasks)
    plain = AutoModelForCausalLM.from_pretrained(backbone, quantization_config=BitsAndBytesConfig(**NF4))
    config = LoraConfig(r=RANK, target_modules=LINEARS, task_type="CAUSAL_LM")
    theirs = get_peft_model(plain, config, adapter_name="t0")
    for i in range(1, num_tasks):
        theirs.add_adapter(f"t{i}", config)
    theirs.eval()
    tasks = [f"t{i}" for i in range(num_tasks)]
    results = {}
    for name, length in (("prefill", 64), ("decode", 1)):
        ids = prompts(ours, num_tasks, length)
        options = {"logits_to_keep": last(1, ours), "use_cache": False}
        ways = {
            "ours": lambda ids=ids, options=options: ours(ids, task=tasks, **options),
            "peft": lambda ids=ids, options=options: theirs(input_ids=ids, adapter_names=tasks, **options),
            "backbone": lambda ids=ids, options=options: ours(ids, **options),
        }
        with generating() if name == "decode" else nullcontext():  # as `generate` calls the model, token by token
            results[name] = interleaved(ways, rounds)
    ratio = {name: round(its["peft"] / its["ours"], 3) for name, its in results.items()}
    return {"value": ratio["prefill"], "ratio": ratio, "times": results}


@torch.inference_mode()
def routed_prefill(backbone: str, rounds: int) -> dict:
    """One token from prompts of 256 tokens: what the router adds."""
    model = with_nodes(backbone, 14)
    for i in range(14):
        model.add_routes(f"t{i}", (prompts(model, 8, 20) + i).tolist())
    ids = prompts(model, 2, 256)
    model.hft_router.config.confidence = 0.0
    options = {"max_new_tokens": 1, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    model.route(ids)  # solves
    times = interleaved(
        {
            "routed": lambda: model.generate(ids, **options),
            "given": lambda: model.generate(ids, task="t3", **options),
            "route alone": lambda: model.route(ids),
        },
        rounds,
    )
    return {"value": round(1 + times["route alone"] / times["given"], 4), "times": times}


def main() -> None:
    settings: dict[str, Callable[[str, int], dict]] = {
        "routed prefill": routed_prefill,
        **{f"mixed {n}": lambda backbone, rounds, n=n: mixed(backbone, n, rounds) for n in (2, 8, 16)},
        **{f"train path {n}": lambda backbone, rounds, n=n: speed_train.path(backbone, n, rounds) for n in (1, 4, 8)},
        **{
            f"train tasks {n}": lambda backbone, rounds, n=n: speed_train.tasks(backbone, n, rounds)
            for n in (4, 16, 64)
        },
        "decode": speed_serve.decode,
        "load 1 of 64": speed_serve.load,
        "instead": speed_peers.instead,
    }
    fill_in(__doc__.splitlines()[0], "speed", settings, 9, "speed.jsonl")


if __name__ == "__main__":
    main()
