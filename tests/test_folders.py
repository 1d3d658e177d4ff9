"""Folders that people share, link, push and unite: nothing outside them is touched, and what is said of them is true."""

import argparse
import itertools
import json
import os
import re
import tempfile
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import hft
from hft.slim_hft import read_gates
from hft.trainers import commands, gguf_files
from hft.trainers.charts import scores_chart
from hft.trainers.cli import main
from hft.trainers.merge import merge_models
from hft.trainers.model_card import as_pushed, renew_model_card, write_model_card
from hft.trainers.pictures import _draw
from hft.trainers.run_record import RunRecord
from hft.upload_hft import own_files

from .tiny import grow


SCORE = {"score": 50.0, "se": 1.0, "rows": 4}


def saved(backbones, tokenizer, folder, tree, with_words=True, seal=True):
    model = hft.HFTForCausalLM.from_backbone(backbones["llama"], tree, rank=2, router_config={"num_features": 32})
    grow(model, seal=seal)
    model.save_pretrained(folder)
    if with_words:
        tokenizer.save_pretrained(folder)
    return model


def card_of(folder, **record):
    config, gates = read_gates(folder)
    write_model_card(config, gates, folder, RunRecord(**record), "me/one")
    return (folder / "README.md").read_text()


@pytest.mark.parametrize(
    "plan",
    [
        {"files": ["../victim.txt"], "stale": []},
        {"files": [], "stale": ["../*.txt"]},
        {"files": [], "stale": ["linked/*.txt"]},
        {"files": ["/victim.txt"], "stale": []},
    ],
)
def test_a_folder_of_anybodys_touches_nothing_outside_it(backbones, tokenizer, tmp_path, plan):
    home = tmp_path / "home"
    saved(backbones, tokenizer, home / "model", {"a": []})
    (home / "victim.txt").write_text("mine")
    (home / "model/linked").symlink_to(home)
    written = home / "model/.written-x"
    written.mkdir()
    (written / ".plan.json").write_text(json.dumps(plan))
    with pytest.raises(ValueError, match=r"outside '.*If the folder is not yours, do not trust it"):
        hft.HFTForCausalLM.from_pretrained(home / "model")
    assert (home / "victim.txt").read_text() == "mine"


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs another disk")
def test_a_part_may_be_on_another_disk(backbones, tokenizer, tmp_path):
    model = saved(backbones, tokenizer, tmp_path / "m", {"a": [], "b": []})
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        if os.stat(elsewhere).st_dev == os.stat(tmp_path).st_dev:
            pytest.skip("it is the same disk")
        (tmp_path / "m/tasks").rename(tmp_path / "was")
        (tmp_path / "m/tasks").symlink_to(elsewhere)
        model.save_pretrained(tmp_path / "m")
        assert not list((tmp_path / "m").glob(".w*")) and sorted(os.listdir(elsewhere)) == [
            "a.safetensors",
            "b.safetensors",
        ]
        assert read_gates(tmp_path / "m")[0].task_names() == ["a", "b"]
        saved(backbones, tokenizer, tmp_path / "n", {"c": []})
        (tmp_path / "m/notes.txt").write_text("mine")
        merge_models(tmp_path / "m", tmp_path / "n", tmp_path / "union")
    assert hft.HFTForCausalLM.from_pretrained(tmp_path / "union").hierarchy.names == ("a", "b", "c")
    assert not (tmp_path / "union/notes.txt").exists()


def test_a_union_has_the_words_of_its_tasks(backbones, tokenizer, tmp_path):
    saved(backbones, tokenizer, tmp_path / "bare", {"a": []}, with_words=False)
    saved(backbones, tokenizer, tmp_path / "worded", {"b": []})
    eos = json.loads((tmp_path / "worded/generation_config.json").read_text()) | {"eos_token_id": [2, 4]}
    (tmp_path / "worded/generation_config.json").write_text(json.dumps(eos))
    (tmp_path / "worded/chat_template.jinja").write_text("mine")
    merge_models(tmp_path / "bare", tmp_path / "worded", tmp_path / "u")
    assert (tmp_path / "u/chat_template.jinja").read_text() == "mine"
    assert json.loads((tmp_path / "u/generation_config.json").read_text())["eos_token_id"] == [2, 4]
    saved(backbones, tokenizer, tmp_path / "other", {"c": []})
    for name in ("chat_template.jinja", "generation_config.json"):
        with pytest.raises(ValueError, match=f"The models differ in {name}"):
            merge_models(tmp_path / "other", tmp_path / "worded", tmp_path / "no")
        (tmp_path / f"worded/{name}").write_text((tmp_path / f"other/{name}").read_text())
    merge_models(tmp_path / "other", tmp_path / "worded", tmp_path / "yes")


def test_renames_that_could_not_be(backbones, tokenizer, tmp_path, capsys):
    for name in ("one", "two"):
        saved(backbones, tokenizer, tmp_path / name, {"a": []})
    command = ["merge", str(tmp_path / "one"), str(tmp_path / "two"), "--out", str(tmp_path / "u")]
    for rename, message in (
        (["--rename", "a=con"], "Windows has no files of that name"),
        (["--rename", "a=b", "--rename", "a=c"], "--rename names a task twice: a=b, a=c"),
    ):
        assert main([*command, *rename]) == 2 and message in capsys.readouterr().err


def test_what_the_router_knew_goes_with_its_last_task(backbones, tokenizer, tmp_path):
    model = saved(backbones, tokenizer, tmp_path, {"a": [], "b": []})
    model.add_routes("a", [[5, 6, 7 + i] for i in range(9)])
    model.save_pretrained(tmp_path)
    assert (tmp_path / "router.safetensors").exists()
    model.remove_task("a")
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "router.safetensors").exists()


def test_only_a_models_own_files_are_pushed(backbones, tokenizer, tmp_path):
    saved(backbones, tokenizer, tmp_path, {"a": []})
    (tmp_path / "pictures").mkdir()
    for name in ("tokenizer_corpus.txt", "my.model", "pictures/holiday.jpg", "pictures/gates.png", "LICENSE"):
        (tmp_path / name).write_text("x")
    own = {path.as_posix() for path in own_files(tmp_path, read_gates(tmp_path)[0])}
    assert own >= {"config.json", "tasks/a.safetensors", "tokenizer.json", "pictures/gates.png", "LICENSE"}
    assert not own & {"tokenizer_corpus.txt", "my.model", "pictures/holiday.jpg"}


def test_a_push_is_private_only_if_that_is_said(backbones, tokenizer, tmp_path, monkeypatch):
    saved(backbones, tokenizer, tmp_path, {"a": []})
    seen = []
    monkeypatch.setattr("hft.upload_hft.check_shareable", lambda config: None)
    monkeypatch.setattr(
        "huggingface_hub.create_repo",
        lambda name, private, **_: seen.append(private) or argparse.Namespace(repo_id=name),
    )
    monkeypatch.setattr(
        "hft.upload_hft.upload",
        lambda folder, name, message, private: seen.append(private) or argparse.Namespace(repo_url=name, oid="0"),
    )
    for private in (False, True):
        commands.push(argparse.Namespace(model=tmp_path, repo_id="me/x", private=private, message=""), {})
    assert seen == [None, None, True, True]


def test_what_is_pushed_is_described_as_it_is(backbones, tokenizer, tmp_path):
    model = saved(backbones, tokenizer, tmp_path / "m", {"a": [], "b": ["a"]})
    known = {"a": SCORE, "b": SCORE}
    stage = {"level": 1, "tasks": ["a", "b"], "steps": 1, "seconds": 1.0, "log": [], "scores": known}
    text = card_of(tmp_path / "m", before=known, stages=[stage])
    (tmp_path / "m/README.md").write_text(text + "\nA word of mine, and me/one-more.\n")
    before = {path: path.read_bytes() for path in (tmp_path / "m").rglob("*") if path.is_file()}
    with as_pushed(tmp_path / "m", "you/two") as folder:
        pushed = (folder / "README.md").read_text()
        assert "A word of mine, and me/one-more." in pushed and pushed.count('"you/two"') == 4
        assert "me/one" not in pushed.replace("me/one-more", "") and ModelCard(pushed).data.model_name == "two"
        assert (folder / "tasks/b.safetensors").read_bytes() == (tmp_path / "m/tasks/b.safetensors").read_bytes()
    assert {path: path.read_bytes() for path in (tmp_path / "m").rglob("*") if path.is_file()} == before
    RunRecord(before=known).write(tmp_path / "m")
    model.remove_task("b")
    model.add_task("c")
    model.save_pretrained(tmp_path / "m")
    with as_pushed(tmp_path / "m", "you/two") as folder:
        pushed = (folder / "README.md").read_text()
        assert "b" not in re.findall(r"^\| (\w+) \|", pushed, re.MULTILINE) and '"you/two"' in pushed
        assert "1 tasks on" in pushed and "Not learnt yet: c." in pushed and 'task="a"' in pushed


def test_cards_of_models_without_tasks_or_a_past(backbones, tokenizer, tmp_path):
    model = saved(backbones, tokenizer, tmp_path, {"a": []})
    text = card_of(tmp_path, data={"a": {"rows": 3}})
    assert "- a: 3 rows" in text and "One stage a level" not in text
    model.remove_task("a")
    model.save_pretrained(tmp_path)
    text = card_of(tmp_path)
    assert 'task=""' not in text and "model.generate(**inputs)" in text and 'model.add_task("another")' in text


def test_files_of_peoples_own_stay(backbones, tokenizer, tmp_path, capsys):
    saved(backbones, tokenizer, tmp_path, {"a": []})
    card_of(tmp_path)
    (tmp_path / "pictures/mine.jpg").write_text("mine")
    renew_model_card(tmp_path, RunRecord())
    assert (tmp_path / "pictures/mine.jpg").exists() and (tmp_path / "pictures/gates.png").exists()
    (tmp_path / "report.html").write_text("<p>my own</p>")
    assert main(["report", str(tmp_path)]) == 2 and "is no report of HFT's" in capsys.readouterr().err
    card_of(tmp_path)
    assert (tmp_path / "report.html").read_text() == "<p>my own</p>"


@pytest.mark.parametrize("values", [{"before": {"a": {}}}, {"stages": None}])
def test_a_record_of_another_shape_is_named(tmp_path, values):
    (tmp_path / "run.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="is no record of a run"):
        RunRecord.load(tmp_path)


def test_a_gguf_file_that_was_cut_short_is_named(tmp_path, monkeypatch):
    def cut(path):
        raise ValueError("cannot reshape array of size 160 into shape (8,32)")

    monkeypatch.setattr(gguf_files, "GGUFReader", cut)
    with pytest.raises(OSError, match="it was cut short: is the disk full"):
        gguf_files.read_lora_gguf(tmp_path / "x.gguf", None)


def test_pictures_have_room_for_pages_and_names(tmp_path):
    tree = hft.Hierarchy({f"t{i}": [f"t{i - 1}"] if i else [] for i in range(8)})
    means = {
        f"t{i}": {**{f"t{j}": 1.0 for j in range(i + 1)}, **{f"page:{p}": 0.5 for p in range(9)}} for i in range(8)
    }
    boxes = []

    def look(figure, *_, **__):
        FigureCanvasAgg(figure).draw()
        its = [text for text in figure.axes[0].texts if text.get_text().startswith("t")]
        boxes.extend(text.get_bbox_patch().get_window_extent() for text in its)

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", look)
        _draw(tree, means, tmp_path / "x.png")
    boxes.sort(key=lambda box: box.y0)
    assert len(boxes) == 8 and all(low.y1 < high.y0 for low, high in itertools.pairwise(boxes))
    figure = scores_chart([{"a": 1.0}, {"a": 1.0}], ["1: yahoo_answers, amazon", "1: agnews, dbpedia"])
    assert {label.get_rotation() for label in figure.axes[0].get_xticklabels()} == {30.0}
