"""One of several training processes, started by torchrun with a JSON description of what to train."""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import disable_progress_bars
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer, BitsAndBytesConfig, TrainerCallback

import hft
from hft.trainers import HFTTrainer, HFTTrainingConfig
from hft.trainers.curriculum import Mastery
from tests.test_trainer import data


class Watching(HFTTrainer):
    """Notes the task of each micro-batch, and whatever this process writes."""

    def training_step(self, model, inputs, *args, **kwargs):
        self.tasks.append(self._task_of(inputs))
        return super().training_step(model, inputs, *args, **kwargs)


class Kill(TrainerCallback):
    """As if all processes died after a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        self.step -= 1
        if not self.step:
            os._exit(3)


def master(task: str, at: int) -> None:
    """From here on, this task is mastered at its first evaluation from a step on, whatever its loss; no other is."""

    def observe(self: Mastery, name: str, step: int, loss: float, accuracy: float) -> str:
        if name != task or step < at or name in self.mastered:
            return ""
        self.mastered[name] = step
        return "as told"

    Mastery.observe = observe


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    disable_progress_bars()
    torch.manual_seed(0)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype="bfloat16",
        bnb_4bit_quant_storage="bfloat16",
    )
    quantized = {"quantization_config": nf4} if spec.get("nf4") else {}
    model = hft.HFTForCausalLM.from_backbone(
        spec["backbone"], spec["hierarchy"], rank=3, memory_config={"slots": 2},
        dtype=torch.bfloat16 if quantized else torch.float32, **quantized,
    )  # fmt: skip
    args = HFTTrainingConfig(output_dir=spec["out"], **spec["options"])
    if spec.get("fsdp"):
        args.distributed_state  # noqa: B018 (makes it)
        # accelerate does not use FSDP in processes on a CPU; called GPUs, they run its code as it is.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    trainer = Watching(
        model,
        args,
        train_dataset=data(spec["hierarchy"]),
        eval_dataset=data(spec["hierarchy"]) if "mastered" in spec else None,
        processing_class=AutoTokenizer.from_pretrained(spec["backbone"]),
    )
    trainer.tasks = []
    if "mastered" in spec:
        master(*spec["mastered"])
    if spec.get("kill"):
        trainer.add_callback(Kill(spec["kill"]))
    trainer.train(resume_from_checkpoint=spec.get("resume", False))
    seen = {"tasks": trainer.tasks, "log": trainer.log_history, "world": args.world_size}
    Path(spec["out"] + f".{args.process_index}.json").write_text(json.dumps(seen))
    sharded = [name for name, p in model.named_parameters() if isinstance(p, DTensor)]
    assert bool(sharded) == bool(spec.get("fsdp")) and not any(name.startswith("hft_") for name in sharded)
    assert not sharded or {"backbone.model.layers.0.mlp.up_proj.weight", "backbone.lm_head.weight"} <= set(sharded)
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if name.startswith("hft_")}
    torch.save(weights, spec["out"] + f".{args.process_index}.pt")


if __name__ == "__main__":
    main()
