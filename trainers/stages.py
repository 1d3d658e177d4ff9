"""The loop over stages: each is one training of TRL's, from its last checkpoint if it was cut off, and then sealed."""

import hashlib
import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from torch.optim.lr_scheduler import LRScheduler
from transformers import TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from hft.trimmed_hft import HFTTrim

from .checkpoints import RunFolder, last_checkpoint, step_in
from .curriculum import Mastery, Stage, open_stages
from .routes import learn_routes
from .task_data import TASK_ID, alone, is_tagged
from .token_means import in_all, mean_loss
from .trackers import one_run


logger = logging.get_logger(__name__)


class HFTStages:
    """The part of `HFTTrainer` that trains stage after stage, bottom-up."""

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Trains every open stage, bottom-up, and seals it.

        Args:
            resume_from_checkpoint: True goes on from what `args.output_dir` holds, at whatever point the run was cut off
                (from the start if nothing was saved); a string names another run's folder or one checkpoint in it. Tasks
                without a checkpoint start as they are in this model: build it with the same seed. From one of this run's
                own checkpoints the run goes back: what it learnt after it is removed.

        A callback that stops the training before a stage's last step stops the run: the stage is kept as a checkpoint to
        resume from, and not sealed. (Tasks that have learnt enough leave by `mastery_accuracy` or `mastery_patience`.)

        Returns:
            Steps and mean loss over all stages; `metrics` as the Trainer has them, of all stages together (`epoch`: the
            last's), and, of a run that was stopped, the step of the last stage at which it was.

        Raises:
            OSError: another training writes to `output_dir`.
            ValueError: a folder to resume from that holds no run, or a stage that was begun with other learning rates or
                batches; an `output_dir` that holds another run's checkpoints or a model with learnt tasks that this one has
                not; a task that was added after this trainer was made; a stage without steps; or a task that has learnt
                numbers that are not finite.
        """
        own = RunFolder(self._root, self.args.should_save)
        with own.held(), one_run(self.callback_handler.callbacks):
            return self._train_all(own, resume_from_checkpoint, **kwargs)

    def _train_all(self, own: RunFolder, resume_from_checkpoint: str | bool | None, **kwargs: Any) -> TrainOutput:
        """As `train`, in a folder that no other process writes to."""
        self._take_changes()
        checkpoint, run = None, own
        if resume_from_checkpoint is True and not own.has_begun(self.model.config.open_tasks()):
            resume_from_checkpoint = None  # tasks that were added, stopped before their first save
        if resume_from_checkpoint:
            path = self._root if resume_from_checkpoint is True else Path(resume_from_checkpoint)
            source = RunFolder(path, self.args.should_save)
            run = source.run()
            checkpoint = source.restore(self.model, is_own=run.is_same(own))
        config = self.model.config
        if missing := [task for task in config.open_tasks() if task not in self._prepared]:
            raise ValueError(
                f"The task {missing[0]!r} was added after this trainer was made; make a new one with its data."
            )
        stages, outputs = open_stages(self.model.hierarchy, config.sealed_tasks()), []
        for stage in stages:
            self._check_steps(stage)
        level = stages[0].level if checkpoint is not None and stages else None
        self._take_record(run.path, bool(resume_from_checkpoint), level)
        if level is not None:
            self._check_batches(checkpoint, stages[0])
        self.accelerator.wait_for_everyone()  # all have read the folder before anyone writes
        if not (resume_from_checkpoint and run.is_same(own)):
            with self.accelerator.main_process_first():  # what it removes, others must not still look at
                own.begin(config.sealed_tasks())
            self._save_record()  # first: of a folder whose config names its tasks, a resume takes its record at its word
            self.save_model(_internal_call=True)
        elif level is not None and source.is_checkpoint():
            with own.going_back(level, step_in(checkpoint)):
                self.save_model(_internal_call=True)
        self.accelerator.wait_for_everyone()
        self._begin_record()
        for stage in stages:
            if outputs:
                self._watch_for_signals()
            outputs.append(self._train_stage(stage, checkpoint, **kwargs))
            checkpoint = None
            if "stopped" in outputs[-1].metrics:
                logger.warning(
                    f"{stage} was stopped at step {outputs[-1].global_step}; a resumed run goes on from there."
                )
                break
        if self.args.push_to_hub and not stages:
            self.push_to_hub()  # what a resumed run could not before
        if not stages and not resume_from_checkpoint:
            logger.warning("All tasks of this model are sealed already: nothing was trained.")
        steps = sum(output.global_step for output in outputs)
        loss = sum(output.training_loss * output.global_step for output in outputs) / max(steps, 1)
        metrics = {**in_all([output.metrics for output in outputs]), "train_loss": loss, "stages": len(outputs)}
        if self.args.has_mastery():
            metrics["saved_steps"] = sum(output.metrics.get("saved_steps", 0) for output in outputs)
        if outputs and "stopped" in outputs[-1].metrics:
            metrics["stopped"] = outputs[-1].metrics["stopped"]
        return TrainOutput(steps, loss, metrics)

    def _train_stage(self, stage: Stage, checkpoint: str | None, **kwargs: Any) -> TrainOutput:
        self.stage = stage
        self.mastery = Mastery(
            stage.tasks,
            self.args.mastery_accuracy,
            self.args.mastery_patience,
            lambda task, step: self.make_sampler().turns_until(task, step),
            self.args.writers(stage.tasks, self.model.config.memory_config),
        )
        self._checked, self._stepping, self._sampler = set(), set(), self.make_sampler()
        self._metrics["train"].clear()  # what the stage before had not logged yet
        self._means.begin_stage()
        # Dropout and noise do not depend on what came before, which a resumed run has not drawn.
        set_seed(self.args.seed)
        self.model.start_stage(stage.tasks, self.args.writers(stage.tasks, self.model.config.memory_config))
        self._place_own()
        if checkpoint is None:
            self.record.rates[str(stage.level)] = {
                **self.args.begun_with(),
                "gradient_accumulation_steps": self.args.gradient_accumulation_steps,
                "processes": self.args.world_size,
                "order": self._order(),
            }
        self._begin_stage_record(stage)
        all_rows, self.train_dataset = self.train_dataset, self._rows_of(stage)
        self._is_in_stage = True
        all_eval_sets = self.eval_dataset
        if isinstance(all_eval_sets, dict):
            self.eval_dataset = {task: rows for task, rows in all_eval_sets.items() if task in stage.tasks}
        self._last = self.optimizer, self.lr_scheduler = None, None
        self.model_wrapped = self.model
        changed = {name: getattr(self.args, name) for name in ("output_dir", "push_to_hub", "eval_on_start")}
        self.args.output_dir, self.args.push_to_hub = str(self._root / stage.folder), False
        self.args.eval_on_start = self.args.eval_on_start and checkpoint is None
        try:
            with self._forward.lent():  # which accelerate wraps for mixed precision at each start
                output = self._learn(checkpoint, **kwargs)
            wanted = min(self.state.max_steps, self._num_steps())  # of batches of people's own there may be fewer
            is_cut = self.control.should_training_stop and self.state.global_step < wanted
            is_stopped = is_cut and not self.mastery.all_mastered()
            if is_stopped:
                self._keep_checkpoint()
            elif self.optimizer is not None:
                self.optimizer.eval()  # a schedule-free one trains at other weights than those to keep, and stays so
        finally:
            for name, value in changed.items():
                setattr(self.args, name, value)
            self.train_dataset, self.eval_dataset = all_rows, all_eval_sets
            self._last, self._is_in_stage = (self.optimizer, self.lr_scheduler), False
            vars(self.model).pop("_original_forward", None)
            if not self.is_fsdp_enabled:  # else the next stage's start would pass by what it wraps
                vars(self.model).pop("_is_accelerate_prepared", None)
        if is_stopped:
            output.metrics["stopped"] = self.state.global_step
            return output
        if self.args.has_mastery():
            left = self.make_sampler().steps_after
            saved = {task: left(step, self.state.max_steps)[task] for task, step in self.mastery.left.items()}
            output.metrics["saved_steps"] = sum(saved.values())
            logger.warning(
                f"{stage}: mastery saved {sum(saved.values())} of {self.state.max_steps} steps {saved or ''}"
            )
        self.model.set_trainable([])
        tolerance = self.args.rank_tolerance
        rows = {task: alone(self.eval_dataset[task]) for task in stage.tasks} if tolerance is not None else None
        trims = self.model.seal(stage.tasks, tolerance, rows)
        routed = self.args.routed(stage.tasks)
        is_formatted = self._formatting_func is not None
        learn_routes(
            self.model, routed, self._train_sets, self.processing_class, self.args.route_samples, is_formatted
        )
        self._end_stage_record(stage, output, trims)
        self.save_model()
        self.stage_ended(stage, trims)
        return output

    def _learn(self, checkpoint: str | None, **kwargs: Any) -> TrainOutput:
        """TRL's training of the stage, or what is left of it after a checkpoint; and its mean loss."""
        output = super().train(**kwargs) if checkpoint is None else self._go_on(checkpoint, **kwargs)
        if checkpoint is None and not self.mastery.left:
            return output
        # The Trainer divides what was lost since the checkpoint, by those who learn, by all steps.
        return output._replace(training_loss=mean_loss(self.state.log_history) or output.training_loss)

    def _go_on(self, checkpoint: str, **kwargs: Any) -> TrainOutput:
        """What is left of the stage after a checkpoint: nothing, if that was its last."""
        if not any(Path(checkpoint).glob("optimizer*")):
            logger.warning(
                f"'{checkpoint}' has no optimizer's state (`save_only_model`): its optimizer begins anew, so "
                "the result is not that of an uninterrupted run."
            )
        state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
        for logs in state.log_history:
            self.mastery.observe_log(logs)
        if state.global_step >= self._num_steps() or self.mastery.all_mastered():
            self._load_from_checkpoint(checkpoint)
            self.create_optimizer_and_scheduler(self._num_steps())
            if hasattr(self.optimizer, "eval"):  # a schedule-free one's weights to keep come from its state
                self._load_optimizer_and_scheduler(checkpoint)
            else:
                self.optimizer, self.lr_scheduler = None, None
            self.state = state
            return TrainOutput(state.global_step, 0.0, {"train_runtime": 0.0})
        return super().train(resume_from_checkpoint=checkpoint, **kwargs)

    def _take_changes(self) -> None:
        """What people set on the trainer since it was made: other labels of its rows, another collator.

        Raises:
            ValueError: an optimizer, or rows that are not those of the trainer.
        """
        if any(its is not None and its not in self._last for its in (self.optimizer, self.lr_scheduler)):
            raise ValueError(
                "HFTTrainer takes no `optimizer` or `lr_scheduler`: each stage makes its own; choose it with `args.optim`."
            )
        self._wrap_collator()
        self._take_rows()

    def _take_rows(self) -> None:
        """The rows that `train_dataset` was set to, in place of those that the trainer was made with; the router's, too.

        Raises:
            ValueError: rows that do not say whose they are, of other tasks, or of a task none with an answer.
        """
        if self.train_dataset is self._joined or self._is_in_stage:
            return
        if not is_tagged(self.train_dataset):
            raise ValueError(
                f"`train_dataset` was set to rows without {TASK_ID!r}, which says whose they are; change the trainer's own "
                "(map, filter), or make a new trainer."
            )
        rows = self.train_dataset.with_format(None)
        places: dict[int, list[int]] = {self._task_names.index(task): [] for task in self._prepared}
        for place, (task_id, labels) in enumerate(zip(rows[TASK_ID], rows["labels"], strict=True)):
            if task_id not in places:
                raise ValueError(
                    f"`train_dataset` was set to rows with the {TASK_ID!r} {task_id}, which is none of this trainer's tasks "
                    f"({', '.join(self._prepared)}); change the trainer's own (map, filter), or make a new trainer."
                )
            if any(label != -100 for label in labels):
                places[task_id].append(place)
        for task_id, its in places.items():
            if not its:
                raise ValueError(
                    f"`train_dataset` was set to rows of which none has an answer of task {self._task_names[task_id]!r}."
                )
        sets = {self._task_names[task_id]: rows.select(its) for task_id, its in places.items()}
        if lost := len(rows) - sum(map(len, sets.values())):
            logger.warning(f"{lost} of the {len(rows)} rows that `train_dataset` was set to hold no answer: left out.")
        self.train_dataset = self._join(sets)
        self._train_sets = {task: Dataset.from_list(alone(its, 10**9)) for task, its in sets.items()}

    def _keep_checkpoint(self) -> None:
        """What a stage that was stopped goes on from, if it was not saved at this step."""
        found = last_checkpoint(Path(self.args.output_dir))
        if self.state.global_step and (found is None or step_in(found) != self.state.global_step):
            self._save_checkpoint(self.model, trial=None)

    def _watch_for_signals(self) -> None:
        """transformers' `enable_jit_checkpoint` stops to listen when a training, here a stage, has ended."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, JITCheckpointCallback):
                manager = callback.jit_manager
                if signal.getsignal(signal.SIGTERM) != manager._sigterm_handler:  # else nothing was trained meanwhile
                    manager.setup_signal_handler()

    def _rows_of(self, stage: Stage) -> Dataset:
        """The prepared rows of a stage's tasks, in the order that its sampler counts on."""
        return concatenate_datasets([self._prepared[task] for task in stage.tasks])

    def _check_batches(self, checkpoint: str, stage: Stage) -> None:
        """A stage goes on in batches as it was begun with: its steps are counted and its rows ordered by them.

        Raises:
            ValueError: in others, of which it might seem to have had enough.
        """
        state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
        found = state.train_batch_size or self._train_batch_size
        if self.args.auto_find_batch_size:
            self._train_batch_size = found  # as the Trainer does, but before the stage's steps are counted
        level, world = stage.level, self.args.world_size
        begun = self.record.rates.get(str(level), {})
        batch, each = "`per_device_train_batch_size` x processes", "gradient_accumulation_steps"
        accumulated = self.args.gradient_accumulation_steps
        for name, now, before in (
            (batch, self._train_batch_size * world, found * begun.get("processes", world)),
            (f"`{each}`", accumulated, begun.get(each, accumulated)),
        ):
            if now != before:
                raise ValueError(
                    f"{name} is {now}, and stage {level}, which is to be resumed, was begun with {before}; give that again, "
                    f"or delete the folder 'stage-{level}' of the run to begin the stage anew."
                )

        self.stage = stage
        if not self.args.auto_find_batch_size and begun.get("order") not in (None, self._order()):
            raise ValueError(
                f"The rows of stage {level}, which is to be resumed, do not come as when it was begun: `packing`, "
                "`max_length`, `task_passes`, `mixed_steps` or `data_seed` is another; give that again, or delete the "
                f"folder 'stage-{level}' of the run to begin the stage anew."
            )

    def _order(self) -> str:
        """A short hash of how many rows the stage's tasks have, as they are prepared, and in which order they come."""
        sampler = self.make_sampler()
        order = [sampler.num_rows, sampler.block_size, sampler.seed, sampler.turns_a_block, sampler.turns(0)]
        return hashlib.sha256(json.dumps(order).encode()).hexdigest()[:16]

    def _check_steps(self, stage: Stage) -> None:
        """Warns of tasks of a stage that take no step before they are sealed for good; refuses a stage without any.

        Warns, too, where the stage is too short to warm up.
        """
        self.stage = stage
        steps = self._num_steps()
        if steps < 1:
            raise ValueError(
                f"{stage} has no steps (`num_train_epochs` is {self.args.num_train_epochs}), and its tasks would be sealed "
                "for good without having learnt anything; raise it, or set `max_steps`."
            )
        sampler = self.make_sampler()
        if idle := [task for task in stage.tasks if not sampler.turns_until(task, steps)]:
            logger.warning(
                f"{stage} has {steps} steps, and none of them is of {', '.join(idle)}, sealed for good without having "
                "learnt anything: raise `max_steps`, unless this is but a try."
            )

        elif self._is_too_short_to_warm_up(steps):
            logger.warning(f"{stage} has {steps} steps, too few to warm up: it begins at the whole learning rate.")

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        """As SFTTrainer's, without a warm-up that is the whole stage, or in whose first step, at a rate of 0, a task has its
        only turns: it would be sealed without having learnt anything."""
        given = self.args.warmup_steps
        if self.stage is not None and self._is_too_short_to_warm_up(num_training_steps):
            self.args.warmup_steps = 0
        try:
            return super().create_scheduler(num_training_steps, optimizer)
        finally:
            self.args.warmup_steps = given

    def _is_too_short_to_warm_up(self, steps: int) -> bool:
        warm_up, turns = self.args.get_warmup_steps(steps), self.make_sampler().turns_until
        if warm_up < 1:
            return False
        return warm_up >= steps or any(turns(task, 1) == turns(task, steps) > 0 for task in self.stage.tasks)

    def _num_steps(self) -> int:
        return self.args.num_steps(self.make_sampler())

    def stage_ended(self, stage: Stage, trims: Sequence[HFTTrim]) -> None:
        """Called on every process when a stage is learnt, sealed and saved; does nothing: for those who subclass.

        Args:
            stage: its level and tasks.
            trims: what `rank_tolerance` cut off, a task each; empty without it.
        """
