"""Pushing to a real HTTP hub on loopback, and loading from it where this package cannot be imported."""

import json
import re
import shutil
import subprocess
import textwrap
from contextlib import contextmanager
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from .hub import Hub, serving
from .test_storage import run_clean, start_clean


BUILD = """
    import sys, torch, hft
    from transformers import AutoTokenizer
    torch.manual_seed(0)
    model = hft.HFTForCausalLM.from_backbone("me/base", {"a": [], "b": ["a"]}, rank=2, memory_config={"slots": 2})
    for level in model.hierarchy.levels():
        model.start_stage(level)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.2)
        model.seal(level)
    model.add_routes("a", [[5, 6, 7 + i] for i in range(9)])
    x = torch.tensor([[5, 6, 7]])
"""

# What these print, one line each time that they are told to go on, is read by the test (see `talking`).
PUSH_TWICE = (
    BUILD
    + """
    model.push_to_hub("me/hft", private=True, commit_message="two tasks")
    print(float(model(x, task="b").logits.double().sum()), flush=True)
    model.add_task("c", ["b"])
    model.start_stage(["c"])
    model.seal(["c"])
    sys.stdin.readline()
    model.push_to_hub("me/hft", commit_message="one more")
    print("done", flush=True)
"""
)

PUSH_AS_TOLD = (
    BUILD
    + """
    from huggingface_hub.errors import HfHubHTTPError
    for repository in iter(sys.stdin.readline, ""):
        try:
            model.push_to_hub(repository.strip())
            print("pushed", flush=True)
        except HfHubHTTPError as error:
            print("failed", error.response.status_code, flush=True)
"""
)

LOAD = """
    import sys
    sys.modules["hft"] = None
    import torch
    from transformers import AutoModel, AutoModelForCausalLM
    for place in sys.argv[1:]:
        repository, revision = place.split("@")
        model = AutoModelForCausalLM.from_pretrained(repository, trust_remote_code=True, revision=revision)
        AutoModel.from_pretrained(repository, trust_remote_code=True, revision=revision)
        print(float(model(torch.tensor([[5, 6, 7]]), task="b").logits.double().sum()), len(model.hierarchy))
"""


@pytest.fixture
def hub(backbones, tmp_path):
    base = shutil.copytree(backbones["llama"], tmp_path / "published")
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    made = Hub()
    made.publish("me/base", base)
    return made


def environment(tmp_path, address, token="good"):
    return {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_ENDPOINT": address,
            "HF_TOKEN": token, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}  # fmt: skip


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def last(hub, repo) -> tuple[str, Path]:
    """The newest commit of a repository, and its files."""
    return list(hub.commits[repo].items())[-1]


@contextmanager
def talking(code: str, tmp_path, **around: str):
    """A fresh process that answers a line with a line: a function that sends one, if any, and returns the next answer."""
    process = start_clean(code, tmp_path, stdin=subprocess.PIPE, **around)

    def ask(line: str | None = None) -> list[str]:
        if line is not None:
            process.stdin.write(line + "\n")
            process.stdin.flush()
        answer = process.stdout.readline()
        assert answer, process.stderr.read()[-3000:]
        return answer.split()

    try:
        yield ask
        process.stdin.close()
        assert process.wait(60) == 0, process.stderr.read()[-3000:]
    finally:
        process.kill()
        process.wait()


def test_push_load_add_a_task_push_again(hub, tmp_path):
    with serving(hub) as address:
        around = environment(tmp_path, address)
        with talking(PUSH_TWICE, tmp_path, **around) as ask:
            (expected,) = ask()
            first, folder = last(hub, "me/hft")
            assert hub.private["me/hft"] and hub.messages[first] == "two tasks"
            weights = {"model.safetensors", "router.safetensors", "pages/1.safetensors", "pages/2.safetensors",
                       "tasks/a.safetensors", "tasks/b.safetensors"}  # fmt: skip
            assert {name for name in files(folder) if name.endswith(".safetensors")} == weights
            assert run_clean(LOAD, tmp_path, "me/hft@main", **around).split() == [expected, "2"]

            hub.received.clear()
            assert ask("go on") == ["done"]
        second, folder = last(hub, "me/hft")
        assert hub.messages[second] == "one more"
        sizes = {name: (folder / name).stat().st_size for name in files(folder)}
        # the new task, its stage's page, and the gates; not the sealed tasks, their pages, nor what the router knows
        assert sorted(hub.received) == sorted(
            sizes[name] for name in ("tasks/c.safetensors", "pages/3.safetensors", "model.safetensors")
        )
        newest_and_pinned = run_clean(LOAD, tmp_path, "me/hft@main", f"me/hft@{first}", **around)
        assert newest_and_pinned.split() == [expected, "3", expected, "2"]
    offline = {**around, "HF_HUB_OFFLINE": "1"}
    assert run_clean(LOAD, tmp_path, "me/hft@main", **offline).split() == [expected, "3"]  # the hub is gone
    saved = json.loads((folder / "config.json").read_text())
    assert saved["backbone"] == "me/base" and len(saved["backbone_revision"]) == 40
    for name in files(folder):
        if not name.endswith(".safetensors"):
            assert str(tmp_path) not in (folder / name).read_text(), name


def test_a_model_pushed_without_a_tokenizer_has_its_backbones(hub, tmp_path):
    push = (
        BUILD
        + """
    model.push_to_hub("me/hft")
    """
    )
    code = """
    from hft.trainers.loading import load_tokenizer
    print(load_tokenizer("me/hft").get_vocab() == load_tokenizer("me/base").get_vocab())
    """
    with serving(hub) as address:
        around = environment(tmp_path, address)
        assert run_clean(push + code, tmp_path, **around) == "True\n"
        assert "tokenizer_config.json" not in files(last(hub, "me/hft")[1])
    assert run_clean(code, tmp_path, **{**around, "HF_HUB_OFFLINE": "1"}) == "True\n"  # the hub is gone


def test_a_hub_that_fails_in_the_middle_has_no_half_model(hub, tmp_path):
    places = {"me/one": "/lfs/", "me/two": "/commit/", "me/three": "preupload"}
    with serving(hub) as address:
        around = environment(tmp_path, address)
        with talking(PUSH_AS_TOLD, tmp_path, **around) as ask:
            for repository, place in places.items():
                hub.objects.clear()
                hub.fails = place
                assert ask(repository) == ["failed", "507"], place
                assert files(last(hub, repository)[1]) == {".gitattributes"}, place
                hub.fails = None
                assert ask(repository) == ["pushed"], place  # the next push repairs
        loaded = run_clean(LOAD, tmp_path, *(f"{repository}@main" for repository in places), **around)
    assert loaded.split()[1::2] == ["2"] * 3


def test_a_wrong_token(hub, tmp_path):
    code = (
        BUILD
        + """
    try:
        model.push_to_hub("me/hft")
    except Exception as error:
        print(type(error).__name__, "401" in str(error))
    """
    )
    with serving(hub) as address:
        found = run_clean(textwrap.dedent(code), tmp_path, **environment(tmp_path, address, token="bad"))
    assert found.split()[-1] == "True" and "me/hft" not in hub.commits


def test_the_command_and_the_trainer(hub, tmp_path):
    code = (
        BUILD
        + """
    import os
    from datasets import Dataset
    from hft.trainers import HFTTrainer, HFTTrainingConfig
    from hft.trainers.cli import main
    model.save_pretrained(sys.argv[1])
    open(sys.argv[1] + "/tasks/gone.safetensors", "w").close()  # of a task that was removed
    for name in ("my-notes.txt", "stage-1/checkpoint-1/modeling_hft.py", "lora/a.jinja"):  # what else there is
        os.makedirs(os.path.dirname(f"{sys.argv[1]}/{name}"), exist_ok=True)
        open(f"{sys.argv[1]}/{name}", "w").close()
    assert main(["push", sys.argv[1], "me/by-command", "--private", "--message", "hello"]) == 0
    model.add_task("t")
    args = HFTTrainingConfig(output_dir=sys.argv[2], max_steps=1, push_to_hub=True, hub_model_id="me/by-trainer", bf16=False,
                             report_to="none", save_strategy="steps", save_steps=1)
    rows = Dataset.from_list([{"prompt": "1", "completion": " 2"}] * 2)
    trainer = HFTTrainer(model, args, train_dataset={"t": rows}, processing_class=AutoTokenizer.from_pretrained("me/base"))
    trainer.train()
    trainer.push_to_hub(dataset_name="me/rows", tags="mine")
    """
    )
    with serving(hub) as address:
        run_clean(
            textwrap.dedent(code),
            tmp_path,
            str(tmp_path / "m"),
            str(tmp_path / "run"),
            **environment(tmp_path, address),
        )
    commit, folder = last(hub, "me/by-command")
    assert {name for name in files(folder) if name.startswith("tasks/")} == {
        "tasks/a.safetensors",
        "tasks/b.safetensors",
    }
    assert not [name for name in files(folder) if name.startswith(("my-", "stage-", "lora"))]
    assert hub.messages[commit] == "hello" and hub.private["me/by-command"]
    _, folder = last(hub, "me/by-trainer")
    names = files(folder)
    assert {"README.md", "tokenizer.json", "tasks/t.safetensors", "config.json"} <= names
    assert not [name for name in names if name.startswith("stage-") or "optimizer" in name]
    card = (folder / "README.md").read_text()
    assert str(tmp_path) not in card + (folder / "run.json").read_text() + (folder / "report.html").read_text()
    data = ModelCard(card).data
    assert data.datasets == ["me/rows"] and {"hft", "trl", "sft", "mine"} <= set(data.tags)
    for line in ("base_model: me/base", "base_model_relation: adapter", "license: apache-2.0", '"me/by-trainer"'):
        assert line in card, line
    assert {"pictures/hierarchy.png", "report.html", "run.json"} <= names
    assert set(re.findall(r"\]\((pictures/[^)]+)\)", card)) <= names


def test_tags_are_added_to_the_card_that_the_hub_has(hub, tmp_path):
    code = (
        BUILD
        + """
    model.push_to_hub("me/hft")
    model.add_model_tags("one")
    model.push_to_hub("me/hft")
    model.model_tags = None
    model.save_pretrained(sys.argv[1] + "/hft", push_to_hub=True, repo_id="me/hft", tags=["two"])
    model.push_to_hub("me/hft")
    """
    )
    with serving(hub) as address:
        run_clean(code, tmp_path, str(tmp_path), **environment(tmp_path, address))
    cards = [folder / "README.md" for folder in list(hub.commits["me/hft"].values())[-4:]]
    found = [ModelCard.load(card).data.tags if card.exists() else [] for card in cards]
    assert found == [[], ["one"], ["one", "two"], ["one", "two"]]
    assert ModelCard.load(cards[-1]).data.base_model == "me/base"


def test_a_removed_task_goes_from_the_hub_and_is_named(hub, tmp_path):
    code = (
        BUILD
        + """
    import logging
    logging.basicConfig(stream=sys.stdout)
    model.push_to_hub("me/hft")
    model.remove_task("b")
    model.push_to_hub("me/hft")
    """
    )
    with serving(hub) as address:
        said = run_clean(code, tmp_path, **environment(tmp_path, address))
    before, after = (files(folder) for folder in list(hub.commits["me/hft"].values())[-2:])
    assert {"tasks/b.safetensors", "pages/2.safetensors"} <= before - after
    assert "me/hft has b, which '" in said and "newest commit lacks" in said
