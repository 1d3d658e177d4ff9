"""How long training will take: a few real steps are timed, and a line is put through them."""

import itertools
import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import pack_dataset

from .hft_config import HFTTrainingConfig
from .hft_trainer import HFTTrainer
from .metrics import Row
from .progress import StagePrinter
from .routes import prompts_of
from .row_tokens import cut_rows, has_answer, tokenize_rows


CHILD = "timed-both"
TIMED = {"timed-short": [], "timed-long": [], CHILD: ["timed-short", "timed-long"]}

# The keys of a training that change what a step costs. While steps are timed, no other key of it acts.
STEP_KEYS = (
    *("per_device_train_batch_size", "max_length", "truncation_mode", "pad_to_multiple_of"),
    *("packing", "packing_strategy", "padding_free"),
    *("loss_type", "completion_only_loss", "assistant_only_loss", "label_smoothing_factor", "neftune_noise_alpha"),
    *("optim", "optim_args", "optim_target_modules", "learning_rate", "gate_learning_rate", "gate_shrink"),
    *("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    *("use_cpu", "bf16", "fp16", "tf32", "full_determinism"),
    *("gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_offloading"),
    *("activation_checkpointing", "activation_checkpointing_kwargs"),
    *("torch_compile", "torch_compile_backend", "torch_compile_mode", "torch_empty_cache_steps"),
    *("use_liger_kernel", "liger_kernel_config", "router_aux_loss_coef"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor"),
)


@dataclass(frozen=True)
class StepTime:
    """How long an optimizer step takes, and what comes besides.

    Args:
        fixed: seconds of any micro-batch; steps are timed with one each, so the optimizer's are in it, too.
        per_token: seconds a token of its micro-batches, padding included, on the path of a root of the next stage.
        per_rank: by what share the time of a token grows with each further rank of a path.
        per_prompt: seconds a prompt that the router learns from.
        per_stage: seconds of a stage besides: it is prepared and saved.
    """

    fixed: float
    per_token: float
    per_rank: float
    per_prompt: float
    per_stage: float

    def seconds(self, tokens: float, more_ranks: int, micro_batches: int = 1) -> float:
        """Of a step with so many tokens in all on a path with so many ranks beyond a root's."""
        return self.fixed * micro_batches + self.per_token * tokens * (1 + self.per_rank * more_ranks)


def task_steps(
    num_rows: Mapping[str, int], config: HFTTrainingConfig, writers: Collection[str] = ()
) -> dict[str, int]:
    """The optimizer steps of each of a stage's tasks, from how many rows it has; whole ones, of shared steps its part.

    Args:
        num_rows: task -> rows.
        config: of the training.
        writers: the tasks that write the stage's page.
    """
    block = config.per_device_train_batch_size * config.gradient_accumulation_steps
    sampler = config.sampler(num_rows, block, writers)
    return sampler.steps_after(0, config.num_steps(sampler))


def tokens_a_step(lengths: Sequence[int], config: HFTTrainingConfig) -> float:
    """The mean number of tokens of an optimizer step with its padding, over random batches of rows of these lengths."""
    draw, size = random.Random(0), config.per_device_train_batch_size
    has_padding = not (config.padding_free or (config.packing and config.packing_strategy != "wrapped"))
    a_row = max if has_padding else statistics.fmean
    means = [a_row(draw.choices(lengths, k=size)) for _ in range(200)]
    return config.gradient_accumulation_steps * size * statistics.fmean(means)


def rows_that_train(
    ready: Sequence[Mapping[str, Sequence[int]]], config: HFTTrainingConfig
) -> list[Mapping[str, Sequence[int]]]:
    """Tokenised rows as the trainer takes them: cut or packed to `max_length`, without those that hold no answer then.

    Raises:
        ValueError: `packing` without `max_length`.
    """
    if config.packing and config.max_length is None:
        raise ValueError("`packing` is set and `max_length` is None; set it to the tokens of a packed row.")
    if config.packing:
        kept = pack_dataset(Dataset.from_list(list(ready)), config.max_length, config.packing_strategy)
    else:
        kept = cut_rows(ready, config.max_length, config.truncation_mode)
    return [row for row in kept if config.completion_only_loss is False or has_answer(row)]


def timing_config(training: Mapping[str, Any], folder: str) -> HFTTrainingConfig:
    """How steps are timed: what costs time is that of a training; nothing is evaluated, logged, kept or sent away."""
    return HFTTrainingConfig(
        output_dir=folder, num_train_epochs=1, route_samples=0, save_strategy="no", logging_strategy="no",
        report_to="none", disable_tqdm=True, **{key: training[key] for key in STEP_KEYS if key in training},
    )  # fmt: skip


class _TimedTrainer(HFTTrainer):
    """Notes when each step begins, in which stage, whose it is, and how many tokens it has."""

    def __init__(self, *args: Any, **kwargs: Any):
        self.starts: list[tuple[float, int, str, int]] = []
        super().__init__(*args, **kwargs)

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        task = self._task_of(inputs)
        self.starts.append((time.perf_counter(), self.stage.level, task, inputs["input_ids"].numel()))
        return super().training_step(model, inputs, *args, **kwargs)


def time_steps(
    model: PreTrainedModel,
    rows: Mapping[str, Sequence[Row]],
    tokenizer: PreTrainedTokenizerBase,
    training: Mapping[str, Any],
    num_steps: int = 5,
) -> StepTime:
    """Trains for a few steps: on short rows, on long rows, and a task that stands on both.

    Args:
        model: an HFT model; it has learnt nonsense afterwards and is of no further use.
        rows: task -> its training rows; those of the shortest and of the longest texts are taken.
        tokenizer: the model's.
        training: keys of `HFTTrainingConfig`; of these, `STEP_KEYS` count.
        num_steps: of each of the three, at least; 2 or more.
    """
    everything = [{key: row[key] for key in ("prompt", "completion")} for its in rows.values() for row in its]
    everything.sort(key=lambda row: len(json.dumps(row)))
    with tempfile.TemporaryDirectory() as folder:
        config = timing_config(training, folder)
        size = config.per_device_train_batch_size
        long = _enough(_longest(everything, tokenizer, config), num_steps * size, tokenizer, config)
        short = _enough(everything, num_steps * size, tokenizer, config)
        data = {task: Dataset.from_list(short if task == "timed-short" else long) for task in TIMED}
        while open_tasks := model.config.open_tasks():  # which would train, too
            model.remove_task(open_tasks[0], cascade=True)
        for task, parents in TIMED.items():
            model.add_task(task, parents)
        trainer = _TimedTrainer(model, config, train_dataset=data, processing_class=tokenizer)
        trainer.remove_callback(StagePrinter)
        begin = time.perf_counter()
        trainer.train()
        whole = time.perf_counter() - begin
    model.eval()
    prompts = prompts_of(data["timed-short"], tokenizer, size) + prompts_of(data["timed-long"], tokenizer, size)
    model.features_of(prompts[:2])
    begin = time.perf_counter()
    model.features_of(prompts)
    per_prompt = (time.perf_counter() - begin) / max(1, len(prompts))
    memory = model.config.memory_config
    slots = memory.slots if memory.read != "off" else 0
    return _fit(trainer.starts, 2 * model.config.rank + slots, per_prompt, whole)


def _enough(
    rows: Iterable[Row], count: int, tokenizer: PreTrainedTokenizerBase, config: HFTTrainingConfig
) -> list[Row]:
    """The rows, over and over, until they give the trainer `count` rows or a few more."""
    endless, wanted, found = itertools.cycle(rows), count, 0
    chosen: list[Row] = []
    ready: list[dict[str, list[int]]] = []
    while found < count:
        more = list(itertools.islice(endless, wanted - len(chosen)))
        chosen += more
        if not config.packing:
            break
        ready += tokenize_rows(more, tokenizer)
        found = len(rows_that_train(ready, config))
        wanted = min(2 * wanted, math.ceil(wanted * count / max(found, 1)))
    return chosen


def _longest(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, config: HFTTrainingConfig) -> Iterator[Row]:
    """The rows of whose answers something is left when they are cut, from the last one down."""
    keeps_start = config.packing_strategy == "bfd" if config.packing else config.truncation_mode == "keep_start"
    cuts = keeps_start and config.completion_only_loss is not False
    end, something_left = config.max_length if cuts else None, False
    for row in reversed(rows):
        (ready,) = tokenize_rows([row], tokenizer)
        if any(label != -100 for label in ready["labels"][:end]):
            something_left = True
            yield row
    if not something_left:
        raise ValueError(f"`max_length`={end} tokens cuts off the answers of all {len(rows)} rows: raise it.")


def _fit(starts: Sequence[tuple[float, int, str, int]], more_ranks: int, per_prompt: float, whole: float) -> StepTime:
    """Least squares over steps that another one of the same stage follows; the first step of all warms up."""
    timed = [
        (task, tokens, after - before)
        for (before, stage, task, tokens), (after, next_stage, _, _) in itertools.pairwise(starts[1:])
        if stage == next_stage
    ]
    roots = [(tokens, seconds) for task, tokens, seconds in timed if task != CHILD]
    design_N2 = torch.tensor([[1.0, tokens] for tokens, _ in roots], dtype=torch.float64)
    seconds_N1 = torch.tensor([[seconds] for _, seconds in roots], dtype=torch.float64)
    fixed, per_token = torch.linalg.lstsq(design_N2, seconds_N1, driver="gelsd").solution[:, 0].tolist()
    if fixed < 0 or per_token <= 0:  # lengths that hardly differ
        fixed, per_token = 0.0, float(seconds_N1.sum() / design_N2[:, 1].sum())
    deep = [(tokens, seconds) for task, tokens, seconds in timed if task == CHILD]
    extra = sum(seconds - fixed for _, seconds in deep) / (per_token * sum(tokens for tokens, _ in deep)) - 1
    mean = sum(seconds for _, _, seconds in timed) / len(timed)
    per_stage = max(0.0, whole - mean * len(starts)) / 2
    return StepTime(fixed, per_token, max(0.0, extra / more_ranks), per_prompt, per_stage)
