"""Trimming: a node keeps the rank that its validation loss needs, and everything else keeps its bits."""

import json
import re

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import hft
from hft.trainers.cli import main
from hft.trainers.merge import merge_models
from hft.trainers.run_record import RunRecord
from hft.trainers.task_data import alone
from hft.trimmed_hft import balanced, mean_and_error

from .test_model import prompts
from .test_refresh import rows_like
from .test_trainer import Kill, data, make, rows
from .tiny import bits, fill, snapshot


@pytest.fixture
def grown(backbones) -> hft.HFTForCausalLM:
    """A sealed root a, and its open child b with a voice; rank 5."""
    made = hft.HFTForCausalLM.from_backbone(
        backbones["llama"], {"a": [], "b": ["a"]}, rank=5, memory_config={"slots": 2}
    )
    for seed, task in enumerate("ab"):
        made.start_stage([task])
        fill(made, seed=seed, only_trainable=True)
        made.seal([task] if task == "a" else [])
    return made


def reduce(model, task: str, rank: int) -> None:
    """Makes each of a task's products one of a lower rank, hidden in factors all of whose rows and columns speak."""
    with torch.no_grad():
        for nodes in model.hft_nodes.values():
            down_RI, up_OR = nodes.pair(task)
            mix_RR = torch.randn(len(down_RI), rank) @ torch.randn(rank, len(down_RI)) / len(down_RI)
            up_OR.copy_(up_OR @ mix_RR)


@pytest.mark.parametrize(("rank", "inside", "outside"), [(4, 9, 7), (6, 3, 9), (6, 4, 3)])
def test_the_factors_are_balanced_and_their_product_is_the_same(rank, inside, outside):
    down, up = torch.randn(rank, inside), torch.randn(outside, rank)
    found_down, found_up, S = balanced(down, up)
    assert found_down.shape == down.shape and found_up.shape == up.shape and S.shape == (rank,)
    torch.testing.assert_close(found_up @ found_down, (up @ down).double(), rtol=1e-5, atol=1e-5)
    expected = torch.linalg.svdvals((up @ down).double())[:rank]
    torch.testing.assert_close(S[: len(expected)], expected, rtol=1e-5, atol=1e-6)
    for square in (found_up.T @ found_up, found_down @ found_down.T):
        torch.testing.assert_close(square, torch.diag(S), rtol=1e-5, atol=1e-5)


def test_at_full_rank_the_logits_are_the_same(grown):
    x = prompts(2, 6)
    with torch.no_grad():
        before = grown(x, task="b").logits
        for nodes in grown.hft_nodes.values():
            down, up, _ = balanced(*nodes.pair("b"))
            for new, parameter in zip((down, up), nodes.pair("b"), strict=True):
                assert not torch.allclose(new.float(), parameter)
                parameter.copy_(new)
        torch.testing.assert_close(grown(x, task="b").logits, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_node_of_rank_three_is_cut_to_three(backbones, dtype):
    model = hft.HFTForCausalLM.from_backbone(backbones["llama"], {"a": [], "b": ["a"]}, rank=7, dtype=dtype)
    for task in "ab":
        model.start_stage([task])
        fill(model, only_trainable=True)
        model.seal([task] if task == "a" else [])
    reduce(model, "b", 3)
    x = prompts(2, 6)
    old = {name: value for name, value in snapshot(model).items() if not name.endswith("_b")}
    gates, page = bits(model.hft_gates.of("b")), {name: bits(p) for name, p in model.page_parameters(2).items()}
    with torch.no_grad():
        before, a = model(x, task="b").logits, bits(model(x, task="a").logits)
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = model.trim("b", rows_like(model, "b", 12), 0.02)
    assert (found.old_rank, found.rank) == (7, 3) and model.config.task("b")["rank"] == 3
    assert abs(found.after - found.before) <= 0.02 and found.error < 0.02
    assert str(found).startswith(f"b: rank 7 -> 3, loss {found.before:.3f} -> {found.after:.3f} (± ")
    after = snapshot(model)
    assert {name: after[name] for name in old} == old and bits(model.hft_gates.of("b")) == gates
    assert {name: bits(p) for name, p in model.page_parameters(2).items()} == page
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trains
    with torch.no_grad():
        close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.5}
        torch.testing.assert_close(model(x, task="b").logits, before, **close)
        assert bits(model(x, task="a").logits) == a


def test_the_loss_never_rises_beyond_the_tolerance_and_no_lower_rank_would_do(grown):
    """Against a search over all ranks, with the losses of a model that has nothing but the cut factors."""
    checks = rows_like(grown, "b", 10)
    pairs = {key: balanced(*nodes.pair("b"))[:2] for key, nodes in grown.hft_nodes.items()}
    before = grown.losses("b", checks, 4)
    rises = {}
    with torch.no_grad():
        for rank in range(1, 5):
            for key, (down, up) in pairs.items():
                up = torch.cat([up[:, :rank], torch.zeros_like(up[:, rank:])], 1)
                for new, parameter in zip((down, up), grown.hft_nodes[key].pair("b"), strict=True):
                    parameter.copy_(new)
            rises[rank] = mean_and_error([a - b for a, b in zip(grown.losses("b", checks, 4), before, strict=True)])
        for key, (down, up) in pairs.items():
            for new, parameter in zip((down, up), grown.hft_nodes[key].pair("b"), strict=True):
                parameter.copy_(new)
    assert min(rises[1][0], rises[2][0]) > rises[3][0] > rises[4][0] > 0.01
    for rank in (4, 3):
        tolerance = rises[rank][0] + 1e-3
        fits = min(r for r, (rise, error) in rises.items() if rise <= max(tolerance, error / 2))
        model = AutoModelForCausalLM.from_config(grown.config)
        model.load_state_dict(grown.state_dict())
        found = model.trim("b", checks, tolerance, batch_size=4)
        assert found.rank == fits == rank, rises
        assert found.after - found.before == pytest.approx(rises[rank][0], abs=1e-3)
        assert found.error == pytest.approx(rises[rank][1], abs=1e-3)
        assert mean_and_error(model.losses("b", checks, 4))[0] == pytest.approx(found.after, abs=1e-5)


def test_what_was_measured_is_what_is_sealed_and_saved(backbones, tmp_path):
    off = {"read": "off"}  # sealing rounds pages, too, which a trim leaves as they are
    model = hft.HFTForCausalLM.from_backbone(
        backbones["llama"], {"a": []}, rank=6, dtype=torch.bfloat16, memory_config=off
    )
    model.start_stage(["a"])
    fill(model, only_trainable=True)
    reduce(model, "a", 2)
    checks = rows_like(model, "a", 8)
    model.save_pretrained(tmp_path / "before")
    (found,) = model.seal(["a"], rank_tolerance=0.02, validation={"a": checks})
    assert found.rank == 2 and model.config.task("a") == {**model.config.task("a"), "rank": 2, "sealed": True}
    x = prompts(2, 6)
    for slim in (True, False):
        model.save_pretrained(tmp_path / str(slim), slim=slim)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / str(slim))
        assert bits(loaded(x, task="a").logits) == bits(model(x, task="a").logits)
        assert loaded.losses("a", checks, 8) == pytest.approx(model.losses("a", checks, 8), abs=0)
    assert mean_and_error(model.losses("a", checks, 8))[0] == found.after
    whole = (tmp_path / "before/tasks/a.safetensors").read_bytes()  # float32, as long as it is open
    cut = (tmp_path / "True/tasks/a.safetensors").read_bytes()
    header = lambda file: 8 + int.from_bytes(file[:8], "little")  # noqa: E731
    assert (len(whole) - header(whole)) / 2 - (len(cut) - header(cut)) == found.saved_bytes > 0


def test_without_a_rank_that_will_do_nothing_changes_to_the_bit(grown):
    before, config, parameters = snapshot(grown), grown.config.to_dict(), dict(grown.named_parameters())
    found = grown.trim("b", rows_like(grown, "b", 8), 0.0)
    assert (found.rank, found.saved_bytes, found.after) == (5, 0, found.before)
    assert str(found) == f"b: rank 5 stays, loss {found.before:.3f}; a lower one would cost too much"
    assert snapshot(grown) == before and grown.config.to_dict() == config
    assert all(parameter is parameters[name] for name, parameter in grown.named_parameters())


def test_one_lost_row_is_no_noise_and_noise_is_no_rise(grown, monkeypatch):
    """A rise in one row alone is one standard error, whatever its size; a toss between rows is less than half of one."""
    for rises, rank in (([0.0] * 7 + [9.0], 5), ([1.0, -1.0, 1.0, -1.1, 0.9, -1.0, 1.2, -0.9], 1)):
        tries = iter([[1.0] * 8] + [[1 + rise for rise in rises]] * 3)
        monkeypatch.setattr(type(grown), "losses", lambda *args, tries=tries: next(tries))
        assert grown.trim("b", rows_like(grown, "b", 8), 0.0).rank == rank


def test_an_interrupted_trim_changes_nothing(grown, monkeypatch):
    before, config = snapshot(grown), grown.config.to_dict()
    checks, losses, calls = rows_like(grown, "b", 6), type(grown).losses, []

    def stop(self, *args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return [0.0] * 6 if calls else losses(self, *args)

    monkeypatch.setattr(type(grown), "losses", stop)
    with pytest.raises(KeyboardInterrupt):
        grown.seal(["b"], rank_tolerance=1.0, validation={"b": checks})
    assert snapshot(grown) == before and grown.config.to_dict() == config


def test_a_stage_is_trimmed_whole_or_not_at_all(grown):
    grown.add_task("c", ["a"])
    grown.start_stage(["b", "c"])
    fill(grown, only_trainable=True)
    reduce(grown, "b", 2)
    before, config = snapshot(grown), grown.config.to_dict()
    good, bad = rows_like(grown, "b", 6), [{"input_ids": [5], "labels": [5]}] * 2  # nothing to predict
    with pytest.raises(ValueError, match="token"):
        grown.seal(["b", "c"], rank_tolerance=100.0, validation={"b": good, "c": bad})
    assert snapshot(grown) == before and grown.config.to_dict() == config
    assert [name for name, p in grown.named_parameters() if p.requires_grad]
    trims = grown.seal(["a", "b", "c", "b"], rank_tolerance=100.0, validation={"b": good, "c": good})
    assert [(its.task, its.rank) for its in trims] == [("b", 1), ("c", 1)]  # what is sealed already is not asked about
    with pytest.raises(ValueError, match=re.escape("The tasks are the string 'bc'; give a list: ['bc'].")):
        grown.seal("bc")


def test_3_a_child_of_a_cut_parent_starts_as_it(grown):
    reduce(grown, "b", 2)
    (found,) = grown.seal(["b"], rank_tolerance=0.05, validation={"b": rows_like(grown, "b", 8)})
    assert found.rank == 2
    grown.add_task("c", ["b"])
    grown.start_stage(["c"])
    x = prompts(2, 6)
    with torch.no_grad():
        expected = grown(x, task="b").logits
        torch.testing.assert_close(grown(x, task="c").logits, expected, rtol=1e-5, atol=1e-5)
        fill(grown, only_trainable=True)
        assert (grown(x, task="c").logits - expected).abs().max() > 0.1
        assert bits(grown(x, task="b").logits) == bits(expected)


def test_6_export_and_union_of_tasks_of_different_ranks(grown, tmp_path):
    x = prompts(2, 6)
    grown.save_pretrained(tmp_path / "open")
    reduce(grown, "b", 2)
    grown.seal(["b"], rank_tolerance=0.05, validation={"b": rows_like(grown, "b", 8)})
    assert [task["rank"] for task in grown.config.tasks] == [5, 2]
    grown.save_pretrained(tmp_path / "one")
    other = hft.HFTForCausalLM.from_pretrained(tmp_path / "open")
    other.remove_task("b")
    other.add_task("y", ["a"])
    other.start_stage(["y"])
    fill(other, seed=5, only_trainable=True)
    reduce(other, "y", 1)
    other.seal(["y"], rank_tolerance=0.05, validation={"y": rows_like(other, "y", 8)})
    other.save_pretrained(tmp_path / "other")
    merge_models(tmp_path / "one", tmp_path / "other", tmp_path / "union")
    union = hft.HFTForCausalLM.from_pretrained(tmp_path / "union")
    assert {task["name"]: task["rank"] for task in union.config.tasks} == {"a": 5, "b": 2, "y": 1}
    with torch.no_grad():
        for model, task in ((grown, "a"), (grown, "b"), (other, "y")):
            assert bits(union(x, task=task).logits) == bits(model(x, task=task).logits)
        mixed = union(x, task=["b", "y"]).logits
        for row, task in enumerate(("b", "y")):
            torch.testing.assert_close(
                mixed[row : row + 1], union(x[row : row + 1], task=task).logits, rtol=1e-4, atol=1e-4
            )
        report = hft.export_lora(grown, "b", tmp_path / "lora")
        assert report["path_rank"] == 5 + 2 + 2 + 2  # both nodes, and two pages of two slots
        plain = AutoModelForCausalLM.from_pretrained(grown.config.backbone)
        exported = PeftModel.from_pretrained(plain, tmp_path / "lora")
        torch.testing.assert_close(exported(x).logits, grown(x, task="b").logits, rtol=1e-4, atol=1e-4)


HIERARCHY = {"a": [], "e": [], "b": ["a"]}


def trimming(backbones, tokenizer, folder, tolerance=0.12, **options):
    # Rows of other tasks to be judged by: what helps a task less than it harms is then cut, to ranks that differ.
    return make(
        backbones, tokenizer, folder, HIERARCHY, eval_dataset=data(HIERARCHY), rank_tolerance=tolerance, **options
    )


@pytest.fixture(scope="module")
def uninterrupted(backbones, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    torch.manual_seed(0)
    trainer = trimming(backbones, tokenizer, folder)
    trainer.train()
    return trainer.model, RunRecord.load(folder)


def test_the_trainer_trims_each_stage_and_writes_down_what_was_saved(uninterrupted, capsys):
    model, record = uninterrupted
    ranks = {task["name"]: task["rank"] for task in model.config.tasks}
    trims = {task: trim for stage in record.stages for task, trim in stage["trims"].items()}
    assert {task: trim["rank"] for task, trim in trims.items()} == ranks
    assert min(ranks.values()) < 3 and len(set(ranks.values())) > 1, ranks
    for task, trim in trims.items():
        assert trim["after"] - trim["before"] <= max(0.12, trim["error"] / 2)
        assert (trim["saved_bytes"] > 0) == (ranks[task] < 3) and trim["old_rank"] == 3
    assert record.budget["rank_tolerance"] == 0.12


@pytest.mark.parametrize(("step", "when"), [(5, "step"), (10, "save"), (11, "step")])
def test_8_resumed_with_cut_ranks_it_is_uninterrupted(backbones, tokenizer, tmp_path, uninterrupted, step, when):
    killed = trimming(backbones, tokenizer, tmp_path)
    killed.add_callback(Kill(step, when))
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed = trimming(backbones, tokenizer, tmp_path)
    resumed.train(resume_from_checkpoint=True)
    model, record = uninterrupted
    assert snapshot(resumed.model) == snapshot(model)
    assert [task["rank"] for task in resumed.model.config.tasks] == [task["rank"] for task in model.config.tasks]
    assert [s["trims"] for s in RunRecord.load(tmp_path).stages] == [s["trims"] for s in record.stages]
    assert snapshot(AutoModelForCausalLM.from_pretrained(tmp_path)) == snapshot(model)


def test_packed_rows_are_judged_alone_and_large_sets_by_a_sample(backbones, tokenizer, tmp_path):
    made = {"a": rows(0, 9)}
    packed, plain = (
        make(
            backbones, tokenizer, tmp_path / str(i), {"a": []}, made, made, rank_tolerance=1.0, max_steps=1, **options
        )
        for i, options in enumerate(({"packing": True, "max_length": 80}, {}))
    )
    assert len(packed.eval_dataset["a"]) < 9 == len(plain.eval_dataset["a"])
    texts = [sorted(map(str, alone(trainer.eval_dataset["a"]))) for trainer in (packed, plain)]
    assert [len(its) for its in texts] == [9, 9]
    ids = [sorted(str(row["input_ids"]) for row in alone(trainer.eval_dataset["a"])) for trainer in (packed, plain)]
    assert ids[0] == ids[1]
    some = alone(plain.eval_dataset["a"], count=4)
    assert [row["input_ids"] for row in some] == [plain.eval_dataset["a"][i]["input_ids"] for i in (0, 2, 4, 6)]
    packed.train()  # and it runs


def test_the_command_trims_and_says_so(backbones, tokenizer, tmp_path, capsys):
    import gzip

    for split in ("train", "validation"):
        (tmp_path / "data/t").mkdir(parents=True, exist_ok=True)
        with gzip.open(tmp_path / f"data/t/{split}.jsonl.gz", "wt") as file:
            for i in range(6):
                row = {
                    "instruction": "yes?",
                    "options": ["yes", "no"],
                    "input": f"t {i}",
                    "output": ["yes", "no"][i % 2],
                }
                file.write(json.dumps(row) + "\n")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"backbone: {backbones['llama']}\nhierarchy: {{t: []}}\ndata: {tmp_path / 'data'}\noutput_dir: {tmp_path / 'out'}\n"
        "max_steps: 2\nbf16: false\nrank: 4\nrank_tolerance: 5e-1\n"
    )
    assert main(["train", str(recipe)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^t: rank 4 -> \d, loss \d+\.\d{3} -> \d+\.\d{3} \(± \d\.\d{3}\), 0\.\d MB saved$", out, re.M), (
        out
    )
    assert json.loads((tmp_path / "out/run.json").read_text())["stages"][0]["trims"]["t"]["old_rank"] == 4


def test_wrong_trims(grown, backbones, tokenizer, tmp_path):
    checks = rows_like(grown, "b", 4)
    grown.add_task("c", ["b"])
    before = snapshot(grown)
    for task, its_rows, tolerance, message in (
        ("bb", checks, 0.1, "Unknown task 'bb'. Did you mean 'b'?"),
        ("a", checks, 0.1, "Task 'a' is sealed and never changes; trim a task before it is sealed."),
        ("b", checks, -0.1, "The tolerance is -0.1; it must be 0 nats a token or more."),
        ("b", checks, float("nan"), "The tolerance is nan; it must be 0"),
        (
            "b",
            checks[:1],
            0.1,
            "Trimming 'b' is judged by validation rows, two or more, and there are 1; give it some, or",
        ),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            grown.trim(task, its_rows, tolerance)
    with pytest.raises(ValueError, match="Trimming 'b' is judged by validation rows, two or more, and there are 0"):
        grown.seal(["b"], rank_tolerance=0.1)
    with pytest.raises(ValueError, match="Trimming 'c' is judged by"):  # b has rows, c has not: neither is cut
        grown.seal(["b", "c"], rank_tolerance=100.0, validation={"b": checks})
    assert snapshot(grown) == before and grown.config.open_tasks() == ["b", "c"]
    fill(grown, only_trainable=True)
    grown.set_trainable(["c"])
    fill(grown, only_trainable=True)
    with pytest.raises(ValueError, match="Task 'c' has learnt on top of 'b', which can be trimmed only before that"):
        grown.trim("b", checks, 0.1)
    grown.set_trainable([])
    grown.fold("a")
    with pytest.raises(ValueError, match=r"is folded for task 'a'; call unfold"):
        grown.trim("b", checks, 0.1)
    with pytest.raises(ValueError, match="`rank_tolerance` is -1; it must be 0 nats a token or more"):
        make(backbones, tokenizer, tmp_path, {"a": []}, rank_tolerance=-1)
    with pytest.raises(ValueError, match="`rank_tolerance` is set, but `eval_dataset` has no rows of the task 'a'"):
        make(backbones, tokenizer, tmp_path, {"a": []}, rank_tolerance=0.1)


def test_8_a_folder_of_other_open_ranks_is_refused(grown, tmp_path):
    grown.save_pretrained(tmp_path)
    other = hft.HFTForCausalLM.from_backbone(grown.config.backbone, {"a": [], "b": ["a"]}, rank=4)
    with pytest.raises(ValueError, match="holds other tasks"):
        other.restore(tmp_path)
