"""Options of TRL's and transformers' that HFT honours on its stages, or refuses, each found to have done neither once."""

import copy
import re
import types

import numpy
import pytest
import torch
from datasets import Dataset
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerCallback
from transformers.integrations import MLflowCallback

import hft
from hft.trainers import HFTTrainer, HFTTrainingConfig, sharing
from hft.trainers.curriculum import open_stages
from hft.trainers.run_record import RunRecord

from .test_trainer import Kill, make, nf4, rows
from .tiny import grow


ONE = {"a": []}


@pytest.fixture
def saved(backbones, tokenizer, tmp_path):
    """The folder of a slim model with an open task, and its tokenizer."""
    model = hft.HFTForCausalLM.from_backbone(backbones["llama"], ONE, rank=3)
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    return str(tmp_path / "saved")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "dft", "mastery_patience": 2, "eval_strategy": "steps"}, "does not go with `loss_type='dft'`"),
        (
            {"eval_packing": True},
            "`eval_packing` is set without `packing`, and so the rows of one pack would read one",
        ),
        ({"use_liger_kernel": True}, "`use_liger_kernel` goes by a model's type, and knows none called 'hft'"),
        ({"activation_offloading": True}, "`activation_offloading` takes activations from a GPU, and there is none"),
    ],
)
def test_what_would_do_nothing_or_harm_is_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        HFTTrainingConfig(output_dir=str(tmp_path), **options)


def test_a_push_is_as_private_as_it_is_told(backbones, tokenizer, tmp_path, monkeypatch):
    trainer, seen = make(backbones, tokenizer, tmp_path, ONE, {"a": rows(1)}), []
    monkeypatch.setattr(sharing, "check_shareable", lambda config: None)
    monkeypatch.setattr(sharing, "upload", lambda *given: seen.append(given[3:]) or "commit")
    monkeypatch.setattr(trainer, "init_hf_repo", lambda token, private: seen.append((private, token)))
    trainer.push_to_hub("end", private=True, token="t", revision="r")
    trainer.hub_model_id = "me/x"
    trainer.push_to_hub("end", False, "t")
    assert seen == [(True, "t"), (True, "t", "r"), (None, "t", None)]
    with pytest.raises(TypeError, match="privat"):
        trainer.push_to_hub(privat=True)


def test_a_saved_model_is_loaded_as_model_init_kwargs_say_each_time(
    saved, tokenizer, tmp_path, monkeypatch, quantizable
):
    args = HFTTrainingConfig(
        str(tmp_path / "run"), bf16=False, report_to="none", model_init_kwargs={"dtype": "bfloat16"}
    )
    for _ in range(2):
        assert HFTTrainer(saved, args, {"a": rows(1)}).model.dtype == torch.bfloat16
    assert args.run_name is None
    args.model_init_kwargs = {"quantization_config": nf4()}
    assert (
        type(HFTTrainer(saved, args, {"a": rows(1)}).model.base_model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    )
    with pytest.raises(ValueError, match="`quantization_config` is given, and stands in `model_init_kwargs`, too"):
        HFTTrainer(saved, args, {"a": rows(1)}, quantization_config=nf4())
    asked = []
    monkeypatch.setattr("hft.trainers.loading.load_tokenizer", lambda model, pinned: asked.append(pinned) or tokenizer)
    args.model_init_kwargs = {"revision": "main"}
    HFTTrainer(saved, args, {"a": rows(1)})
    assert asked == ["main"]  # of the same commit as the weights


def test_trackers_keep_one_run_over_all_stages(backbones, tokenizer, tmp_path, monkeypatch):
    """MLflow's callback is transformers' own; of the package, what it calls."""
    runs, active, logged = [], [], []
    mlflow = types.SimpleNamespace(
        active_run=lambda: active[-1] if active else None,
        end_run=lambda: active.pop(),
        start_run=lambda **_: runs.append(1) or active.append(len(runs)),
        log_metrics=lambda metrics, step, **_: logged.append((tuple(active), sorted(metrics))),
        log_params=lambda *_, **__: None,
    )
    trainer = make(
        backbones, tokenizer, tmp_path, {"a": [], "b": ["a"]}, {"a": rows(1), "b": rows(2)}, num_train_epochs=1
    )
    tracker = object.__new__(MLflowCallback)
    vars(tracker).update(
        _ml_flow=mlflow, _initialized=False, _auto_end_run=False, _log_artifacts=False, _async_log=False
    )

    def setup(args, state, model):
        mlflow.start_run()
        vars(tracker).update(_initialized=True, _auto_end_run=True)

    monkeypatch.setattr(tracker, "setup", setup)
    trainer.add_callback(tracker)
    trainer.train()
    names = {name for _, its in logged for name in its}
    assert {"a_loss", "b_loss"} <= names and {run for run, _ in logged} == {(1,)}
    assert len(runs) == 1 and not active and "on_train_end" not in vars(tracker)


def test_a_schedules_floor_goes_by_the_learning_rate(backbones, tokenizer, tmp_path):
    model = hft.HFTForCausalLM.from_backbone(backbones["llama"], ONE, rank=3)
    args = HFTTrainingConfig(
        str(tmp_path), bf16=False, report_to="none", learning_rate=1e-2, max_steps=4, logging_steps=1, disable_tqdm=True,
        lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr": 1e-3}, save_strategy="no",
    )  # fmt: skip
    options = {"optimizer_cls_and_kwargs": (torch.optim.SGD, {})}  # whose own rate is 1e-3
    trainer = HFTTrainer(model, args, {"a": rows(1)}, processing_class=tokenizer, **options)
    trainer.train()
    rates = [logs["learning_rate"] for logs in trainer.log_history if "learning_rate" in logs]
    assert rates[0] == 1e-2 and all(1e-3 < rate < 1e-2 for rate in rates[1:])
    assert RunRecord.load(tmp_path).budget["optim"] == "SGD"


def test_weight_decay_does_not_go_by_a_tasks_name(backbones, tokenizer, tmp_path):
    tree = {"gender_bias": [], "text_norm": []}
    trainer = make(backbones, tokenizer, tmp_path, tree, weight_decay=0.5)
    (trainer.stage,) = open_stages(trainer.model.hierarchy, ())
    trainer.model.start_stage(list(tree))
    groups = trainer.create_optimizer().param_groups
    gates = {id(trainer.model.hft_gates.of(task)) for task in tree}
    assert {group["weight_decay"] for group in groups if not {id(p) for p in group["params"]} & gates} == {0.5}


def test_callbacks_of_peoples_own_stay(backbones, tokenizer, tmp_path):
    class Mine(PrinterCallback):
        pass

    class Stops(EarlyStoppingCallback):
        pass

    model = hft.HFTForCausalLM.from_backbone(backbones["llama"], ONE, rank=3)
    args = HFTTrainingConfig(str(tmp_path), bf16=False, report_to="none", disable_tqdm=True)
    trainer = HFTTrainer(model, args, {"a": rows(1)}, processing_class=tokenizer, callbacks=[Mine()])
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert Mine in kinds and PrinterCallback not in kinds
    for callback in (Stops, Stops(1)):
        with pytest.raises(ValueError, match="HFTTrainer takes no EarlyStoppingCallback"):
            HFTTrainer(model, args, {"a": rows(1)}, processing_class=tokenizer, callbacks=[callback])


def test_what_is_formatted_is_what_is_learnt(backbones, tokenizer, tmp_path):
    talk = Dataset.from_list([{"messages": [{"role": "user", "content": "hi"}], "text": "not this"}] * 3)
    train = {"a": rows(1), "e": talk}
    model = hft.HFTForCausalLM.from_backbone(backbones["llama"], {"a": [], "e": []}, rank=3)
    for field in ("text", "body"):
        args = HFTTrainingConfig(
            str(tmp_path), bf16=False, report_to="none", completion_only_loss=False, dataset_text_field=field
        )
        trainer = HFTTrainer(
            model, args, train, processing_class=tokenizer, formatting_func=lambda row: f"FORMATTED {sorted(row)[0]}"
        )
        for task, column in (("a", "completion"), ("e", "messages")):
            text = tokenizer.decode(trainer._prepared[task][0]["input_ids"], skip_special_tokens=True)
            assert text == f"FORMATTED {column}"


def test_epochs_that_a_callback_shortens_do_not_stop_a_stage(backbones, tokenizer, tmp_path):
    class Shorter(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_epoch_stop = True

    trainer = make(backbones, tokenizer, tmp_path, ONE, {"a": rows(1)})
    trainer.add_callback(Shorter())
    assert trainer.train().global_step == 2  # one of each epoch
    assert hft.HFTConfig.from_pretrained(tmp_path).sealed_tasks() == ["a"]


def test_evaluation_has_one_precision_before_within_and_after_training(backbones, tokenizer, tmp_path):
    options = {
        "bf16": True,
        "eval_strategy": "steps",
        "eval_steps": 100,
        "eval_on_start": True,
        "learning_rate": 1e-30,
    }
    trainer = make(backbones, tokenizer, tmp_path, ONE, {"a": rows(1)}, {"a": rows(2)}, **options)
    grow(trainer.model, seal=False)
    trainer.train()
    within = next(logs["eval_a_loss"] for logs in trainer.log_history if "eval_a_loss" in logs)
    trainer.model.set_trainable([])
    assert trainer.evaluate({"a": rows(2)})["eval_a_loss"] == pytest.approx(within, abs=1e-6)


@pytest.mark.parametrize("options", [{"packing": True, "max_length": 64}, {"padding_free": True, "max_length": None}])
def test_predictions_are_of_rows_where_training_lays_them_end_to_end(backbones, tokenizer, tmp_path, options):
    found = []
    for more in ({}, options):
        trainer = make(backbones, tokenizer, tmp_path / str(len(found)), ONE, {"a": rows(1)}, **more)
        trainer.train()
        grow(trainer.model)
        found.append(trainer.predict({"a": rows(3, 7)}))
    (plain, flat) = found
    assert len(flat.predictions) == len(plain.predictions) == 7
    kept = plain.label_ids != -100
    numpy.testing.assert_array_equal(flat.label_ids, plain.label_ids)
    assert kept.any() and flat.predictions.shape == plain.predictions.shape


def test_a_stage_goes_on_with_its_optimizer(backbones, tokenizer, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        trainer = make(backbones, tokenizer, tmp_path, ONE, {"a": rows(1)}, save_steps=1)
        trainer.add_callback(Kill(2, "step"))
        trainer.train()
    for option, shown in ({"optim": "sgd"}, "'?adamw"), ({"weight_decay": 0.3}, "0.0"):
        (name,) = option
        with pytest.raises(
            ValueError, match=f"`{name}` is .*, and stage 1, which is to be resumed, was begun with {shown}"
        ):
            make(backbones, tokenizer, tmp_path, ONE, {"a": rows(1)}, **option).train(resume_from_checkpoint=True)


def test_rows_and_tokenizers_that_do_not_fit_are_named(backbones, tokenizer, tmp_path):
    train = {
        "a": rows(1).add_column("extra", [1] * len(rows(1))),
        "e": rows(2).add_column("extra", ["x"] * len(rows(2))),
    }
    with pytest.raises(ValueError, match=re.escape("The rows of a, e have columns of one name and different types")):
        make(backbones, tokenizer, tmp_path, {"a": [], "e": []}, train, remove_unused_columns=False)
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(ValueError, match="The tokenizer has no `eos_token`, with which a text ends"):
        make(backbones, endless, tmp_path, ONE, {"a": rows(1)})
