"""Scores stage by stage, who contributes what, the page and the card: on a real small training."""

import base64
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard

import hft
from hft.trainers import HFTTrainer, HFTTrainingConfig
from hft.trainers.cli import main
from hft.trainers.evaluation import EvalSet, score_options
from hft.trainers.interference import advice, contributions, cross_scores, switched_off
from hft.trainers.metrics import OPTIONS
from hft.trainers.model_card import write_model_card
from hft.trainers.report import write_report
from hft.trainers.run_record import RunRecord, as_score
from tests.tiny import grow, snapshot


TREE = {"a": [], "b": ["a"], "c": []}


def rows_of(task: str) -> list[dict]:
    return [
        {"prompt": f"{task} {i}: ", "completion": "yes" if i % 4 else "no", "options": ["yes", "no"]} for i in range(8)
    ]


def make(backbones, tokenizer, folder, test_sets, **options):
    torch.manual_seed(0)
    model = hft.HFTForCausalLM.from_backbone(backbones["llama"], TREE, rank=2)
    args = HFTTrainingConfig(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=4, logging_steps=1, save_strategy="no",
        bf16=False, gradient_checkpointing=False, disable_tqdm=True, learning_rate=1e-2, **{"report_to": "none", **options},
    )  # fmt: skip
    data = {task: Dataset.from_list(rows_of(task)).remove_columns("options") for task in TREE}
    return HFTTrainer(model, args, train_dataset=data, test_sets=test_sets, processing_class=tokenizer)


@pytest.fixture(scope="module")
def run(backbones, tokenizer, tmp_path_factory):
    """A finished training of three tasks in two stages, scored all along."""
    sets = {task: EvalSet(rows_of(task), OPTIONS) for task in TREE}
    trainer = make(backbones, tokenizer, tmp_path_factory.mktemp("run"), sets, report_to="tensorboard")
    trainer.train()
    return trainer


def test_the_record_of_a_run(run):
    record = RunRecord.load(run._root)
    assert record == run.record
    assert list(record.before) == list(TREE) and list(record.start) == ["b"]
    assert [sorted(stage["scores"]) for stage in record.stages] == [["a", "c"], ["a", "b", "c"]]
    first, last = (stage["scores"] for stage in record.stages)
    assert {task: last[task] for task in first} == first  # nothing forgotten
    for task, score in last.items():
        right = score_options(run.model, run.processing_class, rows_of(task), task)[0]
        assert score == {"score": 100 * sum(right) / 8, "se": pytest.approx(as_score(right)["se"]), "rows": 8}
    assert last != record.before  # something was learnt
    assert record.measures()["forgetting"] == 0.0 == record.measures()["backward_transfer"]
    assert record.data["a"] == {"rows": 8, "metric": "options"}
    assert any("a_loss" in entry for entry in record.stages[0]["log"])
    assert str(run._root) not in (run._root / "run.json").read_text()


def test_scoring_changes_nothing_of_what_is_learnt(run, backbones, tokenizer, tmp_path):
    alone = make(backbones, tokenizer, tmp_path, None)
    alone.train()
    assert snapshot(alone.model) == snapshot(run.model)


def test_trackers_get_scores_and_the_picture(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, set[str]] = {}
    for file in sorted(run._root.rglob("events.out.tfevents*")):
        tags = EventAccumulator(str(file), size_guidance={"images": 0}).Reload().Tags()
        stage = file.relative_to(run._root).parts[0]
        found[stage] = found.get(stage, set()) | {*tags["scalars"], *tags["images"]}
    assert set(found) == {"stage-1", "stage-2"}
    assert {"train/score/a", "train/score/b", "score of each task after each stage"} <= found["stage-2"]
    assert "train/score/b" not in found["stage-1"]


def test_wrong_test_sets(backbones, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="unknown task 'd'"):
        make(backbones, tokenizer, tmp_path, {"d": EvalSet(rows_of("d"))})
    with pytest.raises(ValueError, match="is empty"):
        make(backbones, tokenizer, tmp_path, {"a": EvalSet([])})


def test_a_source_is_switched_off_and_on_again_to_the_bit(backbones, tokenizer):
    model = hft.HFTForCausalLM.from_backbone(backbones["llama"], TREE, rank=2)
    grow(model)
    before = snapshot(model)
    ids = torch.tensor([[5, 6, 7]])
    whole = model(ids, task="b").logits
    with switched_off(model, "b", "a"):
        assert not torch.equal(model(ids, task="b").logits, whole)
        assert model.gates("b").mean()["a"] == 0.0
    assert torch.equal(model(ids, task="b").logits, whole) and snapshot(model) == before


def test_contributions_and_cross_scores_ask_for_what_they_say(backbones, tokenizer, monkeypatch):
    model, asked = hft.HFTForCausalLM.from_backbone(backbones["llama"], TREE, rank=2), []
    grow(model)

    def score(model, tokenizer, data, task, *_):
        asked.append((data, task, model.gates(task).values))
        return [1 / len(asked)] * 8

    monkeypatch.setattr("hft.trainers.interference.score_task", score)
    sets = {task: EvalSet(rows_of(task), OPTIONS) for task in "ab"}
    _, found = contributions(model, tokenizer, "b", sets["b"])
    assert list(found) == ["a", "b", "page:1", "page:2"]
    (_, _, whole), *without = asked
    assert all(data is sets["b"] and task == "b" for data, task, _ in asked)
    for column, (_, _, values) in enumerate(without):
        expected = whole.clone()
        expected[:, column] = 0
        assert torch.equal(values, expected)
    assert [its["drop"] for its in found.values()] == pytest.approx([100 - 100 / n for n in (2, 3, 4, 5)], abs=0.01)
    asked.clear()
    cross = cross_scores(model, tokenizer, sets)
    expected = [(sets[task], path) for task in "ab" for path in "ab"]
    assert all(its[0] is data and its[1] == path for its, (data, path) in zip(asked, expected, strict=True))
    shown = [cross[task][path]["score"] for task in "ab" for path in "ab"]
    assert shown == pytest.approx([100, 50, 100 / 3, 25], abs=0.01)


def test_advice_in_words():
    def source(drop, error, gate=1.0, score=50.0):
        return {"score": score, "rows": 32, "drop": drop, "drop_se": error, "gate": gate}

    sources = {
        "yelp": {"sst2": source(4.1, 1.0), "page:1": source(0.0, 0.0, 0.0), "yelp": source(30.0, 2.0)},
        "copa": {"rte": source(0.5, 1.0), "page:1": source(-6.0, 2.0)},
    }
    cross = {"yelp": {"yelp": {"score": 60.0}, "copa": {"score": 20.0, "rows": 32, "drop": 40.0, "drop_se": 2.0}}}
    assert advice({"yelp": ["sst2"], "copa": ["rte"]}, sources, cross) == [
        "yelp rests on sst2: without it, it loses 4.1 ± 1.0 points.",
        "yelp lets nothing of memory page:1 in.",
        "copa does not measurably use its parent rte (+0.5 ± 1.0 points): it could be a root.",
        "memory page:1 is in the way of copa, which gains 6.0 ± 2.0 points without it: refresh its gates (`hft refresh`).",
        "yelp falls from 60.0 to 20.0 on the path of copa, which answers something else.",
    ]
    cross["yelp"]["copa"]["drop_se"] = 21.0  # of the differences row by row
    assert len(advice({"yelp": ["sst2"], "copa": ["rte"]}, sources, cross)) == 4
    assert (
        advice({"d": ["b"]}, {"d": {"b": source(0.0, 0.0, score=0.0)}}, {}) == []
    )  # always wrong, with b and without
    two = {"d": {"b": source(20.0, 1.0), "c": source(0.1, 1.0)}}
    assert advice({"d": ["b", "c"]}, two, {})[1].endswith("its parent c (+0.1 ± 1.0 points): it could do without.")


def test_a_refreshed_task_has_no_score_until_it_is_scored_again():
    scores = {"a": {"score": 77.0, "se": 1.0, "rows": 9}, "b": {"score": 55.0, "se": 1.0, "rows": 9}}
    stages = [{"level": 1, "tasks": ["a"], "log": [], "scores": {"a": scores["a"]}},
              {"level": 2, "tasks": ["b"], "log": [], "scores": scores}]  # fmt: skip
    record = RunRecord(stages=stages).after_refresh("a")
    assert record.matrix() == [{"b": 55.0}] and record.scored_stages() == ["2"]
    assert record.measures()["average_performance"] == 55.0
    assert record.after_refresh("b").matrix() == [] and record.after_refresh("b").measures() == {}


def test_a_report_of_what_is_no_folder_or_of_nothing(run, capsys):
    for command in ("report", "refresh", "remove", "push"):
        more = {"refresh": ["--recipe", "cl14-small"], "remove": ["--task", "b"], "push": ["me/x"]}.get(command, [])
        assert main([command, "me/nowhere", *more]) == 2
        assert "There is no folder 'me/nowhere'; of a model on the Hub, make one first" in capsys.readouterr().err
    assert not Path("me").exists()
    assert main(["report", str(run._root), "--samples", "3"]) == 2
    assert "--data and --samples say on what --recipe measures anew" in capsys.readouterr().err


@pytest.fixture(scope="module")
def page(run, tokenizer):
    record = RunRecord.load(run._root)
    sets = {task: EvalSet(rows_of(task), OPTIONS) for task in TREE}
    for task, data in sets.items():
        record.routed[task], record.sources[task] = contributions(run.model, tokenizer, task, data)
        record.confusion[task] = {task: 6, "backbone": 2}
    record.cross = cross_scores(run.model, tokenizer, sets)
    gates = {task: run.model.gates(task) for task in TREE}
    return write_report(run.model.config, gates, record, run._root)


def test_the_page_needs_nothing_from_outside(page):
    text = page.read_text()
    addresses = set(re.findall(r'(?:src|href)="([^"]{0,40})', text))
    assert all(address.startswith("data:") for address in addresses), addresses
    assert text.count("<figure>") == 7
    for encoded in re.findall(r"data:image/svg\+xml;base64,([^\"]+)", text):
        assert b"<svg" in base64.b64decode(encoded)
    assert str(page.parent) not in text
    names = {path.name for path in (page.parent / "pictures").iterdir()}
    assert {f"{name}.{kind}" for name in ("hierarchy", "matrix", "gates", "cross", "router", "loss", "scores")
            for kind in ("png", "svg")} == names  # fmt: skip


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
def test_the_page_in_a_browser(page, tmp_path):
    shot = tmp_path / "page.png"
    done = subprocess.run(
        ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-quic",
         "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
         f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1100,3000", f"--screenshot={shot}", page.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert shot.stat().st_size > 20_000, done.stderr[-2000:]
    assert "CONSOLE" not in done.stderr


def test_the_card(run, tmp_path):
    gates = {task: run.model.gates(task) for task in run.model.hierarchy.names}
    write_model_card(run.model.config, gates, tmp_path, RunRecord.load(run._root), "me/my-hft")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-generation"
    results = {result.dataset_name: result.metric_value for result in card.data.eval_results}
    assert results == {task: score["score"] for task, score in run.record.stages[-1]["scores"].items()}
    assert "| b | 8 | options |" in card.content and "forgetting 0.0" in card.content
    assert card.data.base_model is None  # a folder of this machine is nobody's base model
    assert str(run.model.config.backbone) not in card.content and str(run._root) not in card.content
    for picture in re.findall(r"\]\((pictures/[^)]+)\)", card.content):
        assert (tmp_path / picture).exists()
    assert len(re.findall(r"```python", card.content)) == 3
    for file, is_chat in (("tokenizer_config.json", False), ("chat_template.jinja", True)):
        (tmp_path / file).write_text("{}")
        write_model_card(run.model.config, gates, tmp_path)
        assert ("apply_chat_template" in (tmp_path / "README.md").read_text()) == is_chat


def test_the_card_is_a_card_whatever_came_from_where(run, tmp_path, monkeypatch):
    monkeypatch.setattr("hft.trainers.model_card.is_matplotlib_available", lambda: False)  # pictures take seconds
    gates = {task: run.model.gates(task) for task in run.model.hierarchy.names}
    record, file = RunRecord.load(run._root), tmp_path / "README.md"
    first, second, *_ = record.last_scores()
    for task, config in ((first, "one"), (second, "two")):
        record.data[task] |= {"source": "you/data", "config": config}
    write_model_card(run.model.config, gates, tmp_path, record)
    lines = file.read_text().splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("| task |"))
    table = lines[begin : begin + 2 + len(record.last_scores())]
    assert all(line.startswith("|") for line in table) and lines[begin + len(table)] == ""
    results = {its.dataset_name: its for its in ModelCard.load(file).data.eval_results}
    assert results.keys() == record.last_scores().keys()  # not one for both
    assert (results[first].dataset_type, results[first].dataset_config) == ("you/data", "one")
    record.data[second]["config"] = "one"
    write_model_card(run.model.config, gates, tmp_path, record)
    results = {its.dataset_name: its for its in ModelCard.load(file).data.eval_results}
    assert results.keys() == record.last_scores().keys() and results[second].dataset_type == second

    record.quantization = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    assert "Trained and scored with" not in file.read_text()
    write_model_card(run.model.config, gates, tmp_path, record)
    how = "BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4')`"
    assert "with the backbone in 4 bit (nf4): " in file.read_text() and how in file.read_text()
    assert "<this repository>" in file.read_text()
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "README.md").write_text("# my own notes")
    write_model_card(run.model.config, gates, tmp_path / "own", record)
    assert (tmp_path / "own" / "README.md").read_text() == "# my own notes"

    for broken in (b"---\nlicense: [a\n---\n", b"\xff\xfe", b"---\n- a\n---\n"):
        (tmp_path / "backbone.md").write_bytes(broken)
        monkeypatch.setattr("hft.trainers.model_card.cached_file", lambda *_, **__: tmp_path / "backbone.md")
        write_model_card(run.model.config, gates, tmp_path, record)
        assert ModelCard.load(file).data.license is None


def test_a_broken_record(tmp_path):
    (tmp_path / "run.json").write_text('{"stages": ')
    with pytest.raises(ValueError, match="is no record of a run"):
        RunRecord.load(tmp_path)
    assert RunRecord.load(tmp_path / "nowhere") == RunRecord()
    assert json.loads("{}") == RunRecord().before
