"""What people bring to a trainer, as they do to SFTTrainer: their losses, optimizers, callbacks, collators, rows."""

import gc
import json
import re
import weakref

import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader, SequentialSampler
from transformers import DefaultFlowCallback, EarlyStoppingCallback, TrainerCallback
from transformers.integrations import TensorBoardCallback

import hft
from hft.trainers import HFTTrainer, progress
from hft.trainers import hft_trainer as trainer_module
from hft.trainers.curriculum import NOT_OWN_ROWS

from .test_trainer import make, rows
from .tiny import snapshot


TREE = {"a": [], "b": ["a"]}


class AtEachStep(TrainerCallback):
    """Does something with its trainer after each step."""

    def __init__(self, act):
        self.act = act

    def on_step_end(self, args, state, control, **kwargs):
        self.act(self.trainer)


def with_callback(trainer, act):
    callback = AtEachStep(act)
    callback.trainer = trainer
    trainer.add_callback(callback)
    return trainer


@pytest.mark.parametrize(
    "look",
    [
        lambda trainer: trainer.predict({"a": trainer.easy}),
        lambda trainer: trainer.evaluate({"a": trainer.easy}),
        lambda trainer: trainer.evaluate({"a": trainer.easy}, None, "eval"),
    ],
    ids=["predict", "evaluate", "by position"],
)
def test_a_task_is_mastered_by_its_validation_rows_only(backbones, tokenizer, tmp_path, look):
    """Not by rows that a callback looks at meanwhile; nor by their log, when the run is resumed."""
    options = {"mastery_accuracy": 0.3, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 4, "save_steps": 2,
               "learning_rate": 1e-9}  # fmt: skip
    trainer = make(backbones, tokenizer, tmp_path, {"a": []}, {"a": rows(1)}, {"a": rows(5)}, **options)
    start = tokenizer("ab", return_tensors="pt")
    ids = trainer.model.generate(**start, task="backbone", min_new_tokens=24, max_new_tokens=24, do_sample=False)[
        0
    ].tolist()
    length = start["input_ids"].shape[1]
    easy = {"input_ids": ids, "labels": [-100] * length + ids[length:]}  # what the backbone says by itself
    trainer.easy = Dataset.from_list([easy, easy])
    found = trainer.evaluate({"a": trainer.easy})["eval_mean_token_accuracy"]
    assert trainer.evaluate({"a": rows(5)})["eval_mean_token_accuracy"] < 0.3 < found

    def looks(trainer):
        if (
            trainer.state.global_step % 2
        ):  # where it evaluates by itself, a callback's evaluation would take that's place
            look(trainer)

    assert with_callback(trainer, looks).train().global_step == 4 and not trainer.mastery.mastered
    history = trainer.state.log_history
    own = [logs for logs in history if "eval_a_loss" in logs and NOT_OWN_ROWS not in logs]
    assert len(own) == 2 and all(logs["eval_mean_token_accuracy"] < 0.3 for logs in own)
    assert all("a_loss" in logs for logs in history if "learning_rate" in logs)
    state = json.loads((tmp_path / "stage-1/checkpoint-4/trainer_state.json").read_text())
    for logs in state["log_history"]:
        trainer.mastery.observe_log(logs)
    assert not trainer.mastery.mastered


class Averaging(torch.optim.SGD):
    """As a schedule-free optimizer: while it trains, weights are not those to keep."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.is_training = True

    def _move(self, by: float) -> None:
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.add_(by)

    def train(self):
        if not self.is_training:
            self._move(0.5)
        self.is_training = True

    def eval(self):
        if self.is_training:
            self._move(-0.5)
        self.is_training = False


def test_weights_to_keep_are_sealed_and_stay(backbones, tokenizer, tmp_path):
    options = {"max_steps": 2, "lr_scheduler_type": "constant", "memory": {"read": "off"}}

    def train(folder, cls, **more):
        trainer = make(backbones, tokenizer, tmp_path / folder, {"a": []}, {"a": rows(1)}, {"a": rows(5)},
                       cls=with_optimizer(cls), **options, **more)  # fmt: skip
        trainer.train()
        return trainer

    plain, averaging = train("plain", torch.optim.SGD), train("averaging", Averaging)
    for (name, its), (_, other) in zip(
        plain.model.named_parameters(), averaging.model.named_parameters(), strict=True
    ):
        moved = -0.5 if name.startswith("hft_nodes") else 0.0
        torch.testing.assert_close(other, its + moved, msg=name)
    sealed = snapshot(averaging.model)
    # The same if it ended between its last checkpoint and the seal.
    cut = make(backbones, tokenizer, tmp_path / "cut", {"a": []}, {"a": rows(1)}, cls=Cut, **options)
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    on = make(
        backbones, tokenizer, tmp_path / "cut", {"a": []}, {"a": rows(1)}, cls=with_optimizer(Averaging), **options
    )
    on.train(resume_from_checkpoint=True)
    assert snapshot(on.model) == sealed
    averaging.evaluate()
    averaging.save_model(tmp_path / "again")
    assert snapshot(averaging.model) == sealed == snapshot(hft.HFTForCausalLM.from_pretrained(tmp_path / "again"))


def with_optimizer(cls, **options):
    """A trainer that takes this optimizer."""

    class Trainer(HFTTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, optimizer_cls_and_kwargs=(cls, options), **kwargs)

    return Trainer


class Cut(with_optimizer(Averaging)):
    def _end_stage_record(self, *args):
        raise KeyboardInterrupt


def test_a_stages_optimizer_is_let_go_of(backbones, tokenizer, tmp_path):
    seen = {}

    def look(trainer):
        if trainer.stage.level == 1:
            seen["first"] = weakref.ref(trainer.optimizer.optimizer)
        else:
            gc.collect()
            seen.setdefault("there", []).append(seen["first"]() is not None)

    with_callback(make(backbones, tokenizer, tmp_path, TREE, max_steps=3), look).train()
    assert not any(seen["there"][1:])


def test_an_optimizers_learning_rate_is_the_configs(backbones, tokenizer, tmp_path):
    with pytest.raises(
        ValueError, match=re.escape("`optimizer_cls_and_kwargs` has lr=0.5, and `learning_rate` is 0.01")
    ):
        make(backbones, tokenizer, tmp_path, TREE, cls=with_optimizer(torch.optim.SGD, lr=0.5))
    trainer = make(backbones, tokenizer, tmp_path, TREE, cls=with_optimizer(torch.optim.SGD, lr=0.01, momentum=0.5))
    seen = []
    with_callback(
        trainer, lambda trainer: seen.append([group["momentum"] for group in trainer.optimizer.param_groups])
    )
    trainer.train()
    assert all(set(momenta) == {0.5} for momenta in seen)


@pytest.mark.parametrize("optim", ["galore_adamw", "apollo_adamw", "galore_adamw_layerwise"])
def test_optimizers_that_would_do_nothing_are_refused(backbones, tokenizer, tmp_path, optim):
    with pytest.raises(ValueError, match=f"`optim` is '{optim}', which projects the gradients of whole weights"):
        make(backbones, tokenizer, tmp_path, TREE, optim=optim, optim_target_modules="all-linear")


def test_changed_rows_train(backbones, tokenizer, tmp_path):
    """`trainer.train_dataset = ...map(...)`, as people mask prompts."""

    def trained(folder, change=None):
        trainer = make(backbones, tokenizer, tmp_path / folder, TREE)
        before = trainer.train_dataset
        if change is not None:
            trainer.train_dataset = change(before)
        trainer.train()
        assert (trainer.train_dataset is before) == (change is None)
        return snapshot(trainer.model)

    def masked(row):
        return {"labels": [*[-100] * (len(row["labels"]) - 1), row["labels"][-1]]}

    def seen(change=lambda rows: rows):
        trainer = make(backbones, tokenizer, tmp_path / "seen", TREE)
        trainer.train_dataset = change(trainer.train_dataset)
        first = next(iter(trainer.get_train_dataloader()))
        assert set(first["task"]) == {0}
        return int((first["labels"] != -100).sum())

    assert seen(lambda rows: rows.map(masked)) == 2 < seen()
    plain = trained("plain")
    assert trained("same", lambda rows: rows.map(lambda row: row)) == plain
    assert trained("masked", lambda rows: rows.map(masked)) != plain
    for change, message in [
        (lambda rows: rows.remove_columns("hft_task"), "`train_dataset` was set to rows without 'hft_task'"),
        (lambda rows: rows.select([0]), "`train_dataset` was set to rows of which none has an answer of task 'b'"),
        (
            lambda rows: rows.map(lambda row: {"hft_task": 7}),
            "rows with the 'hft_task' 7, which is none of this trainer's",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            trained("wrong", change)


def test_rows_that_were_left_out_are_gone(backbones, tokenizer, tmp_path, monkeypatch, caplog):
    """For the router, too; and the trainer shows the rows that are next, after training the last stage's."""
    taught = {}
    trainer = make(backbones, tokenizer, tmp_path, TREE, num_train_epochs=1)
    monkeypatch.setattr(trainer.model, "add_routes", lambda task, prompts: taught.update({task: len(prompts)}))
    all_rows = trainer.train_dataset
    kept = [place for place, task in enumerate(all_rows["hft_task"]) if task == 1 or place < 3]
    trainer.train_dataset = all_rows.select(kept).map(
        lambda row, place: {"labels": [-100] * len(row["labels"])} if place == 0 else {}, with_indices=True
    )
    trainer.train()
    assert taught["a"] == 2 and "1 of the 9 rows that `train_dataset` was set to hold no answer" in caplog.text
    assert trainer.record.data["a"]["rows"] == 2
    assert {task for batch in trainer.get_train_dataloader() for task in batch["task"]} == {1}


def test_a_run_may_be_resumed_with_fewer_steps(backbones, tokenizer, tmp_path):
    class Stops(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4

    trainer = make(backbones, tokenizer, tmp_path, {"a": []}, {"a": rows(1)}, max_steps=9)
    trainer.add_callback(Stops())
    assert trainer.train().metrics["stopped"] == 4
    on = make(backbones, tokenizer, tmp_path, {"a": []}, {"a": rows(1)}, max_steps=3)
    assert "stopped" not in on.train(resume_from_checkpoint=True).metrics
    assert hft.HFTConfig.from_pretrained(tmp_path).sealed_tasks() == ["a"]


def test_an_evaluation_leaves_the_mode_as_transformers_does(backbones, tokenizer, tmp_path):
    trainer = make(backbones, tokenizer, tmp_path, TREE, None, {"a": rows(5)}, max_steps=2)
    modes = []
    with_callback(trainer, lambda its: (its.evaluate({"a": rows(5)}), modes.append(its.model.training))).train()
    assert modes == [True] * 4
    trainer.evaluate({"a": rows(5)})
    assert not trainer.model.training


def test_predictions_come_in_the_order_of_the_rows(backbones, tokenizer, tmp_path):
    trainer = make(backbones, tokenizer, tmp_path, TREE, shuffle_dataset=True, max_length=40)
    asked = Dataset.from_list([{"prompt": f"t{i}", "completion": " " + "o" * i} for i in range(1, 7)])
    labels = trainer.predict({"a": asked}).label_ids
    assert [int((row != -100).sum()) for row in labels] == [i + 2 for i in range(1, 7)]  # a space, and the end
    long = Dataset.from_list([{"prompt": "so " * 40, "completion": " so"}, *asked])
    with pytest.raises(
        ValueError, match="1 of the 7 rows of task 'a' have no answer, or lose it with `max_length`=40"
    ):
        trainer.predict({"a": long})


def test_a_loss_of_ones_own(backbones, tokenizer, tmp_path, capsys):
    """Batches say their task as `forward` takes it; gates still shrink, and the log claims nothing."""

    class Own(HFTTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            output = model(**inputs)
            return (output.loss, output) if return_outputs else output.loss

        def prediction_step(self, model, inputs, *args, **kwargs):
            with torch.no_grad():
                return model(**self._prepare_inputs(inputs)).loss, None, None

    trainer = make(backbones, tokenizer, tmp_path, TREE, None, {"a": rows(5), "b": rows(6)}, cls=Own, gate_shrink=5.0,
                   eval_strategy="epoch", lr_scheduler_type="constant")  # fmt: skip
    trainer.train()
    by_shrinking = 1 - trainer.model.gates("b").values[:, 0]
    assert (by_shrinking > 0.04).all()
    said = capsys.readouterr().out
    assert "mastered" not in said and re.search(r"step 1/\d+: loss \d+\.\d+, learning rate 0.01", said)


def test_too_few_validation_rows_for_a_batch(backbones, tokenizer, tmp_path):
    options = {"eval_strategy": "epoch", "dataloader_drop_last": True, "num_train_epochs": 1}
    make(backbones, tokenizer, tmp_path, {"a": []}, {"a": rows(1)}, {"a": rows(5, 3)}, **options).train()
    assert hft.HFTConfig.from_pretrained(tmp_path).sealed_tasks() == ["a"]


def test_batches_of_ones_own(backbones, tokenizer, tmp_path):
    """A stage has as many steps as its batches give; what they may not hold is two tasks."""

    class Own(HFTTrainer):
        def get_train_dataloader(self):
            rows = self._remove_unused_columns(self.train_dataset)
            order = SequentialSampler(rows)
            return self.accelerator.prepare(DataLoader(rows, 4, sampler=order, collate_fn=self.data_collator))

    trainer = make(backbones, tokenizer, tmp_path, {"a": []}, {"a": rows(1, 8)}, cls=Own, num_train_epochs=1)
    assert trainer.train().global_step == 1  # of two batches of four; HFT's own would be 2 steps of two batches of two
    assert hft.HFTConfig.from_pretrained(tmp_path).sealed_tasks() == ["a"]
    two = {"a": [], "b": []}
    with pytest.raises(ValueError, match=re.escape("A micro-batch holds rows of the tasks with the ids [0, 1]")):
        make(backbones, tokenizer, tmp_path / "2", two, {"a": rows(1, 3), "b": rows(2, 3)}, cls=Own).train()


def test_a_collator_and_columns_of_ones_own(backbones, tokenizer, tmp_path):
    seen = []

    def collator_on(inner):
        def collate(examples):
            seen.extend(row.pop("weight") for row in examples)
            return inner(examples)

        return collate

    data = {task: rows(i).add_column("weight", [0.5 + i] * 7) for i, task in enumerate(TREE)}
    trainer = make(backbones, tokenizer, tmp_path, TREE, data, remove_unused_columns=False, num_train_epochs=1)
    trainer.data_collator = collator_on(trainer.data_collator.collator)
    trainer.train()
    assert set(seen) == {0.5, 1.5}


def test_rows_with_a_transform_are_refused(backbones, tokenizer, tmp_path):
    row = {"input_ids": [5, 6, 7], "labels": [5, 6, 7]}
    data = {task: Dataset.from_list([row] * 4).with_transform(lambda batch: batch) for task in TREE}
    with pytest.raises(
        ValueError, match="The rows of task 'a' have a transform, which would undo that they are prepared"
    ):
        make(backbones, tokenizer, tmp_path, TREE, data, dataset_kwargs={"skip_prepare_dataset": True})


class Writer:
    """What TensorBoard's writer is asked for."""

    def __init__(self, log_dir):
        self.log_dir, self.scalars = log_dir, []

    def add_scalar(self, name, value, step):
        self.scalars.append((name, step))

    def add_text(self, *args):
        pass

    def flush(self):
        pass

    def close(self):
        pass


def test_a_tensorboard_writer_of_ones_own(backbones, tokenizer, tmp_path):
    pytest.importorskip("tensorboard")
    writer = Writer(str(tmp_path / "events"))
    trainer = make(backbones, tokenizer, tmp_path / "run", TREE, num_train_epochs=1)
    trainer.add_callback(TensorBoardCallback(tb_writer=writer))
    trainer.train()
    names = [name for name, _ in writer.scalars]
    assert "train/a_loss" in names and "train/b_loss" in names  # of both stages
    assert not list((tmp_path / "run").rglob("events*"))


def test_what_is_set_or_added_too_late_is_refused(backbones, tokenizer, tmp_path):
    trainer = make(backbones, tokenizer, tmp_path, TREE)
    with pytest.raises(ValueError, match="HFTTrainer takes no EarlyStoppingCallback"):
        trainer.add_callback(EarlyStoppingCallback(1))
    trainer.optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1.0)
    with pytest.raises(
        ValueError, match="HFTTrainer takes no `optimizer` or `lr_scheduler`: each stage makes its own"
    ):
        trainer.train()


def test_what_is_odd_is_said(backbones, tokenizer, tmp_path, caplog, capsys):
    def counts(prediction):
        return {"rows": 7.0}

    trainer = make(backbones, tokenizer, tmp_path, {"a": []}, {"a": rows(1)}, {"a": rows(5)},
                   cls=with_metrics(counts), eval_strategy="epoch", num_train_epochs=1)  # fmt: skip
    trainer.train()
    assert re.search(r"a on validation rows: loss .* right, rows 7$", capsys.readouterr().out, re.MULTILINE)
    assert trainer.train().global_step == 0
    assert "All tasks of this model are sealed already: nothing was trained." in caplog.text
    trainer.model.add_task("b", ["a"])
    again = HFTTrainer(trainer.model, trainer.args, {"b": rows(2)}, {"a": rows(5), "b": rows(6)})
    assert "The `eval_dataset` of a is not looked at in training: sealed tasks stay." in caplog.text
    again.train()


def with_metrics(compute):
    class Trainer(HFTTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, compute_metrics=compute, **kwargs)

    return Trainer


def test_one_progress_in_a_notebook(backbones, tokenizer, tmp_path, monkeypatch):
    import transformers.trainer

    class NotebookProgressCallback(TrainerCallback):
        """transformers' own needs IPython."""

    for module in (transformers.trainer, trainer_module):
        monkeypatch.setattr(module, "DEFAULT_PROGRESS_CALLBACK", NotebookProgressCallback)
    trainer = make(backbones, tokenizer, tmp_path, TREE, disable_tqdm=False)
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert progress.StageProgress in kinds and NotebookProgressCallback not in kinds and DefaultFlowCallback in kinds
