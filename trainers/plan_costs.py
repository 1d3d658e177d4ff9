"""What training a plan will cost, a task and in all: steps, time, bytes on disk, the peak of memory."""

import copy
import dataclasses
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .hft_config import HFTTrainingConfig
from .memory_estimate import MemoryEstimate, estimate_recipe, node_bytes, page_bytes
from .metrics import Row
from .planner import Plan
from .recipes import Recipe
from .row_tokens import tokenize_rows
from .time_estimate import rows_that_train, task_steps, time_steps, tokens_a_step


logger = logging.get_logger(__name__)
SAMPLED_ROWS = 1000  # of a task, to tell the lengths of all; as many as TRL packs at once


@dataclass(frozen=True)
class PlanCosts:
    """The estimate.

    Args:
        steps, seconds: task -> optimizer steps, and seconds of these and of learning its routes.
        stage_seconds: what all stages take besides.
        task_bytes, page_bytes: of one task's file and of one stage's page.
        num_pages: stages that write a page.
        length: tokens of the longest row that trains.
        memory: the peak of the step that needs most.
    """

    steps: Mapping[str, int]
    seconds: Mapping[str, float]
    stage_seconds: float
    task_bytes: int
    page_bytes: int
    num_pages: int
    length: int
    memory: MemoryEstimate

    def total_seconds(self) -> float:
        """Of the whole training, without answering questions between its stages."""
        return sum(self.seconds.values()) + self.stage_seconds

    def lines(self) -> list[str]:
        """A table, a task a line."""
        width = max(8, *(len(task) for task in self.steps)) + 2
        table = [f"{'task':<{width}}{'steps':>7}{'time':>14}{'on disk':>12}"]
        rows = [(task, str(steps), self.seconds[task], self.task_bytes) for task, steps in self.steps.items()]
        pages = self.num_pages * self.page_bytes
        rows.append(("stages", "", self.stage_seconds, pages))
        all_bytes = len(self.steps) * self.task_bytes + pages
        rows.append(("in all", str(sum(self.steps.values())), self.total_seconds(), all_bytes))
        for name, steps, seconds, size in rows:
            table.append(f"{name:<{width}}{steps:>7}{duration(seconds):>14}{size / 2**20:>8.1f} MiB")
        return [*table, f"Peak of a step with rows of {self.length} tokens: {self.memory}, and the libraries."]


def duration(seconds: float) -> str:
    """Seconds for people: 3 min 20 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def plan_costs(
    plan: Plan,
    recipe: Recipe,
    model: PreTrainedModel,
    rows: Mapping[str, Sequence[Row]],
    tokenizer: PreTrainedTokenizerBase,
) -> PlanCosts:
    """Times a few steps, and counts the rest.

    Args:
        plan: the hierarchy.
        recipe: rank, batch, epochs, length.
        model: on the recipe's backbone, without tasks, or that which the plan's tasks join; of no use afterwards, see
            `time_steps`.
        rows: new task -> the rows that it trains on; those of a family's root are its tasks'.
        tokenizer: the model's.
    """
    onto = copy.deepcopy(model.config)  # as it is before steps are timed, and without what has begun to train
    onto.tasks = [task for task in onto.tasks if task["sealed"]]
    parents = {task: ups for task, ups in plan.parents.items() if task not in model.config.open_tasks()}
    recipe = dataclasses.replace(recipe, hierarchy=parents, mixtures=dict(plan.families))
    training = HFTTrainingConfig(**{**recipe.training_arguments(), "report_to": "none"})
    hierarchy, rank = plan.hierarchy(), recipe.model.get("rank", onto.rank)
    rank_of = {**dict.fromkeys(hierarchy.names, rank), **{task["name"]: task["rank"] for task in onto.tasks}}
    memory = onto.memory_config
    slots = 0 if memory.read == "off" else memory.slots
    of_roots = {root: [row for task in its for row in rows[task]] for root, its in plan.families.items()}
    num_given, num_rows, lengths, answers = {}, {}, {}, {}
    for task, its in {**rows, **of_roots}.items():
        num_given[task] = len(its)
        num_rows[task], lengths[task], answers[task] = _measure(task, its, tokenizer, training)
    timing = time_steps(model, rows, tokenizer, recipe.training)
    levels = [[task for task in level if task in num_rows] for level in hierarchy.levels()]
    levels = [level for level in levels if level]
    writers = [training.writers(level, memory) for level in levels]
    more = {}  # columns of a path beside those of one node and of the pages, which steps are timed with
    for level, tasks in enumerate(levels):
        for task in tasks:
            num_pages = sum(map(bool, writers[:level])) + (task in writers[level])
            more[task] = sum(rank_of[node] for node in hierarchy.path(task)) - onto.rank + slots * (num_pages - 1)
    steps: dict[str, int] = {}
    micro_batches = training.gradient_accumulation_steps
    for level, its_writers in zip(levels, writers, strict=True):
        steps |= task_steps({task: num_rows[task] for task in level}, training, its_writers)
    seconds = {
        task: steps[task] * timing.seconds(tokens_a_step(lengths[task], training), more[task], micro_batches)
        + timing.per_prompt * min(training.route_samples if training.routed([task]) else 0, num_given[task])
        for task in steps
    }
    batch = training.per_device_train_batch_size
    on_accelerator = torch.accelerator.is_available()
    longest = max(map(max, lengths.values()))
    whole_rows = (
        training.completion_only_loss is False or training.label_smoothing_factor > 0 or training.torch_compile
    )
    memory = estimate_recipe(
        recipe,
        onto.text_config,
        longest,
        None if whole_rows else batch * max(answers.values()),
        on_accelerator,
        onto,
    )
    stage_seconds = timing.per_stage * len(levels)
    sizes = node_bytes(model, rank), page_bytes(model, slots)
    return PlanCosts(steps, seconds, stage_seconds, *sizes, sum(map(bool, writers)), longest, memory)


def _measure(
    task: str, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, training: HFTTrainingConfig
) -> tuple[int, list[int], int]:
    """Of a task's rows as they train: how many, the lengths of some in tokens, and that of the longest answer.

    Raises:
        ValueError: rows of which cutting at `max_length` leaves no answer.
    """
    chosen = random.Random(0).sample(range(len(rows)), min(SAMPLED_ROWS, len(rows)))
    ready = rows_that_train(tokenize_rows((rows[i] for i in chosen), tokenizer), training)
    if not ready:
        raise ValueError(f"`max_length`={training.max_length} tokens cuts off all answers of task {task!r}: raise it.")
    if not training.packing and len(ready) < len(chosen):
        logger.warning(
            f"{len(chosen) - len(ready)} of {len(chosen)} rows of task {task!r} would be dropped: `max_length`="
            f"{training.max_length} cuts off their whole answer. Raise it, or set truncation_mode: keep_end."
        )
    lengths = [len(row["input_ids"]) for row in ready]
    answer = max(sum(label != -100 for label in row["labels"]) for row in ready)
    return round(len(ready) * len(rows) / len(chosen)), lengths, answer
