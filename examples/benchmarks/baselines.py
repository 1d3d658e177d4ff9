"""The methods that HFT is compared with, run with TRL and PEFT as their users run them.

Each takes the same backbone in NF4, the same rows, rank, linears, batch and steps a task, and returns an `Outcome`.
"""

import functools
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from harness import NF4, QUIET, attention
from peft import ArrowConfig, LoraConfig, OSFConfig, create_arrow_model, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerBase, set_seed
from trl import SFTConfig, SFTTrainer
from unfinished import Work, WorkCallback

from hft.trainers.checkpoints import last_checkpoint


LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass
class Setup:
    """What all methods share.

    Args:
        backbone: Hub id or folder.
        tokenizer: its tokenizer.
        order: the tasks, in the order of methods that see one after another.
        train: task -> rows.
        with_options: the same rows with their "options", for the planner.
        rank: of a LoRA.
        training: keys of SFTConfig; epochs are of one task.
        seed: of weights and order.
        after_task: called with the method's model after each task of a sequence; does what it does once.
        work: what was done so far.
    """

    backbone: str
    tokenizer: PreTrainedTokenizerBase
    order: list[str]
    train: Mapping[str, Dataset]
    with_options: Mapping[str, Dataset]
    rank: int
    training: dict[str, Any]
    seed: int
    after_task: Callable[[str, Callable[[str], Any]], None] = lambda task, model_of: None
    work: Work = field(default_factory=Work)


@dataclass
class Outcome:
    """A method's result.

    Args:
        model_of: task -> the model that answers it.
        trainable: parameters that were trained, counted once each.
        stored: parameters to keep beside the backbone in order to answer all tasks.
        notes: what a reader of the table should know.
    """

    model_of: Callable[[str], Any]
    trainable: int
    stored: int
    notes: dict[str, Any] = field(default_factory=dict)


def load(setup: Setup, quantized: bool = True) -> Any:
    """The plain backbone."""
    how = {"quantization_config": BitsAndBytesConfig(**NF4)} if quantized else {"dtype": torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(setup.backbone, attn_implementation=attention(), **how)
    for module in model.modules():
        # Else the first evaluation on a CPU with AVX512-BF16 would repack the weights, and gradients would be wrong.
        if "support_avx512bf16_for_cpu" in vars(module):
            module.support_avx512bf16_for_cpu = False
    return model


def lora(setup: Setup, rank: int | None = None) -> LoraConfig:
    rank = setup.rank if rank is None else rank
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=LINEARS, task_type="CAUSAL_LM")


class LoRATrainer(SFTTrainer):
    """TRL's, whose checkpoints hold what trains and no more, whichever of PEFT's methods it is of."""

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: p.detach().contiguous() for name, p in self._training().items()}, folder / "training.safetensors"
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        training = self._training()
        with torch.no_grad():
            for name, saved in load_file(Path(resume_from_checkpoint) / "training.safetensors").items():
                training[name].copy_(saved)

    def _training(self) -> dict[str, torch.nn.Parameter]:
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def train_on(self) -> None:
        """As `train`, from where an earlier run was cut off: after its end, if it came so far."""
        folder = Path(self.args.output_dir)
        if not (folder / "end").is_dir():
            self.train(resume_from_checkpoint=last_checkpoint(folder))
            self._save(str(folder / "end.writing"))
            (folder / "end.writing").rename(folder / "end")
        else:
            self._load_from_checkpoint(str(folder / "end"))


class Float32Trainer(LoRATrainer):
    """TRL makes what trains over 4 bits bfloat16; here it stays float32, as HFT's nodes are, and is rounded in the end."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._convert(torch.float32)

    def train_on(self) -> None:
        super().train_on()
        self._convert(torch.bfloat16)

    def _convert(self, dtype: torch.dtype) -> None:
        for parameter in self._training().values():
            parameter.data = parameter.data.to(dtype)


def fit(setup: Setup, model: Any, rows: Dataset, trainer: type[LoRATrainer] = LoRATrainer, **options: Any) -> Any:
    """One training by TRL's SFTTrainer; `options` go to the trainer."""
    with setup.work.training() as folder:
        config = SFTConfig(
            output_dir=str(folder),
            seed=setup.seed,
            use_cpu=not torch.accelerator.is_available(),
            **QUIET,
            **setup.work.saving(),
            **setup.training,
        )
        made = trainer(
            model,
            config,
            train_dataset=rows,
            processing_class=setup.tokenizer,
            callbacks=[WorkCallback(setup.work)],
            **options,
        )
        made.train_on()
    trained = made.accelerator.unwrap_model(made.model, keep_fp32_wrapper=False).eval()
    # What comes next is as in a run that goes on from here: unwrapped, and with numbers of its own to draw.
    vars(trained).pop("_is_accelerate_prepared", None)
    set_seed(setup.seed + 1000 * setup.work.trainings)
    return trained


def count(model: Any, but: str | None = None) -> int:
    """The numbers of a model's LoRAs, without the one called `but`."""
    its = {name: parameter.numel() for name, parameter in model.named_parameters() if "lora_" in name}
    return sum(number for name, number in its.items() if but is None or f".{but}." not in name)


def zero_shot(setup: Setup) -> Outcome:
    """The backbone as it is."""
    model = load(setup).eval()
    return Outcome(lambda task: model, 0, 0)


def single(setup: Setup, trainer: type[LoRATrainer] = LoRATrainer) -> Outcome:
    """One LoRA a task."""
    set_seed(setup.seed)
    model = get_peft_model(load(setup), lora(setup), adapter_name=setup.order[0])
    for task in setup.order[1:]:
        model.add_adapter(task, lora(setup))
    for task in setup.order:
        model.set_adapter(task)
        fit(setup, model, setup.train[task], trainer)

    def model_of(task: str) -> Any:
        model.set_adapter(task)
        return model

    return Outcome(model_of, count(model), count(model))


def joint(setup: Setup, rank: int | None = None, trainer: type[LoRATrainer] = LoRATrainer) -> Outcome:
    """One LoRA on the mixture of all tasks, as many steps as all of them together."""
    set_seed(setup.seed)
    rows = concatenate_datasets([setup.train[task] for task in setup.order])
    model = fit(setup, load(setup), rows, trainer, peft_config=lora(setup, rank))
    return Outcome(lambda task: model, count(model), count(model))


def joint_wide(setup: Setup) -> Outcome:
    """As `joint`, with as many parameters as HFT has in all: a node a task and half a node a stage of three."""
    return joint(setup, setup.rank * len(setup.order) + 3 * setup.rank // 2)


def sequential(setup: Setup, replay: float = 0.0) -> Outcome:
    """One LoRA that learns one task after another."""
    set_seed(setup.seed)
    model = get_peft_model(load(setup), lora(setup))
    for i, task in enumerate(setup.order):
        rows = setup.train[task]
        old = [setup.train[other] for other in setup.order[:i]]
        if replay and old:
            kept = [its.shuffle(seed=setup.seed).select(range(max(1, round(replay * len(its))))) for its in old]
            rows = concatenate_datasets([rows, *kept])
        fit(setup, model, rows)
        setup.after_task(task, lambda task: model)
    return Outcome(lambda task: model, count(model), count(model))


def sequential_replay(setup: Setup) -> Outcome:
    """As `sequential`, with 2 % of each earlier task's rows mixed in."""
    return sequential(setup, replay=0.02)


def orthogonality(new: list[torch.Tensor], old: list[list[torch.Tensor]]) -> torch.Tensor:
    """O-LoRA's penalty: the sum over linears and earlier tasks of |A_i A_t^T|, all entries (Wang et al. 2023,
    https://arxiv.org/abs/2310.14152, equation 8, with absolute values as in the authors' code).

    Args:
        new: A [R, I] of the task that trains, a linear each.
        old: for each earlier task the same.
    """
    total = new[0].new_zeros(())
    for before in old:
        for A_new, A_old in zip(new, before, strict=True):
            total = total + (A_new.float() @ A_old.float().T).abs().sum()
    return total


def olora(setup: Setup, weight: float = 0.5) -> Outcome:
    """O-LoRA: a LoRA a task, all of them added up always, the new one orthogonal to the earlier ones.

    The authors also penalise the norm of the new LoRA, and give both penalties weights of their own for each task (lambda_1
    0, 0.5 or 5 for the order of our tasks), at a constant learning rate of 1e-3. Here lambda_1 is one number, there is no
    such norm, and the rate falls as it does for all methods.
    """
    set_seed(setup.seed)
    model = get_peft_model(load(setup), lora(setup), adapter_name=setup.order[0])

    def factors(task: str) -> list[torch.Tensor]:
        return [p for name, p in model.named_parameters() if f"lora_A.{task}." in name]

    learnt: list[str] = []

    class OLoRATrainer(LoRATrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            penalty = weight * orthogonality(factors(task), [factors(other) for other in learnt])
            return (loss[0] + penalty, loss[1]) if return_outputs else loss + penalty

    for task in setup.order:
        if learnt:
            model.add_adapter(task, lora(setup))
        model.base_model.set_adapter([*learnt, task])
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name and f".{task}." in name)
        fit(setup, model, setup.train[task], OLoRATrainer)
        learnt.append(task)
        setup.after_task(task, lambda task: model)
    return Outcome(lambda task: model, count(model), count(model), {"penalty": weight})


def osf(setup: Setup) -> Outcome:
    """PEFT's OSF: each task may move only the weights' weakest directions, fewer of them from task to task.

    It decomposes the weights, so the backbone is held in bfloat16, not in NF4.
    """
    set_seed(setup.seed)
    model, trainable = load(setup, quantized=False), 0
    for i, task in enumerate(setup.order):
        share = 0.5 + 0.4 * i / len(setup.order)
        wrapped = get_peft_model(model, OSFConfig(target_modules=LINEARS, effective_rank=share))
        its = sum(parameter.numel() for parameter in wrapped.parameters() if parameter.requires_grad)
        trainable = max(trainable, its)  # of the same weights, from task to task fewer
        fit(setup, wrapped, setup.train[task])
        model = wrapped.merge_and_unload().eval()
        setup.after_task(task, lambda task, model=model: model)
    whole = sum(parameter.numel() for parameter in model.parameters())
    return Outcome(lambda task: model, trainable, whole, {"backbone": "bfloat16"})


def arrow(setup: Setup) -> Outcome:
    """PEFT's Arrow: the LoRAs of `single`, mixed for each token by their own singular vectors; no task ids."""
    set_seed(setup.seed)
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for task in setup.order:
            model = fit(setup, load(setup), setup.train[task], peft_config=lora(setup))
            model.save_pretrained(Path(folder) / task)
            paths.append(str(Path(folder) / task))
        mixed = create_arrow_model(
            load(setup), paths, ArrowConfig(top_k=min(3, len(paths)), rng_seed=setup.seed)
        ).eval()
        numbers = count(mixed, but="arrow_router")  # which PEFT adds, and neither trains nor reads
    return Outcome(lambda task: mixed, numbers, numbers)


METHODS: dict[str, Callable[[Setup], Outcome]] = {
    "zero_shot": zero_shot,
    "single": single,
    "joint": joint,
    "joint_wide": joint_wide,
    "single_float32": functools.partial(single, trainer=Float32Trainer),
    "joint_float32": functools.partial(joint, trainer=Float32Trainer),
    "sequential": sequential,
    "sequential_replay": sequential_replay,
    "olora": olora,
    "osf": osf,
    "arrow": arrow,
}
