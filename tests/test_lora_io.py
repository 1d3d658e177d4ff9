"""A task as a plain LoRA and a plain LoRA as a task, read by PEFT itself."""

import copy
import json
import re
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import hft
from hft.lora_io_hft import path_factors, shrink_rank
from hft.trainers.cli import main
from hft.trainers.model_card import write_model_card
from hft.trainers.run_record import RunRecord, write_json

from .test_model import prompts
from .tiny import BACKBONES, bits, fill, grow, snapshot


def plain(backbones, family="llama", dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(backbones[family], dtype=dtype)


@pytest.fixture
def sealed(model):
    model.seal(model.hierarchy.names)
    return model


@pytest.mark.parametrize("family", BACKBONES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_6_an_exported_task_has_its_logits_in_peft(backbones, tmp_path, family, dtype):
    model = hft.HFTForCausalLM.from_backbone(
        backbones[family], {"a": [], "b": ["a"]}, rank=3, dtype=dtype, memory_config={"slots": 2}
    )
    grow(model)
    x = prompts(2, 7)
    for task in ("a", "b"):
        report = hft.export_lora(model, task, tmp_path / task)
        assert report == {"rank": 8 if task == "a" else 16, "path_rank": 5 if task == "a" else 10, "svd_error": 0.0}
    peft = PeftModel.from_pretrained(plain(backbones, family, dtype), tmp_path / "b", adapter_name="b")
    peft.load_adapter(tmp_path / "a", adapter_name="a")
    limit = 1e-3 if dtype == torch.float32 else 0.05
    with torch.no_grad():
        plain_logits, expected = model(x).logits, model(x, task="b").logits
        assert (expected - plain_logits).abs().max() > 0.5

        def error(found, wanted):  # of what the task adds to the backbone
            return float((found - wanted).norm() / (wanted - plain_logits).norm())

        assert error(peft(input_ids=x).logits, expected) < limit
        mixed = peft.eval()(input_ids=x, adapter_names=["a", "b"]).logits
        assert error(mixed, model(x, task=["a", "b"]).logits) < limit
        auto = AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=dtype)  # transformers reads adapters, too
        assert error(auto(x).logits, expected) < limit
        assert error(peft.merge_and_unload()(x).logits, expected) < 2 * limit


def test_6_a_borrowed_node_goes_along(sealed, backbones, tmp_path):
    """As a refreshed task may have: a node that is not on its path."""
    sealed._take_gates("e", borrows=["d"], pages=sealed.config.task("e")["pages"])
    x = prompts(2, 6)
    with torch.no_grad():
        sealed.hft_gates.of("e").fill_(0.5)
        expected = sealed(x, task="e").logits
        hft.export_lora(sealed, "e", tmp_path)
        peft = PeftModel.from_pretrained(plain(backbones), tmp_path)
        torch.testing.assert_close(peft(input_ids=x).logits, expected, rtol=1e-4, atol=1e-4)
        for merge in (False, True):
            sealed.fold("e", merge=merge)
            torch.testing.assert_close(sealed(x).logits, expected, rtol=1e-3, atol=1e-3)
            sealed.unfold()


def test_the_files_are_what_servers_take(sealed, tmp_path):
    """vLLM's documented rules: an allowed rank, only lora_A and lora_B, no modules_to_save, no bias, no DoRA."""
    hft.export_lora(sealed, "d", tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] in (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what `max_lora_rank` may be
    assert (
        not config["rank_pattern"]
        and not config["alpha_pattern"]
        and config["lora_alpha"] == config["r"]
        and config["peft_type"] == "LORA"
    )
    assert not config["modules_to_save"] and not config["use_dora"] and not config["use_rslora"]
    assert config["bias"] == "none" and config["task_type"] == "CAUSAL_LM"
    assert sorted(config["target_modules"]) == [
        "down_proj",
        "gate_proj",
        "k_proj",
        "o_proj",
        "q_proj",
        "up_proj",
        "v_proj",
    ]
    assert config["base_model_name_or_path"] == sealed.config.backbone
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in tensors)
    assert list(tensors["base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"].shape) == [config["r"], 32]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_sources_behind_closed_gates_are_left_out(sealed, tmp_path):
    with torch.no_grad():
        sealed.hft_gates.of("d")[:, :2] = 0  # a and b, of ranks 3 and 3
    names = sealed.sources("d").labels()
    assert names == ("a", "b", "c", "d", "page:1", "page:2", "page:3")
    factors = path_factors(sealed, "d")
    assert len(factors["layers.0.self_attn.q_proj"][0]) == 3 + 3
    assert len(factors["layers.0.self_attn.v_proj"][0]) == 3 + 3 + 3 * 2
    with torch.no_grad():
        sealed.hft_gates.of("e").zero_()
    hft.export_lora(sealed, "e", tmp_path)
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sealed.config.backbone), tmp_path)
    x = prompts(1, 5)
    torch.testing.assert_close(peft(input_ids=x).logits, sealed(x).logits)


def test_a_lower_rank_is_the_best_of_its_rank():
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(6, 20, generator=generator), torch.randn(15, 6, generator=generator)
    small_A, small_B, error = shrink_rank(A, B, 2)
    U, S, Vh = torch.linalg.svd(B @ A)
    best = U[:, :2] * S[:2] @ Vh[:2]
    torch.testing.assert_close(small_B @ small_A, best, rtol=1e-4, atol=1e-4)
    assert error == pytest.approx(float(S[2:].norm() / S.norm()), rel=1e-4)
    torch.testing.assert_close(small_A.norm(dim=1), small_B.norm(dim=0), rtol=1e-4, atol=1e-4)  # balanced
    same_A, same_B, error = shrink_rank(A, B, 6)
    assert same_A is A and same_B is B and error == 0.0


def test_max_rank_reports_its_error(sealed, tmp_path):
    report = hft.export_lora(sealed, "d", tmp_path, max_rank=8)
    assert report["rank"] == 8 and report["path_rank"] == 18 and 0.05 < report["svd_error"] < 1
    assert hft.export_lora(sealed, "d", tmp_path, max_rank=18)["svd_error"] == 0.0


def test_wrong_exports(sealed, backbones, tmp_path):
    with pytest.raises(ValueError, match=re.escape("Unknown task 'dd'. Did you mean 'd'?")):
        hft.export_lora(sealed, "dd", tmp_path)
    with pytest.raises(ValueError, match=re.escape("`max_rank` is 0; it must be 1 or more.")):
        hft.export_lora(sealed, "d", tmp_path, max_rank=0)
    wide = hft.HFTForCausalLM.from_backbone(backbones["llama"], {"a": []}, rank=600)
    with pytest.raises(
        ValueError, match=r"The path has rank 600, and servers take 512 at most; cut it with max_rank=512"
    ):
        hft.export_lora(wide, "a", tmp_path)
    assert not list(tmp_path.iterdir())


def lora(backbones, folder, seed=0, **options):
    """A plain LoRA that PEFT made and saved, and its logits."""
    torch.manual_seed(seed)
    config = LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "target_modules": ["q_proj", "down_proj"], **options})
    peft = get_peft_model(plain(backbones), config)
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    peft.save_pretrained(folder)
    with torch.no_grad():
        return peft.eval()(input_ids=prompts(2, 6)).logits


@pytest.mark.parametrize(
    "options",
    [
        {"lora_alpha": 4},
        {"lora_alpha": 32, "r": 2},
        {"lora_alpha": 16, "use_rslora": True},
        {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7}},
        {"lora_alpha": 8, "alpha_pattern": {"layers.0.self_attn.q_proj": 3}},
        {"lora_alpha": 8, "alpha_pattern": {"model.layers.0.self_attn.q_proj": 32, "^model.layers.1.*.q_proj": 3}},
        {"layers_to_transform": [1]},
    ],
)
def test_an_imported_lora_has_pefts_logits(backbones, tmp_path, options):
    expected = lora(backbones, tmp_path / "lora", **options)
    model = hft.HFTForCausalLM.from_backbone(backbones["llama"], {"a": []}, rank=3, gating_config={"init": 0.5})
    grow(model)
    before = snapshot(model)
    model.import_lora("shelf", tmp_path / "lora")
    x = prompts(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(model(x, task="shelf").logits, expected, rtol=1e-4, atol=1e-4)
    assert model.config.task("shelf")["sealed"]
    assert before.items() <= snapshot(model).items()
    model.add_task("child", ["shelf"])
    torch.testing.assert_close(model(x, task="child").logits, expected, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "model")
    loaded = hft.HFTForCausalLM.from_pretrained(tmp_path / "model")
    assert bits(loaded(x, task="shelf").logits) == bits(model(x, task="shelf").logits)
    hft.export_lora(loaded, "shelf", tmp_path / "out")  # out again
    peft = PeftModel.from_pretrained(plain(backbones), tmp_path / "out")
    torch.testing.assert_close(peft(input_ids=x).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_shelf_of_loras_becomes_one_routed_model(backbones, tmp_path):
    model = hft.HFTForCausalLM.from_backbone(backbones["llama"], router_config={"num_features": 64})
    answers = {}
    for i, name in enumerate(("one", "two", "three")):
        lora(backbones, tmp_path / name, seed=i)
        its = [torch.cat([torch.full((6,), 50 + 30 * i), prompts(1, 6, seed=s)[0]]).tolist() for s in range(16)]
        model.import_lora(name, tmp_path / name, prompts=its[1:])
        answers[name] = its[0]
    for name, prompt in answers.items():
        assert model.route(torch.tensor([prompt]))[0].task == name
    model.import_lora("both", tmp_path / "two", parents=["one"])
    assert model.hierarchy.path("both") == ("one", "both")


def test_an_import_that_fails_takes_nothing_with_it(backbones, tmp_path, monkeypatch):
    """Not even a page that no task reads any more."""
    model = hft.HFTForCausalLM.from_backbone(backbones["llama"], {"a": [], "b": []}, memory_config={"slots": 2})
    grow(model)
    lora(backbones, tmp_path)
    for task in "ab":
        model.config.task(task)["pages"].clear()
        model._make_gates(task)
    before, config = snapshot(model), copy.deepcopy(model.config.to_dict())
    monkeypatch.setattr(type(model), "add_routes", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        model.import_lora("x", tmp_path, prompts=[[5, 6], [7, 8]])
    assert (snapshot(model), model.config.to_dict()) == (before, config)
    assert config["pages"]


def test_a_lora_whose_prompts_teach_nothing_is_not_imported(backbones, tmp_path, monkeypatch):
    model = hft.HFTForCausalLM.from_backbone(backbones["llama"], {"a": []})
    lora(backbones, tmp_path)
    before, tasks = snapshot(model), copy.deepcopy(model.config.tasks)
    for prompts_, message in (
        ([], None),
        ([[5, 6]], "The router got 1 prompts of task 'x'; give two or more."),
        ([[5, 6], [], [7]], "Prompt 1 of task 'x' has no tokens"),
        (["hello", "there"], "are texts; give token ids"),
    ):
        if message is not None:
            with pytest.raises(ValueError, match=re.escape(message)):
                model.import_lora("x", tmp_path, prompts=prompts_)
        monkeypatch.setattr(type(model), "seal", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):  # in the middle
            model.import_lora("x", tmp_path)
        monkeypatch.undo()
        assert (snapshot(model), model.config.tasks) == (before, tasks)
    model.import_lora("x", tmp_path)
    assert model.config.sealed_tasks() == ["x"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "has DoRA, which scales the backbone's own weight; only plain LoRA can become a node."),
        ({"modules_to_save": ["lm_head"]}, "has whole modules beside the LoRA"),
        ({"peft_type": "OFT"}, "is a OFT adapter; only plain LoRA can become a node."),
        ({"init_lora_weights": "lora_ga"}, "began as 'lora_ga'"),
        ({"init_lora_weights": "pissa_niter_4"}, "began as 'pissa_niter_4', which changes the backbone's own weights"),
        ({"bias": "all"}, "trained biases (`bias` is 'all')"),
        ({"base_model_name_or_path": "other/backbone"}, "is an adapter of 'other/backbone', and this model stands on"),
    ],
)
def test_other_adapters_are_refused(backbones, tmp_path, change, message):
    lora(backbones, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **change}))
    model = hft.HFTForCausalLM.from_backbone(backbones["llama"], {"a": []})
    before, tasks = snapshot(model), copy.deepcopy(model.config.tasks)
    with pytest.raises(ValueError, match=re.escape(message)):
        model.import_lora("x", tmp_path)
    with pytest.raises(ValueError, match="The router got 1 prompts of task 'x'; give two or more"):
        model.import_lora("x", tmp_path, prompts=[[5, 6]])
    assert (snapshot(model), model.config.tasks) == (before, tasks)


def test_adapters_that_do_not_fit_are_refused(backbones, tmp_path):
    lora(backbones, tmp_path / "half")
    tensors = load_file(tmp_path / "half/adapter_model.safetensors")
    gone = next(name for name in tensors if "lora_B" in name)
    save_file(
        {name: tensor for name, tensor in tensors.items() if name != gone}, tmp_path / "half/adapter_model.safetensors"
    )
    whole = hft.HFTForCausalLM.from_backbone(backbones["llama"], {"a": []})
    with pytest.raises(ValueError, match=r"has only lora_A at '.*'; its file is not whole"):
        whole.import_lora("x", tmp_path / "half")
    lora(backbones, tmp_path / "lora")
    narrow = hft.HFTForCausalLM.from_backbone(backbones["llama"], {"a": []}, target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"down_proj.*make the model with `target_modules` that cover it"):
        narrow.import_lora("x", tmp_path / "lora")
    other = hft.HFTForCausalLM.from_backbone(backbones["qwen3"], {"a": []})
    config = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    shutil.copytree(tmp_path / "lora", tmp_path / "unnamed")
    (tmp_path / "unnamed/adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": None, "r": 4})
    )
    other.import_lora("fits", tmp_path / "unnamed")  # the same shapes, and it does not say whose it is
    with pytest.raises(OSError, match=r"holds no adapter_config.json; is it a PEFT adapter"):
        other.import_lora("x", tmp_path)
    other.add_task("open")
    with pytest.raises(ValueError, match="would stand on 'open', which is not sealed"):
        other.import_lora("x", tmp_path / "unnamed", parents=["open"])
    assert other.hierarchy.names == ("a", "fits", "open")


def test_removing_a_task_leaves_the_others_to_the_bit(sealed, tmp_path):
    x = prompts(2, 6)
    expected = {task: bits(sealed(x, task=task).logits) for task in ("a", "c", "e", "f")}
    with pytest.raises(
        ValueError, match=re.escape("Task 'b' cannot be removed: d depend on it. Remove them first, or")
    ):
        sealed.remove_task("b")
    assert sealed.remove_task("b", cascade=True) == ["b", "d"]
    assert sealed.hierarchy.names == ("a", "e", "c", "f")
    assert [page["id"] for page in sealed.config.pages] == [1, 2]  # page 3 was d's alone
    assert {task: bits(sealed(x, task=task).logits) for task in expected} == expected
    assert not [name for name, _ in sealed.named_parameters() if name.endswith(("_b", "_d", "_3"))]
    sealed.save_pretrained(tmp_path)
    loaded = hft.HFTForCausalLM.from_pretrained(tmp_path)
    assert {task: bits(loaded(x, task=task).logits) for task in expected} == expected
    loaded.add_task("b", ["a"])  # the name is free again
    fill(loaded, only_trainable=True)
    with pytest.raises(ValueError, match="Unknown task 'zz'"):
        loaded.remove_task("zz")


def test_the_command_removes_a_task_and_its_files(sealed, tmp_path, capsys):
    """And what the folder says of it."""
    sealed.save_pretrained(tmp_path)
    score = {"score": 5.0, "se": 1.0, "rows": 2}
    stage = {"level": 1, "tasks": ["a", "b"], "log": [], "scores": {"a": score, "b": score}}
    its = RunRecord(data={"a": {"rows": 1}, "b": {"rows": 1}}, stages=[stage], machine="of the training")
    write_json(tmp_path / "run.json", vars(its))
    config, gates = hft.read_gates(tmp_path)
    write_model_card(config, gates, tmp_path, its)
    assert "| b |" in (tmp_path / "README.md").read_text()
    before = sealed(prompts(2, 5), task="a").logits
    assert main(["remove", str(tmp_path), "--task", "b"]) == 2
    assert "d depend on it" in capsys.readouterr().err and (tmp_path / "tasks/b.safetensors").exists()
    assert main(["remove", str(tmp_path), "--task", "nothing"]) == 2
    assert main(["remove", str(tmp_path), "--task", "b", "--cascade"]) == 0
    assert "Removed b, d" in capsys.readouterr().out
    left = hft.HFTForCausalLM.from_pretrained(tmp_path)
    assert {path.stem for path in (tmp_path / "tasks").iterdir()} == set(left.hierarchy.names)
    assert {"b", "d"}.isdisjoint(left.hierarchy.names)
    assert torch.equal(left(prompts(2, 5), task="a").logits, before)
    record = RunRecord.load(tmp_path)
    assert (
        record.matrix() == [{"a": 5.0}] and record.data == {"a": {"rows": 1}} and record.machine == "of the training"
    )
    card = (tmp_path / "README.md").read_text()
    assert 'task="b"' not in card and "| b |" not in card and "| a |" in card


def test_what_borrows_a_node_depends_on_it(sealed):
    sealed.config.task("e")["borrows"] = ["c"]
    with pytest.raises(ValueError, match=r"Task 'c' cannot be removed: e, d, f depend on it"):
        sealed.remove_task("c")


def test_who_borrows_from_a_deeper_level_goes_with_it(sealed):
    """`e`, a root, reads d; d depends on a."""
    sealed._take_gates("e", borrows=["d"], pages=sealed.config.task("e")["pages"])
    with pytest.raises(ValueError, match=r"Task 'a' cannot be removed: b, c, d, e, f depend on it"):
        sealed.remove_task("a")
    assert set(sealed.remove_task("a", cascade=True)) == set("abcdef") and not sealed.config.tasks


def test_a_stage_goes_on_without_a_task_that_was_removed(backbones):
    model = hft.HFTForCausalLM.from_backbone(backbones["llama"], {"a": [], "b": []})
    model.start_stage(["a", "b"])
    model.remove_task("b")
    model.seal(["a"])
    assert model.config.pages == [{"id": 1, "slots": 8, "sealed": True, "writers": ["a"], "dtype": "float32"}]
