"""The arguments of `HFTTrainer`."""

import contextlib
import json
import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from accelerate.utils import is_compiled_module
from torch import accelerator
from transformers import EarlyStoppingCallback
from transformers.trainer_utils import HubStrategy
from trl import SFTConfig

from hft.configuration_hft import HFTMemoryConfig
from hft.hierarchy_hft import Hierarchy, nearest

from .curriculum import BlockSampler
from .kinds import check_kind, field_types, kinds_of
from .mixtures import REFINING_RATE, ROOT_SHARE, check_mixtures, check_standing, members_of, passes_of
from .optimizers import check_optimizer
from .trackers import check_trackers


# Settings that name tasks: some of them, or a number for each.
TASK_LISTS = ("route_tasks", "page_tasks")
TASK_NUMBERS = ("task_passes", "task_learning_rates")
# The least that a number may be, and with which a step can be taken.
LEAST = {
    "gradient_accumulation_steps": 1, "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "max_length": 1,
    "mastery_patience": 1, "learning_rate": 0, "gate_learning_rate": 0, "gate_shrink": 0, "num_train_epochs": 0,
    "route_samples": 0, "neftune_noise_alpha": 0,
}  # fmt: skip
TEMPLATE_FILES = (".jinja", ".j2")  # what TRL reads as a template, and not as a model whose tokenizer has one


@dataclass
class HFTTrainingConfig(SFTConfig):
    """TRL's `SFTConfig` with what a hierarchy adds. Where nothing else is said, a number counts for one stage.

    Unlike `SFTConfig`, it picks the CPU by itself where there is no accelerator, and its learning rate suits low-rank nodes
    with scaling 1 rather than whole models.

    Args:
        learning_rate: of the nodes and pages.
        gate_learning_rate: of the gates, on what a task inherits. They are single numbers near 1, so they take larger steps
            than the nodes.
        gate_shrink: how strongly the gates on ancestors and older pages are drawn to 0: after each step, by this times the
            gates' learning rate, and never past 0 (the proximal step of an L1 penalty). A gate that its task's gradient does
            not hold ends at exactly 0. 0 switches it off.
        mastery_accuracy: a task leaves its stage when this share of the answer tokens of its validation rows is right, given
            the tokens before; 0 to 1. None: never. What ends each answer counts, too (`<|im_end|>` and a line break in many
            chat templates), and is soon always right: of answers of one token, 0.95 then means 85 % of them.
        mastery_patience: a task leaves its stage after so many evaluations in a row, each after a step of its own, without a
            new lowest validation loss. None: never. Tasks that write a memory page together leave together, once all of
            them would. When all tasks of a stage have left, it ends. Both need `eval_dataset` and an `eval_strategy`.
        route_samples: prompts of each task from which the router learns to know it; 0: the router does not learn.
        route_tasks: the tasks that it learns to know; None: all but `mixtures`.
        task_passes: task -> passes over its rows in an epoch, above 0; 1 for those that neither it nor `mixtures` names. Of
            half a pass the next epoch goes on in the other half. Each epoch has a whole number of steps a task.
        task_learning_rates: task -> the learning rate of its node, where it is not `learning_rate`; above 0. That of its
            gates changes by the same factor. What tasks learn together, their page, has `learning_rate`.
        page_tasks: the tasks that write their stage's memory page; None: all but `mixtures` and their tasks, as what these
            share is in the root already.
        mixtures: task -> tasks that stand on it, whose rows are its rows: the root of a family learns from all of them, and
            they refine what it has learnt. (Rows that `train_dataset` gives it take the place of theirs; they share epochs
            all the same.)
        root_share: of each epoch over a mixture's rows, how much it takes; its tasks take the rest, each on its own node.
            Above 0, below 1. `task_passes` says it of each task by itself.
        refining_rate: the tasks of a mixture learn at so much of `learning_rate`. Above 0. `task_learning_rates` says it of
            each task by itself.
        rank_tolerance: before a stage is sealed, each task's node is cut to the smallest rank that raises its mean loss on
            up to 128 rows of `eval_dataset` by no more than this, in nats a token (those that end an answer among them), or
            by no more than half the standard error of the rise; 0 or more. See `HFTForCausalLM.trim`. None: no cuts.
        num_train_epochs, max_steps: of one stage.
        mixed_steps: with `gradient_accumulation_steps`, let the micro-batches of an optimizer step be of different tasks,
            where these write a memory page together. Steps on what they share are then steps for all of them. Other tasks
            have steps of their own, and so have all if this is False.
        per_device_train_batch_size: rows of one micro-batch; they always belong to one task.
    """

    learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of the nodes and pages."})
    gate_learning_rate: float = field(default=1e-2, metadata={"help": "Learning rate of the gates."})
    gate_shrink: float = field(default=0.0, metadata={"help": "Strength of the gates' pull to exactly 0."})

    mastery_accuracy: float | None = field(
        default=None, metadata={"help": "Accuracy at which a task leaves its stage."}
    )
    mastery_patience: int | None = field(default=None, metadata={"help": "Evaluations without progress till it does."})
    route_samples: int = field(default=256, metadata={"help": "Prompts a task that the router learns from; 0: none."})
    route_tasks: list[str] | None = field(
        default=None, metadata={"help": "Tasks that the router learns; None: all but mixtures."}
    )
    task_passes: dict[str, float] | str | None = field(
        default=None, metadata={"help": "Passes over a task's rows in an epoch, where it is not one."}
    )
    page_tasks: list[str] | None = field(
        default=None, metadata={"help": "Tasks that write memory pages; None: all but mixtures and their tasks."}
    )
    task_learning_rates: dict[str, float] | str | None = field(
        default=None, metadata={"help": "Learning rate of a task's node, where it is not `learning_rate`."}
    )

    mixtures: dict[str, list[str]] | str | None = field(
        default=None, metadata={"help": "Tasks that learn from the rows of those that stand on them."}
    )
    root_share: float = field(default=ROOT_SHARE, metadata={"help": "A mixture's share of an epoch over its rows."})
    refining_rate: float = field(
        default=REFINING_RATE, metadata={"help": "Learning rate of a mixture's tasks, of `learning_rate`."}
    )

    mixed_steps: bool = field(
        default=True, metadata={"help": "Tasks that write a page together share optimizer steps."}
    )
    rank_tolerance: float | None = field(
        default=None, metadata={"help": "Nats a token by which a sealed node's cut may raise the validation loss."}
    )

    def __post_init__(self):
        self._check_values()
        if not accelerator.is_available():
            self.use_cpu = True
        if self.train_sampling_strategy != "random":
            raise ValueError(
                f"`train_sampling_strategy` is {self.train_sampling_strategy!r}, but a micro-batch must hold one task, so "
                "HFT orders the rows itself; leave it at 'random'."
            )
        if self.activation_checkpointing is None:  # TRL still sets the field's old name, of which transformers warns
            self.activation_checkpointing = self.gradient_checkpointing
        for name, given in (
            ("load_best_model_at_end", self.load_best_model_at_end),
            ("metric_for_best_model", self.metric_for_best_model is not None),
            ("save_strategy='best'", self.save_strategy == "best"),
            *(
                (f"lr_scheduler_type={its!r}", self.lr_scheduler_type == its)
                for its in ("reduce_lr_on_plateau", "greedy")
            ),
        ):
            if given:
                raise ValueError(
                    f"`{name}` is not supported: each stage evaluates other tasks, so no one metric could choose for all of "
                    "them. To stop early, set `mastery_patience` or `mastery_accuracy`."
                )
        for name in ("bf16_full_eval", "fp16_full_eval"):
            if getattr(self, name):
                raise ValueError(f"`{name}` would round the model itself, with what tasks have learnt; leave it out.")
        if self.hub_strategy != HubStrategy.EVERY_SAVE:
            raise ValueError(
                f"`hub_strategy` is {str(self.hub_strategy)!r}, and HFT pushes the model whenever a stage is learnt; leave "
                "it out."
            )
        if self.mastery_patience is not None and self.loss_type == "dft":
            raise ValueError(
                "`mastery_patience` does not go with `loss_type='dft'`, which rises while a task begins to learn; take "
                "another loss, or `mastery_accuracy`."
            )
        if self.eval_packing and not (self.packing or self.padding_free):
            raise ValueError(
                "`eval_packing` is set without `packing`, and so the rows of one pack would read one another; set "
                "`padding_free`, too, or leave it out."
            )
        if self.activation_offloading and not accelerator.is_available():
            raise ValueError("`activation_offloading` takes activations from a GPU, and there is none; leave it out.")
        if self.has_mastery() and self.fp16:
            raise ValueError(
                "`fp16` does not go with `mastery_accuracy` or `mastery_patience`: its scaler cannot pass over the steps of "
                "a task that has left. Train in bf16 or float32, or without mastery."
            )
        if self.mastery_accuracy is not None and not 0 < self.mastery_accuracy <= 1:
            raise ValueError(f"`mastery_accuracy` is {self.mastery_accuracy}; it must be above 0 and at most 1.")
        if self.rank_tolerance is not None and not self.rank_tolerance >= 0:
            raise ValueError(f"`rank_tolerance` is {self.rank_tolerance}; it must be 0 nats a token or more.")
        for name in TASK_LISTS:
            if getattr(self, name) is not None:
                setattr(self, name, list(getattr(self, name)))  # as it comes back from a file
        for name in ("task_learning_rates", "mixtures"):
            if getattr(self, name) and not self.learning_rate > 0:
                raise ValueError(f"`learning_rate` is {self.learning_rate}; with `{name}` it must be above 0.")
        check_mixtures(its := self._read_json("mixtures"), self.root_share, self.refining_rate)
        if its:  # as they come back from a file
            self.mixtures = {root: list(members) for root, members in its.items()}
        for name, what in zip(TASK_NUMBERS, ("passes", "learning rate"), strict=True):
            by_task = self._read_json(name)
            if not isinstance(by_task, dict):
                raise ValueError(f'`{name}` is {by_task!r}; give {{"task": {what}}}.')
            for task, value in by_task.items():
                if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                    raise ValueError(f"`{name}[{task!r}]` is {value!r}; it must be a number above 0.")
        if self.has_mastery() and self.eval_strategy == "no":
            raise ValueError(
                "`mastery_accuracy` and `mastery_patience` go by evaluations, and `eval_strategy` is 'no'; "
                "set it to 'steps', and `eval_steps`."
            )
        if self.ddp_find_unused_parameters is None:  # what the siblings of a micro-batch's task own gets no gradient
            self.ddp_find_unused_parameters = True
        super().__post_init__()
        for name in ("split_batches", "dispatch_batches"):
            if getattr(self.accelerator_config, name):
                raise ValueError(
                    f"`accelerator_config` sets `{name}`, but HFT orders the rows so that all processes take the same task; "
                    "leave it out."
                )
        check_trackers(self.report_to)
        check_optimizer(self)
        if (self.activation_checkpointing_kwargs or {}).get("use_reentrant"):  # by its old name, too, from here on
            leave = "leave `use_reentrant` out of `activation_checkpointing_kwargs`"
            if self.torch_compile:
                raise ValueError(f"`torch_compile` does not go with reentrant checkpointing; {leave}.")
            if self.world_size > 1:
                raise ValueError(
                    f"Reentrant checkpointing hides from DDP which parameters a step uses, and there are {self.world_size} "
                    f"processes; {leave}."
                )

    def _read_json(self, name: str) -> Any:
        """What a setting by task is, which is text from a command line; {} for None."""
        by_task = getattr(self, name) or {}
        if isinstance(by_task, str):
            with contextlib.suppress(json.JSONDecodeError):
                by_task = json.loads(by_task)
                setattr(self, name, by_task)
        return by_task

    def _check_values(self) -> None:
        """Raises ValueError for values of a wrong kind, and for such as no step could be taken with."""
        for name, its_type in field_types(HFTTrainingConfig).items():
            if kinds_of(its_type) - {type(None)} != {str}:  # transformers takes True, too, where it says text
                check_kind(name, getattr(self, name), its_type, LEAST.get(name))
        if self.max_steps == 0 or self.max_steps < -1:
            raise ValueError(
                f"`max_steps` is {self.max_steps}; it must be a whole number of 1 or more (-1: as many as there are)."
            )
        if not 0 <= self.warmup_steps < 1 and not float(self.warmup_steps).is_integer():
            raise ValueError(
                f"`warmup_steps` is {self.warmup_steps}; it must be a whole number, or below 1 a share of a stage's steps."
            )
        if self.output_dir == "":
            raise ValueError("`output_dir` is ''; name a folder, or leave it out.")
        template = self.chat_template_path
        if template is not None and template.endswith(TEMPLATE_FILES) and not os.path.isfile(template):
            raise ValueError(f"`chat_template_path` is '{template}', and there is no such file.")

    def sampler(self, num_rows: Mapping[str, int], block_size: int, together: Collection[str] = ()) -> BlockSampler:
        """The order of a stage's rows: task -> how many it has, in blocks of what one optimizer step takes.

        Args:
            num_rows, block_size: see `BlockSampler`.
            together: the tasks that write a page together, which share steps.
        """
        seed = self.seed if self.data_seed is None else self.data_seed
        together = together if self.mixed_steps else ()
        return BlockSampler(num_rows, block_size, seed, self.passes(), self.gradient_accumulation_steps, together)

    def num_steps(self, sampler: BlockSampler) -> int:
        """The optimizer steps of a stage whose rows come in this order."""
        an_epoch = len(sampler) // sampler.block_size
        return self.max_steps if self.max_steps > 0 else math.ceil(self.num_train_epochs * an_epoch)

    def passes(self) -> dict[str, float]:
        """Passes over a task's rows in an epoch, where it is not one."""
        return {**passes_of(self.mixtures or {}, self.root_share), **(self.task_passes or {})}

    def routed(self, tasks: Sequence[str]) -> list[str]:
        """Those of the tasks that the router learns to know."""
        if not self.route_samples:
            return []
        if self.route_tasks is None:
            return [task for task in tasks if task not in (self.mixtures or {})]
        return [task for task in tasks if task in self.route_tasks]

    def rates(self, task: str) -> tuple[float, float]:
        """A task's learning rates: of its node, and of its gates."""
        refining = dict.fromkeys(members_of(self.mixtures or {}), self.refining_rate * self.learning_rate)
        own = {**refining, **(self.task_learning_rates or {})}
        if task not in own:
            return self.learning_rate, self.gate_learning_rate
        return own[task], self.gate_learning_rate * own[task] / self.learning_rate

    def begun_with(self) -> dict[str, Any]:
        """What a stage that goes on must have as it was begun: the optimizer's state is of these."""
        names = ("learning_rate", "gate_learning_rate", "weight_decay", "seed")
        return {**{name: getattr(self, name) for name in names}, "optim": str(self.optim.value)}

    def writers(self, tasks: Sequence[str], memory: HFTMemoryConfig) -> list[str]:
        """Those of a stage's tasks that write its memory page; none where there is no memory."""
        if memory.read == "off":
            return []
        if self.page_tasks is None:
            mixtures = self.mixtures or {}
            return [task for task in tasks if task not in (*mixtures, *members_of(mixtures))]
        return [task for task in tasks if task in self.page_tasks]

    def check_names(self, tree: Hierarchy) -> None:
        """Whether the settings that name tasks name known ones, and those of mixtures such as stand on them.

        Raises:
            ValueError: one does not.
        """
        for field_name in (*TASK_LISTS, *TASK_NUMBERS):
            for task in getattr(self, field_name) or ():
                if task not in tree:
                    raise ValueError(f"`{field_name}` names the unknown task {task!r}. {nearest(task, tree.names)}")
        check_standing(self.mixtures or {}, tree)

    def needs_validation(self) -> bool:
        """Whether losses on validation rows decide or are logged."""
        return self.eval_strategy != "no" or self.eval_on_start or self.rank_tolerance is not None

    def has_mastery(self) -> bool:
        """Whether tasks may leave their stage early."""
        return self.mastery_accuracy is not None or self.mastery_patience is not None


def check_callback(callback: Any) -> None:
    """Raises ValueError for a callback that goes by one metric of all stages."""
    if issubclass(callback if isinstance(callback, type) else type(callback), EarlyStoppingCallback):
        raise ValueError(
            "HFTTrainer takes no EarlyStoppingCallback: each stage evaluates other tasks, so no one metric could stop them; "
            "set `mastery_patience`, the evaluations without progress after which a task leaves its stage."
        )


def how_to_load(given: Mapping[str, Any], quantization_config: Any) -> dict[str, Any]:
    """The arguments of `from_pretrained`, of which `quantization_config` may stand in two places; ValueError if in both."""
    if quantization_config is None:
        return dict(given)
    if given.get("quantization_config") is not None:
        raise ValueError("`quantization_config` is given, and stands in `model_init_kwargs`, too; give one of them.")
    return {**given, "quantization_config": quantization_config}


def check_given(model: Any, args: Any, train_dataset: Any, others: Mapping[str, Any]) -> None:
    """Whether `HFTTrainer` got what it takes.

    Args:
        model, args, train_dataset: see `HFTTrainer`.
        others: what else it got, for `SFTTrainer`.

    Raises:
        TypeError: `args` that are not HFT's.
        ValueError: a plain or wrapped model, no data, or what each stage makes or decides by itself.
    """
    if not isinstance(args, HFTTrainingConfig):
        raise TypeError(
            f"HFTTrainer got a {type(args).__name__} as `args`; give an HFTTrainingConfig, which is an SFTConfig."
        )
    # By name: as remote code it is another class. By class: what wraps a model, as PEFT does, passes its config through.
    plain = model._orig_mod if is_compiled_module(model) else model
    if not any(cls.__name__ == "HFTForCausalLM" for cls in type(plain).__mro__):
        raise ValueError(
            f"HFTTrainer got a {type(model).__name__} as `model`; give an HFTForCausalLM, not wrapped: its tasks' nodes are "
            "what trains. On a plain decoder, build one with HFTForCausalLM.from_backbone(...)."
        )
    if others.get("peft_config") is not None:
        raise ValueError("HFTTrainer takes no `peft_config`: the tasks' nodes are what trains.")
    for callback in others.get("callbacks") or ():
        check_callback(callback)
    _, options = others.get("optimizer_cls_and_kwargs") or (None, {})
    if options.get("lr", args.learning_rate) != args.learning_rate:
        raise ValueError(
            f"`optimizer_cls_and_kwargs` has lr={options['lr']}, and `learning_rate` is {args.learning_rate}, by which "
            "tasks, pages and gates have their rates; give one number to both, or leave `lr` out."
        )
    template, size = args.chat_template_path, model.get_input_embeddings().num_embeddings
    if template is not None and not template.endswith(TEMPLATE_FILES) and size % 64:
        raise ValueError(
            f"`chat_template_path` is '{template}', a model, and with its template TRL takes its tokens, too, and rounds "
            f"the embeddings up to a multiple of 64; the backbone has {size}, and is frozen. Give the template alone, as a "
            "file that ends in .jinja."
        )
    if others.get("optimizers", (None, None)) != (None, None):
        raise ValueError("HFTTrainer takes no `optimizers`: each stage makes its own; choose it with `args.optim`.")
    if train_dataset is None:
        raise ValueError("`train_dataset` is missing; give a Dataset a task: {name: Dataset}.")
