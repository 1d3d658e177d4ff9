"""How much memory a training step takes, from the configuration alone: no weights are loaded, none are allocated.

B batch, T tokens, V vocabulary, R rank, S slots.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig
from transformers.initialization import no_init_weights

from hft.attention_hft import plain_attention
from hft.backbone_hft import without_weights
from hft.configuration_hft import HFTConfig
from hft.modeling_hft import HFTForCausalLM
from hft.nodes_hft import numbers_a_rank

from .hft_config import HFTTrainingConfig
from .recipes import HOW_TO_LOAD, Recipe


BLOCK = 64  # weights that share a scale in bitsandbytes' 4-bit formats
NESTED_BLOCK = 256  # scales that share one, if they are quantised themselves
# TRL scores a tile of so many positions and words at a time. With Triton in bfloat16 and in place; else its backward pass
# holds seven numbers in float32 and a mask beside each logit, and the tile's part of the head in float32.
TILE_POSITIONS, TILE_WORDS = 4096, 32768
LOGIT_BYTES, LOGIT_BYTES_CPU = 2, 2 + 7 * 4 + 1
# Two numbers of AdamW's for each that trains: in float32, or bitsandbytes' in 8 bit with a float32 scale for 256 of them.
OPTIMIZER_BYTES, OPTIMIZER_BYTES_8BIT = 8.0, 2 * (1 + 4 / 256)
# What a process on a CPU holds besides, measured with SmolLM2-135M on two cores (see `cpu_memory`): kernels and code that is
# loaded when first used, and freed blocks that were too small for what came later, a share of what comes and goes.
PROCESS_BYTES, HOLES = 174 * 2**20, 0.42


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the peak of a training step.

    Args:
        backbone: its weights.
        tasks: nodes and pages that no longer train, in the backbone's dtype.
        training: the factors that train, in float32.
        gradients: of those of the tasks of a step and their page.
        optimizer: two numbers for each that trains, in float32 or 8 bit.
        activations: what autograd keeps for the backward pass, without logits.
        logits: a tile of them, the gradient of the hidden states that are scored, on a CPU a part of the head.
        working: on a GPU, what a layer's backward pass takes for a while, beyond the logits, which are gone by then: three
            gradients as wide as its widest linear, and of one 4-bit weight a copy in 16 bit.
        process: on a CPU, kernels, the part of the mapped file whose weights were quantised, and holes between blocks.
    """

    backbone: int
    tasks: int
    training: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    working: int = 0
    process: int = 0

    @property
    def total(self) -> int:
        """The sum; what Python and its libraries take (a CPU: about half a GiB) comes on top."""
        return sum(getattr(self, field.name) for field in fields(self))

    def __str__(self) -> str:
        parts = ", ".join(f"{field.name} {getattr(self, field.name) / 2**20:,.0f}" for field in fields(self))
        return f"{self.total / 2**20:,.0f} MiB ({parts})"


def estimate_memory(
    text_config: PreTrainedConfig,
    *,
    rank: int,
    path_rank: int | None = None,
    num_training: int = 1,
    num_stepping: int = 1,
    sealed_rank: int = 0,
    sealed_slots: int = 0,
    waiting_rank: int = 0,
    slots: int = 8,
    batch_size: int = 8,
    length: int = 256,
    num_scored: int | None = None,
    on_accelerator: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    load_in_4bit: bool = True,
    load_in_8bit: bool = False,
    double_quant: bool = True,
    gradient_checkpointing: bool = False,
    target_modules: str | Sequence[str] = "all-linear",
    memory_modules: str | Sequence[str] = "all-linear",
    optimizer_bytes: float = OPTIMIZER_BYTES,
) -> MemoryEstimate:
    """Estimates the peak of a step of training with AdamW.

    Shapes are the model's own, and what autograd keeps is counted in a pass over tensors without memory, which holds for
    any decoder; attention is counted as PyTorch's fused kernel, on a batch with padding (whose mask is a tensor).

    Args:
        text_config: the backbone's configuration.
        rank: R of a node.
        path_rank: the ranks of all nodes and slots on the deepest path; R + S by default.
        num_training, num_stepping: tasks of a stage, and those of them that an optimizer step holds (more than one with
            `mixed_steps`).
        sealed_rank, sealed_slots: the ranks of all nodes that are there already, and the slots of all pages.
        waiting_rank: the ranks of all nodes of later stages, which are there from the start, in float32.
        slots: S of the one page that a stage writes; 0 without memory.
        batch_size, length: B and T of a micro-batch.
        num_scored: positions that meet the head, of B T: those of answers; all by default.
        on_accelerator: whether the loss runs in Triton's kernels.
        dtype: of the backbone, and of what is sealed.
        load_in_4bit, load_in_8bit, double_quant: how the linears of the layers are held; embeddings and head are in `dtype`.
        gradient_checkpointing: whether layers are computed again in the backward pass.
        target_modules, memory_modules: the linears that carry nodes, and those that carry slots.
        optimizer_bytes: what it keeps of each number that trains.
    """
    path_rank = rank + slots if path_rank is None else path_rank
    model, fake = _without_memory(text_config, path_rank, dtype, target_modules, memory_modules)
    # bitsandbytes packs them all, whichever carry nodes.
    linears = [module.weight for module in model.base_model.modules() if isinstance(module, nn.Linear)]
    frozen, size = set(map(id, linears)), dtype.itemsize
    backbone, mapped = 0, 0
    for parameter in model.backbone.parameters():  # a tied head comes once
        is_quantized, count = (load_in_4bit or load_in_8bit) and id(parameter) in frozen, parameter.numel()
        mapped += 2 * count if is_quantized else 0
        packed = quantized_bytes(count, double_quant) if load_in_4bit else count + 4 * len(parameter)
        backbone += packed if is_quantized else size * count
    a_rank, a_slot = numbers_a_rank(model.hft_nodes), numbers_a_rank(model.hft_memory)
    node, page = rank * a_rank, slots * a_slot
    trained = num_training * node + page
    kept = saved_bytes(model, fake, batch_size, length)
    if gradient_checkpointing:  # the input of each layer, and one layer at a time
        num_layers = text_config.num_hidden_layers
        kept = size * num_layers * batch_size * length * text_config.hidden_size + kept // num_layers
    scored = batch_size * length if num_scored is None else num_scored
    estimate = MemoryEstimate(
        backbone=backbone,
        tasks=size * (sealed_rank * a_rank + sealed_slots * a_slot) + 4 * waiting_rank * a_rank,
        training=4 * trained,
        gradients=4 * (num_stepping * node + page),
        optimizer=round(optimizer_bytes * trained),
        activations=kept,
        logits=_loss_bytes(scored, text_config, on_accelerator),
    )
    if on_accelerator:
        shapes = [weight.shape for weight in linears]
        copy_bytes = 2 * max(map(math.prod, shapes)) if load_in_4bit else 0
        passing = 3 * size * batch_size * length * max(map(max, shapes)) + copy_bytes
        return replace(estimate, working=max(0, passing - estimate.logits))
    passing = estimate.gradients + estimate.activations + estimate.logits
    return replace(estimate, process=PROCESS_BYTES + mapped + round(HOLES * passing))


def estimate_recipe(
    recipe: Recipe,
    text_config: PreTrainedConfig,
    length: int | None = None,
    num_scored: int | None = None,
    on_accelerator: bool = True,
    onto: HFTConfig | None = None,
) -> MemoryEstimate:
    """The largest of the estimates of a recipe's stages, its optimizer an AdamW: in 8 bit if its name (`optim`) says so.

    Args:
        recipe: as `read_recipe` gives it.
        text_config: of its backbone.
        length: of the longest row, in tokens; the recipe's `max_length` by default.
        num_scored, on_accelerator: see `estimate_memory`.
        onto: with `from_model` that model's, whose tasks need not be in the recipe.

    Raises:
        ValueError: `from_model` without `onto`.
    """
    if onto is None and recipe.from_model is not None:
        raise ValueError(
            f"What '{recipe.from_model}' has learnt already takes memory, too; give its configuration as `onto`."
        )
    if onto is None:
        own = {key: its for key, its in recipe.model.items() if key not in HOW_TO_LOAD}
        onto = HFTConfig(text_config=text_config, **own)
    tree, sealed = onto.hierarchy().extended(recipe.hierarchy), onto.sealed_tasks()
    training = HFTTrainingConfig(**{**recipe.training_arguments(), "bf16": False, "use_cpu": True})
    memory = onto.memory_config
    rank = recipe.model.get("rank", onto.rank)
    rank_of = {**dict.fromkeys(tree.names, rank), **{task["name"]: task["rank"] for task in onto.tasks}}
    batch_size, length = training.per_device_train_batch_size, length or training.max_length or 1024
    estimates, sealed_rank = [], sum(rank_of[task] for task in sealed)
    waiting_rank = sum(rank_of[task] for task in tree.names if task not in sealed)
    sealed_slots = sum(page["slots"] for page in onto.pages if page["sealed"])
    for level in tree.levels():
        tasks = [task for task in level if task not in sealed]
        if not tasks:
            continue
        writers = training.writers(tasks, memory)
        slots, ranks = memory.slots if writers else 0, [rank_of[task] for task in tasks]
        waiting_rank -= sum(ranks)
        path_ranks = [sum(rank_of[node] for node in tree.path(task)) for task in tasks]
        num_stepping = min(len(writers), training.gradient_accumulation_steps) if training.mixed_steps else 1
        estimates.append(
            estimate_memory(
                text_config,
                rank=max(ranks),
                path_rank=max(path_ranks) + sealed_slots + slots,
                num_training=len(tasks),
                num_stepping=max(1, num_stepping),
                sealed_rank=sealed_rank,
                sealed_slots=sealed_slots,
                waiting_rank=waiting_rank,
                slots=slots,
                batch_size=batch_size,
                length=length,
                num_scored=num_scored,
                on_accelerator=on_accelerator,
                dtype=_dtype_of(recipe, text_config),
                load_in_4bit=recipe.quantization.get("load_in_4bit", False),
                load_in_8bit=recipe.quantization.get("load_in_8bit", False),
                double_quant=recipe.quantization.get("bnb_4bit_use_double_quant", False),
                gradient_checkpointing=training.gradient_checkpointing,
                target_modules=onto.target_modules,
                memory_modules=memory.target_modules,
                optimizer_bytes=OPTIMIZER_BYTES_8BIT if "8bit" in training.optim else OPTIMIZER_BYTES,
            )
        )
        sealed_rank += sum(ranks)
        sealed_slots += slots
    return max(estimates, key=lambda estimate: estimate.total)


def _dtype_of(recipe: Recipe, text_config: PreTrainedConfig) -> torch.dtype:
    """Of the backbone: what the recipe names, else as it was saved."""
    for named in (recipe.model.get("dtype"), text_config.dtype):
        if isinstance(dtype := getattr(torch, str(named).removeprefix("torch."), None), torch.dtype):
            return dtype
    return torch.bfloat16


def _loss_bytes(scored: int, text_config: PreTrainedConfig, on_accelerator: bool) -> int:
    positions = min(scored, TILE_POSITIONS)
    if on_accelerator:  # the buffer has its full width
        tile = LOGIT_BYTES * positions * TILE_WORDS
    else:
        tile = (LOGIT_BYTES_CPU * positions + 4 * text_config.hidden_size) * min(text_config.vocab_size, TILE_WORDS)
    return tile + 4 * scored * text_config.hidden_size


def quantized_bytes(count: int, double_quant: bool) -> int:
    """Of `count` weights in a 4-bit format of bitsandbytes: half a byte each, and their scales."""
    scales = -(-count // BLOCK)
    return -(-count // 2) + (scales + 4 * -(-scales // NESTED_BLOCK) if double_quant else 4 * scales)


def node_bytes(model: nn.Module, rank: int) -> int:
    """What the factors of a sealed task take in its file, without the file's header."""
    return rank * numbers_a_rank(model.hft_nodes) * model.backbone.dtype.itemsize


def page_bytes(model: nn.Module, slots: int) -> int:
    """What a sealed memory page takes in its file, without the file's header."""
    return slots * numbers_a_rank(model.hft_memory) * model.backbone.dtype.itemsize


def _without_memory(
    text_config: PreTrainedConfig,
    rank: int,
    dtype: torch.dtype,
    target_modules: str | Sequence[str],
    memory_modules: str | Sequence[str],
) -> tuple[HFTForCausalLM, FakeTensorMode]:
    """A model of one root whose tensors have shapes only."""
    text_config = copy.deepcopy(text_config)
    text_config.dtype = dtype
    config = HFTConfig(
        text_config=text_config,
        tasks=[{"name": "a"}],
        rank=rank,
        dtype=dtype,
        target_modules=target_modules,
        memory_config={"target_modules": memory_modules},
    )
    config._attn_implementation = plain_attention(without_weights(text_config))
    fake, default = FakeTensorMode(), torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with fake, no_init_weights():
            model = HFTForCausalLM(config)
            model.backbone.tie_weights()  # which nothing that is to be initialised does by itself
            model.set_trainable(["a"])
    finally:
        torch.set_default_dtype(default)
    return model, fake


def saved_bytes(model: HFTForCausalLM, fake: FakeTensorMode, batch_size: int, length: int) -> int:
    """What autograd keeps of a padded batch's pass through the decoder on the path of task `a`, but for parameters."""
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no other storage takes its place

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with fake, torch.enable_grad(), hooks, model.activate("a"):
        ids_BT = torch.ones(batch_size, length, dtype=torch.long)
        model.base_model(input_ids=ids_BT, use_cache=False)
    return sum(storage.nbytes() for storage in kept.values())
