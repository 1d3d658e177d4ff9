"""Loading a part of a slim model: only the files of some tasks and of what they stand on; the rest stays safe."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import hft
from hft.trainers.merge import merge_models

from .test_model import prompts
from .test_storage import run_clean
from .tiny import bits, fill


@pytest.fixture
def whole(model, tmp_path):
    """A slim folder of a -> (b, c) -> d and e -> f, all sealed, all known to the router."""
    model.seal(model.hierarchy.names)
    for i, task in enumerate(model.hierarchy.names):
        model.add_routes(task, (prompts(8, 12, seed=i) % 40 + 5 + 40 * i).tolist())
    model.save_pretrained(tmp_path / "whole")
    return tmp_path / "whole"


def only_files(folder, tmp_path, tasks, pages):
    """A copy of a model's folder that lacks the files of all other tasks and pages."""
    copy = tmp_path / "files"
    shutil.copytree(folder, copy)
    for path in copy.glob("*/*.safetensors"):
        if path.stem not in [*tasks, *pages]:
            path.unlink()
    return copy


def test_only_the_files_of_the_path_are_read(whole, model, tmp_path):
    """The other files are not even there."""
    folder = only_files(whole, tmp_path, ["e", "f"], ["1", "2"])
    x = prompts(2, 6)
    part = hft.HFTForCausalLM.from_pretrained(folder, tasks=["f"])
    assert part.hierarchy.names == ("e", "f") and [page["id"] for page in part.config.pages] == [1, 2]
    assert {name.rsplit("_", 1)[1] for name, _ in part.named_parameters() if name.startswith("hft_nodes")} == {
        "e",
        "f",
    }
    with torch.no_grad():
        for task in ("e", "f", ["f", None]):
            assert bits(part(x, task=task).logits) == bits(model(x, task=task).logits)
    with pytest.raises(
        ValueError, match="Task 'd' was left out when this part of a model was loaded: load it with `t"
    ):
        part(x, task="d")
    with pytest.raises(OSError, match="the file is missing"):
        hft.HFTForCausalLM.from_pretrained(folder, tasks=["b"])


def test_a_borrowed_node_comes_along(whole, model, tmp_path):
    with torch.no_grad():
        model._read_everything("e")
        model.hft_gates.of("e").add_(0.1)
    model.save_pretrained(whole)
    part = hft.HFTForCausalLM.from_pretrained(whole, tasks=["e"])
    assert set(part.hierarchy.names) == {*"abcdef"} == {"e", *model.config.task("e")["borrows"]}
    x = prompts(2, 6)
    assert bits(part(x, task="e").logits) == bits(model(x, task="e").logits)


def test_auto_classes_take_the_tasks_too(whole, model):
    x = prompts(2, 6)
    part = AutoModelForCausalLM.from_pretrained(whole, tasks=["b"])
    assert part.hierarchy.names == ("a", "b")
    assert bits(part(x, task="b").logits) == bits(model(x, task="b").logits)
    config, unused = AutoConfig.from_pretrained(whole, tasks=["b"], other=1, return_unused_kwargs=True)
    assert config.task_names() == ["a", "b"] and unused == {"other": 1}
    assert AutoConfig.from_pretrained(whole).left_out == {}
    entry = {"name": "z", "parents": []}  # a list of entries is what it always was: the field itself
    assert AutoConfig.from_pretrained(whole, tasks=[entry]).tasks == [entry]
    assert hft.HFTForCausalLM.from_pretrained(whole, config=config).hierarchy.names == ("a", "b")


REMOTE = """
    import sys
    sys.modules["hft"] = None  # this process cannot import the package
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    folder, out = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, tasks=["f"])
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    assert model.hierarchy.names == ("e", "f")
    with torch.no_grad():
        save_file({"f": model(torch.tensor([[5, 6, 7, 8]]), task="f").logits}, out)
"""


def test_7_a_part_loads_as_remote_code(whole, model, tmp_path):
    run_clean(REMOTE, tmp_path, str(only_files(whole, tmp_path, ["e", "f"], ["1", "2"])), str(tmp_path / "out"))
    with torch.no_grad():
        expected = model(torch.tensor([[5, 6, 7, 8]]), task="f").logits
    assert bits(load_file(tmp_path / "out")["f"]) == bits(expected)


def test_the_router_leaves_other_tasks_prompts_to_the_backbone(whole, model):
    part = hft.HFTForCausalLM.from_pretrained(whole, tasks=["d"])
    x = torch.cat([prompts(2, 12, seed=i) % 40 + 5 + 40 * i for i in range(6)])
    expected, found = model.route(x), part.route(x)
    assert {route.task for route in expected} >= {"d", "e", "f"}
    for ours, theirs in zip(expected, found, strict=True):
        if ours.task in ("e", "f"):
            assert theirs.task == "backbone" and theirs.reason == f"it belongs to {ours.task}, which is not loaded"
        else:
            assert theirs == ours
    assert [route.task for route in part.route_features(part.features_of(x.tolist()))] == [r.task for r in found]


def test_in_doubt_a_part_goes_back_to_the_ancestor_that_the_whole_goes_to(backbones, tmp_path):
    """Of two that are as near, whatever was loaded."""
    tree = {"r2": [], "r1": [], "x": ["r2", "r1"], "y": ["r2", "r1"]}
    model = hft.HFTForCausalLM.from_backbone(backbones["llama"], tree)
    model.seal(model.hierarchy.names)
    model.save_pretrained(tmp_path)
    assert model.hierarchy.lowest_common_ancestor(["x", "y"]) == "r1"
    for tasks in (["r1"], ["r2"], ["r1", "r2"], ["x"]):
        part = hft.HFTForCausalLM.from_pretrained(tmp_path, tasks=tasks)
        assert part.config.whole_hierarchy().lowest_common_ancestor(["x", "y"]) == "r1"


def test_a_part_never_wipes_out_the_rest(whole, tmp_path):
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    part = hft.HFTForCausalLM.from_pretrained(whole, tasks=["b"])
    part.add_task("g", ["b"])
    for slim in (True, False):
        with pytest.raises(
            ValueError, match="also holds c, d, e, f, which this model was loaded without and which would"
        ):
            part.save_pretrained(whole, slim=slim)
    with pytest.raises(
        ValueError, match=re.escape("This is a part of a model (without c, d, e, f): unite it with the whole")
    ):
        part.push_to_hub("me/my-hft")
    with pytest.raises(ValueError, match="The task 'f' is in the whole of which this model is a part"):
        part.add_task("f")
    assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == before
    part.save_pretrained(tmp_path / "part")
    again = hft.HFTForCausalLM.from_pretrained(tmp_path / "part")  # still a part
    with pytest.raises(ValueError, match="also holds"):
        again.save_pretrained(whole)
    part.save_pretrained(tmp_path / "full", slim=False)
    assert hft.HFTForCausalLM.from_pretrained(tmp_path / "full").hierarchy.names == ("a", "b", "g")


def test_what_is_learnt_on_a_part_unites_with_the_whole(whole, model, tmp_path):
    part = hft.HFTForCausalLM.from_pretrained(whole, tasks=["f"])
    part.add_task("g", ["f"], rank=2)
    part.start_stage(["g"])
    fill(part, only_trainable=True)
    part.seal(["g"])
    part.save_pretrained(tmp_path / "part")
    kept = json.loads((tmp_path / "part/config.json").read_text())["tasks"]
    assert [task["hash"] for task in kept[:2]] == [hashes(whole)[task] for task in ("e", "f")]  # the same lineage
    x = prompts(2, 6)
    for name, (one, other) in {"out": (whole, tmp_path / "part"), "back": (tmp_path / "part", whole)}.items():
        merge_models(one, other, tmp_path / name)
        union = hft.HFTForCausalLM.from_pretrained(tmp_path / name)
        assert union.config.left_out == {} and set(union.hierarchy.names) == {*"abcdefg"}
        with torch.no_grad():
            assert bits(union(x, task="g").logits) == bits(part(x, task="g").logits)
            assert bits(union(x, task="d").logits) == bits(model(x, task="d").logits)


def hashes(folder):
    return {task["name"]: task["hash"] for task in json.loads((folder / "config.json").read_text())["tasks"]}


def test_wrong_parts(whole, model, tmp_path):
    for tasks, message in (
        (["bb"], "Unknown task 'bb'. Did you mean 'b'?"),
        ("b", "`tasks` is the string 'b'; give a list: ['b']."),
    ):
        for load in (hft.HFTForCausalLM, AutoModelForCausalLM):
            with pytest.raises(ValueError, match=re.escape(message)):
                load.from_pretrained(whole, tasks=tasks)
    model.add_task("open", ["a"])
    model.save_pretrained(whole)
    with pytest.raises(ValueError, match="`tasks` names 'open', which still trains; load the whole model"):
        hft.HFTForCausalLM.from_pretrained(whole, tasks=["open"])
    model.save_pretrained(tmp_path / "full", slim=False)
    with pytest.raises(ValueError, match="this one is saved in the full form, all tasks in one file; load it whole"):
        hft.HFTForCausalLM.from_pretrained(tmp_path / "full", tasks=["a"])
