"""Invariant 8 where it is hardest: the router, what is random in a pass, the edges of a stage, other folders."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import BitsAndBytesConfig

import hft
from hft.trainers import HFTTrainer, HFTTrainingConfig
from hft.trainers.checkpoints import RunFolder
from hft.trainers.cli import main
from hft.trainers.run_record import RunRecord

from .test_mastery import mastering
from .test_trainer import Kill, data, make, rows
from .tiny import bits, snapshot


TREE = {"a": [], "b": ["a"]}


def chats(seed: int, count: int = 9) -> Dataset:
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"t{seed}t plus {i} is"}],
                "completion": [{"role": "assistant", "content": f"{seed + i}"}],
            }
            for i in range(count)
        ]
    )


def dying(where: str, level: int):
    """A trainer whose process dies as a stage's method begins."""

    def die(self, stage, *args, **kwargs):
        if stage.level == level:
            raise KeyboardInterrupt
        return getattr(HFTTrainer, where)(self, stage, *args, **kwargs)

    return type("Dying", (HFTTrainer,), {where: die})


def learnt(trainer) -> dict:
    """All that a run leaves in its model."""
    router = trainer.model.hft_router
    config = trainer.model.config.router_config
    sums = {name: bits(tensor) for name, tensor in router.tensors().items()}
    return {**snapshot(trainer.model), **sums, "template": (config.prefix, config.suffix, sorted(config.tasks))}


@pytest.mark.parametrize("where", ["stage_ended", "_begin_stage_record", "_end_stage_record"])
def test_8_the_router_and_what_is_random_in_a_pass(backbones, tokenizer, tmp_path, where):
    """Chats, whose template the router learns to leave out, and noise on the embeddings, which is drawn in each pass."""
    train, options = {"a": chats(1), "b": chats(2)}, {"neftune_noise_alpha": 5.0, "save_steps": 3}
    whole = make(backbones, tokenizer, tmp_path / "whole", TREE, train, **options)
    whole.train()
    for level in (1, 2):
        folder = tmp_path / f"{level}"
        with pytest.raises(KeyboardInterrupt):
            make(backbones, tokenizer, folder, TREE, train, cls=dying(where, level), **options).train()
        resumed = make(backbones, tokenizer, folder, TREE, train, **options)
        resumed.train(resume_from_checkpoint=True)
        assert learnt(resumed) == learnt(whole)
        assert resumed.model.config.router_config.prefix != []


def test_8_after_the_last_checkpoint_of_a_stage_nothing_is_left_to_train(backbones, tokenizer, tmp_path):
    """In the middle of an epoch, at a rate that is not 0 at the end."""
    options = {"max_steps": 3, "save_steps": 3, "lr_scheduler_type": "constant", "logging_steps": 2}
    whole = make(backbones, tokenizer, tmp_path / "whole", TREE, **options)
    expected = whole.train()
    with pytest.raises(KeyboardInterrupt):
        make(backbones, tokenizer, tmp_path / "cut", TREE, cls=dying("_end_stage_record", 2), **options).train()
    resumed = make(backbones, tokenizer, tmp_path / "cut", TREE, **options)
    output = resumed.train(resume_from_checkpoint=True)
    assert learnt(resumed) == learnt(whole) and (output.global_step, expected.global_step) == (3, 6)
    logged = {log["step"]: log["loss"] for log in resumed.state.log_history if "loss" in log}
    assert output.training_loss == pytest.approx(logged[2])  # of the steps that were logged: two of three


@pytest.mark.parametrize("step", [2, 5])  # in the first stage, in the second
def test_8_a_run_that_was_cut_before_its_first_checkpoint_goes_on_in_the_same_process(
    backbones, tokenizer, tmp_path, step
):
    """From where the stage began, not from what the model has learnt of it since."""
    options = {"max_steps": 3, "save_strategy": "no"}
    whole = make(backbones, tokenizer, tmp_path / "whole", TREE, **options)
    whole.train()
    cut = make(backbones, tokenizer, tmp_path / "cut", TREE, **options)
    cut.add_callback(Kill(step, "step"))
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    output = cut.train(resume_from_checkpoint=True)
    assert learnt(cut) == learnt(whole)
    assert output.metrics["train_steps_per_second"] > 0 and output.metrics["epoch"] > 0


def test_8_mixed_precision_is_the_same_in_every_stage(backbones, tokenizer, tmp_path):
    """Of a float32 backbone: else a run that goes on from a stage's end would compute what follows otherwise."""

    class Watching(HFTTrainer):
        def compute_loss(self, *args, **kwargs):
            first = self.model.backbone.base_model.layers[0]
            hook = first.register_forward_pre_hook(
                lambda *_: seen.add((self.stage.level, torch.is_autocast_enabled("cpu")))
            )
            try:
                return super().compute_loss(*args, **kwargs)
            finally:
                hook.remove()

    seen: set[tuple[int, bool]] = set()
    whole = make(backbones, tokenizer, tmp_path / "whole", TREE, cls=Watching, bf16=True)
    forward = whole.model.forward
    whole.train()
    assert seen == {(1, True), (2, True)} and whole.model.forward == forward
    with pytest.raises(KeyboardInterrupt):
        make(backbones, tokenizer, tmp_path / "cut", TREE, cls=dying("stage_ended", 1), bf16=True).train()
    resumed = make(backbones, tokenizer, tmp_path / "cut", TREE, bf16=True)
    resumed.train(resume_from_checkpoint=True)
    assert learnt(resumed) == learnt(whole)


@pytest.mark.parametrize("step", [4, 6])  # the last checkpoint is one before, where nothing was evaluated
def test_8_an_evaluation_at_the_start_is_not_repeated(backbones, tokenizer, tmp_path, step):
    """It would count as one without progress, and a resumed run would leave the task earlier."""
    options = {"mastery_patience": 4, "eval_on_start": True, "save_steps": 1, "learning_rate": 0.0}  # no loss is lower
    whole = mastering(backbones, tokenizer, tmp_path / "whole", {"a": []}, **options)
    whole.train()
    killed = mastering(backbones, tokenizer, tmp_path / "cut", {"a": []}, **options)
    killed.add_callback(Kill(step, "step"))
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed = mastering(backbones, tokenizer, tmp_path / "cut", {"a": []}, **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.mastery.mastered == whole.mastery.mastered == {"a": 8} and learnt(resumed) == learnt(whole)


def test_8_mastery_at_the_last_checkpoint_ends_the_stage(backbones, tokenizer, tmp_path):
    options = {"mastery_patience": None, "mastery_accuracy": 1e-9, "save_steps": 2}
    cut = dying("_end_stage_record", 1)
    with pytest.raises(KeyboardInterrupt):
        mastering(backbones, tokenizer, tmp_path, {"a": []}, cls=cut, **options).train()
    resumed = mastering(backbones, tokenizer, tmp_path, {"a": []}, **options)
    assert resumed.train(resume_from_checkpoint=True).global_step == 2 and not hasattr(resumed, "taken")


@pytest.mark.parametrize("save_steps", [1, 100])
def test_a_stage_that_could_not_be_saved_is_trained_again_in_the_same_process(
    backbones, tokenizer, tmp_path, save_steps
):
    """As on a full disk. The folder knows nothing of the stage, or only its checkpoints."""
    whole = make(backbones, tokenizer, tmp_path / "whole", TREE, save_steps=save_steps)
    whole.train()
    trainer = make(
        backbones, tokenizer, tmp_path / "cut", TREE, cls=dying("_end_stage_record", 1), save_steps=save_steps
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.model.config.sealed_tasks() == ["a"]
    type(trainer)._end_stage_record = HFTTrainer._end_stage_record
    trainer.train(resume_from_checkpoint=True)
    assert learnt(trainer) == learnt(whole)
    assert [stage["tasks"] for stage in trainer.record.stages] == [["a"], ["b"]]


def test_of_two_runs_in_one_folder_the_second_is_refused(backbones, tokenizer, tmp_path):
    trainer = make(backbones, tokenizer, tmp_path, {"a": []}, max_steps=1)
    with (
        RunFolder(tmp_path).held(),
        pytest.raises(OSError, match=r"Another command on this machine writes to '.*'; wait for its end"),
    ):
        trainer.train()
    assert not list(tmp_path.iterdir())
    with RunFolder(tmp_path, writes=False).held():  # as another process of the same run
        trainer.train()


@pytest.mark.parametrize("command", [["remove", "--task", "a"], ["refresh", "--recipe", "cl14-small"]])
def test_no_command_changes_a_model_that_is_being_trained(backbones, tokenizer, tmp_path, capsys, command):
    make(backbones, tokenizer, tmp_path, {"a": []}, max_steps=1).train()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with RunFolder(tmp_path).held():
        assert main([command[0], str(tmp_path), *command[1:]]) == 1
    assert "Another command on this machine writes to" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_another_model_is_not_overwritten(backbones, tokenizer, tmp_path):
    shutil.copytree(backbones["llama"], tmp_path / "plain")
    before = (tmp_path / "plain" / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"holds another model, a plain 'llama', which would be overwritten"):
        make(backbones, tokenizer, tmp_path / "plain", {"a": []}, max_steps=1).train()
    assert (tmp_path / "plain" / "model.safetensors").read_bytes() == before


def test_a_task_that_was_added_and_stopped_before_its_first_save_is_resumed(backbones, tokenizer, tmp_path):
    make(backbones, tokenizer, tmp_path, {"a": []}, max_steps=1).train()

    def grown() -> hft.HFTForCausalLM:
        model = hft.HFTForCausalLM.from_pretrained(tmp_path)
        model.add_task("b", ["a"])
        return model

    options = {"output_dir": str(tmp_path), "max_steps": 1, "bf16": False, "report_to": "none"}
    trainer = HFTTrainer(grown(), HFTTrainingConfig(**options), {"b": rows(3, 4)}, processing_class=tokenizer)
    trainer.train(resume_from_checkpoint=True)
    assert hft.read_gates(tmp_path)[0].sealed_tasks() == ["a", "b"]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"seed": 7}, "`seed` is 7, and stage 1"), ({}, "Task 'a' has 3 rows, and stage 1, .* was begun with 4")],
)
def test_a_stage_goes_on_with_the_rows_and_the_seed_that_it_was_begun_with(
    backbones, tokenizer, tmp_path, options, message
):
    sets = {"a": rows(1, 4)}
    cut = make(backbones, tokenizer, tmp_path, {"a": []}, sets, cls=dying("_end_stage_record", 1), save_steps=1)
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    others = sets if options else {"a": rows(1, 3)}
    resumed = make(backbones, tokenizer, tmp_path, {"a": []}, others, save_steps=1, **options)
    with pytest.raises(ValueError, match=message):
        resumed.train(resume_from_checkpoint=True)


def test_a_task_that_was_refreshed_meanwhile_stays_so(backbones, tokenizer, tmp_path):
    """The checkpoint that a stage goes on from holds older gates of the tasks below."""
    killed = make(backbones, tokenizer, tmp_path, TREE, save_steps=1)
    killed.add_callback(Kill(2, "step"))
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    assert hft.HFTConfig.from_pretrained(tmp_path).sealed_tasks() == []
    done = make(backbones, tokenizer, tmp_path, TREE, cls=dying("_end_stage_record", 2), save_steps=1)
    with pytest.raises(KeyboardInterrupt):
        done.train(resume_from_checkpoint=True)
    model = hft.HFTForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        model.hft_gates.of("a").mul_(0.5)  # as a refresh might
    model.save_pretrained(tmp_path)
    resumed = make(backbones, tokenizer, tmp_path, TREE, save_steps=1)
    resumed.train(resume_from_checkpoint=True)
    assert bits(resumed.model.hft_gates.of("a")) == bits(model.hft_gates.of("a"))
    assert resumed.model.config.sealed_tasks() == ["a", "b"]


def test_a_run_goes_back_to_where_nodes_were_whole(backbones, tokenizer, tmp_path):
    options = {"eval_dataset": data(TREE), "rank_tolerance": 9.0, "save_steps": 1, "max_steps": 2}
    trainer = make(backbones, tokenizer, tmp_path, TREE, **options)
    trainer.train()
    first = learnt(trainer)
    assert trainer.model.config.task("a")["rank"] < 3
    trainer.train(resume_from_checkpoint=str(tmp_path / "stage-1/checkpoint-1"))
    assert learnt(trainer) == first


def test_another_runs_folder_overwrites_no_learnt_model(backbones, tokenizer, tmp_path):
    make(backbones, tokenizer, tmp_path / "full", {"z": []}, max_steps=1, save_strategy="no").train()
    with pytest.raises(KeyboardInterrupt):
        make(backbones, tokenizer, tmp_path / "cut", TREE, cls=dying("_begin_stage_record", 2)).train()
    resumed = make(backbones, tokenizer, tmp_path / "full", TREE)
    with pytest.raises(ValueError, match=r"full' holds a model that has learnt z, which this run's model has not"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "cut"))
    elsewhere = make(backbones, tokenizer, tmp_path / "new", TREE)
    elsewhere.train(resume_from_checkpoint=str(tmp_path / "cut"))
    assert [stage["tasks"] for stage in RunRecord.load(tmp_path / "new").stages] == [["a"], ["b"]]


def test_a_model_grows_in_its_own_folder_and_keeps_its_past(backbones, tokenizer, tmp_path):
    """A task of the first level is added last: the stages before it stay in the record."""
    make(backbones, tokenizer, tmp_path, TREE).train()
    assert list(tmp_path.glob("stage-*/checkpoint-*"))
    model = hft.HFTForCausalLM.from_pretrained(tmp_path)
    model.add_task("c")
    args = HFTTrainingConfig(str(tmp_path), max_steps=1, save_steps=1, bf16=False, report_to="none", disable_tqdm=True)
    HFTTrainer(model, args, train_dataset={"c": rows(3)}, processing_class=tokenizer).train()
    record = RunRecord.load(tmp_path)
    assert [stage["tasks"] for stage in record.stages] == [["a"], ["b"], ["c"]] and set(record.data) == set("abc")
    left = list(tmp_path.glob("stage-*/checkpoint-*"))
    assert [path.parent.name for path in left] == ["stage-1"]  # of the new stage


class TestRecord:
    record = RunRecord(
        budget={"seed": 1},
        data={"a": {"rows": 3}, "b": {"rows": 4}},
        before={"a": {"score": 1.0}, "b": {"score": 2.0}, "late": {"score": 3.0}},
        stages=[
            {"level": 1, "tasks": ["a"], "log": [{"loss": 1.0, "a_loss": 1.0}], "scores": {"a": {"score": 5.0}}},
            {"level": 2, "tasks": ["b"], "log": [], "scores": {"a": {"score": 5.0}, "b": {"score": 6.0}}, "trims": {"b": 1}},
        ],
        routed={"a": {"score": 5.0}},
        sources={"a": {"a": {"drop": 1.0}, "b": {"drop": 2.0}}},
        cross={"a": {"a": {"score": 5.0}, "b": {"score": 1.0}}},
    )  # fmt: skip

    def test_a_stage_that_nobody_tested_leaves_the_last_scores(self):
        later = replace(self.record, stages=[*self.record.stages, {"level": 3, "tasks": ["late"], "log": []}])
        assert later.last_scores() == self.record.stages[1]["scores"] and RunRecord().last_scores() == {}
        assert later.scored_stages() == ["1", "2"] and len(later.stages) == 3

    def test_without_a_task(self):
        left = self.record.without(["b"])
        assert left.data == {"a": {"rows": 3}} and "b" not in json.dumps(vars(left)["stages"])
        assert left.matrix() == [{"a": 5.0}] and left.routed == {} and left.sources == {"a": {"a": {"drop": 1.0}}}
        assert self.record.without([]) == self.record

    def test_after_a_refresh(self):
        now = self.record.after_refresh("a")
        assert "a" not in now.last_scores() and now.matrix() == [{"b": 6.0}]
        assert now.routed == {} and now.sources == {} and now.cross == {}
        assert RunRecord().after_refresh("a") == RunRecord()  # was never scored
        now.add_stage(
            {"level": 3, "tasks": ["late"], "log": [], "scores": {"a": {"score": 7.0}, "late": {"score": 1.0}}}
        )
        assert now.last_scores()["a"] == {"score": 7.0}

    def test_the_past_of_a_model_that_goes_on(self):
        past = self.record.past_of(["a", "b"])
        assert past.stages == self.record.stages and set(past.before) == {"a", "b"} and past.budget == {}
        assert self.record.past_of([]).stages == [] and self.record.past_of([]).before == {}

    def test_of_two_models_that_became_one(self):
        other = RunRecord(data={"a": {"rows": 9}, "z": {"rows": 8}}, before={"z": {"score": 4.0}})
        union = self.record.united(other, {"z": "y"})
        assert union.data == {"a": {"rows": 3}, "b": {"rows": 4}, "y": {"rows": 8}} and union.stages == []
        assert union.before["y"] == {"score": 4.0} and union.before["a"] == {"score": 1.0}


def test_means_are_over_tokens_and_not_over_batches(backbones, tokenizer, tmp_path):
    """Eight long rows in one batch, and one short row in the next."""
    checks = Dataset.from_list([{"prompt": "p", "completion": "a long answer, many tokens"}] * 8 + [
        {"prompt": "p", "completion": "b"}
    ])  # fmt: skip
    trainer = make(
        backbones, tokenizer, tmp_path, {"a": []}, {"a": checks}, {"a": checks}, per_device_eval_batch_size=8,
        per_device_train_batch_size=1, gradient_accumulation_steps=9, logging_steps=1, max_steps=1, learning_rate=3e-2,
    )  # fmt: skip
    trainer.train()
    (logged,) = [log for log in trainer.log_history if "loss" in log]
    assert logged["a_loss"] == pytest.approx(logged["loss"], rel=1e-4)  # nine micro-batches, one step
    trainer.model.eval()
    found = trainer.evaluate()
    right = total = 0
    for row in trainer.eval_dataset["a"]:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])[:, 1:]
        with torch.no_grad():
            best = trainer.model(ids, task="a").logits[:, :-1].argmax(-1)
        right, total = right + int((best == labels)[labels != -100].sum()), total + int((labels != -100).sum())
    assert found["eval_mean_token_accuracy"] == pytest.approx(right / total, abs=1e-4)


def test_a_tokenizer_that_cannot_be_written_leaves_the_old_one(backbones, tokenizer, tmp_path, monkeypatch):
    trainer = make(backbones, tokenizer, tmp_path, {"a": []})
    trainer.save_model()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def disk_full(folder):
        (folder / "tokenizer.json").write_text("{")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainer, "processing_class", SimpleNamespace(save_pretrained=disk_full))
    with pytest.raises(OSError, match="No space left"):
        trainer.save_model()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_what_would_fail_after_hours_fails_at_once(backbones, tokenizer, tmp_path):
    one = {"a": rows(1, 1)}
    with pytest.raises(ValueError, match="`rank_tolerance` needs two rows or more of task 'a' in `eval_dataset`"):
        make(backbones, tokenizer, tmp_path, {"a": []}, eval_dataset=one, rank_tolerance=0.1)
    with pytest.raises(ValueError, match=r"a folder of this machine: others could not load the model"):
        make(backbones, tokenizer, tmp_path, {"a": []}, push_to_hub=True, hub_model_id="me/mine")


def test_packed_rows_without_an_answer_are_dropped_and_counted(backbones, tokenizer, tmp_path, caplog):
    from transformers.utils import logging

    train = Dataset.from_list(
        [{"prompt": "p" * 40, "completion": " a"}] * 3 + [{"prompt": "p", "completion": " b"}] * 3
    )
    logging.enable_propagation()
    trainer = make(backbones, tokenizer, tmp_path, {"a": []}, {"a": train}, packing=True, max_length=32)
    logging.disable_propagation()
    assert "3 of the 4 packed rows of task 'a' were dropped" in caplog.text
    assert len(trainer._prepared["a"]) == 1


def test_a_model_given_by_its_folder_is_loaded_as_asked(backbones, tokenizer, tmp_path):
    hft.HFTForCausalLM.from_backbone(backbones["llama"], {"a": []}, dtype=torch.float32).save_pretrained(
        tmp_path / "m"
    )
    args = HFTTrainingConfig(str(tmp_path / "out"), bf16=False, model_init_kwargs={"attn_implementation": "eager"})
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float32")
    trainer = HFTTrainer(
        str(tmp_path / "m"), args, train_dataset={"a": rows(1)}, processing_class=tokenizer, quantization_config=nf4
    )
    assert trainer.model.is_loaded_in_4bit and trainer.model.backbone.config._attn_implementation == "eager"
