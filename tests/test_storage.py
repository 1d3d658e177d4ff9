"""Saving and loading: invariant 7, and what is on disk stays whole."""

import copy
import functools
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3Config,
    GenerationConfig,
)

import hft
from hft.files_hft import disk_errors
from hft.slim_hft import read_config
from hft.trainers.run_record import write_json

from .hub import Hub, serving
from .test_model import prompts
from .tiny import bits, fill, snapshot


@pytest.fixture
def saved(model, tmp_path, tokenizer):
    """A slim folder; some tasks sealed, some not."""
    model.seal(["a", "b", "c", "e", "f"])
    folder = tmp_path / "slim"
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_sealed_tasks_file_does_not_change_with_the_models_dtype(backbones, tmp_path):
    """Nor its hash, by which `merge` knows it."""
    model = hft.HFTForCausalLM.from_backbone(backbones["llama"], {"a": []}, rank=3, dtype=torch.bfloat16)
    fill(model)
    model.start_stage(["a"])
    fill(model, only_trainable=True)
    model.seal(["a"])
    model.save_pretrained(tmp_path / "before")
    model.float().save_pretrained(tmp_path / "after")
    model.bfloat16().save_pretrained(tmp_path / "again")
    for other in ("after", "again"):
        for file in ("tasks/a.safetensors", "model.safetensors"):
            assert (tmp_path / "before" / file).read_bytes() == (tmp_path / other / file).read_bytes(), (other, file)
        assert read_config(tmp_path / other).tasks == read_config(tmp_path / "before").tasks


def test_what_is_not_finite_in_the_models_dtype_is_not_sealed(backbones):
    model = hft.HFTForCausalLM.from_backbone(backbones["llama"], {"a": []}, rank=3, dtype=torch.float16)
    model.start_stage(["a"])
    with torch.no_grad():
        next(iter(model.hft_nodes.values())).pair("a")[1].fill_(1e6)
    with pytest.raises(ValueError, match=r"not finite in torch\.float16"):
        model.seal(["a"])
    assert not model.config.sealed_tasks()


def test_slim_files_are_a_contract(saved, model):
    files = sorted(str(path.relative_to(saved)) for path in saved.rglob("*.safetensors"))
    pages = [f"pages/{page}.safetensors" for page in (1, 2, 3)]
    assert files == ["model.safetensors", *pages, *(f"tasks/{task}.safetensors" for task in "abcdef")]
    gates = load_file(saved / "model.safetensors")
    assert {name for name in gates if ".f." in name} == {
        f"gates.f.{source}" for source in ("e", "f", "page:1", "page:2")
    }
    assert {name.split(".")[1] for name in gates} == set("abcdef")
    assert {tuple(gate.shape) for gate in gates.values()} == {(2,)}
    page = load_file(saved / "pages/2.safetensors")
    assert page.keys() == {
        f"layers.{i}.{n}.{f}" for i in (0, 1) for n in ("self_attn.v_proj", "mlp.down_proj") for f in "KV"
    }
    assert list(page["layers.1.mlp.down_proj.K"].shape) == [2, 40]
    assert list(page["layers.1.mlp.down_proj.V"].shape) == [32, 2]
    node = load_file(saved / "tasks/f.safetensors")
    assert len(node) == 2 * 7 * 2  # two layers, seven linears, two factors
    assert list(node["layers.1.mlp.down_proj.A"].shape) == [5, 40]
    assert list(node["layers.1.mlp.down_proj.B"].shape) == [32, 5]
    config = json.loads((saved / "config.json").read_text())
    assert config["tasks"][4] == {
        **{"name": "d", "parents": ["b", "c"], "rank": 3, "sealed": False, "pages": [1, 2, 3], "borrows": []}
    }
    assert config["pages"][1] == {
        **{"id": 2, "slots": 2, "sealed": True, "writers": ["b", "c", "f"], "dtype": "float32"}
    }
    assert config["slim"] is True and config["format_version"] == 1 and "quantization_config" not in config
    assert config["auto_map"].keys() == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}


@pytest.mark.parametrize("slim", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_loaded_computes_the_same_bits(backbones, tmp_path, slim, dtype):
    model = hft.HFTForCausalLM.from_backbone(
        backbones["llama"], {"a": [], "b": ["a"], "c": ["a"]}, rank=3, dtype=dtype
    )
    for stage in (["a"], ["b"], ["c"]):  # c keeps its stage open
        model.start_stage(stage)
        fill(model, only_trainable=True)
        model.seal([] if stage == ["c"] else stage)
    model.save_pretrained(tmp_path, slim=slim)
    x = prompts(2, 6)
    for auto in (AutoModelForCausalLM, AutoModel):
        loaded = auto.from_pretrained(tmp_path)
        assert loaded.dtype == dtype
        assert not loaded.training
        with torch.no_grad():
            for task in (None, "a", "b", "c", ["c", None]):
                ours = model(x, task=task, output_hidden_states=True)
                theirs = loaded(x, task=task)
                if auto is AutoModel:
                    assert bits(theirs.last_hidden_state) == bits(ours.hidden_states[-1])
                else:
                    assert bits(theirs.logits) == bits(ours.logits)
        dtypes = {name: p.dtype for name, p in loaded.named_parameters()}
        assert dtypes["hft_gates.g_a"] == torch.float32
        assert dtypes["hft_nodes.layers_0_mlp_up_proj.A_a"] == dtype  # sealed: what it computes in
        assert dtypes["hft_nodes.layers_0_mlp_up_proj.A_c"] == torch.float32  # open: what it learns in
        trainable = {name for name, p in loaded.named_parameters() if p.requires_grad}
        assert dtypes["hft_memory.layers_0_mlp_up_proj.K_2"] == dtype
        assert dtypes["hft_memory.layers_0_mlp_up_proj.K_3"] == torch.float32
        assert trainable == {*loaded.task_parameters("c"), *loaded.page_parameters(3)}


def test_generation_config_and_chat_template_come_along(saved, tokenizer):
    loaded = AutoModelForCausalLM.from_pretrained(saved)
    assert loaded.generation_config.max_new_tokens == 7
    assert AutoTokenizer.from_pretrained(saved).chat_template == tokenizer.chat_template


def test_a_saved_model_saves_again(saved, tmp_path):
    first = AutoModelForCausalLM.from_pretrained(saved)
    first.save_pretrained(tmp_path / "again")
    for path in saved.rglob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(saved)).read_bytes()
    first.save_pretrained(tmp_path / "full", slim=False)
    AutoModelForCausalLM.from_pretrained(tmp_path / "full").save_pretrained(tmp_path / "slim again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "slim again")
    x = prompts(1, 5)
    assert bits(again(x, task="d").logits) == bits(first(x, task="d").logits)


REMOTE = """
    import sys
    sys.modules["hft"] = None  # this process cannot import the package
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    folder, out = sys.argv[1:]
    x = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    decoder = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model.add_task("later", ["d"])
    model.save_pretrained(out)  # remote code saves itself again
    with torch.no_grad():
        save_file({
            "backbone": model(x).logits,
            "d": model(x, task="d").logits,
            "mixed": model(x, task=["a", None]).logits,
            "answer": model.generate(x, task="d", max_new_tokens=5, do_sample=False),
            "hidden": decoder(x, task="d").last_hidden_state,
        }, out + "/logits.safetensors")
"""


@pytest.mark.parametrize("slim", [True, False])
def test_7_loads_as_remote_code_where_the_package_cannot_be_imported(model, tmp_path, tokenizer, slim):
    model.seal(list("aebcf"))
    folder, out = tmp_path / "model", tmp_path / "out"
    model.save_pretrained(folder, slim=slim)
    tokenizer.save_pretrained(folder)
    run_clean(REMOTE, tmp_path, str(folder), str(out))
    x = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    remote = load_file(out / "logits.safetensors")
    with torch.no_grad():
        assert bits(remote["backbone"]) == bits(model(x).logits)
        assert bits(remote["d"]) == bits(model(x, task="d").logits)
        assert bits(remote["mixed"]) == bits(model(x, task=["a", None]).logits)
        assert bits(remote["hidden"]) == bits(model(x, task="d", output_hidden_states=True).hidden_states[-1])
        assert remote["answer"].tolist() == model.generate(x, task="d", max_new_tokens=5, do_sample=False).tolist()
    assert hft.HFTForCausalLM.from_pretrained(out).hierarchy.path("later") == ("a", "b", "c", "d", "later")


BUILD = """
    import sys, torch, hft
    out = sys.argv[1]
    torch.manual_seed(0)
    model = hft.HFTForCausalLM.from_backbone("me/base", {"a": [], "b": ["a"]}, rank=2)
    for parameter in model.hft_nodes.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.seal(list("ab"))
    model.save_pretrained(out)
    print(float(model(torch.tensor([[5, 6, 7]]), task="b").logits.double().sum()))
"""

LOAD = """
    import sys
    sys.modules["hft"] = None
    import torch
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained("me/hft", trust_remote_code=True)
    AutoModel.from_pretrained("me/hft", trust_remote_code=True)
    AutoTokenizer.from_pretrained("me/base")
    print(float(model(torch.tensor([[5, 6, 7]]), task="b").logits.double().sum()))
"""


def test_from_a_hub_the_backbone_stays_at_its_commit(backbones, tmp_path):
    """Loaded by id as remote code, also offline; a newer commit of the backbone does not get under the tasks."""
    hub = Hub()
    first = hub.publish("me/base", backbones["llama"])
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    with serving(hub) as address:
        environment["HF_ENDPOINT"] = address
        built = run_clean(BUILD, tmp_path, str(tmp_path / "slim"), **environment)
        config = json.loads((tmp_path / "slim/config.json").read_text())
        assert (config["backbone"], config["backbone_revision"]) == ("me/base", first)

        newer = tmp_path / "newer"
        shutil.copytree(backbones["llama"], newer)
        changed = AutoModelForCausalLM.from_pretrained(newer)
        with torch.no_grad():
            changed.lm_head.weight.mul_(2)
        changed.save_pretrained(newer)
        hub.publish("me/base", newer)
        hub.publish("me/hft", tmp_path / "slim")
        assert run_clean(LOAD, tmp_path, **environment) == built
    assert run_clean(LOAD, tmp_path, **{**environment, "HF_HUB_OFFLINE": "1"}) == built  # the hub is gone


def start_clean(
    code: str, tmp_path, *arguments: str, stdin: int | None = None, **environment: str
) -> subprocess.Popen:
    """Begins code in a fresh process, in an empty folder, with a module cache of its own."""
    empty = tmp_path / "empty"
    empty.mkdir(exist_ok=True)
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", **environment}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        cwd=empty, env=environment, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def run_clean(code: str, tmp_path, *arguments: str, **environment: str) -> str:
    """Runs code in such a process, and gives what it printed."""
    with start_clean(code, tmp_path, *arguments, **environment) as process:
        try:
            printed, errors = process.communicate(timeout=300)
        finally:
            process.kill()
    assert process.returncode == 0, errors[-3000:]
    return printed


def test_a_slim_model_takes_its_backbone_from_elsewhere(saved, model, backbones, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(backbones["llama"], moved)
    edit(saved / "config.json", backbone="/nowhere/at/all")
    with pytest.raises(OSError, match=re.escape("The backbone '/nowhere/at/all' of the slim model")) as error:
        AutoModelForCausalLM.from_pretrained(saved)
    assert "say where: from_pretrained(..., backbone=...)" in str(error.value)
    loaded = AutoModelForCausalLM.from_pretrained(saved, backbone=str(moved))
    x = prompts(1, 5)
    assert bits(loaded(x, task="d").logits) == bits(model(x, task="d").logits)


def edit(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_missing_file_is_named(saved):
    (saved / "tasks/b.safetensors").unlink()
    with pytest.raises(
        OSError, match=re.escape("lists tasks/b.safetensors in its config.json, but the file is missing.")
    ):
        AutoModelForCausalLM.from_pretrained(saved)


@pytest.mark.parametrize("file", ["tasks/b.safetensors", "model.safetensors"])
@pytest.mark.parametrize("keep", [0, 5, 0.7])
def test_a_truncated_file_is_named(saved, file, keep):
    whole = (saved / file).read_bytes()
    (saved / file).write_bytes(whole[: int(keep * len(whole)) if keep < 1 else keep])
    with pytest.raises(OSError, match=re.escape(f"{file}' is no whole safetensors file")):
        AutoModelForCausalLM.from_pretrained(saved)


def test_a_truncated_full_model_is_named(model, tmp_path):
    model.save_pretrained(tmp_path, slim=False)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OSError, match="is no whole safetensors file"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_full_model_that_lacks_a_task_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path, slim=False)
    config = json.loads((tmp_path / "config.json").read_text())
    edit(tmp_path / "config.json", tasks=[*config["tasks"], {"name": "x", "parents": [], "rank": 3, "sealed": True}])
    with pytest.raises(ValueError, match=re.escape("its weights lack 'hft_gates.g_x'")):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_files_of_another_model_are_refused(saved, backbones, tmp_path):
    other = hft.HFTForCausalLM.from_backbone(backbones["llama"], {"b": []}, rank=2, target_modules=["q_proj"])
    other.save_pretrained(tmp_path / "other")
    (saved / "tasks/b.safetensors").write_bytes((tmp_path / "other/tasks/b.safetensors").read_bytes())
    with pytest.raises(
        ValueError, match=re.escape("does not fit its config.json: it lacks 'layers.0.mlp.down_proj.A'")
    ):
        AutoModelForCausalLM.from_pretrained(saved)
    (saved / "tasks/b.safetensors").write_bytes((saved / "tasks/f.safetensors").read_bytes())
    with pytest.raises(ValueError, match=re.escape("with shape [5, 32], and this model needs [3, 32]")):
        AutoModelForCausalLM.from_pretrained(saved)
    (saved / "tasks/b.safetensors").write_bytes((saved / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"does not fit its config\.json"):
        AutoModelForCausalLM.from_pretrained(saved)


def test_a_config_from_a_newer_version_is_refused(saved):
    edit(saved / "config.json", format_version=99)
    with pytest.raises(
        ValueError, match=re.escape("saved in HFT format 99, and this version reads formats up to 1. Upgrade")
    ):
        AutoModelForCausalLM.from_pretrained(saved)


def test_an_empty_folder_holds_no_model(tmp_path):
    with pytest.raises(OSError, match=r"config\.json"):
        hft.HFTForCausalLM.from_pretrained(tmp_path)


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="needs to mount a small disk")
def test_a_disk_that_is_really_full(saved, model, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=440k", "tmpfs", str(disk)]).returncode != 0:
        pytest.skip("may not mount here")
    try:
        model.save_pretrained(disk / "model")
        before = {path: path.read_bytes() for path in (disk / "model").rglob("*") if path.is_file()}
        for i in range(9):
            model.add_task(f"more{i}", rank=32)
        with pytest.raises(OSError, match=r"Cannot write .*No space left on device"):
            model.save_pretrained(disk / "model")
        assert {path: path.read_bytes() for path in (disk / "model").rglob("*") if path.is_file()} == before
    finally:
        subprocess.run(["umount", str(disk)])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_whoever_writes_to_a_full_disk_says_where():
    def by_hand(path):
        with open(path, "w") as file:
            file.write("x")

    for write in (lambda path: torch.save({"x": torch.zeros(9)}, path), by_hand):
        with pytest.raises(OSError, match=r"Cannot write run: .* What was saved before is whole"), disk_errors("run"):
            write("/dev/full")
    with pytest.raises(RuntimeError, match="something else"), disk_errors("run"):
        raise RuntimeError("something else")


def test_a_plain_model_is_no_hft_model(backbones):
    with pytest.raises(
        ValueError, match=r"is no HFT model but a plain 'llama'; build on it with HFTForCausalLM.from_backbone"
    ):
        hft.HFTForCausalLM.from_pretrained(backbones["llama"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 0}, "`rank` is 0"),
        ({"tasks": [{"name": "a", "parents": []}] * 2}, "The task 'a' is a duplicate"),
        ({"tasks": [{"name": "a", "parents": ["b"]}]}, "unknown parent 'b'"),
    ],
)
def test_wrong_configs(values, message):
    with pytest.raises(ValueError, match=message):
        hft.HFTConfig(**values)


def test_a_write_that_fails_leaves_what_was_there(saved, model, monkeypatch):
    before = {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()}
    fill(model, seed=9)
    written = []

    def disk_full(tensors, path):
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        written.append(path)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"new")

    monkeypatch.setattr("hft.slim_hft.write_tensors", disk_full)
    with pytest.raises(OSError, match="No space left on device"):
        model.save_pretrained(saved)
    assert len(written) == 3
    assert {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()} == before


def trim_and_grow(model):
    rows = [{"input_ids": list(range(5, 9 + i)), "labels": list(range(5, 9 + i))} for i in range(2)]
    model.start_stage(["b"])
    fill(model, only_trainable=True)
    model.seal(["b"], rank_tolerance=100.0, validation={"b": rows})
    model.add_routes("b", [[5, 6, 7 + i] for i in range(8)])
    model.add_task("c", ["b"])


@pytest.mark.parametrize(
    "change",
    [
        trim_and_grow,
        lambda model: model.remove_task("b"),
        lambda model: model._take_gates("a", borrows=[], pages=[]),  # as a refresh may
    ],
    ids=["trim and grow", "remove", "refresh"],
)
def test_a_kill_between_any_two_renames_leaves_a_model(backbones, tmp_path, monkeypatch, change):
    """All that was there, or all that is there now: files, and what a reader makes of them."""
    x, rename, replace, seen = prompts(1, 5), os.rename, os.replace, []
    for kill in (0, 1, 2, *range(3, 60, 5)):
        folder = tmp_path / str(kill)
        model = hft.HFTForCausalLM.from_backbone(backbones["llama"], {"a": [], "b": ["a"]}, rank=3)
        model.start_stage(["a"])
        fill(model, only_trainable=True)
        model.seal(["a"])
        model.add_routes("a", [[50, 60, 70 + i] for i in range(8)])
        model.save_pretrained(folder)  # b is open, and has no page yet
        before = snapshot(model), model.hft_router.tensors()["gram"]
        change(model)
        after = snapshot(model), model.hft_router.tensors()["gram"]
        calls = []

        def killed(source, target, original, calls=calls, kill=kill):
            if len(calls) == kill:
                raise KeyboardInterrupt
            calls.append(target)
            original(source, target)

        monkeypatch.setattr(os, "rename", functools.partial(killed, original=rename))
        monkeypatch.setattr(os, "replace", functools.partial(killed, original=replace))
        try:
            model.save_pretrained(folder)
        except KeyboardInterrupt:
            calls.append(None)
        monkeypatch.undo()
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        state = snapshot(loaded), loaded.hft_router.tensors()["gram"]
        is_new = state[0] == after[0]
        assert torch.equal(state[1], (after if is_new else before)[1]) and (is_new or state[0] == before[0])
        assert bits(loaded(x, task="a").logits) == bits(model(x, task="a").logits) or not is_new
        assert not list(folder.glob(".writ*-*"))
        seen.append(is_new)
        if calls[-1] is not None:
            assert kill > 10 and not seen.pop(0) and all(seen)  # the first rename is the one that counts
            return
    raise AssertionError("the save never came to its end")


@pytest.mark.parametrize("first_slim", [True, False])
def test_one_form_may_follow_the_other_in_a_folder(model, tmp_path, first_slim):
    x = prompts(1, 5)
    for slim in (first_slim, not first_slim, first_slim):
        model.save_pretrained(tmp_path, slim=slim, max_shard_size="30KB")
        assert bits(AutoModelForCausalLM.from_pretrained(tmp_path)(x, task="d").logits) == bits(
            model(x, task="d").logits
        )


def test_a_backbone_that_lacks_weights_or_is_another_is_refused(saved, backbones, tmp_path):
    from safetensors.torch import save_file

    broken = tmp_path / "broken"
    shutil.copytree(backbones["llama"], broken)
    tensors = load_file(broken / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    for load in (
        lambda b: hft.HFTForCausalLM.from_backbone(b, {"a": []}),
        lambda b: hft.HFTForCausalLM.from_pretrained(saved, backbone=b),
    ):
        with pytest.raises(
            ValueError, match=re.escape("its weights lack 'backbone.model.layers.1.mlp.up_proj.weight' (1 such)")
        ):
            load(str(broken))
        with pytest.raises(ValueError, match="its weights lack"):
            hft.HFTForCausalLM.from_pretrained(saved, backbone=str(backbones["phi3"]))
    whole = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OSError, match="is no whole safetensors file"):
        hft.HFTForCausalLM.from_backbone(broken, {"a": []})


def test_what_save_and_from_backbone_refuse(saved, model, backbones):
    before = (backbones["llama"] / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="is the backbone's own folder, which would be overwritten; choose another"):
        model.save_pretrained(backbones["llama"])
    assert (backbones["llama"] / "model.safetensors").read_bytes() == before
    with pytest.raises(TypeError, match=re.escape("got the unknown argument 'slm'. Did you mean 'slim'?")):
        model.save_pretrained(saved, slm=False)
    with pytest.raises(ValueError, match="push_to_hub uploads the slim form"):
        model.save_pretrained(saved, slim=False, push_to_hub=True)
    with pytest.raises(ValueError, match=r"is an HFT model itself; load it with from_pretrained and use add_task"):
        hft.HFTForCausalLM.from_backbone(saved, {"a": []})
    with pytest.raises(ValueError, match="`subfolder` is not supported"):
        hft.HFTForCausalLM.from_backbone(backbones["llama"], subfolder="x")
    for load, source in (("from_backbone", backbones["llama"]), ("from_pretrained", saved)):
        with pytest.raises(ValueError, match="`variant` is not supported"):
            getattr(hft.HFTForCausalLM, load)(source, variant="x")
    with pytest.raises(ValueError, match=re.escape("unknown key 'trainabel'. Did you mean 'trainable'?")):
        hft.HFTForCausalLM.from_backbone(backbones["llama"], gating_config={"trainabel": False})
    with pytest.raises(StrictDataclassError, match="expected one of"):
        hft.HFTMemoryConfig(read="on")


def test_a_relative_backbone_is_found_from_elsewhere(backbones, tmp_path, monkeypatch):
    monkeypatch.chdir(backbones["llama"].parent)
    hft.HFTForCausalLM.from_backbone(backbones["llama"].name, {"a": []}, rank=2).save_pretrained(tmp_path / "slim")
    monkeypatch.chdir(tmp_path)
    assert AutoModelForCausalLM.from_pretrained("slim").config.backbone == str(backbones["llama"])


def test_models_of_one_config_do_not_share_it(backbones):
    config = hft.HFTForCausalLM.from_backbone(backbones["llama"], {"a": []}).config
    first, second = hft.HFTForCausalLM(config), hft.HFTForCausalLM(config)
    first.add_task("b")
    assert second.config.task_names() == config.task_names() == ["a"]


def test_an_unwritable_folder_is_named(model, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(
        OSError, match=r"Cannot write to the folder '.*file/model' \(Not a directory\); choose another one"
    ):
        model.save_pretrained(tmp_path / "file" / "model")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_locked_folder_is_named(model, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(OSError, match="Permission denied"):
        model.save_pretrained(locked)


def test_without_a_named_backbone_there_is_no_slim_form(model, tmp_path):
    model.config.backbone = None
    with pytest.raises(ValueError, match=re.escape("save it whole: save_pretrained(..., slim=False)")):
        model.save_pretrained(tmp_path)


def test_restore_takes_over_tasks_and_seals(saved, model, backbones):
    other = hft.HFTForCausalLM.from_backbone(
        backbones["llama"],
        {"a": [], "b": ["a"], "c": ["a"], "d": ["b", "c"], "e": []},
        rank=3,
        memory_config=model.config.memory_config,
    )
    with pytest.raises(ValueError, match="holds other tasks"):
        other.restore(saved)
    other.add_task("f", ["e"], rank=5)
    twin = copy.deepcopy(other)
    other.restore(saved)
    assert snapshot(other) == snapshot(model)
    assert (other.config.tasks, other.config.pages) == (model.config.tasks, model.config.pages)
    twin.restore(saved, "sealed")
    assert [page["id"] for page in twin.config.pages] == [1, 2]
    assert twin.config.open_tasks() == ["d"] and twin.config.task("d")["pages"] == []
    x = prompts(1, 5)
    assert bits(twin(x, task="f").logits) == bits(model(x, task="f").logits)


@pytest.mark.parametrize("broken", ["a missing file", "another shape", "another router"])
def test_a_restore_that_fails_changes_nothing(saved, model, backbones, broken):
    other = hft.HFTForCausalLM.from_backbone(
        backbones["llama"],
        {"a": [], "b": ["a"], "c": ["a"], "d": ["b", "c"], "e": []},
        rank=3,
        memory_config=model.config.memory_config,
        router_config={"num_features": 64},
    )
    other.add_task("f", ["e"], rank=5)
    if broken == "a missing file":
        (saved / "tasks/d.safetensors").unlink()
    elif broken == "another shape":
        tensors = load_file(saved / "tasks/d.safetensors")
        name = min(tensors)
        save_file({**tensors, name: tensors[name][:, :-1].contiguous()}, saved / "tasks/d.safetensors")
    else:
        model.add_routes("a", prompts(2, 6).tolist())
        model.save_pretrained(saved)
    before = snapshot(other), copy.deepcopy((other.config.tasks, other.config.pages)), other.hft_router.tasks()
    with pytest.raises((OSError, ValueError), match=r"d\.safetensors|The router's file is for features"):
        other.restore(saved)
    assert (snapshot(other), (other.config.tasks, other.config.pages), other.hft_router.tasks()) == before


def test_the_slim_form_is_no_state_dict(saved, model):
    """transformers' `Trainer` reads a checkpoint so, leniently: it would go on with nodes that have learnt nothing."""
    with pytest.raises(
        ValueError, match=r"is of the slim form, whose model.safetensors holds gates only: take it over with"
    ):
        model.load_state_dict(load_file(saved / "model.safetensors"), strict=False)
    model.load_state_dict(model.state_dict())


def test_restore_opens_again_what_the_folder_has_not_sealed(backbones, tmp_path):
    """Else a sealed task would read a page that its folder's next stage writes."""
    model = hft.HFTForCausalLM.from_backbone(backbones["llama"], {"a": [], "b": ["a"]}, memory_config={"slots": 2})
    model.save_pretrained(tmp_path)
    before, x = snapshot(model), prompts(1, 5)
    model.start_stage(["a"])
    fill(model, only_trainable=True)
    model.seal(["a"])
    model.restore(tmp_path, "sealed")
    assert model.config.open_tasks() == ["a", "b"] and model.config.pages == []
    assert snapshot(model) == before and bits(model(x, task="a").logits) == bits(model(x).logits)
    model.start_stage(["a"])
    assert model.config.task("a")["pages"] == [1]


def test_restore_of_open_tasks_leaves_sealed_ones(saved, model):
    """Whose gates may have been refreshed since the folder was written."""
    model.add_task("z", ["a"])
    model.start_stage(["z"])
    model.save_pretrained(saved)
    before = snapshot(model)
    fill(model, only_trainable=True)
    with torch.no_grad():
        model.hft_gates.of("a").mul_(0.5)
    model.restore(saved, "open")
    assert {name for name, value in snapshot(model).items() if before[name] != value} == {"hft_gates.g_a"}


def test_a_backbone_that_also_takes_images_is_refused(tmp_path):
    Gemma3Config(text_config={"num_hidden_layers": 1}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a 'gemma3', which takes more than text; give a text model"):
        hft.HFTForCausalLM.from_backbone(tmp_path)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_maps(saved, model, device_map):
    loaded = AutoModelForCausalLM.from_pretrained(saved, device_map=device_map)
    x = prompts(2, 5)
    with torch.no_grad():
        assert bits(loaded(x, task=["d", "a"]).logits) == bits(model(x, task=["d", "a"]).logits)


def test_layers_on_disk(saved, model, tmp_path):
    """A part of the backbone is offloaded; its nodes are not."""
    device_map = {"backbone.model.embed_tokens": "cpu", "backbone.model.layers.0": "cpu", "backbone.model.layers.1": "disk",
                  "backbone.model.norm": "cpu", "backbone.model.rotary_emb": "cpu", "backbone.lm_head": "cpu",
                  "hft_nodes": "cpu", "hft_gates": "cpu"}  # fmt: skip
    loaded = AutoModelForCausalLM.from_pretrained(saved, device_map=device_map, offload_folder=tmp_path / "offload")
    assert loaded.backbone.model.layers[1].mlp.up_proj.weight.device.type == "meta"
    x = prompts(2, 5)
    with torch.no_grad():
        assert bits(loaded(x, task=["d", "a"]).logits) == bits(model(x, task=["d", "a"]).logits)


def test_variants_stay_side_by_side(model, tmp_path):
    x = prompts(1, 5)
    model.save_pretrained(tmp_path, slim=False)
    model.save_pretrained(tmp_path, slim=False, variant="fp16")
    for options in ({}, {"variant": "fp16"}):
        assert bits(hft.HFTForCausalLM.from_pretrained(tmp_path, **options)(x, task="d").logits) == bits(
            model(x, task="d").logits
        )
    model.save_pretrained(tmp_path / "was full", slim=False, variant="fp16")
    model.save_pretrained(tmp_path / "was full")
    assert not list((tmp_path / "was full").glob("model.*.safetensors"))  # its config.json is gone
    with pytest.raises(ValueError, match="The slim form has no variants"):
        model.save_pretrained(tmp_path, variant="fp16")
    model.save_pretrained(tmp_path / "slim")
    with pytest.raises(
        ValueError, match=r"slim. holds a slim model, whose config\.json a variant of the full form would"
    ):
        model.save_pretrained(tmp_path / "slim", slim=False, variant="fp16")
    assert hft.HFTForCausalLM.from_pretrained(tmp_path / "slim").config.slim


@pytest.mark.parametrize("load", [hft.HFTForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained])
def test_how_a_decoder_runs_is_for_the_backbones_config(saved, backbones, load):
    x = prompts(1, 5)
    loaded = load(saved, use_cache=False, output_hidden_states=True)
    output = loaded(x, task="a")
    assert output.past_key_values is None and len(output.hidden_states) == 3
    built = hft.HFTForCausalLM.from_backbone(backbones["llama"], {"a": []}, use_cache=False)
    assert built(x).past_key_values is None and built(x).hidden_states is None


def test_another_backbone_has_no_known_commit(saved):
    edit(saved / "config.json", backbone_revision="0" * 40)
    config = AutoConfig.from_pretrained(saved, backbone="somewhere/else")
    assert (config.backbone, config.backbone_revision) == ("somewhere/else", None)
    assert AutoConfig.from_pretrained(saved).backbone_revision == "0" * 40


def test_a_config_that_was_read_before_a_save_was_finished_is_read_again(saved, model, monkeypatch):
    """Auto classes read config.json themselves, before any code of ours runs."""
    model.remove_task("d")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "replace", lambda source, target: (_ for _ in ()).throw(KeyboardInterrupt))
        model.save_pretrained(saved)
    stale = AutoConfig.from_pretrained(saved)
    assert "d" in stale.task_names()
    assert "d" not in hft.HFTForCausalLM.from_pretrained(saved, config=stale).hierarchy


def test_a_part_without_any_task_still_knows_the_others(saved, model):
    model.add_routes("a", [[5, 6, 7 + i] for i in range(8)])
    model.save_pretrained(saved)
    part = AutoModelForCausalLM.from_pretrained(saved, tasks=[])
    assert part.hierarchy.names == () and set(part.config.left_out) == set(model.hierarchy.names)
    assert part.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=1, return_route=True)[1][0].task == "backbone"


def test_what_hft_owns_cannot_be_offloaded(model, tmp_path):
    model.save_pretrained(tmp_path, slim=False)
    on_disk = {"backbone": "cpu", "hft_nodes": "cpu", "hft_memory": "cpu", "hft_gates": "disk"}
    with pytest.raises(ValueError, match=r"`device_map` puts what HFT owns \(hft_gates.g_a, 6 such\)"):
        hft.HFTForCausalLM.from_pretrained(tmp_path, device_map=on_disk, offload_folder=tmp_path / "off")


def test_the_backbone_may_be_named_by_a_path_and_is_never_overwritten(saved, backbones, monkeypatch):
    monkeypatch.chdir(backbones["llama"].parent)
    model = AutoModelForCausalLM.from_pretrained(saved, backbone=Path(backbones["llama"].name))
    assert model.config.backbone == str(backbones["llama"])
    for slim in (True, False):
        with pytest.raises(ValueError, match="is the backbone's own folder"):
            model.save_pretrained(backbones["llama"], slim=slim)


@pytest.mark.parametrize("kills", [1, 2, 4])
def test_a_save_that_was_cut_off_is_finished_by_whoever_reads_it(model, tmp_path, monkeypatch, kills):
    """In a subfolder as elsewhere; and in a new folder, where auto classes look for config.json before our code runs."""
    model.seal(["a", "b", "c", "e", "f"])
    x = prompts(1, 5)
    expected = bits(model(x, task="d").logits)

    def cut_off(folder):
        replace, calls = os.replace, []

        def killed(source, target):
            calls.append(target)
            if len(calls) > kills:
                raise KeyboardInterrupt
            replace(source, target)

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(os, "replace", killed)
            model.save_pretrained(folder)

    for i, load in enumerate((AutoModelForCausalLM.from_pretrained, hft.HFTForCausalLM.from_pretrained)):
        cut_off(tmp_path / f"{i}/sub")
        assert bits(load(tmp_path / str(i), subfolder="sub")(x, task="d").logits) == expected
        cut_off(tmp_path / f"new{i}")
        assert bits(load(tmp_path / f"new{i}")(x, task="d").logits) == expected
        assert not list(tmp_path.glob("**/.writ*-*/**/*"))


@pytest.mark.parametrize("load", [hft.HFTForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained])
def test_none_is_as_good_as_not_given(saved, load):
    loaded = load(saved, tasks=None, backbone=None)
    assert len(loaded.hierarchy) == 6
    ours = load(saved, generation_config=GenerationConfig(max_new_tokens=77))
    assert (ours.generation_config.max_new_tokens, loaded.generation_config.max_new_tokens) == (77, 7)
    assert hft.HFTForCausalLM.from_pretrained(saved, config=str(saved)).hierarchy.names == loaded.hierarchy.names


def test_shards_of_an_older_save_do_not_stay(model, tmp_path):
    model.save_pretrained(tmp_path, slim=False, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*"))) > 3
    model.save_pretrained(tmp_path, slim=False)
    assert [path.name for path in tmp_path.glob("model[.-]*")] == ["model.safetensors"]


def test_a_file_is_not_written_in_a_folders_place_and_nothing_stays_behind(tmp_path):
    (tmp_path / "results").mkdir()
    with pytest.raises(OSError, match=r"results' is a folder, and a file is to be written there; move it away\."):
        write_json(tmp_path / "results", {})
    write_json(tmp_path / "scores.json", {"a": 1})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results", "scores.json"]


def test_a_folder_is_not_made_in_a_files_place(model, tmp_path):
    (tmp_path / "tasks").write_text("mine")
    with pytest.raises(OSError, match=r"tasks' is a file, and a folder is to be made there; move it away\."):
        model.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tasks"]
