"""What a training leaves for people: its record, pictures for trackers, the model card, and the push to the Hub."""

import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.trainer_utils import TrainOutput
from transformers.utils import is_matplotlib_available

from hft.trimmed_hft import HFTTrim
from hft.upload_hft import check_shareable, upload

from .charts import matrix_chart
from .curriculum import Stage, open_stages
from .metrics import metric_name
from .model_card import write_model_card
from .run_record import BUDGET, RECORD_FILE, RunRecord
from .stage_scores import StageScores, in_words
from .trackers import begin_stage, show_picture


class HFTSharing:
    """The part of `HFTTrainer` that writes down and hands on what came out."""

    def _take_record(self, folder: Path, resumes: bool, within: int | None) -> None:
        """A resumed run goes on with the record that its folder holds, a model that grows with its past, which may be in the
        folder that it was loaded from; writes nothing.

        Args:
            folder: the run's.
            resumes: whether it is resumed.
            within: the level of the stage that goes on from a checkpoint.

        Raises:
            ValueError: arguments that the run was begun with are others now.
        """
        sealed = self.model.config.sealed_tasks()
        has_record = (folder / RECORD_FILE).exists()
        elsewhere = None if has_record else self.model.config.name_or_path
        source, goes_on = Path(elsewhere) if elsewhere else folder, resumes and has_record
        self.record = RunRecord.load(source) if goes_on or sealed else RunRecord()
        for root, members in (self.args.mixtures or {}).items():
            learnt_from = (self.record.budget.get("mixtures") or {}).get(root, ())
            if new := [task for task in members if task not in (*sealed, *learnt_from)] if root in sealed else []:
                raise ValueError(
                    f"`mixtures[{root!r}]` names {new[0]!r}, from whose rows {root!r} has not learnt, and it is sealed; "
                    f"take {new[0]!r} out of `mixtures` (it stands on {root!r} all the same)."
                )
        if not goes_on:
            self.record = self.record.past_of(sealed)
        # Of a run that went back to an earlier checkpoint, later stages are no longer there.
        past = {task for stage in self.record.stages for task in stage["tasks"]}
        self.record.stages = self.record.without(past - set(sealed)).stages
        args = self.args.to_dict()  # enums as text
        unused = () if args["mixtures"] else ("root_share", "refining_rate")
        budget = {name: args[name] for name in BUDGET if args[name] is not None and name not in unused}
        for name in ("page_tasks", "task_learning_rates", "mixtures", "root_share", "refining_rate"):
            now, before = budget.get(name), self.record.budget.get(name)
            if self.record.budget and now != before:
                raise ValueError(
                    f"`{name}` is {now}, and the run to be resumed was begun with {before}; give that again, or start anew."
                )
        # A stage goes on at the rates that its optimizer was saved with; by them its groups are told apart.
        begun = self.record.rates.get(str(within), {})
        for name, now in self.args.begun_with().items():
            if name in begun and now != begun[name]:
                raise ValueError(
                    f"`{name}` is {now}, and stage {within}, which is to be resumed, was begun with {begun[name]}; give "
                    f"that again, or delete '{folder / f'stage-{within}'}' to begin the stage anew."
                )
        stage = next((its for its in open_stages(self.model.hierarchy, sealed) if its.level == within), None)
        for task in stage.tasks if stage is not None else ():
            now, before = len(self._train_sets[task]), self.record.data.get(task, {}).get("rows")
            if before not in (None, now):
                raise ValueError(
                    f"Task {task!r} has {now} rows, and stage {within}, which is to be resumed, was begun with {before}; "
                    f"give the same rows, or delete '{folder / f'stage-{within}'}' to begin the stage anew."
                )
        self.record.budget = budget
        self.record.quantization = how_held(self.model)

    def _begin_record(self) -> None:
        """Before the first stage: what the backbone scores."""
        for task, rows in self._train_sets.items():
            self.record.data[task] = {"rows": len(rows), **_origin(rows)}
        batch_size, has_bars = self.args.per_device_eval_batch_size, self.is_world_process_zero()
        self._scores = StageScores(self.model, self.processing_class, self._test_sets, batch_size, has_bars)
        for task, data in self._test_sets.items():
            self.record.data.setdefault(task, {})["metric"] = metric_name(data.score)
        self._scores.begin(self.record)
        self._save_record()

    def _begin_stage_record(self, stage: Stage) -> None:
        begin_stage(self.callback_handler.callbacks)
        self._scores.start(self.record, stage)
        self._save_record()

    def _end_stage_record(self, stage: Stage, output: TrainOutput, trims: Sequence[HFTTrim] = ()) -> None:
        """After a stage was sealed, before the folder says so: a kill in between trains the stage again."""
        scores = self._scores.end(stage)
        log = [entry for entry in self.state.log_history if "loss" in entry]
        entry = {"level": stage.level, "tasks": list(stage.tasks), "steps": output.global_step}
        entry |= {"seconds": round(output.metrics["train_runtime"], 1), "log": log, "scores": scores}
        # What was taken in the end: `auto_find_batch_size` may have lowered it.
        self.record.budget["per_device_train_batch_size"] = self._train_batch_size
        if self.optimizer_cls_and_kwargs is not None:
            self.record.budget["optim"] = self.optimizer_cls_and_kwargs[0].__name__
        entry["trims"] = {trim.task: {k: v for k, v in asdict(trim).items() if k != "task"} for trim in trims}
        if self.is_world_process_zero():
            print(*trims, sep="\n", end="\n" if trims else "", flush=True)
        self.record.add_stage(entry)
        self._save_record()
        if not scores:
            return
        self.log({f"score/{task}": score["score"] for task, score in scores.items()})
        if not self.is_world_process_zero():
            return
        print(f"After {stage}: {in_words(scores)}", flush=True)
        if is_matplotlib_available():
            before = {task: score["score"] for task, score in self.record.before.items()}
            figure = matrix_chart(self.record.matrix(), before, self.record.scored_stages())
            show_picture(self.callback_handler.callbacks, "score of each task after each stage", figure, stage.level)

    def _save_record(self) -> None:
        if self.args.should_save:
            self.record.save(self._root)

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | list[str] | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        """Writes README.md, with pictures where matplotlib is installed; TRL's own card knows nothing of tasks.

        Not within a stage, where TRL asks for a card at each checkpoint: drawing takes seconds.

        Args:
            model_name: as TRL has it; the card takes the repository's.
            dataset_name: Hub ids of datasets that were loaded in another way than by `load_dataset(id)`, which is seen.
            tags: beside HFT's and the model's own (`model.add_model_tags`).
        """
        within_stage = self.args.output_dir != str(self._root)
        if self.is_world_process_zero() and not within_stage:
            self._write_card(self._root, self._labelled_record(dataset_name, tags))

    def _labelled_record(self, dataset_name: str | list[str] | None, tags: str | list[str] | None) -> RunRecord:
        """The folder's record, which from now on names these datasets and tags for every later card, too."""
        record = RunRecord.load(self._root)
        more = {"tags": [*(self.model.model_tags or ()), *_listed(tags)], "datasets": _listed(dataset_name)}
        card = {name: list(dict.fromkeys([*record.card.get(name, ()), *its])) for name, its in more.items()}
        if card != record.card:
            record.card = card
            record.save(self._root)
        return record

    def _write_card(self, folder: Path, record: RunRecord) -> None:
        gates = {task: self.model.gates(task) for task in self.model.hierarchy.names}
        write_model_card(self.model.config, gates, folder, record, self.hub_model_id)

    def push_to_hub(
        self,
        commit_message: str = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        model_name: str | None = None,
        dataset_name: str | list[str] | None = None,
        tags: str | list[str] | None = None,
    ) -> str:
        """Uploads the model, its tokenizer, its card and the run's record in one commit; no checkpoints.

        Args:
            commit_message: of the commit.
            blocking: as transformers has it; the upload is always waited for.
            token, revision: to use instead of `args.hub_token` and `args.hub_revision`.
            private: whether the repository, if it is made, is private; `args.hub_private_repo` by default.
            model_name, dataset_name, tags: as for `create_model_card`.

        Returns:
            The commit's address.
        """
        private = self.args.hub_private_repo if private is None else private
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        if not self.is_world_process_zero():
            return ""
        check_shareable(self.model.config)
        with tempfile.TemporaryDirectory() as folder:
            self._save(folder)
            record = self._labelled_record(dataset_name, tags)
            record.save(Path(folder))
            self._write_card(Path(folder), record)
            commit = upload(
                folder,
                self.hub_model_id,
                commit_message,
                private,
                token or self.args.hub_token,
                revision or self.args.hub_revision,
            )
        return str(commit)


def _listed(names: str | Sequence[str] | None) -> list[str]:
    return [names] if isinstance(names, str) else list(names or ())


def _origin(rows: Dataset) -> dict[str, Any]:
    """The Hub id that rows came from, if `datasets` knows one: {"source": id}, and its part: {"config": name}."""
    for address in rows.info.download_checksums or {}:
        if address.startswith("hf://datasets/"):
            config = rows.info.config_name
            part = {"config": config} if config and config != "default" else {}
            return {"source": address.removeprefix("hf://datasets/").split("@")[0], **part}
    return {}


def how_held(model: PreTrainedModel) -> dict[str, Any]:
    """The keys of BitsAndBytesConfig by which a model's backbone is held, as recipes have them; {} if by none of them."""
    config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    if not isinstance(config, BitsAndBytesConfig):
        return {}
    return {key: its for key, its in config.to_diff_dict().items() if not key.startswith("_")}
