"""Two models that grew apart become one, and nothing computes otherwise."""

import json
import os
import re
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import hft
from hft.slim_hft import read_config, read_gates
from hft.trainers.cli import main
from hft.trainers.merge import merge_models
from hft.trainers.model_card import write_model_card
from hft.trainers.run_record import RunRecord

from .test_model import prompts
from .test_router import typical
from .tiny import bits, fill, grow


def branch(folder, tokenizer, out, names, seed, kinds=()):
    """Grows a saved model by a task on `a`, another on that, and a root; all with pages of their own."""
    model = hft.HFTForCausalLM.from_pretrained(folder)
    first, second, root = names
    for stage in ({first: ["a"], root: []}, {second: [first]}):
        for name, parents in stage.items():
            model.add_task(name, parents)
        model.start_stage(stage)
        fill(model, seed=seed, only_trainable=True)
        model.seal(stage)
    for name, kind in zip(names, kinds, strict=False):
        model.add_routes(name, [typical(kind, s)[0].tolist() for s in range(16)])
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return model


@pytest.fixture
def grown_apart(backbones, tokenizer, tmp_path):
    base = hft.HFTForCausalLM.from_backbone(
        backbones["llama"], {"a": []}, rank=3, memory_config={"slots": 2}, router_config={"num_features": 64}
    )
    grow(base)
    base.add_routes("a", [typical(0, s)[0].tolist() for s in range(16)])
    base.save_pretrained(tmp_path / "base")
    one = branch(tmp_path / "base", tokenizer, tmp_path / "one", ("b", "c", "r"), 5, kinds=(1, 2))
    other = branch(tmp_path / "base", tokenizer, tmp_path / "other", ("x", "y", "s"), 6, kinds=(3, 4))
    return one, other


def test_every_task_keeps_its_bits(grown_apart, tmp_path):
    one, other = grown_apart
    assert merge_models(tmp_path / "one", tmp_path / "other", tmp_path / "union") == ["x", "s", "y"]
    union = hft.HFTForCausalLM.from_pretrained(tmp_path / "union")
    assert union.hierarchy.names == ("a", "r", "s", "b", "x", "c", "y")
    x = prompts(2, 6)
    with torch.no_grad():
        for model, tasks in ((one, "abcr"), (other, "axys")):
            for task in tasks:
                assert bits(union(x, task=task).logits) == bits(model(x, task=task).logits), task
    assert [page["id"] for page in union.config.pages] == [1, 2, 3, 4, 5]
    assert union.config.task("y")["pages"] == [
        1,
        4,
        5,
    ]  # the shared page, and those that the other model called 2 and 3
    for kind, task in ((0, "a"), (1, "b"), (2, "c"), (3, "x"), (4, "y")):
        assert union.route(typical(kind, 99))[0].task == task
    union.add_task("both", ["c", "y"])  # and it grows on
    union.start_stage(["both"])
    union.save_pretrained(tmp_path / "again")
    merge_models(tmp_path / "one", tmp_path / "one", tmp_path / "same")
    assert hft.HFTForCausalLM.from_pretrained(tmp_path / "same").hierarchy.names == one.hierarchy.names


def test_a_task_that_one_model_removed_is_known_where_the_other_has_it(grown_apart, tmp_path):
    for folder, task in (("one", "c"), ("other", "y")):
        model = hft.HFTForCausalLM.from_pretrained(tmp_path / folder)
        model.remove_task(task)
        model.save_pretrained(tmp_path / f"less of {folder}")
    for one, other, gone in (
        ("less of one", "less of other", "cy"),
        ("less of one", "other", "c"),
        ("one", "less of one", ""),
        ("less of one", "one", ""),
    ):
        merge_models(tmp_path / one, tmp_path / other, tmp_path / f"{one}, {other}")
        union = hft.HFTForCausalLM.from_pretrained(tmp_path / f"{one}, {other}")
        for kind, task in ((0, "a"), (1, "b"), (2, "c"), (4, "y")):
            if task != "y" or "other" in other:
                (route,) = union.route(typical(kind, 99))
                assert route.task == ("backbone" if task in gone else task), (one, other, task)
                assert (route.reason == f"it belongs to {task}, which was removed") == (task in gone)


@pytest.mark.parametrize("swapped", [False, True])
def test_a_task_that_was_removed_is_none_that_only_has_its_name(backbones, tokenizer, tmp_path, swapped):
    """Its prompts go to the backbone, as before, and those of the living task to that."""
    base = hft.HFTForCausalLM.from_backbone(
        backbones["llama"], {"a": []}, rank=2, memory_config={"read": "off"}, router_config={"num_features": 64}
    )
    grow(base)
    base.add_routes("a", [typical(0, s)[0].tolist() for s in range(16)])
    base.save_pretrained(tmp_path / "base")
    for name, kind in (("lives", 1), ("gone", 2)):
        model = hft.HFTForCausalLM.from_pretrained(tmp_path / "base")
        model.add_task("x")
        model.start_stage(["x"])
        model.seal(["x"])
        model.add_routes("x", [typical(kind, s)[0].tolist() for s in range(16)])
        if name == "gone":
            model.remove_task("x")
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    one, other = ("gone", "lives") if swapped else ("lives", "gone")
    merge_models(tmp_path / one, tmp_path / other, tmp_path / "union")
    union = hft.HFTForCausalLM.from_pretrained(tmp_path / "union")
    for kind, expected in ((1, "x"), (2, "backbone"), (0, "a")):
        routes = union.route(torch.cat([typical(kind, s) for s in range(20, 30)]))
        assert [route.task for route in routes].count(expected) >= 8, (kind, routes[0])


def test_a_task_may_get_the_name_of_one_that_was_removed(grown_apart, tmp_path):
    model = hft.HFTForCausalLM.from_pretrained(tmp_path / "other")
    model.remove_task("y")
    model.save_pretrained(tmp_path / "less")
    merge_models(tmp_path / "one", tmp_path / "less", tmp_path / "union", {"x": "y"})
    union = hft.HFTForCausalLM.from_pretrained(tmp_path / "union")
    for kind, expected in ((0, "a"), (1, "b"), (3, "y"), (4, "backbone")):
        assert union.route(typical(kind, 99))[0].task == expected


def test_pages_of_the_same_content_stay_several(backbones, tokenizer, tmp_path):
    """As two pages that were never trained and were filled with the same numbers."""
    base = hft.HFTForCausalLM.from_backbone(backbones["llama"], {"a": []}, rank=3, memory_config={"slots": 2})
    grow(base)
    base.save_pretrained(tmp_path / "base")
    for name, names in (("one", "bcr"), ("other", "xys")):
        model = branch(tmp_path / "base", tokenizer, tmp_path / name, names, 5)
        with torch.no_grad():
            for parameter in model.hft_memory.parameters():
                parameter.fill_(0.25)
        model.save_pretrained(tmp_path / name)
    before = model(prompts(2, 6), task="y").logits
    merge_models(tmp_path / "one", tmp_path / "other", tmp_path / "union")
    union = hft.HFTForCausalLM.from_pretrained(tmp_path / "union")
    assert bits(union(prompts(2, 6), task="y").logits) == bits(before)
    assert len(set(union.config.task("y")["pages"])) == len(model.config.task("y")["pages"]) == 3


def test_clashes_are_refused_or_renamed(grown_apart, tokenizer, tmp_path, capsys):
    third = branch(tmp_path / "base", tokenizer, tmp_path / "third", ("b", "z", "r"), 9, kinds=(5,))
    command = ["merge", str(tmp_path / "one"), str(tmp_path / "third"), "--out", str(tmp_path / "union")]
    assert main(command) == 2
    assert "Both models have a task 'b', and they are not the same" in capsys.readouterr().err
    assert not (tmp_path / "union").exists()
    assert main([*command, "--rename", "b=b2", "--rename", "r=r2"]) == 0
    assert "3 tasks came from" in capsys.readouterr().out
    union = hft.HFTForCausalLM.from_pretrained(tmp_path / "union")
    assert union.hierarchy.parents("z") == ("b2",)
    x = prompts(2, 6)
    with torch.no_grad():
        for name, old in (("b2", "b"), ("z", "z"), ("r2", "r")):
            assert bits(union(x, task=name).logits) == bits(third(x, task=old).logits)
    assert union.route(typical(5, 77))[0].task == "b2"
    for more, message in (
        (["--rename", "bb=c"], "--rename names the unknown task 'bb'. Did you mean 'b'?"),
        (["--rename", "b"], "--rename takes OLD=NEW, not 'b'."),
        (["--rename", "b=c", "--rename", "r=r2"], "The task 'c' is a duplicate"),
        ([], "is not empty; choose a new folder."),
        ([], "choose one beside it"),
    ):
        out = {"is not empty; choose a new folder.": "union", "choose one beside it": "one/union"}.get(
            message, "other union"
        )
        assert main([*command[:-1], str(tmp_path / out), *more]) == 2
        assert message in capsys.readouterr().err


def test_a_task_may_be_called_as_a_folder_of_checkpoints(backbones, tmp_path):
    for folder, name in (("one", "stage-1"), ("other", "x")):
        model = hft.HFTForCausalLM.from_backbone(backbones["llama"], {name: []}, rank=3, memory_config={"slots": 2})
        grow(model)
        model.save_pretrained(tmp_path / folder)
    merge_models(tmp_path / "one", tmp_path / "other", tmp_path / "union")
    assert hft.HFTForCausalLM.from_pretrained(tmp_path / "union").hierarchy.names == ("stage-1", "x")


def test_backbones_of_different_dtypes_are_not_united(backbones, tmp_path):
    for folder, dtype in (("one", torch.float32), ("other", torch.bfloat16)):
        model = hft.HFTForCausalLM.from_backbone(backbones["llama"], {folder: []}, rank=3, dtype=dtype)
        grow(model)
        model.save_pretrained(tmp_path / folder)
    with pytest.raises(ValueError, match="The models differ in `dtype`"):
        merge_models(tmp_path / "one", tmp_path / "other", tmp_path / "union")


def test_names_of_left_out_and_of_shared_tasks_are_kept(grown_apart, tmp_path):
    hft.HFTForCausalLM.from_pretrained(tmp_path / "one", tasks=["r"]).save_pretrained(tmp_path / "part")
    for first, second, rename, message in (
        ("part", "other", {"x": "c"}, "The task 'c' is in the whole of which '.*part' is a part"),
        ("other", "part", {"r": "c"}, "The task 'c' is in the whole of which '.*part' is a part"),
        ("one", "other", {"a": "z"}, "Both models have the same task 'a'"),
    ):
        with pytest.raises(ValueError, match=message):
            merge_models(tmp_path / first, tmp_path / second, tmp_path / "union", rename)
    assert not (tmp_path / "union").exists()


def test_lineage_is_checked(grown_apart, tmp_path, backbones):
    entry = json.loads((tmp_path / "one/config.json").read_text())["tasks"][0]
    assert re.fullmatch("[0-9a-f]{64}", entry["hash"])
    tensors = load_file(tmp_path / "other/tasks/a.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, tmp_path / "other/tasks/a.safetensors")
    with pytest.raises(ValueError, match=r"a\.safetensors' is not the file that config\.json was written with"):
        merge_models(tmp_path / "one", tmp_path / "other", tmp_path / "union")
    foreign = hft.HFTForCausalLM.from_backbone(backbones["qwen3"], {"q": []})
    foreign.seal(["q"])
    foreign.save_pretrained(tmp_path / "foreign")
    with pytest.raises(ValueError, match="The models differ in `backbone`"):
        merge_models(tmp_path / "one", tmp_path / "foreign", tmp_path / "union")
    foreign.add_task("open")
    foreign.save_pretrained(tmp_path / "foreign")
    with pytest.raises(ValueError, match=r"Task 'open' of .* is not sealed"):
        merge_models(tmp_path / "one", tmp_path / "foreign", tmp_path / "union")


def test_a_task_that_one_model_refreshed_is_refused(grown_apart, tmp_path):
    path = tmp_path / "other/model.safetensors"
    save_file({k: v * 0.5 if k.startswith("gates.a.") else v for k, v in load_file(path).items()}, path)
    with pytest.raises(ValueError, match="The gates of task 'a' differ: it was refreshed in one of the two models"):
        merge_models(tmp_path / "one", tmp_path / "other", tmp_path / "union")


def test_the_router_that_has_learnt_says_how_it_looks(backbones, tokenizer, tmp_path):
    """Its template and size come along, and two that look differently do not add up."""
    for name, task, features in (("one", "b", 64), ("other", "x", 32)):
        model = hft.HFTForCausalLM.from_backbone(
            backbones["llama"], {task: []}, rank=3, router_config={"num_features": features}
        )
        grow(model)
        if name == "other":
            model.config.router_config.prefix = [5, 6]
            model.add_routes(task, [typical(1, s)[0].tolist() for s in range(16)])
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    merge_models(tmp_path / "one", tmp_path / "other", tmp_path / "union")
    union = hft.HFTForCausalLM.from_pretrained(tmp_path / "union")
    known = union.config.router_config
    assert (known.prefix, known.num_features, known.tasks) == ([5, 6], 32, ["x"])
    x = typical(1, 99)
    assert union.route(x) == hft.HFTForCausalLM.from_pretrained(tmp_path / "other").route(x)
    one = hft.HFTForCausalLM.from_pretrained(tmp_path / "one")
    one.add_routes("b", [typical(0, s)[0].tolist() for s in range(16)])
    one.save_pretrained(tmp_path / "one")
    with pytest.raises(ValueError, match=re.escape("The two routers differ in `num_features` (64 and 32)")):
        merge_models(tmp_path / "one", tmp_path / "other", tmp_path / "second")


def test_the_union_is_described_as_what_it_is(grown_apart, tmp_path):
    """Data of the tasks of both; no scores and no pictures of a model that is none of the two."""
    for folder, own in (("one", "b"), ("other", "x")):
        score = {"score": 5.0, "se": 1.0, "rows": 2}
        stage = {"level": 1, "tasks": ["a", own], "log": [], "scores": {own: score}}
        record = RunRecord(data={"a": {"rows": 3}, own: {"rows": 4}}, stages=[stage])
        record.save(tmp_path / folder)
        config, gates = read_gates(tmp_path / folder)
        write_model_card(config, gates, tmp_path / folder, record)
    merge_models(tmp_path / "one", tmp_path / "other", tmp_path / "union", {"x": "new"})
    record = RunRecord.load(tmp_path / "union")
    assert record.data == {"a": {"rows": 3}, "b": {"rows": 4}, "new": {"rows": 4}} and record.matrix() == []
    card = (tmp_path / "union/README.md").read_text()
    assert "new" in card and "5.0" not in card
    names = {path.name for path in (tmp_path / "union/pictures").iterdir()}
    assert "hierarchy.svg" in names and "matrix.svg" not in names


def test_models_of_other_machines_are_united(grown_apart, tmp_path):
    """Their backbone is not here, their lists of linears are in another order, and somebody wrote in their card."""
    (tmp_path / "one/README.md").write_text("# My own words\n")
    for folder, names in (("one", ["q_proj", "v_proj"]), ("other", ["v_proj", "q_proj"])):
        config = json.loads((tmp_path / folder / "config.json").read_text())
        config.update(backbone="/gone/llama", target_modules=names)
        (tmp_path / folder / "config.json").write_text(json.dumps(config))
    config, gates = read_gates(tmp_path / "other")
    write_model_card(config, gates, tmp_path / "other")
    assert "/gone" not in (tmp_path / "other/README.md").read_text()
    merge_models(tmp_path / "one", tmp_path / "other", tmp_path / "union", {"x": "new"})
    assert (tmp_path / "union/README.md").read_text() == "# My own words\n"
    merge_models(tmp_path / "other", tmp_path / "one", tmp_path / "again")
    card = (tmp_path / "again/README.md").read_text()
    assert "a local backbone" in card and "/gone" not in card


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to be another user")
def test_archives_that_may_not_be_written_are_united(grown_apart, tmp_path):
    place = Path(tempfile.mkdtemp())  # where another user may go
    try:
        for folder in ("one", "other"):
            shutil.copytree(tmp_path / folder, place / folder)
            (place / folder / "dangling").symlink_to("/nowhere")
            for path in (place / folder, *(place / folder).rglob("*")):
                if not path.is_symlink():
                    path.chmod(0o555 if path.is_dir() else 0o444)
        os.chown(place, 65534, 65534)
        os.seteuid(65534)
        merge_models(place / "one", place / "other", place / "union", {"x": "new"})
        os.seteuid(0)
        assert {"a", "b", "new"} <= set(read_config(str(place / "union")).task_names())
    finally:
        os.seteuid(0)
        shutil.rmtree(place)
