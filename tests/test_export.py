"""Exports are read again by their own reader, and go away if they answer otherwise."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import hft
from hft.trainers import export
from hft.trainers.cli import main
from hft.trainers.export import ExportError, export_merged, export_peft

from .test_model import prompts
from .tiny import bits, grow, in_nf4, snapshot


@pytest.fixture
def grown(backbones):
    model = hft.HFTForCausalLM.from_backbone(
        backbones["llama"], {"a": [], "b": ["a"]}, rank=3, memory_config={"slots": 2}
    )
    grow(model)
    return model.eval()


def test_a_checked_lora(grown, tokenizer, tmp_path):
    x = prompts(2, 6)
    before, logits = snapshot(grown), bits(grown(x, task="b").logits)
    report = export_peft(grown, tokenizer, "b", tmp_path / "lora")
    assert report["max_difference"] < 1e-3 and report["top1"] == 1.0 and report["kl"] < 1e-6
    assert json.loads((tmp_path / "lora/export.json").read_text()) == report
    # the check left the model as it was
    assert snapshot(grown) == before
    assert bits(grown(x, task="b").logits) == logits
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(grown.config.backbone), tmp_path / "lora")
    torch.testing.assert_close(peft(input_ids=x).logits, grown(x, task="b").logits, rtol=1e-4, atol=1e-4)
    kept = AutoTokenizer.from_pretrained(tmp_path / "lora")  # by which a server asks as the task was trained
    assert kept.chat_template == tokenizer.chat_template and kept.get_vocab() == tokenizer.get_vocab()


def test_a_lora_in_16_bit_is_checked_to_the_bit(grown, tokenizer, tmp_path):
    grown.save_pretrained(tmp_path / "model")
    model = hft.HFTForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16).eval()
    assert export_peft(model, tokenizer, "b", tmp_path / "lora")["max_difference"] == 0


@pytest.mark.parametrize("onto", ["backbone", "dequantized"])
def test_a_checked_whole_model(grown, tokenizer, tmp_path, onto):
    tolerance = {"rtol": 1e-3, "atol": 1e-3}
    if onto == "dequantized":
        grown = in_nf4(grown, tmp_path / "model")
        tolerance = {"rtol": 0.1, "atol": 0.3}  # written in bfloat16
    report = export_merged(grown, tokenizer, "b", tmp_path / "whole", onto)
    assert report["onto"] == onto and report["kl"] < (1e-6 if onto == "backbone" else 1e-2)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert type(merged).__name__ == "LlamaForCausalLM"
    x = prompts(2, 6)
    torch.testing.assert_close(merged(x).logits, grown(x, task="b").logits.to(merged.dtype), **tolerance)
    assert AutoTokenizer.from_pretrained(tmp_path / "whole").chat_template == tokenizer.chat_template


@pytest.mark.parametrize("write", [export_peft, export_merged])
def test_a_wrong_export_is_removed(grown, tokenizer, tmp_path, monkeypatch, write):
    """Files that say something else, as a bug in a writer or a reader would make them."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    honest = export.path_factors

    def wrong(model, task):
        return {name: (A, B * 1.5) for name, (A, B) in honest(model, task).items()}

    monkeypatch.setattr("hft.lora_io_hft.path_factors", wrong)
    if write is export_merged:
        load = AutoModelForCausalLM.from_pretrained

        def damaged(source, **options):
            model = load(source, **options)
            if "out" in str(source):
                model.base_model.layers[0].mlp.up_proj.weight.data *= 1.5
            return model

        monkeypatch.setattr("hft.trainers.export.AutoModelForCausalLM.from_pretrained", damaged)
    with pytest.raises(ExportError, match=r"of task 'b' does not answer as HFT does: mean KL .*Nothing was written\."):
        write(grown, tokenizer, "b", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_an_export_spares_what_is_there(grown, tokenizer, tmp_path, capsys):
    grown.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    export_peft(grown, tokenizer, "a", tmp_path / "lora")
    backbone = grown.config.backbone
    for folder in (tmp_path / "model", backbone, tmp_path / "lora"):
        before = {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}
        with pytest.raises(ValueError, match="choose another folder"):
            export_merged(grown, tokenizer, "b", Path(folder))
        assert main(["export", str(tmp_path / "model"), str(folder), "--task", "b", "--to", "merged"]) == 2
        assert "choose another folder" in capsys.readouterr().err
        assert {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()} == before
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "model"), "--all"]) == 2
    export_peft(grown, tokenizer, "b", tmp_path / "lora")  # an export of the same form is replaced


def test_a_whole_model_ends_where_training_said(grown, tokenizer, tmp_path):
    """The Trainer aligns these tokens with the tokenizer's, which may be others than the backbone's."""
    grown.generation_config.eos_token_id = [2, 4]
    export_merged(grown, tokenizer, "b", tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert read.generation_config.eos_token_id == read.config.eos_token_id == [2, 4]


def test_the_check_leaves_the_model_training(grown, tokenizer, tmp_path):
    grown.train()
    export_peft(grown, tokenizer, "b", tmp_path)
    assert all(module.training for module in grown.modules())


def test_a_backbone_that_is_quantised_in_its_own_repository(grown, tokenizer, tmp_path, capsys):
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float32")
    AutoModelForCausalLM.from_pretrained(grown.config.backbone, quantization_config=nf4).save_pretrained(
        tmp_path / "q"
    )
    model = hft.HFTForCausalLM.from_backbone(tmp_path / "q", {"a": []}, rank=3)
    grow(model)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    command = ["export", str(tmp_path / "model"), str(tmp_path / "out"), "--task", "a", "--to", "merged"]
    assert main(command) == 2
    assert "holds its weights quantised, so there are none in 16 bit to write" in capsys.readouterr().err
    assert main([*command, "--onto", "dequantized"]) == 0
    x = prompts(2, 6)
    merged, ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), model.eval()(x, task="a").logits
    torch.testing.assert_close(merged(x).logits, ours.to(merged.dtype), rtol=0.1, atol=0.3)
    assert (ours - model(x).logits).abs().max() > 1


def test_all_or_none_is_exported_and_only_what_is_learnt(grown, tokenizer, tmp_path, capsys):
    grown.add_task("later", ["a"])
    grown.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    out = tmp_path / "out"

    def run(*arguments):
        return main(["export", str(tmp_path / "model"), str(out), *arguments]), "".join(capsys.readouterr())

    code, said = run("--task", "later")
    assert code == 2 and "Task 'later' is not sealed" in said
    out.mkdir()
    (out / "README.md").write_text("# My own words, to serve\n")
    code, said = run("--all")
    assert code == 2 and "README.md' would be overwritten by how to serve the exports" in said
    (out / "README.md").unlink()
    export_merged(grown, tokenizer, "b", out / "b")
    code, said = run("--all")
    assert code == 2 and "holds an export of another form (merged)" in said and not (out / "a").exists()
    (out / "b/export.json").write_text("[]")
    code, said = run("--all")
    assert code == 2 and "export.json' is not what an export writes" in said
    shutil.rmtree(out / "b")
    code, said = run("--all")
    assert code == 0 and "Not learnt yet, and left out: later" in said and not (out / "later").exists()
    assert run("--all")[0] == 0  # again, over its own


def test_the_command(grown, tokenizer, tmp_path, capsys):
    folder = tmp_path / "model"
    grown.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert main(["export", str(folder), str(tmp_path / "all"), "--all"]) == 0
    shown = capsys.readouterr().out
    assert re.search(
        r"all/b: b, rank 10 in 16; read again: logits differ by \S+, KL \S+, same first choice at 100.0 %", shown
    )
    for task in "ab":
        assert (tmp_path / f"all/{task}/adapter_config.json").exists()
    notes = (tmp_path / "all/README.md").read_text()
    assert "--tokenizer a --enable-lora --max-lora-rank 16 --max-loras 2 --lora-modules a=a b=b" in notes
    assert "--all --to gguf" in notes and ".gguf" not in notes
    assert main(["export", str(folder), str(tmp_path / "cut"), "--task", "b", "--max_rank", "4"]) == 0
    assert re.search(r"rank 10 in 8, cut with an error of 0\.\d+", capsys.readouterr().out)
    assert main(["export", str(folder), str(tmp_path / "whole"), "--task", "a", "--to", "merged"]) == 0
    assert json.loads((tmp_path / "whole/export.json").read_text())["form"] == "merged"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Give one task by --task, or --all."),
        (["--all", "--task", "a"], "Give one task by --task, or --all."),
        (["--all", "--to", "merged"], "--all writes LoRAs"),
        (["--task", "aa"], "Unknown task 'aa'. Did you mean 'a'?"),
        (["--task", "a", "--max_rank", "0"], "--max_rank is 0; it must be 1 or more."),
        (["--task", "a", "--to", "merged", "--max_rank", "4"], "--max_rank cuts a LoRA, and a whole model has none."),
        (["--task", "a", "--onto", "dequantized"], "--onto says what a whole model is merged onto; a LoRA is merged"),
        (
            ["--task", "a", "--to", "merged", "--onto", "dequantized"],
            "`onto` is 'dequantized', and this model's backbone is not in 4 bit: load it so (`--load_in_4bit`)",
        ),
    ],
)
def test_wrong_commands(grown, tokenizer, tmp_path, capsys, arguments, message):
    grown.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "out"), *arguments]) == 2
    assert f"hft: error: {message}" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*"))
