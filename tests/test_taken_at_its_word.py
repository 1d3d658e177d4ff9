"""What people ask for is done, or refused: settings, recipes and commands of which a part was passed over."""

import json

import pytest
from datasets import Dataset
from transformers.utils import logging

from hft.hierarchy_hft import Hierarchy
from hft.trainers import HFTTrainingConfig
from hft.trainers.cli import main
from hft.trainers.hft_trainer import HFTTrainer
from hft.trainers.loading import load_model
from hft.trainers.recipe_data import load_task
from hft.trainers.recipe_model import load_again, model_of
from hft.trainers.recipes import read_recipe
from hft.trainers.run_record import RunRecord, stage_names
from hft.trainers.task_data import alone, check_completions, learnable
from hft.trainers.token_means import mean_loss
from hft.trainers.trackers import check_trackers

from .test_mastery import e_is_mastered, mastering  # noqa: F401
from .test_recipes_and_cli import tiny_run, write_data
from .test_trainer import Kill, make, rows


def linear_of(model) -> str:
    return type(model.base_model.layers[0].mlp.up_proj).__name__


def test_a_backbone_is_held_in_4_bit_if_that_is_said(backbones, tmp_path, quantizable):
    (tmp_path / "r.yaml").write_text(f"backbone: {backbones['llama']}\nhierarchy: {{a: []}}\nrank: 2\n")
    for given, expected in (
        ({}, "Linear"),
        ({"load_in_4bit": False, "bnb_4bit_quant_type": "nf4"}, "Linear"),
        ({"load_in_4bit": True, "bnb_4bit_compute_dtype": "float32"}, "Linear4bit"),
    ):
        assert linear_of(model_of(read_recipe(tmp_path / "r.yaml", given))) == expected
    with pytest.raises(ValueError, match="`bnb_4bit_quant_type` says how a backbone is held in few bits, and nothing"):
        read_recipe(tmp_path / "r.yaml", {"bnb_4bit_quant_type": "nf4"})


def test_a_model_is_scored_and_asked_as_it_was_trained(backbones, tmp_path, quantizable):
    """Held as its record says, and over the recipe's backbone where its own has moved."""
    (tmp_path / "r.yaml").write_text(f"backbone: {backbones['llama']}\nhierarchy: {{a: []}}\nrank: 2\n")
    made = model_of(read_recipe(tmp_path / "r.yaml"))
    made.seal(["a"])
    made.save_pretrained(tmp_path / "m")
    assert linear_of(load_model(tmp_path / "m", None)) == "Linear"
    record = RunRecord(quantization={"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"})
    record.write(tmp_path / "m")
    for asked, expected in ((None, "Linear4bit"), (True, "Linear4bit"), (False, "Linear")):
        assert linear_of(load_model(tmp_path / "m", asked)) == expected
    config = json.loads((tmp_path / "m/config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps({**config, "backbone": "/nowhere"}))
    assert linear_of(load_again(read_recipe(tmp_path / "r.yaml"), str(tmp_path / "m"))) == "Linear4bit"
    plain = read_recipe(tmp_path / "r.yaml", {"load_in_4bit": False})
    assert linear_of(load_again(plain, str(tmp_path / "m"))) == "Linear"
    assert linear_of(load_again(plain, str(tmp_path / "m"), as_trained=True)) == "Linear4bit"
    assert record.united(record, {}).quantization == record.quantization
    assert record.united(RunRecord(quantization={}), {}).quantization is None


def test_all_data_is_read_before_any_is_scored(backbones, tmp_path, capsys):
    data = write_data(tmp_path / "data")
    assert main(tiny_run(backbones, data, tmp_path)) == 0
    command = [
        "eval",
        str(tmp_path / "run"),
        "--recipe",
        "cl14-small",
        "--data",
        str(data),
        "--out",
        str(tmp_path / "o"),
    ]
    (data / "yelp/validation.jsonl.gz").unlink()
    capsys.readouterr()
    assert main(command) == 2
    shown = capsys.readouterr()
    assert "yelp/validation.jsonl" in shown.err and "sst2  " not in shown.out


def test_a_recipes_rows_hand_nothing_to_the_template(tmp_path, tokenizer):
    (tmp_path / "a").mkdir()
    row = {"instruction": "Add.", "options": [], "input": "1 + 1", "output": "2", "tools": "[]", "id": 7}
    (tmp_path / "a/train.jsonl").write_text(json.dumps(row))
    (tmp_path / "r.yaml").write_text(f"backbone: x\nhierarchy: {{a: []}}\ndata: {tmp_path}\n")
    recipe = read_recipe(tmp_path / "r.yaml")
    scored = load_task(recipe, "a", "train", tokenizer, scored=True)
    assert set(scored.column_names) == {"prompt", "completion", "options", "id"}
    (tmp_path / "a/train.jsonl").write_text(json.dumps({**row, "id": 10**19}))
    with pytest.raises(ValueError, match=r"a further key \('tools', 'id'\) has values of several kinds, or too large"):
        load_task(recipe, "a", "train", tokenizer)


def test_a_home_is_a_home_in_every_key(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "r.yaml").write_text("backbone: ~/b\nhierarchy: {a: []}\ndata: ~/d\n")
    recipe = read_recipe(tmp_path / "r.yaml")
    assert (recipe.backbone, recipe.data) == (f"{tmp_path}/b", f"{tmp_path}/d")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"bf16_full_eval": True}, "`bf16_full_eval` would round the model itself"),
        ({"hub_strategy": "checkpoint"}, "`hub_strategy` is 'checkpoint', and HFT pushes the model whenever"),
    ],
)
def test_settings_that_would_change_what_is_learnt_or_nothing_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        HFTTrainingConfig(output_dir=str(tmp_path), **options)


def test_rows_that_would_be_learnt_whole_are_refused():
    whole = Dataset.from_list([{"messages": []}])
    with pytest.raises(ValueError, match="`completion_only_loss` is set, and the rows of task 'a' have no prompts"):
        check_completions("a", whole, True, None)
    with pytest.raises(ValueError, match="have a column 'labels' and are not tokenised"):
        check_completions("a", Dataset.from_list([{"prompt": "a", "completion": "b", "labels": 1}]), None, None)
    check_completions("a", whole, None, None)


def test_none_stands_alone():
    with pytest.raises(ValueError, match="names 'none' beside others"):
        check_trackers(["none", "tensorboard"])


def test_a_mean_loss_is_of_those_who_learn(backbones, tokenizer, tmp_path, e_is_mastered):  # noqa: F811
    options = {"hierarchy": {"a": [], "e": []}, "memory": {"read": "off"}, "learning_rate": 1e-9, "logging_steps": 1}
    trainer = mastering(backbones, tokenizer, tmp_path, cls=HFTTrainer, **options)
    output = trainer.train()
    logs = [its for its in trainer.log_history if "learning_rate" in its]
    assert len(logs) == 24 and len([its for its in logs if "loss" in its]) == 24 - output.metrics["saved_steps"]
    assert all(its["loss"] > 1 for its in logs if "loss" in its)
    assert output.training_loss > 1  # nothing moves, so the mean is that of single steps
    assert mean_loss([{"loss": 2.0, "step": 1, "learning_rate": 1}, {"step": 9, "learning_rate": 1}]) == 2.0


def test_rows_that_are_given_are_those_that_are_evaluated(backbones, tokenizer, tmp_path):
    options = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    sets = {"a": rows(1, 3), "e": rows(2, 3)}
    trainer = make(backbones, tokenizer, tmp_path, {"a": [], "e": []}, sets, **options)
    for task in "ae":
        both, alone = trainer.evaluate(sets), trainer.evaluate({task: sets[task]})
        assert both[f"eval_{task}_loss"] == alone[f"eval_{task}_loss"]
    assert both["eval_a_loss"] != both["eval_e_loss"]


def test_a_task_of_another_stage_is_evaluated_by_its_rows(backbones, tokenizer, tmp_path):
    sets = {"a": rows(1, 3), "b": rows(2, 3)}
    said = []

    class Asking(HFTTrainer):
        def training_step(self, *args, **kwargs):
            if self.stage.level == 2 and not said:
                with pytest.raises(ValueError) as error:
                    self.evaluate("a")
                said.append(str(error.value))
            return super().training_step(*args, **kwargs)

    make(backbones, tokenizer, tmp_path, {"a": [], "b": ["a"]}, sets, sets, cls=Asking).train()
    assert said == [
        "The task 'a' is not of this stage (b); while it trains, give that task's rows: evaluate({'a': rows})."
    ]


def test_stages_of_one_level_are_told_apart():
    stages = [{"level": 1, "tasks": ["a"]}, {"level": 2, "tasks": ["b"]}, {"level": 2, "tasks": ["c", "d"]}]
    assert stage_names(stages) == ["1", "2: b", "2: c, d"]


def test_what_is_no_template_or_tokenizer_is_said(backbones, tmp_path, monkeypatch, capsys):
    import jinja2

    from hft.trainers import commands

    def fail(args, overrides):
        raise jinja2.TemplateSyntaxError("unexpected end", 3)

    monkeypatch.setattr(commands, "generate", fail)
    assert main(["generate", "m", "hi"]) == 1
    assert "hft: error: The chat template cannot be used: unexpected end" in capsys.readouterr().err


def test_trees_are_drawn_where_branches_cannot_be_shown(tmp_path, monkeypatch, capfd):
    import io
    import sys

    shown = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", shown)
    assert main([]) == 2
    shown.write(Hierarchy({"a": []}).draw())
    shown.flush()
    assert b"?? a" in shown.buffer.getvalue()


@pytest.mark.parametrize(
    "change", [{"packing": True, "max_length": 64}, {"task_passes": {"a": 2.0}}, {"data_seed": 7}], ids=str
)
def test_a_stage_goes_on_with_its_rows_in_their_order(backbones, tokenizer, tmp_path, change):
    """Else it might seem to have had its steps, and be sealed for good."""
    options = {"hierarchy": {"a": []}, "num_train_epochs": 4}
    killed = make(backbones, tokenizer, tmp_path, **options)
    killed.add_callback(Kill(3, "step"))
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    with pytest.raises(
        ValueError, match="The rows of stage 1, which is to be resumed, do not come as when it was begun"
    ):
        make(backbones, tokenizer, tmp_path, **options, **change).train(resume_from_checkpoint=True)
    resumed = make(backbones, tokenizer, tmp_path, **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.model.config.sealed_tasks() == ["a"]


def test_a_mixture_of_a_tuple_is_one_of_a_list(tmp_path):
    args = HFTTrainingConfig(output_dir=str(tmp_path), mixtures={"root": ("a", "b")})
    assert args.mixtures == {"root": ["a", "b"]}


def test_a_cut_is_not_judged_by_rows_without_answers():
    whole = {"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4], "seq_lengths": [4]}
    two = {"input_ids": [1, 2, 9, 5, 6], "labels": [-100, 2, 9, -100, -100], "seq_lengths": [2, 1, 2]}
    assert alone(Dataset.from_list([whole, two])) == [
        {"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4]},
        {"input_ids": [1, 2], "labels": [-100, 2]},
    ]


def test_what_the_router_did_is_not_known_once_tasks_are_added():
    record = RunRecord(routed={"a": {"score": 9.0, "se": 1.0, "rows": 9}}, confusion={"a": {"a": 9}})
    record.add_stage({"level": 1, "tasks": ["b"], "log": []})
    assert record.routed == record.confusion == {}


def test_rows_that_never_had_an_answer_were_not_cut(caplog):
    rows_of_two = Dataset.from_list(
        [{"input_ids": [5, 6], "labels": [-100, 6]}, {"input_ids": [5, 6], "labels": [-100, -100]}]
    )
    logging.enable_propagation()
    try:
        assert len(learnable("a", rows_of_two, rows_of_two, 512, False)) == 1
        assert "they have no answer, all their labels are -100" in caplog.text
        learnable("a", rows_of_two, rows_of_two, 1, False)
        assert "truncation cut off their whole answer" in caplog.text
        texts = Dataset.from_list([{"prompt": "x", "completion": "y"}] * 3)
        cut = Dataset.from_list([{"labels": [-100, 5, 6]}, {"labels": [-100, -100, 5]}, {"labels": [-100, 5]}])
        learnable("a", texts, cut, 3, False)
        assert "2 of the 3 rows of task 'a' are `max_length`=3 tokens long" in caplog.text
        caplog.clear()
        tokens = cut.add_column("input_ids", [[5]] * 3)
        for given in ((texts, cut, 4, False), (texts, cut, 3, False, False), (tokens, cut, 3, False)):
            learnable("a", *given)
        assert "tokens long" not in caplog.text
    finally:
        logging.disable_propagation()
