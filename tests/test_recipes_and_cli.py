"""Recipes and the command `hft`, on real files."""

import gzip
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from transformers import AutoTokenizer
from transformers.utils import logging

import hft
from hft.trainers import HFTTrainer, HFTTrainingConfig, commands, compute_dtype
from hft.trainers.cli import main
from hft.trainers.loading import load_tokenizer
from hft.trainers.metrics import find_metric, rouge_l
from hft.trainers.recipe_data import load_task, to_chat
from hft.trainers.recipe_data import test_set as find_test_set  # else pytest takes it for a test
from hft.trainers.recipes import read_recipe, read_value
from hft.trainers.row_tokens import tokenize_rows
from hft.trainers.run_record import RunRecord
from hft.trainers.task_files import find_split, read_rows, tasks_in

from .tiny import grow


RECIPES = sorted((Path(__file__).parent.parent / "hub_configs/recipes").glob("*.yaml"))
CL14 = Path(__file__).parent.parent.parent / "shared/data/cl14"


def write_data(folder: Path) -> Path:
    """Rows as in cl14, for the tasks of the shipped recipe."""
    for task in ("sst2", "yelp", "mnli", "cb", "rte"):
        (folder / task).mkdir(parents=True)
        for split, count in (("train", 6), ("validation", 3)):
            rows = [
                {
                    "instruction": f"{task}?",
                    "options": ["yes", "no"],
                    "input": f"Text: {i}\n",
                    "output": ["yes", "no"][i % 2],
                }
                for i in range(count)
            ]
            with gzip.open(folder / task / f"{split}.jsonl.gz", "wt") as file:
                file.write("\n".join(json.dumps(row) for row in rows))
    return folder


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "data")


def tiny_run(backbones, data, tmp_path, *more: str) -> list[str]:
    """The shipped recipe for two steps a stage on a tiny backbone, not quantised."""
    return ["train", "cl14-small", "--backbone", str(backbones["llama"]), "--data", str(data), "--max_steps", "2",
            "--load_in_4bit", "false", "--output_dir", str(tmp_path / "run"), "--rank", "2", *more]  # fmt: skip


def test_a_family_stands_on_a_root_that_learns_from_all(backbones, data, tmp_path, capsys):
    lines = f"""
backbone: {backbones["llama"]}
hierarchy: {{inference: [], mnli: [inference], cb: [inference], sst2: []}}
mixtures: {{inference: [mnli, cb]}}
data: {data}
train_samples: 4
"""
    (tmp_path / "family.yaml").write_text(lines)
    recipe = read_recipe(tmp_path / "family.yaml")
    tasks, memory = list(recipe.hierarchy), hft.HFTMemoryConfig()

    def trained(**more):
        return HFTTrainingConfig(**read_recipe(tmp_path / "family.yaml", more).training_arguments())

    def rates(config):
        return {task: config.rates(task)[0] for task in tasks}

    config = trained()
    assert config.routed(tasks) == ["mnli", "cb", "sst2"] and config.writers(tasks, memory) == ["sst2"]
    assert config.passes() == pytest.approx({"inference": 0.9, "mnli": 0.1, "cb": 0.1})
    assert rates(config) == pytest.approx({"inference": 1e-3, "mnli": 1e-4, "cb": 1e-4, "sst2": 1e-3})
    assert config.rates("cb")[1] == pytest.approx(config.gate_learning_rate / 10)
    slower = trained(refining_rate=0.5, learning_rate=4e-3)
    assert rates(slower) == pytest.approx({"inference": 4e-3, "mnli": 2e-3, "cb": 2e-3, "sst2": 4e-3})
    changed = trained(root_share=0.25, route_tasks=["cb"], page_tasks=["mnli", "inference"])
    assert changed.passes() == {"inference": 0.25, "mnli": 0.75, "cb": 0.75} and changed.routed(tasks) == ["cb"]
    assert changed.writers(tasks, memory) == ["inference", "mnli"]
    # A task that is not named keeps what it had.
    some = trained(task_passes={"cb": "5e-1"}, task_learning_rates={"cb": "5e-5"}, refining_rate="1e-1")
    assert some.passes() == pytest.approx({"inference": 0.9, "mnli": 0.1, "cb": 0.5})
    assert rates(some) == pytest.approx({"inference": 1e-3, "mnli": 1e-4, "cb": 5e-5, "sst2": 1e-3})
    with pytest.raises(
        ValueError, match=r"`mixtures\['inference'\]` has the rows of 'sst2', which does not stand on it"
    ):
        read_recipe(tmp_path / "family.yaml", {"mixtures": {"inference": ["mnli", "sst2"]}})
    for wrong in (1.0, 0.0, "a"):
        with pytest.raises(ValueError, match="`root_share` is"):
            read_recipe(tmp_path / "family.yaml", {"root_share": wrong})
    for wrong in (0, float("nan")):
        with pytest.raises(ValueError, match=rf"`refining_rate` is {wrong}; it must be above 0\.0"):
            read_recipe(tmp_path / "family.yaml", {"refining_rate": wrong})
    assert rates(trained(refining_rate=1)) == pytest.approx(dict.fromkeys(tasks, 1e-3))
    tokenizer = AutoTokenizer.from_pretrained(backbones["llama"])
    parts = [load_task(recipe, task, "train", tokenizer) for task in ("inference", "mnli", "cb")]
    rows = [[json.dumps(row, sort_keys=True) for row in part] for part in parts]
    assert sorted(rows[0]) == sorted(rows[1] + rows[2]) and rows[0] != rows[1] + rows[2] and len(rows[0]) == 8
    command = ["train", str(tmp_path / "family.yaml"), "--max_steps", "2", "--output_dir", str(tmp_path / "run")]
    assert main([*command, "--stage_eval_samples", "2"]) == 0
    assert "inference  8 rows" in (shown := capsys.readouterr().out) and "After stage 1/2: inference, sst2" in shown
    model = hft.HFTForCausalLM.from_pretrained(tmp_path / "run")
    assert set(model.hft_router.tasks()) == {"sst2", "mnli", "cb"}
    card = (tmp_path / "run" / "README.md").read_text()
    assert "The router was not taught inference: prompts go there only where" in card


@pytest.mark.parametrize(
    "mixtures, message",
    [
        ("{x: [cb]}", "names the unknown task 'x'"),
        ("{a: [cb, y]}", "names the unknown task 'y'"),
        ("{a: []}", "give a list of tasks"),
        ("[a]", "give `task: [tasks]`"),
        ("{a: [b], b: [cb]}", "it cannot have a mixture's"),
        ("{a: [a]}", "it cannot have a mixture's"),
    ],
)
def test_wrong_mixtures(tmp_path, mixtures, message):
    (tmp_path / "r.yaml").write_text(f"backbone: x\nhierarchy: {{a: [], b: [a], cb: [a]}}\nmixtures: {mixtures}\n")
    with pytest.raises(ValueError, match=re.escape(message)):
        read_recipe(tmp_path / "r.yaml")


def test_mastery_from_the_command_and_its_lines(backbones, data, tmp_path, capsys):
    """Losses are lines for people, and a stage's first do not hold what the stage before had left."""
    more = ["--max_steps", "6", "--eval_strategy", "steps", "--eval_steps", "2", "--logging_steps", "4"]
    assert main(tiny_run(backbones, data, tmp_path, *more, "--mastery_patience", "1", "--learning_rate", "1e-9")) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^step 4/6: loss \d\.\d{3} \(.+\), learning rate", shown, re.M) and "{'" not in shown
    assert re.search(r"^step 2/6: sst2 on validation rows: loss \d\.\d{3}, \d+ % of its tokens right$", shown, re.M)
    second = [line for line in shown.split("stage 1/2")[-1].splitlines() if re.match(r"step \d/6: loss", line)]
    assert second and not any("sst2" in line or "mnli" in line for line in second)


@pytest.mark.parametrize("text", ["no", "'no'", "steps"])
def test_words_that_yaml_reads_as_false(tmp_path, text):
    lines = f"backbone: x\nhierarchy: {{a: []}}\nsave_strategy: {text}\npacking: no\nmemory_config: {{read: off}}\n"
    (tmp_path / "r.yaml").write_text(lines)
    recipe = read_recipe(tmp_path / "r.yaml")
    assert recipe.training["save_strategy"] == text.strip("'") and recipe.training["packing"] is False
    assert recipe.model["memory_config"] == {"read": "off"}


def test_numbers_are_read_as_their_field_takes_them(tmp_path):
    """YAML 1.1 takes 1e2 for a string; the default of a number may be None, or whole where the number is not."""
    (tmp_path / "r.yaml").write_text("backbone: x\nhierarchy: {a: []}\n")
    given = {"warmup_steps": "1e-1", "save_steps": "1e2", "eval_steps": "5e-1", "max_steps": "1e3",
             "rank_tolerance": "1e-2", "save_total_limit": "2e0", "output_dir": "1e2", "train_samples": "1e1",
             "llm_int8_threshold": "5e0", "load_in_8bit": True,
             "seed": 4.0, "resume_from_checkpoint": True, "include_for_metrics": ["loss"],
             "rank": "1e1", "dtype": "auto"}  # fmt: skip
    recipe = read_recipe(tmp_path / "r.yaml", given)
    assert recipe.training == {
        "warmup_steps": 0.1, "save_steps": 100, "eval_steps": 0.5, "max_steps": 1000, "rank_tolerance": 0.01,
        "save_total_limit": 2, "output_dir": "1e2", "seed": 4, "resume_from_checkpoint": True,
        "include_for_metrics": ["loss"],
    }  # fmt: skip
    assert type(recipe.training["max_steps"]) is type(recipe.training["seed"]) is int and recipe.train_samples == 10
    assert recipe.model == {"rank": 10, "dtype": "auto"}
    assert recipe.quantization == {"llm_int8_threshold": 5.0, "load_in_8bit": True}
    config = HFTTrainingConfig(**{**recipe.training, "bf16": False})
    assert (config.get_warmup_steps(1000), config.save_steps) == (100, 100)
    for key, value, message in (
        ("warmup_steps", "few", "`warmup_steps` is 'few'; it must be a number."),
        ("max_steps", "1e-1", "`max_steps` is '1e-1'; it must be a whole number."),
        ("mixed_steps", "maybe", "`mixed_steps` is 'maybe'; it must be true or false."),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            read_recipe(tmp_path / "r.yaml", {key: value})


@pytest.mark.slow
def test_of_two_processes_one_speaks(backbones, data, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    more = tiny_run(backbones, data, tmp_path, "--use_cpu", "true", "--eval_strategy", "no")
    package = Path(importlib.util.find_spec("hft").origin).parent.parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{package}"}
    command += ["-m", "hft.trainers.cli", *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    for text, times in (("└─ mnli  6 rows", 1), (": 2 steps in", 2), ("After stage", 2), ("Next: ", 1)):
        assert done.stdout.count(text) == times, done.stdout
    assert done.stderr.count("rte, the backbone:   0%") == 1  # a bar
    assert (tmp_path / "run/README.md").exists()


def test_train_eval_generate(backbones, data, tmp_path, capsys):
    assert main(tiny_run(backbones, data, tmp_path, "--save_steps=1", "--learning_rate", "1e-2")) == 0
    shown = capsys.readouterr().out
    assert "└─ mnli  6 rows\n   ├─ cb  6 rows" in shown
    assert f"Next: hft eval {tmp_path / 'run'} --recipe cl14-small --data {data}" in shown
    assert (tmp_path / "run/README.md").exists()

    scores = tmp_path / "scores.json"
    command = ["eval", str(tmp_path / "run"), "--recipe", "cl14-small", "--data", str(data), "--out", str(scores)]
    assert main([*command, "--task", "cb", "--task", "sst2"]) == 0
    report = json.loads(scores.read_text())
    assert list(report["tasks"]) == ["cb", "sst2"] and report["split"] == "validation"
    table = capsys.readouterr().out
    assert "with its path          routed" in table and "Scores (%) on validation rows" in table
    assert report["tasks"]["cb"].keys() == {
        "rows",
        "metric",
        *(c + e for c in ("backbone", "hft", "routed") for e in ("", "_se")),
    }
    assert report["tasks"]["cb"]["rows"] == 3 and 0 <= report["tasks"]["cb"]["hft"] <= 100

    assert "After stage 1/2: " in shown and f"Pictures: open {tmp_path / 'run' / 'report.html'}" in shown
    command = ["report", str(tmp_path / "run"), "--recipe", "cl14-small", "--data", str(data), "--samples", "2"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "forgetting: 0.0" in shown and "The report is in" in shown
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["cross"].keys() == record["sources"].keys() == record["confusion"].keys() == record["before"].keys()
    assert str(tmp_path) not in (tmp_path / "run/run.json").read_text() + (tmp_path / "run/README.md").read_text()
    assert main(["report", str(tmp_path / "nowhere")]) in (1, 2)

    capsys.readouterr()
    assert main(["generate", str(tmp_path / "run"), "hello", "you", "--task", "rte", "--max_new_tokens", "3"]) == 0
    hello = capsys.readouterr().out
    assert len(hello.splitlines()) >= 2
    assert main(["generate", str(tmp_path / "run"), "--task", "rte", "--max_new_tokens", "3", "hello", "you"]) == 0
    assert capsys.readouterr().out == hello
    assert main(["generate", str(tmp_path / "run"), "--task", "backbone", "--max_new_tokens", "3", "hello"]) == 0
    capsys.readouterr()
    assert main(["generate", str(tmp_path / "run"), "hello", "you", "--max_new_tokens", "3"]) == 0
    shown, alone = capsys.readouterr(), ""
    for name, prompt in zip(re.findall(r"^\[(\w+)\]$", shown.err, re.M), ("hello", "you"), strict=True):
        assert main(["generate", str(tmp_path / "run"), prompt, "--task", name, "--max_new_tokens", "3"]) == 0
        alone += capsys.readouterr().out
    assert shown.out == alone
    assert main(["generate", str(tmp_path / "run"), "hello", "--task", "rts"]) == 2
    assert "hft: error: Unknown task 'rts'. Did you mean 'rte'?" in capsys.readouterr().err

    assert main(tiny_run(backbones, data, tmp_path, "--resume")) == 0  # all sealed: nothing to do
    assert "are learnt already: nothing was trained" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--learning_rat", "1"], "Unknown key 'learning_rat'. Did you mean 'learning_rate'?"),
        (["--bnb_4bit_quant_typ", "nf4"], "Unknown key 'bnb_4bit_quant_typ'. Did you mean 'bnb_4bit_quant_type'?"),
        (["--rnk", "3"], "Unknown key 'rnk'. Did you mean 'rank'?"),
        (
            ["--hierarchy", "{sst2: [], yelp: [sst]}"],
            "Task 'yelp' names the unknown parent 'sst'. Did you mean 'sst2'?",
        ),
        (["--hierarchy", "{sst2: [], mnl: []}"], "`datasets` describes the unknown task 'yelp'."),
        (["--learning_rate", "fast"], "`learning_rate` is 'fast'; it must be a number."),
        (
            ["--data", "/nowhere"],
            "There is no '/nowhere/sst2/train.jsonl' (or .jsonl.gz) for task 'sst2'; is `data` the right folder?",
        ),
        (["--seed"], "--seed needs a value."),
        (["--hierarchy", "{a: ["], "--hierarchy has the value '{a: [', which is no YAML."),
        (["--hierarchy", "[a, b]"], "`hierarchy` is ['a', 'b']; give `task: [parents]` lines."),
        (
            ["--hierarchy", "{yelp: sst2, sst2: []}"],
            "The parents of task 'yelp' are the string 'sst2'; give a list",
        ),
        (["--train_samples", "x"], "`train_samples` is 'x'; it must be a whole number."),
        (["--train_samples", "0"], "`train_samples` is 0; it must be a whole number of 1 or more."),
        (["--rank", "abc"], "`rank` is 'abc'; it must be a whole number."),
        (["--rank", "0"], "`rank` is 0; a node needs a whole rank of 1 or more."),
        (["--hierarchy", "{}", "--datasets", "{}"], "`hierarchy` names no task; give `task: [parents]` lines."),
        (["--hierarchy", "{}", "--datasets", "{}", "--mixtures", "{c: [a]}"], "`hierarchy` names no task; give"),
        (["--output_dir", ""], "`output_dir` is ''; name a folder, or leave it out."),
        (
            ["--max_steps", "-5"],
            "`max_steps` is -5; it must be a whole number of 1 or more (-1: as many as there are).",
        ),
        (
            ["--warmup_steps", "1.5"],
            "`warmup_steps` is 1.5; it must be a whole number, or below 1 a share of a stage's",
        ),
        (["--device_map", "cuda"], "`device_map` is 'cuda', and PyTorch finds no GPU here; leave it out"),
        (["--backbone", "tests"], "`backbone` is 'tests', a folder that holds no model (no config.json)."),
        (["--optim_args", "3"], "`optim` is 'adamw_torch_fused' and `optim_args` '3', with which training could not"),
        (["--gating_config", "{trainabel: false}"], "`gating_config` has the unknown key 'trainabel'."),
        (["--resume_from_checkpoint", "/no/run"], "'/no/run' holds no run to resume"),
        (["stray"], "'stray' stands where a --key should."),
    ],
)
def test_what_is_wrong_gives_exit_code_2(backbones, data, tmp_path, capsys, more, message):
    assert main(tiny_run(backbones, data, tmp_path, *more)) == 2
    assert f"hft: error: {message}" in capsys.readouterr().err
    assert not list(tmp_path.glob("run/*"))


@pytest.mark.parametrize("before", [["--learning_rate", "1e-3"], ["--resume", "--learning_rate", "1e-3"]])
def test_a_key_before_the_recipe_is_told_of(capsys, before):
    assert main(["train", *before, "cl14-small"]) == 2
    error = (
        "hft: error: --learning_rate stands before the recipe; give the recipe first: hft train RECIPE --learning_rate"
    )
    assert error in capsys.readouterr().err
    assert main(["train", "--learning_rate=fast", "cl14-small"]) == 2
    assert "`learning_rate` is 'fast'" in capsys.readouterr().err


def test_an_option_before_the_model_is_told_of(capsys):
    assert main(["serve", "--port", "8000", "M"]) == 2
    assert (
        "--port stands before the model; give the model first: hft serve MODEL --port VALUE."
        in capsys.readouterr().err
    )


def test_other_wrong_commands(tmp_path, backbones, capsys):
    assert main([]) == 2
    assert main(["train", str(tmp_path)]) == 2
    (tmp_path / "empty.yaml").write_text("")
    assert main(["train", str(tmp_path / "empty.yaml")]) == 2
    said = capsys.readouterr().err
    assert (
        f"'{tmp_path}' is a folder, and a recipe is a YAML file" in said and "empty.yaml' is empty; a recipe" in said
    )
    assert main(["train", "cl14-smal"]) == 2
    assert main(["eval", str(backbones["llama"]), "--recipe", "cl14-small", "--samples", "3", "--lr", "3"]) == 2
    assert main(["generate", str(backbones["llama"]), "hi"]) == 2
    error = capsys.readouterr().err
    assert "There is no file 'cl14-smal', and no recipe of that name. Did you mean 'cl14-small'?" in error
    assert "`hft eval` does not know '--lr'; see `hft eval --help`." in error
    assert "is no HFT model but a plain 'llama'" in error
    with pytest.raises(SystemExit) as stop:
        main(["trane"])
    assert stop.value.code == 2


def test_a_missing_backbone_gives_exit_code_1(data, tmp_path, capsys):
    assert main(["train", "cl14-small", "--backbone", "no/such-model", "--data", str(data)]) == 1
    assert "no/such-model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("backbone: x\nbackbone: y\n", "The key 'backbone' is a duplicate (line 2); keep one."),
        ("backbone: x\nhierarchy: {a: [], a: []}\n", "The key 'a' is a duplicate (line 2); keep one."),
        ("backbone: x\n", "lacks the key 'hierarchy'."),
        ("- 1\n", "must hold `key: value` lines, not a list."),
        ("a: [\n", "is no YAML"),
        ("backbone: x\nhierarchy: {a: [b], b: [a]}\n", "The hierarchy has a cycle"),
        ("backbone: x\nhierarchy: {a: 3}\n", "The parents of task 'a' are 3; give a list of names: `a: [parent]`."),
        ("backbone: x\nhierarchy: {a: [], b: [[a]]}\n", "The parents of task 'b' are [['a']]; give a list of names"),
        (
            "backbone: x\nhierarchy: {a: []}\ndatasets: {a: null}\n",
            "`datasets['a']` is None; give path, instruction, o",
        ),
        (
            "backbone: x\nhierarchy: {a: []}\ndatasets:\n",
            "`datasets` is None; describe each task's data in it, or leave",
        ),
    ],
)
def test_wrong_recipes(tmp_path, text, message):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_recipe(tmp_path / "r.yaml")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_read(path):
    recipe = read_recipe(path)
    assert recipe.datasets.keys() == set(recipe.tasks())
    assert recipe.quantization_config().load_in_4bit
    assert read_recipe(path.stem) == recipe  # by name, from wherever the package is


def test_a_description_reads_any_dataset(tmp_path, tokenizer):
    """As on the Hub: labels are numbers, columns have names of their own."""
    rows = [{"premise": f"p{i}", "hypothesis": f"h{i}", "label": i % 3} for i in range(6)]
    Dataset.from_list(rows).to_parquet(tmp_path / "sets" / "validation_matched.parquet")
    spec = yaml.safe_load(RECIPES[0].read_text())["datasets"]["mnli"]
    recipe = read_recipe(
        RECIPES[0],
        {
            "datasets": {"mnli": {**spec, "path": str(tmp_path / "sets"), "splits": {"validation": "validation"}}},
            "eval_samples": None,
        },
    )
    read = load_task(recipe, "mnli", "validation", tokenizer)
    assert read[2]["prompt"][0]["content"].endswith(
        "\nOptions: entailment, neutral, contradiction\nsentence 1: p2\nsentence 2: h2"
    )
    assert [row["completion"][0]["content"] for row in read] == ["entailment", "neutral", "contradiction"] * 2
    with pytest.raises(ValueError, match="Task 'cb' has no data: describe it under `datasets`"):
        load_task(recipe, "cb", "validation", tokenizer)
    with pytest.raises(ValueError, match=re.escape("`datasets['mnli']` lacks the key 'label'.")):
        bad = {key: value for key, value in spec.items() if key != "label"}
        load_task(read_recipe(RECIPES[0], {"datasets": {"mnli": bad}}), "mnli", "train", tokenizer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": "lab"}, "`label` of task 'mnli' is 'lab'. Did you mean 'label'?"),
        ({"input": "{premis}"}, "`input` of task 'mnli' names 'premis'. Did you mean 'premise'?"),
        ({"options": ["yes"]}, "has the label 1, and there are 1 options; a hidden label (-1) marks"),
        ({"spilts": {}}, "`datasets['mnli']` has the unknown key 'spilts'. Did you mean 'splits'?"),
        ({"input": None}, "`datasets['mnli']` lacks the key 'input'."),
        ({"input": "{premise"}, "`input` of task 'mnli' is '{premise', which is no template: expected '}' before end"),
        ({"label": "premise"}, "A row of task 'mnli' (train) has the label 'p'; a label is the index of one of `opt"),
    ],
)
def test_wrong_descriptions(tmp_path, tokenizer, change, message):
    Dataset.from_list([{"premise": "p", "hypothesis": "h", "label": 1}]).to_parquet(
        tmp_path / "sets" / "train.parquet"
    )
    spec = {**yaml.safe_load(RECIPES[0].read_text())["datasets"]["mnli"], "path": str(tmp_path / "sets"), **change}
    with pytest.raises(ValueError, match=re.escape(message)):
        load_task(read_recipe(RECIPES[0], {"datasets": {"mnli": spec}}), "mnli", "train", tokenizer)


@pytest.mark.parametrize(
    ("key", "of_all"),
    [("options", True), ("options", False), ("instruction", False), ("input", True), ("output", False)],
)
def test_rows_that_lack_a_key(backbones, data, tmp_path, capsys, key, of_all):
    file = data / "mnli" / "train.jsonl.gz"
    with gzip.open(file, "rt") as lines:
        rows = [json.loads(line) for line in lines]
    for row in rows if of_all else rows[2:3]:
        del row[key]
    with gzip.open(file, "wt") as lines:
        lines.write("\n".join(map(json.dumps, rows)))
    assert main(tiny_run(backbones, data, tmp_path)) == 2
    error = capsys.readouterr().err
    where = f"Line {1 if of_all else 3} of '{file}' (task 'mnli')"
    assert f"hft: error: {where} cannot be read: it lacks the key '{key}'; each row needs instruction, opt" in error
    assert "(`options: []` for free answers)." in error and not list(tmp_path.glob("run/*"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"output": 1},
            "Line 1 of '{}' (task 'mnli') cannot be read: 'output' is 1; it must be text: put numbers in quotes.",
        ),
        ({"input": None}, "Line 1 of '{}' (task 'mnli') cannot be read: it lacks the key 'input'"),
        ({"options": ["0", 1]}, "'options' is ['0', 1]; it must be a list of texts: put numbers in quotes."),
        ({"options": "yes"}, "'options' is 'yes'; it must be a list of texts"),
        (None, "'{}' (task 'mnli') is empty; it needs at least one row."),
    ],
)
def test_rows_of_another_kind(backbones, data, tmp_path, capsys, row, message):
    file = data / "mnli" / "train.jsonl.gz"
    whole = {"instruction": "Which?", "options": ["0", "1"], "input": "one", "output": "1"}
    with gzip.open(file, "wt") as lines:
        lines.write("" if row is None else f"{json.dumps({**whole, **row})}\n" * 3)
    assert main(tiny_run(backbones, data, tmp_path)) == 2
    assert message.format(file) in capsys.readouterr().err and not list(tmp_path.glob("run/*"))


def test_odd_answers_are_told_of(tmp_path, caplog):
    outputs = ("a", "A", " ", "b", "c")
    rows = [{"instruction": "?", "options": ["a", "b"], "input": "x", "output": output} for output in outputs]
    file = tmp_path / "train.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    logging.enable_propagation()
    try:
        assert len(read_rows(file, "t")) == 5
    finally:
        logging.disable_propagation()
    assert "(task 't'): the answer is none of the row's `options` in 2 of 5 rows, first in line 2." in caplog.text
    assert "(task 't'): the answer is empty in 1 of 5 rows, first in line 3." in caplog.text


def test_rows_stay_as_they_are_written_plain_or_gzipped(tmp_path):
    rows = [
        {"instruction": "When?", "options": [], "input": "1", "output": "2020-01-02", "seed": 1},
        {"instruction": "When?", "options": [], "input": "2", "output": "2020-01-03T10:00:00Z", "more": {"a": [1]}},
    ]
    (tmp_path / "date").mkdir()
    text = "\n".join(json.dumps(row) for row in rows)
    plain, packed = tmp_path / "date/train.jsonl", tmp_path / "date/train.jsonl.gz"
    plain.write_text(text)
    found = read_rows(find_split(tmp_path, "date", "train"), "date")
    assert found.to_list() == [{**rows[0], "more": None}, {**rows[1], "seed": None}]
    plain.write_bytes(text.encode("utf-8-sig"))  # as on Windows
    assert read_rows(plain, "date").to_list() == found.to_list()
    assert tasks_in(tmp_path) == ["date"]
    packed.write_bytes(gzip.compress(text.encode()))
    with pytest.raises(
        ValueError, match=r"There are both '.*train.jsonl.gz' and 'train.jsonl' for task 'date'; remove"
    ):
        find_split(tmp_path, "date", "train")
    plain.unlink()
    assert read_rows(find_split(tmp_path, "date", "train"), "date").to_list() == found.to_list()
    packed.write_bytes(gzip.compress((text + "\n" + json.dumps({**rows[0], "seed": "x"})).encode()))
    with pytest.raises(ValueError, match=r"a further key \('seed', 'more'\) has values of several kinds"):
        read_rows(packed, "date")


@pytest.mark.parametrize(
    "text, message",
    [
        (
            '{"instruction": "a", "options": [], "input": "b", "output": "c"}\n{"instruction": ',
            "Line 2 of '{}' (task 'mnli') cannot be read: Expecting value",
        ),
        ("[1]\n", "Line 1 of '{}' (task 'mnli') cannot be read: it must be an object, {{instruction, options"),
        ("\n\n", "'{}' (task 'mnli') is empty"),
        (None, "'{}' (task 'mnli') cannot be read: Not a gzipped file"),
        (
            '{"instruction": "a", "options": ["c"], "input": "b", "output": "c"}\n' * 300 + "\xfc",
            "Line 301 of '{}' (task 'mnli') cannot be read: 'utf-8' codec can't decode byte 0xfc",
        ),
        (
            '{"instruction": "a", "options": ["c", "c"], "input": "b", "output": "c"}',
            "cannot be read: 'options' is ['c', 'c']; each option stands once",
        ),
        ('{"instruction": "\\ud800", "options": [], "input": "b", "output": "c"}', "with half of a surrogate pair"),
    ],
)
def test_lines_that_are_no_rows_are_named(backbones, data, tmp_path, capsys, text, message):
    file = data / "mnli" / "train.jsonl.gz"
    file.write_bytes(b"plain" if text is None else gzip.compress(text.encode("latin-1")))
    assert main(tiny_run(backbones, data, tmp_path)) == 2
    assert message.format(file) in capsys.readouterr().err


@pytest.mark.parametrize("is_slow, dtype", [(True, "bfloat16"), (True, "float32"), (False, "bfloat16")])
def test_a_cpu_without_bfloat16_products_is_told_of(backbones, data, tmp_path, capsys, monkeypatch, is_slow, dtype):
    monkeypatch.setattr(compute_dtype, "is_bfloat16_slow", lambda: is_slow)
    assert compute_dtype.fast_dtype() == (torch.float32 if is_slow else torch.bfloat16)
    assert main(tiny_run(backbones, data, tmp_path, "--dtype", dtype, "--bf16", "false", "--max_steps", "1")) == 0
    assert (compute_dtype.advice() in capsys.readouterr().err) == (is_slow and dtype == "bfloat16")


def test_a_checkpoint_that_is_named_comes_before_the_last_one(backbones, data, tmp_path):
    command = tiny_run(
        backbones, data, tmp_path, "--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "9"
    )
    assert main(command) == 0
    first = tmp_path / "run" / "stage-1" / "checkpoint-1"
    assert main([*command, "--resume", "--resume_from_checkpoint", str(tmp_path / "none")]) == 2
    assert first.is_dir() and main([*command, "--resume", "--resume_from_checkpoint", str(first)]) == 0


def test_a_prompt_that_is_no_text_is_refused(grown_folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", ["good\n", "\udcff hi\n"])
    assert main(["generate", str(grown_folder)]) == 2
    assert "The prompt '\\udcff hi' is no UTF-8 text." in capsys.readouterr().err


def test_an_unknown_metric_shows_before_training(backbones, data, tmp_path, capsys):
    assert main(tiny_run(backbones, data, tmp_path, "--metric", "foo")) == 2
    assert "Unknown metric 'foo'" in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "error, words",
    [
        (RuntimeError("No space left on device (os error 28)"), "No space left on device (os error 28)"),
        (
            type("ConnectError", (Exception,), {"__module__": "httpx"})("refused"),
            "The Hub cannot be reached: refused.",
        ),
    ],
)
def test_what_disks_and_networks_do_is_no_traceback(monkeypatch, capsys, error, words):
    def fail(args, overrides):
        raise error

    monkeypatch.setattr(commands, "remove", fail)
    assert main(["remove", "m", "--task", "a"]) == 1
    assert f"hft: error: {words}" in capsys.readouterr().err
    error.args = ("a bug",)
    if "os error" in words:
        with pytest.raises(RuntimeError, match="a bug"):
            main(["remove", "m", "--task", "a"])


def test_names_may_be_numbers(tmp_path):
    (tmp_path / "r.yaml").write_text("backbone: x\nhierarchy: {1: [], 2: [1]}\n")
    assert read_recipe(tmp_path / "r.yaml").hierarchy == {"1": [], "2": ["1"]}


def test_names_keep_their_letters(tmp_path):
    (tmp_path / "r.yaml").write_text("backbone: x\nhierarchy: {no: [], 007: [no], on: [007]}\npage_tasks: [on]\n")
    recipe = read_recipe(tmp_path / "r.yaml")
    assert recipe.hierarchy == {"no": [], "007": ["no"], "on": ["007"]}
    assert recipe.training["page_tasks"] == ["on"]
    (tmp_path / "r.yaml").write_bytes("backbone: größe\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"r.yaml' is no YAML: 'utf-8' codec can't decode byte 0xf6"):
        read_recipe(tmp_path / "r.yaml")
    (tmp_path / "r.yaml").write_text("backbone: x\nhierarchy: {[a]: []}\n")
    with pytest.raises(ValueError, match="A key in line 2 is no word"):
        read_recipe(tmp_path / "r.yaml")


def test_few_rows_of_a_sorted_file_are_a_random_choice_with_all_that_scoring_needs(tokenizer, tmp_path):
    rows = [
        {"instruction": "i", "options": ["no", "yes"], "input": str(i), "output": ["no", "yes"][i // 50], "entry": i}
        for i in range(100)
    ]
    for split in ("train", "validation"):
        (tmp_path / "a").mkdir(exist_ok=True)
        with gzip.open(tmp_path / "a" / f"{split}.jsonl.gz", "wt") as lines:
            lines.write("\n".join(map(json.dumps, rows)))
    (tmp_path / "r.yaml").write_text(f"backbone: x\nhierarchy: {{a: []}}\ndata: {tmp_path}\n")
    recipe = read_recipe(tmp_path / "r.yaml")
    for split in ("train", "validation"):
        some = find_test_set(recipe, "a", split, tokenizer, 20)
        assert len(some.rows) == 20 and {row["completion"][0]["content"] for row in some.rows} == {"no", "yes"}
        assert all(row["options"] == ["no", "yes"] and "entry" in row for row in some.rows)
        assert some.rows == find_test_set(recipe, "a", split, tokenizer, 20).rows


def test_a_long_passage_is_cut_and_nothing_else(tokenizer):
    row = {"instruction": "Which?", "options": ["a", "b"], "input": "x" * 500, "output": "a"}
    content = to_chat(row, tokenizer, 20)["prompt"][0]["content"]
    assert content == "Which?\nOptions: a, b\n" + "x" * 10 + " " + "x" * 10


@pytest.mark.skipif(not CL14.exists(), reason="the data of the benchmark is not here")
def test_the_real_rows_are_read(tokenizer):
    recipe = read_recipe("cl14-small", {"data": str(CL14), "train_samples": 5})
    for task in recipe.hierarchy:
        rows = load_task(recipe, task, "train", tokenizer)
        assert len(rows) == 5
        assert all(row["completion"][0]["content"] in row["prompt"][0]["content"] for row in rows)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_what_a_recipe_trains_decides_and_tests_on_are_different_rows(path):
    """Each split is a whole one of the Hub's, or the first or the remaining rows of one."""
    for task, spec in read_recipe(path).datasets.items():
        splits = [spec.get("splits", {}).get(split, split) for split in ("train", "validation", "test")]
        names, parts = zip(*(re.fullmatch(r"(\w+)(?:\[(:\d+|\d+:)\])?", its).groups() for its in splits), strict=True)
        for i, j in ((0, 1), (0, 2), (1, 2)):
            both = {part.strip(":") for part in (parts[i], parts[j]) if part}
            is_cut_in_two = parts[i] != parts[j] and None not in (parts[i], parts[j]) and len(both) == 1
            assert names[i] != names[j] or is_cut_in_two, f"{task}: {splits}"


def test_help_is_quick_and_names_the_commands():
    done = subprocess.run(
        [sys.executable, "-m", "hft.trainers.cli", "--help"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0
    assert all(command in done.stdout for command in ("demo", "train", "eval", "generate"))


@pytest.fixture
def grown_folder(backbones, tokenizer, tmp_path):
    """A saved model of sst2 -> yelp and mnli, sealed, whose gates differ."""
    model = hft.HFTForCausalLM.from_backbone(
        backbones["llama"], {"sst2": [], "yelp": ["sst2"], "mnli": []}, memory_config={"slots": 2}
    )
    grow(model)
    with torch.no_grad():
        model.hft_gates.of("yelp").copy_(torch.tensor([[0.0, 1.0, 0.5, 1.0], [0.4, 1.0, 0.5, 0.0]]))
    model.add_task("later", ["yelp"])
    model.save_pretrained(tmp_path / "grown")
    tokenizer.save_pretrained(tmp_path / "grown")
    return tmp_path / "grown"


def test_plan_draws_a_saved_model_without_its_backbone(grown_folder, tmp_path, capsys):
    config = json.loads((grown_folder / "config.json").read_text())
    (grown_folder / "config.json").write_text(json.dumps({**config, "backbone": "/nowhere"}))
    out = tmp_path / "tree.svg"
    assert main(["plan", "--model", str(grown_folder), "--task", "yelp", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "├─ sst2  (page:1 " in shown
    assert "│  └╌ yelp  (sst2 0.20, page:1 0.50, page:2 0.50)" in shown  # a dashed edge: little flows in
    assert "│     └═ later  (open; sst2 0.20, yelp 1.00, page:1 0.50, page:2 0.50)" in shown
    assert "mean |g|     0.200     1.000     0.500     0.500" in shown
    picture = out.read_text()
    for text in ("yelp", "page:1 0.50", "0.20", "backbone"):
        assert f"<!-- {text} -->" in picture, text
    yelp, later = map(float, re.findall(r"fill: none; stroke: #000000; stroke-width: ([\d.]+)", picture))
    assert later > 2 * yelp  # gates of 1 and 0.2 on their parents
    assert main(["plan", "--model", str(grown_folder), "--out", str(tmp_path / "tree.png")]) == 0
    assert (tmp_path / "tree.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--model", "GROWN", "--task", "yelb"], 2, "Unknown task 'yelb'. Did you mean 'yelp'?"),
        (["--model", "GROWN", "--out", "tree.gif"], 2, "'tree.gif' should end in .png, .svg or .pdf."),
        (["--model", "/nowhere"], 1, "/nowhere"),
        (["--model", "BACKBONE"], 2, "is no HFT model but a plain 'llama'"),
        (
            ["--model", "GROWN", "--backbone", "BACKBONE"],
            2,
            "--backbone does not go with --model: it has one; leave one",
        ),
        (
            ["--model", "GROWN", "--yaml", "p.yaml"],
            2,
            "--yaml names the recipe that is written for the tasks of --data",
        ),
        (
            ["--model", "GROWN", "--recipe", "cl14-small"],
            2,
            "--recipe says how the tasks of --data train; give --data",
        ),
        (
            ["--model", "GROWN", "--steps", "9"],
            2,
            "--steps says how a hierarchy is found for the tasks of --data; give",
        ),
        (["--model", "GROWN", "--no_families"], 2, "--no_families says how a hierarchy is found for the tasks of"),
        (
            ["--data", "cl14-small", "--recipe", "cl14-small"],
            2,
            "--data 'cl14-small' is no folder, so it is taken as a recipe, and --recipe 'cl14-small' is another one;",
        ),
        (["--data", "DATA", "--yaml", "DATA"], 2, "', a folder; name a file in it."),
        (["--data", "DATA", "--max_parents", "0"], 2, "--max_parents is 0; it must be 1 or more."),
        (["--data", "DATA", "--steps", "0"], 2, "--steps is 0; it must be 1 or more."),
        (["--data", "DATA", "--out", "BACKBONE/config.json/tree.svg"], 1, "config.json"),
        (["--data", "DATA", "--yaml", "BACKBONE/config.json/plan.yaml"], 1, "Cannot write to the folder '"),
        (["--data", "WRONG"], 2, "`mastery_patience` is 0; it must be a whole number of 1 or more"),
    ],
)
def test_wrong_plans(grown_folder, backbones, data, tmp_path, monkeypatch, capsys, arguments, code, message):
    """They are refused before anything is loaded or measured."""
    monkeypatch.setattr(hft.HFTForCausalLM, "from_backbone", None)
    (tmp_path / "wrong.yaml").write_text(f"backbone: x\nhierarchy: {{sst2: []}}\nmastery_patience: 0\ndata: {data}\n")
    places = {"GROWN": grown_folder, "BACKBONE": backbones["llama"], "DATA": data, "WRONG": tmp_path / "wrong.yaml"}
    arguments = [re.sub("|".join(places), lambda match: str(places[match[0]]), word) for word in arguments]
    assert main(["plan", *arguments]) == code
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("after", [1.0, 2.0])
def test_refresh_saves_only_what_helps(grown_folder, data, monkeypatch, capsys, after):
    """The rule is tested in test_refresh.py; here the loss falls, or does not, as told."""
    losses = itertools.cycle([2.0, after])

    def as_told(self, task, rows, batch_size):
        return [next(losses)] * len(rows)

    def files():
        return {str(path.relative_to(grown_folder)): path.read_bytes() for path in grown_folder.rglob("*.safetensors")}

    monkeypatch.setattr(hft.HFTForCausalLM, "losses", as_told)
    score = {"score": 5.0, "se": 1.0, "rows": 2}
    scores = {"sst2": score, "mnli": score}
    RunRecord(stages=[{"level": 1, "tasks": list(scores), "log": [], "scores": scores}]).write(grown_folder)
    before, is_kept = files(), after < 2
    command = ["refresh", str(grown_folder), "--recipe", "cl14-small", "--data", str(data), "--samples", "3"]
    assert main([*command, "--task", "sst2", "--steps", "2"]) == 0
    assert f"sst2: {'refreshed' if is_kept else 'left as it was'}" in capsys.readouterr().out
    changed = {name for name, its in files().items() if its != before[name]}
    assert changed == ({"model.safetensors"} if is_kept else set())
    assert ("sst2" in RunRecord.load(grown_folder).last_scores()) == (not is_kept)


def test_what_can_be_refreshed(grown_folder, data, capsys):
    command = ["refresh", str(grown_folder), "--recipe", "cl14-small", "--data", str(data)]
    assert main([*command, "--task", "later"]) == 2
    assert "Task 'later' is not sealed" in capsys.readouterr().err
    assert main([*command, "--task", "sst3"]) == 2
    assert "Unknown task 'sst3'. Did you mean 'sst2'?" in capsys.readouterr().err
    assert main([*command, "--steps", "1", "--samples", "3"]) == 0  # each task that is sealed and has rows
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["sst2", "mnli", "yelp"]
    (grown_folder / "other.yaml").write_text("backbone: b\nhierarchy: {later: [], none: []}\n")
    assert main(["refresh", str(grown_folder), "--recipe", str(grown_folder / "other.yaml")]) == 2
    assert "has no sealed task of the recipe's (later, none)" in capsys.readouterr().err


def test_eval_asks_for_what_its_columns_say(grown_folder, data, tmp_path, monkeypatch, capsys):
    asked = []

    def score(model, tokenizer, its, task, *_, **__):
        asked.append(task)
        return [{"backbone": 0.0, None: 0.5}.get(task, 1.0)] * len(its.rows)

    model = hft.HFTForCausalLM.from_pretrained(grown_folder)
    model.add_routes("sst2", [[5, 6, 7 + i] for i in range(8)])
    model.save_pretrained(grown_folder)
    monkeypatch.setattr("hft.trainers.evaluation.score_task", score)
    out = tmp_path / "scores.json"
    command = ["eval", str(grown_folder), "--recipe", "cl14-small", "--data", str(data), "--out", str(out)]
    assert main([*command, "--task", "mnli", "--task", "sst2"]) == 0
    assert asked == ["backbone", "mnli", None, "backbone", "sst2", None]
    cells = json.loads(out.read_text())["tasks"]["mnli"]
    assert [cells[column] for column in ("backbone", "hft", "routed")] == [0.0, 100.0, 50.0]
    assert "Not learnt to the end" not in capsys.readouterr().err


def test_commands_that_have_nothing_to_do(grown_folder, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", ["\n"])
    (tmp_path / "o.yaml").write_text(f"backbone: b\nhierarchy: {{other: []}}\ndata: {data}\n")
    for command, message in (
        (["generate", str(grown_folder)], "There is no prompt"),
        (["eval", str(grown_folder), "--recipe", str(tmp_path / "o.yaml")], "describes none of the model's tasks"),
    ):
        assert main(command) == 2 and message in capsys.readouterr().err


def test_a_recipe_cuts_inputs_and_answers_and_scores_as_it_says(tmp_path, tokenizer):
    (tmp_path / "a").mkdir()
    row = {"instruction": "Which?", "options": [], "input": "x" * 500, "output": "a"}
    (tmp_path / "a/validation.jsonl").write_text(json.dumps(row))
    keys = f"backbone: x\nhierarchy: {{a: []}}\ndata: {tmp_path}\n"
    (tmp_path / "r.yaml").write_text(keys + "max_input_tokens: 20\nmax_new_tokens: 3\nmetric: {a: rouge_l}\n")
    found = find_test_set(read_recipe(tmp_path / "r.yaml"), "a", "validation", tokenizer)
    assert len(found.rows[0]["prompt"][0]["content"]) < 40
    assert (found.max_new_tokens, found.score) == (3, rouge_l)


def test_rows_are_tokenised_as_by_the_trainer(backbones, tokenizer, tmp_path):
    rows = [
        {"prompt": "two plus two is", "completion": " four"},
        {
            "prompt": [{"role": "user", "content": "two plus two?"}],
            "completion": [{"role": "assistant", "content": "four"}],
        },
    ]
    for row in rows:
        model = hft.HFTForCausalLM.from_backbone(backbones["llama"], {"a": []})
        config = HFTTrainingConfig(output_dir=str(tmp_path), report_to="none", bf16=False)
        trainer = HFTTrainer(model, config, train_dataset={"a": Dataset.from_list([row])}, processing_class=tokenizer)
        (ours,) = tokenize_rows([row], tokenizer)
        theirs = trainer.train_dataset[0]
        assert ours == {"input_ids": theirs["input_ids"], "labels": theirs["labels"]}
        (cut,) = tokenize_rows([row], tokenizer, max_length=6)
        assert cut == {"input_ids": ours["input_ids"][-6:], "labels": ours["labels"][-6:]}


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("eval m --recipe r --batch_size -1", "--batch_size is -1; it must be 1 or more."),
        ("report m --recipe r --samples 0", "--samples is 0; it must be 1 or more."),
        ("refresh m --recipe r --batch_size 0", "--batch_size is 0; it must be 1 or more."),
        ("generate m hi --max_new_tokens 0", "--max_new_tokens is 0; it must be 1 or more."),
        ("generate m hi -x", "`hft generate` does not know '-x'; see `hft generate --help`."),
        ("eval m --recipe r --out .", "--out is '.', a folder; name a file in it."),
    ],
)
def test_wrong_numbers_and_options_are_refused_before_anything_is_loaded(capsys, command, message):
    assert main(command.split()) == 2
    assert f"hft: error: {message}" in capsys.readouterr().err


@pytest.mark.parametrize("prompt", ["-5 + 3 =", "-5", "-.5", "- milk\n- eggs"])
def test_prompts_may_begin_with_a_dash(monkeypatch, prompt):
    asked = []
    monkeypatch.setattr(commands, "generate", lambda args, _: asked.append((args.task, args.prompt)))
    assert main(["generate", "m", "--task", "a", prompt]) == 0
    assert asked == [("a", [prompt])]
    assert main(["generate", "m", "--task", "a", "--", prompt, "--task"]) == 0
    assert asked[1:] == [("a", [prompt, "--task"])]


def test_only_a_stopped_training_is_said_to_go_on(monkeypatch, capsys):
    for command in ("train r", "generate m hi"):
        monkeypatch.setattr(commands, command.split()[0], lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(command.split()) == 130
        assert ("--resume" in capsys.readouterr().err) == command.startswith("train")


def test_without_a_tokenizer_of_its_own_a_model_has_its_backbones(backbones, tokenizer, tmp_path):
    hft.HFTForCausalLM.from_backbone(backbones["llama"], {"a": []}).save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("text", ["1.10", "0123", "1_0", "12:30", "no", "2024-01-01", "a: b"])
def test_words_and_paths_are_taken_to_the_letter_on_the_command_line(text):
    assert read_value("output_dir", text) == text and read_value("hub_model_id", "null") is None
    for key in ("resume_from_checkpoint", "fsdp"):  # text, or a truth value
        assert read_value(key, text) == (False if text == "no" else text)
        assert (read_value(key, "true"), read_value(key, "null")) == (True, None)
    assert read_value("hierarchy", "{no: [], 1: [no]}") == {"no": [], "1": ["no"]} and read_value("seed", "") is None
    assert read_value("max_steps", "1_0") == 10 and read_value("metric", "{a: options}") == {"a": "options"}


@pytest.mark.parametrize(
    "line, message",
    [
        ("output_dir: 1.10", "`output_dir` is 1.1, as YAML reads it; it must be text: put it in quotes."),
        ("output_dir: 2024-01-01", "it must be text: put it in quotes."),
        ("bf16: maybe", "`bf16` is 'maybe'; it must be true or false."),
        ("learning_rate: true", "`learning_rate` is True; it must be a number."),
        ("train_samples: true", "`train_samples` is True; it must be a whole number."),
        ("refining_rate: true", "`refining_rate` is True; it must be a number."),
        ("task_learning_rates: {a: true}", "`task_learning_rates['a']` is True; it must be a number."),
        ("seed: 1.5", "`seed` is 1.5; it must be a whole number."),
        ("max_grad_norm: null", "`max_grad_norm` is None; it must be a number."),
        ("page_tasks: 3", "`page_tasks` is 3; it must be a list."),
        ("lr_scheduler_kwargs: 3", "`lr_scheduler_kwargs` is 3; it must be text or `key: value` pairs."),
        ("accelerator_config: 3", "`accelerator_config` is 3; it must be text or `key: value` pairs."),
        ("metric: [exact_match]", "`metric` is ['exact_match']; it must be text or `key: value` pairs."),
        ("metric:", "`metric` is None; it must be text or `key: value` pairs."),
        ("metric: {a: 3}", "`metric['a']` is 3; it must be text."),
        ("rank: true", "`rank` is True; it must be a whole number."),
        ("gating_config: 3", "`gating_config` is 3; it must be `key: value` pairs."),
        ("target_modules: 3", "`target_modules` is 3; it must be text or a list."),
        ("target_modules: []", "`target_modules` is []; name the linears that carry nodes, or leave it out for all"),
        ("dtype: floaty", "`dtype` is 'floaty'; it must be a floating-point type of torch, such as bfloat16."),
        ("dtype: int8", "`dtype` is 'int8'; it must be a floating-point type of torch"),
        ("bnb_4bit_compute_dtype: auto", "`bnb_4bit_compute_dtype` is 'auto'; it must be a floating-point type of"),
        ("bnb_4bit_quant_type: nf5", "`bnb_4bit_quant_type` is 'nf5'; it must be nf4 or fp4."),
        ("llm_int8_skip_modules: 3", "BitsAndBytesConfig has a wrong value: llm_int8_skip_modules must be a list"),
    ],
)
def test_values_that_are_not_what_their_key_takes(tmp_path, line, message):
    (tmp_path / "r.yaml").write_text(f"backbone: x\nhierarchy: {{a: []}}\n{line}\n")
    with pytest.raises(ValueError, match=re.escape(message)):
        read_recipe(tmp_path / "r.yaml")


def test_a_metric_of_ones_own_is_found_where_the_command_is_called(tmp_path, monkeypatch):
    (tmp_path / "metric_of_mine.py").write_text("def score(answer, row):\n    return 0.5\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    assert find_metric("metric_of_mine:score")("", {}) == 0.5


def test_what_yaml_reads_as_a_number_may_be_a_folder(tmp_path):
    (tmp_path / "r.yaml").write_text("backbone: x\nhierarchy: {a: []}\ndata: 123\noutput_dir: 2024\n")
    recipe = read_recipe(tmp_path / "r.yaml")
    assert recipe.data == "123" and recipe.training_arguments()["output_dir"] == "2024"
