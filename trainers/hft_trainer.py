"""`HFTTrainer`: TRL's SFTTrainer on a hierarchy: data and optimizer. The loss: `losses.py`; the loop: `stages.py`."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging
from trl import SFTTrainer

from hft.files_hft import check_writable, disk_errors, replacing
from hft.modeling_hft import HFTForCausalLM
from hft.upload_hft import check_shareable

from .compiled import CompiledDecoder
from .curriculum import BlockSampler, Mastery, Stage, open_stages
from .evaluation import EvalSet
from .held_out import HFTHeldOut
from .hft_config import HFTTrainingConfig, check_callback, check_given, how_to_load
from .loading import own_tokenizer
from .losses import HFTLosses, LentForward
from .mixtures import with_mixtures
from .processes import HFTProcesses, use_one_gpu
from .progress import StagePrinter, StageProgress
from .quantized import passing_as_unquantized
from .rate_groups import group_by_rate, rate_of
from .sharing import HFTSharing
from .stage_callback import StageCallback
from .stage_scores import check_sets
from .stages import HFTStages
from .task_data import (
    TASK_ID,
    OneTaskCollator,
    TaskDatasets,
    alone,
    check_completions,
    check_messages,
    check_tokens,
    formatted,
    is_tagged,
    joined,
    learnable,
    open_sets,
    split_by_task,
    tag_rows,
    why_unfit,
)
from .token_means import TokenMeans


logger = logging.get_logger(__name__)


class HFTTrainer(HFTStages, HFTLosses, HFTHeldOut, HFTSharing, HFTProcesses, SFTTrainer):
    """Trains the open tasks of an HFT model level by level and seals each level.

    Unlike `SFTTrainer`, it takes a dataset a task; `train` runs one training a stage, with a fresh optimizer and schedule,
    in which only the stage's tasks are trainable and each micro-batch holds one task; and `args.output_dir` is at all
    times a model with the stages learnt so far, with the checkpoints of stage n in `stage-n/`.

    Args:
        model: an HFT model, or the id or folder of a saved one.
        args: see `HFTTrainingConfig`.
        train_dataset: `{task: Dataset}`, or a Dataset with a column `task`; every open task needs data. Any format that
            SFTTrainer takes, and another one for each task if need be.
        eval_dataset: the same for evaluation; optional, and not every task needs one. Its losses are logged as
            `eval_<task>_loss`.
        test_sets: `{task: EvalSet}`: what tasks answer before the first stage (the plain backbone), those with parents as
            their stage begins, and all after each stage that learnt them or came later. Scores are logged, and kept in the
            folder's `run.json`.
        kwargs: as for `SFTTrainer`.

    Raises:
        ValueError: a task without data, data for an unknown task, an empty dataset, or rows without anything to learn.
        OSError: if `args.output_dir` cannot be written.
    """

    _tag_names = ["trl", "sft", "hft"]  # noqa: RUF012 (a list in the parent, too)
    _name = "HFT"

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: HFTTrainingConfig | None = None,
        train_dataset: TaskDatasets | Dataset | None = None,
        eval_dataset: TaskDatasets | Dataset | None = None,
        test_sets: Mapping[str, EvalSet] | None = None,
        **kwargs: Any,
    ):
        args = HFTTrainingConfig() if args is None else copy.copy(args)  # people may make another trainer with it
        revision = None
        if isinstance(model, str):
            how = args.model_init_kwargs or {}
            revision = how.get("revision")
            model = HFTForCausalLM.from_pretrained(model, **how_to_load(how, kwargs.pop("quantization_config", None)))
            args.model_init_kwargs = None  # TRL would say that they were not used
        check_given(model, args, train_dataset, kwargs)
        if kwargs.get("processing_class") is None:
            kwargs["processing_class"] = own_tokenizer(model, revision)
        use_one_gpu(args, model)
        self._task_names: list[str] = model.config.task_names()
        args.check_names(model.hierarchy)
        open_tasks = model.config.open_tasks()
        mixtures = {root: its for root, its in (args.mixtures or {}).items() if root in open_tasks}
        train_sets = split_by_task(train_dataset, self._task_names, "train_dataset")
        self._train_sets = open_sets(with_mixtures(mixtures, train_sets, "train_dataset"), open_tasks)
        self._test_sets = dict(test_sets or {})
        check_sets(self._test_sets, self._task_names)
        eval_sets = split_by_task(eval_dataset, self._task_names, "eval_dataset") if eval_dataset is not None else {}
        some = {root: its for root, its in mixtures.items() if eval_sets.keys() >= set(its)}
        eval_sets = with_mixtures(some, eval_sets, "eval_dataset")
        if sealed := [task for task in eval_sets if task not in open_tasks]:
            logger.warning(
                f"The `eval_dataset` of {', '.join(sealed)} is not looked at in training: sealed tasks stay."
            )
        for wanted, names in (
            (args.has_mastery(), "`mastery_patience` or `mastery_accuracy`"),
            (args.rank_tolerance is not None, "`rank_tolerance`"),
        ):
            for task in self._train_sets if wanted else ():
                if task not in eval_sets:
                    raise ValueError(f"{names} is set, but `eval_dataset` has no rows of the task {task!r}.")
        if args.push_to_hub:
            check_shareable(model.config)
        if args.should_save:
            check_writable(args.output_dir)

        self.stage: Stage | None = None
        self.mastery = Mastery([])  # of the stage
        self.log_history: list[dict[str, float]] = []  # of all stages; `state.log_history`: the last's
        self._root = Path(args.output_dir)
        args.run_name = args.run_name or self._root.name  # trackers that start anew at each stage go on with it
        self._checked: set[str] = set()  # tasks whose gradients were seen to reach every parameter
        self._means = TokenMeans()
        # TRL casts whatever is trainable on a 4-bit model to bfloat16; each stage makes its own trainable.
        model.set_trainable([])
        self._prepared: dict[str, Dataset] = {}
        self._is_in_stage = False
        self._last: tuple[Any, Any] = (None, None)  # the newest stage's optimizer and schedule
        train_set = next(iter(self._train_sets.values()))  # TRL looks at one row of it
        if (args.dataset_kwargs or {}).get("skip_prepare_dataset"):
            eval_sets = {task: self._ready(task, rows, args) for task, rows in eval_sets.items()}
            train_set = self._join({task: self._ready(task, rows, args) for task, rows in self._train_sets.items()})
        self._forward = LentForward(model)
        with passing_as_unquantized(model):
            super().__init__(
                model,
                args,
                train_dataset=train_set,
                eval_dataset=eval_sets or None,
                **kwargs,
            )
        self._forward.take_off()
        for task in self._train_sets if args.rank_tolerance is not None else ():
            rows = self.eval_dataset[task]
            if (left := len(alone(rows.select(range(min(2, len(rows))))))) < 2:
                raise ValueError(
                    f"`rank_tolerance` needs two rows or more of task {task!r} in `eval_dataset`, and {left} is left when "
                    "they are prepared; give more, or raise `max_length`."
                )
        self._wrap_collator()
        self._compiled: CompiledDecoder | None = None
        if args.torch_compile:
            self._compiled = CompiledDecoder(model, args.torch_compile_backend, args.torch_compile_mode)
        progress = StagePrinter if args.disable_tqdm else StageProgress
        usual = PrinterCallback if args.disable_tqdm else DEFAULT_PROGRESS_CALLBACK
        for callback in [its for its in self.callback_handler.callbacks if type(its) is usual]:  # not people's own
            self.callback_handler.callbacks.remove(callback)
        self.add_callback(progress(lambda: self.stage, lambda: self.mastery))
        self.add_callback(StageCallback(self._step_taken, lambda: self.mastery, lambda: self._sampler))

    def _wrap_collator(self) -> None:
        """Lets the collator, which people may set, name the task of a micro-batch."""
        if not isinstance(self.data_collator, OneTaskCollator):
            self.data_collator = OneTaskCollator(self.data_collator)

    def add_callback(self, callback: Any) -> None:
        """As the Trainer's; ValueError for one that HFT cannot serve."""
        check_callback(callback)
        super().add_callback(callback)

    def _ready(
        self, task: str, rows: Dataset, args: Any, tokenized: Dataset | None = None, packing: bool = True
    ) -> Dataset:
        """A task's rows as TRL has tokenised them, or as given, checked, and each with the task's id."""
        if tokenized is None:
            check_tokens(task, rows)
            tokenized = rows
        tagged = tag_rows(task, tokenized, self._task_names.index(task), with_others=not args.remove_unused_columns)
        return learnable(task, rows, tagged, args.max_length, packing, args.truncation_mode == "keep_start")

    def _join(self, prepared: dict[str, Dataset]) -> Dataset:
        self._joined = joined(prepared)
        self._prepared = prepared
        return self._joined

    def _prepare_dataset(
        self,
        dataset: Dataset,
        processing_class: Any,
        args: Any,
        packing: bool,
        formatting_func: Callable[[dict], str] | None,
        dataset_name: str,
    ) -> Dataset:
        """Prepares each task on its own, so that formats may differ and packing never mixes tasks."""

        def prepare(task: str, rows: Dataset, split: str) -> Dataset:
            is_tokenized = "input_ids" in rows.column_names
            if is_tokenized:
                check_tokens(task, rows)  # before rows are cut
            if args.completion_only_loss is None:  # TRL looks at the first task only, and past a mask
                self.completion_only_loss = (
                    "completion_mask" in rows.column_names
                    if is_tokenized
                    else {"prompt", "completion"} <= set(rows.column_names)
                )
            if not is_tokenized:
                check_completions(task, rows, args.completion_only_loss, formatting_func)
            try:
                if args.assistant_only_loss:  # here, too
                    check_messages(task, rows)
                texts = formatted(rows, formatting_func, args.dataset_text_field)
                tokenized = super(HFTTrainer, self)._prepare_dataset(
                    texts, processing_class, args, packing, None, f"{task} ({split})"
                )
            except (AttributeError, IndexError, KeyError, TypeError) as error:  # none of which names the task
                if getattr(processing_class, "eos_token", "") is None:
                    raise ValueError(
                        "The tokenizer has no `eos_token`, with which a text ends; set it, or name a token by `eos_token`."
                    ) from error
                raise ValueError(why_unfit(task, rows, args.dataset_text_field, formatting_func, error)) from error
            return self._ready(task, rows, args, tokenized, packing)

        if not self._prepared:  # TRL prepares the training data first
            return self._join({task: prepare(task, rows, "train") for task, rows in self._train_sets.items()})
        if is_tagged(dataset):
            return dataset
        return prepare(dataset_name, dataset, "eval")

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if TASK_ID not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, TASK_ID]

    def get_train_dataloader(self) -> DataLoader:
        """As SFTTrainer's, of the stage's rows; outside `train`, of the next stage's, or the last one's, to look at them."""
        if self._is_in_stage:
            return super().get_train_dataloader()
        self._take_rows()
        all_rows, before = self.train_dataset, self.stage
        stages = open_stages(self.model.hierarchy, self.model.config.sealed_tasks())
        self.stage = stages[0] if stages else before
        self.train_dataset = self._rows_of(self.stage)
        try:
            return super().get_train_dataloader()
        finally:
            self.stage, self.train_dataset = before, all_rows

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> BlockSampler:
        self._sampler = self.make_sampler()
        return self._sampler

    def make_sampler(self) -> BlockSampler:
        """What orders the stage's rows, as it begins; for those who subclass."""
        block = self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        rows = {task: len(self._prepared[task]) for task in self.stage.tasks}
        writers = self.args.writers(self.stage.tasks, self.model.config.memory_config)
        return self.args.sampler(rows, block, writers)

    def _task_of(self, inputs: Mapping[str, Any]) -> str:
        """The task of a micro-batch."""
        return self._task_names[inputs["task"][0]]

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """As SFTTrainer's; the first time that a task trains, checks that a gradient reached all that it trains."""
        task = self._task_of(inputs)
        if task in self.mastery.left:
            # It passes without computing, so that order, schedule and resuming stay what they are.
            self._means.passed += 1
            return torch.zeros((), device=self.args.device)
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._average_gradients()
        self._means.computed += 1
        self._stepping.add(task)
        if task not in self._checked:
            self._checked.add(task)
            own = self.model.learning_parameters(task)
            without = [name for name, parameter in own.items() if parameter.requires_grad and parameter.grad is None]
            if without:
                raise RuntimeError(
                    f"{self.stage}: no gradient reached {len(without)} of the {len(own)} parameters of task {task!r}, "
                    f"first {without[0]!r}. This backbone does not use that linear in its forward pass, or detaches it; "
                    "leave it out with `target_modules`."
                )
        return loss

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """All that trains; the Trainer goes by names such as "bias", which a task may have. (Gates get none later.)"""
        return [name for name, parameter in model.named_parameters() if parameter.requires_grad]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As the Trainer's, in groups by learning rate: tasks may have one of their own, and gates have, without decay."""
        if self.stage is None:
            raise RuntimeError("An optimizer is a stage's, and no stage has begun: `train` makes one for each.")
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if fresh:
            group_by_rate(optimizer, self.model, self.stage.tasks, self.args)
        return optimizer

    def _step_taken(self) -> None:
        """After an optimizer step: the proximal step on the gates of the tasks that took it."""
        for task in sorted(self._stepping) if self.args.gate_shrink else ():
            if columns := self.model.learning_gates(task):
                strength = rate_of(self.optimizer, self.model.hft_gates.of(task)) * self.args.gate_shrink
                self.model.hft_gates.shrink(task, columns, strength)
        self._stepping.clear()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As SFTTrainer's, with the stage."""
        if self.stage is not None:
            logs["stage"] = self.stage.level
        self._means.of_computed(logs)
        self._means.take_the_place(self._metrics, "train" if self.model.training else "eval")
        super().log(logs, start_time)
        self.log_history.append(dict(self.state.log_history[-1]))

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with disk_errors(self.args.output_dir):
            super()._save_checkpoint(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = self.args.output_dir if output_dir is None else output_dir
        if not self.args.should_save:
            return
        with replacing(folder, last="tokenizer_config.json") as staging:
            self.processing_class.save_pretrained(staging)
        self.model.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.model.restore(resume_from_checkpoint, "open")  # sealed tasks may have been refreshed since
        self.model.set_trainable(self.stage.tasks)
