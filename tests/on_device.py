"""What `test_on_a_device.py` starts in a process of its own: HFT on a pretended device, beside the same on the CPU."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from datasets import disable_progress_bars
from transformers import AutoModelForCausalLM

import hft

from .pretended_device import CARD, OnDevice, moved, waited, waited_in
from .test_on_a_device import TREE, train
from .tiny import fill


MIXED = ["a", "b", "backbone", "c"]
TOKENS = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
ROWS = [{"input_ids": [5, 6, 7 + i], "labels": [-100, 6, 7 + i]} for i in range(12)]
PASS = (
    "modeling_hft/modeling_hft.py",
    "modeling_hft/path_hft.py",
    "modeling_hft/fused_hft.py",
    "modeling_hft/kept_hft.py",
)


class Twins:
    """Two models that are the same, one of them on the device, and ids [B, T] for each."""

    def __init__(self, base: str):
        torch.manual_seed(0)
        self.here, self.there = (
            hft.HFTForCausalLM.from_backbone(base, TREE, rank=3, memory_config={"slots": 2}) for _ in range(2)
        )
        moved(self.there)
        self.x = torch.randint(5, 250, (4, 6))
        self.y = self.x.to(CARD)

    def each(self, do: Callable[[hft.HFTForCausalLM], Any]) -> None:
        for model in (self.here, self.there):
            torch.manual_seed(1)
            do(model)

    def answer_alike(self, *tasks: str | list[str] | None) -> None:
        """Logits; twice, since the second pass takes what the first one made."""
        mask = torch.ones_like(self.y)
        for task in (*tasks, *tasks):
            with torch.no_grad():
                same(self.here(self.x, task=task).logits, self.there(self.y, attention_mask=mask, task=task).logits)

    def generate_alike(self, **options: Any) -> None:
        here, there = self.here.generate(self.x, **TOKENS, **options), self.there.generate(self.y, **TOKENS, **options)
        assert there.cpu().equal(here), options


def same(here: torch.Tensor, there: torch.Tensor) -> None:
    assert there.device == CARD
    torch.testing.assert_close(there.cpu(), here, rtol=1e-4, atol=1e-5)


def gradients(model: hft.HFTForCausalLM, ids: torch.Tensor, task: str | list[str]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(ids, labels=ids, task=task).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def learn(twins: Twins) -> None:
    """Two stages, checkpointed or not, one task or several in a batch. From a task's second step on, none waits for HFT."""
    waited.clear()
    gradients(twins.there, twins.y, "a")
    assert waited_in("modeling_hft/")  # the first one does
    for level in twins.here.hierarchy.levels():
        twins.each(lambda model, level=level: model.start_stage(level))
        twins.each(lambda model: fill(model.train(), only_trainable=True))
        for checkpointed in (False, True):
            if checkpointed:
                twins.each(lambda model: model.activation_checkpointing_enable({"use_reentrant": False}))
            for task in (level[0], list(level)):
                count = 4 if isinstance(task, str) else len(task)
                expected = gradients(twins.here, twins.x[:count], task)
                gradients(twins.there, twins.y[:count], task)
                waited.clear()
                found = gradients(twins.there, twins.y[:count], task)
                assert not waited_in("modeling_hft/"), waited
                assert found and found.keys() == expected.keys()
                for name, gradient in expected.items():
                    same(gradient, found[name])
        twins.each(lambda model: model.activation_checkpointing_disable())
        twins.each(lambda model, level=level: model.eval().seal(level))


def answer(twins: Twins) -> None:
    """With a task, several, none; folded; routed. A token waits for nothing of HFT's once its tasks are known."""
    twins.answer_alike(None, "b", MIXED)
    for task in ("b", MIXED):
        twins.generate_alike(task=task)
        twins.generate_alike(task=task, num_beams=2)
        waited.clear()
        twins.there.generate(twins.y, task=task, **TOKENS)
        assert waited and not waited_in(*PASS), waited
    for merge in (False, True):
        twins.each(lambda model, merge=merge: model.fold("b", merge=merge))
        twins.answer_alike(None)
        twins.each(lambda model: model.unfold())
    twins.answer_alike("b", None)
    for task, prompts in {"a": [[5, 6, 7]] * 3, "c": [[90, 91, 92]] * 3}.items():
        twins.each(lambda model, task=task, prompts=prompts: model.add_routes(task, prompts))
    routes = [
        [route.task for route in model.route(ids)] for model, ids in ((twins.here, twins.x), (twins.there, twins.y))
    ]
    assert routes[0] == routes[1]
    twins.generate_alike()


def change(twins: Twins, folder: Path) -> None:
    """Gates learn anew; a task comes, is cut, sealed, saved, loaded on the CPU, exported, and goes."""
    twins.each(lambda model: model.refresh_gates("a", ROWS))
    torch.testing.assert_close(twins.there.gates("a").values, twins.here.gates("a").values)
    twins.each(lambda model: model.add_task("d", ["b"]))
    twins.each(lambda model: model.start_stage(["d"]))
    twins.each(lambda model: fill(model, only_trainable=True))
    twins.each(lambda model: model.trim("d", ROWS, 5.0))
    ranks = [model.config.task("d")["rank"] for model in (twins.here, twins.there)]
    assert ranks[0] == ranks[1] < 3
    twins.each(lambda model: model.seal(["d"]))
    assert {parameter.device for parameter in twins.there.parameters()} == {CARD}
    twins.answer_alike("d")
    twins.there.save_pretrained(folder / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(folder / "saved", trust_remote_code=True)
    torch.testing.assert_close(loaded(twins.x, task="d").logits, twins.here(twins.x, task="d").logits)
    hft.export_lora(twins.there, "d", folder / "lora")
    twins.each(lambda model: model.remove_task("d"))
    twins.answer_alike("b")


def split(model: hft.HFTForCausalLM) -> hft.HFTForCausalLM:
    """All on the device but the head, as `device_map` may have it."""
    moved(model)
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().cpu(), requires_grad=False)
    add_hook_to_module(head, AlignDevicesHook(torch.device("cpu"), io_same_device=True))
    model.hf_device_map = {"backbone.model": CARD, "backbone.lm_head": torch.device("cpu")}
    return model


def main(what: str, base: str, folder: Path) -> None:
    if what == "model":
        twins = Twins(base)
        learn(twins)
        answer(twins)
        change(twins, folder)
    else:
        place = moved if what == "trainer" else split
        (folder / "losses.json").write_text(json.dumps(train(base, folder / "run", place)))


if __name__ == "__main__":
    disable_progress_bars()
    with OnDevice():
        main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
