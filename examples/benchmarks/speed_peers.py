"""What a reader would pick instead of a path, against one plain LoRA, all by PEFT on the same backbone, rank and linears.

`4 active`: four LoRAs added up, of which the last trains. `xlora`: X-LoRA's mixture of four, which trains its classifier
only, and runs without a cache. `poly`: Poly's four skills, mixed by a learnt row for the task. What does not run is in the
cell with its error.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PolyConfig, XLoraConfig, get_peft_model
from speed_serve import a_token
from speed_train import ROWS, training_step
from timing import LINEARS, RANK, interleaved, medians, plain, ratios, speak, with_loras


def xlora(backbone: str) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        adapters = {}
        for i in range(4):
            one = with_loras(backbone)
            one.save_pretrained(Path(folder) / str(i), selected_adapters=["t0"])
            adapters[str(i)] = str(Path(folder) / str(i) / "t0")
        model = plain(backbone)
        model.config.use_cache = False
        config = XLoraConfig(
            task_type="CAUSAL_LM", hidden_size=model.config.hidden_size, xlora_depth=1, adapters=adapters
        )
        return get_peft_model(model, config)


def poly(backbone: str) -> Any:
    config = PolyConfig(
        task_type="CAUSAL_LM", r=RANK, target_modules=LINEARS, n_tasks=4, n_skills=4, n_splits=1, poly_type="poly"
    )
    model = get_peft_model(plain(backbone), config)
    speak(model)
    return model


def _try(made: Callable[[], Any], failed: dict[str, str], name: str) -> Any:
    """What `made` gives, after it ran once; None, and why, if it does not run."""
    try:
        return made()
    except Exception as error:
        failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
        return None


def instead(backbone: str, rounds: int) -> dict:
    """Training steps and generated tokens of each, over those of one LoRA."""
    failed: dict[str, str] = {}
    makers: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
        "one lora": (lambda: with_loras(backbone), {}),
        "4 active": (lambda: with_loras(backbone, 4), {}),
        "xlora": (lambda: xlora(backbone), {}),
        "poly": (lambda: poly(backbone), {"task_ids": torch.zeros(ROWS, dtype=torch.long)}),
    }
    steps, tokens = {}, {}
    for name, (make, which) in makers.items():
        model = _try(make, failed, name)
        if model is None:
            continue

        def step(model: Any = model, which: dict = which) -> Any:
            taken = training_step(model, **which)
            taken()
            return taken

        steps[name] = _try(step, failed, f"{name}, training")

        def token(model: Any = model, which: dict = which, name: str = name) -> Any:
            one_row = {key: value[:1] for key, value in which.items()}
            measure = a_token(model, **one_row, **({"use_cache": False} if name == "xlora" else {}))
            return _served(model, measure)

        tokens[name] = _try(token, failed, f"{name}, decoding")
    train = interleaved({name: its for name, its in steps.items() if its}, rounds)
    decode = medians({name: its for name, its in tokens.items() if its}, rounds)
    ratio = {"train": ratios(train, "one lora"), "decode": ratios(decode, "one lora")}
    times = {"train": train, "decode": decode}
    return {"value": ratio["train"]["4 active"], "ratio": ratio, "times": times, "does_not_run": failed}


def _served(model: Any, measure: Callable[[], float]) -> Callable[[], float]:
    """The measure in evaluation mode, without gradients; it is taken once, to see whether it runs."""

    @torch.no_grad()
    def served() -> float:
        model.eval()
        seconds = measure()
        model.train()
        return seconds

    served()
    return served
