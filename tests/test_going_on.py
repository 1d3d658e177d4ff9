"""A recipe that goes on from a saved model: tasks more, later, beside what is learnt already."""

import shutil
from pathlib import Path

import pytest

import hft
from hft.trainers import HFTTrainer
from hft.trainers.cli import main
from hft.trainers.run_record import RunRecord
from hft.trainers.stage_scores import StageScores

from .test_recipes_and_cli import tiny_run, write_data


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "data")


@pytest.fixture(scope="module")
def finished(backbones, tmp_path_factory):
    """The run of the shipped recipe on a tiny backbone."""
    folder = tmp_path_factory.mktemp("finished")
    assert main(tiny_run(backbones, write_data(folder / "data"), folder)) == 0
    return folder / "run"


@pytest.fixture
def learnt(finished, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("in_place", [True, False])
def test_a_recipe_adds_tasks_to_a_model(learnt, data, tmp_path, capsys, in_place):
    """In its own folder or another; what was learnt keeps its files, to the byte."""
    for task in ("amazon", "amazon-more"):
        shutil.copytree(data / "yelp", data / task)
    out = learnt if in_place else tmp_path / "more"
    lines = f"""
from_model: {learnt}
hierarchy: {{amazon-more: [amazon, mnli], amazon: [yelp], yelp: [sst2]}}
data: {data}
rank: 3
max_steps: 2
stage_eval_samples: 2
output_dir: {out}
"""
    (tmp_path / "more.yaml").write_text(lines)
    before = files_in(learnt)
    capsys.readouterr()
    assert main(["train", str(tmp_path / "more.yaml")]) == 0
    shown = capsys.readouterr().out
    assert "sst2  learnt" in shown and "amazon  6 rows" in shown and "After stage 4/4: amazon-more" in shown
    after = files_in(out)
    kept = [name for name in before if name.startswith(("tasks/", "pages/"))]
    assert len(kept) > 5 and all(after[name] == before[name] for name in kept)
    assert {"tasks/amazon.safetensors", "tasks/amazon-more.safetensors"} <= after.keys() - before.keys()
    stages = [stage["tasks"] for stage in RunRecord.load(out).stages]
    assert stages == [["sst2", "mnli"], ["yelp", "cb", "rte"], ["amazon"], ["amazon-more"]]
    model = hft.HFTForCausalLM.from_pretrained(out)
    assert model.hierarchy.path("amazon-more") == ("sst2", "yelp", "amazon", "mnli", "amazon-more")
    assert [model.config.task(task)["rank"] for task in ("yelp", "amazon")] == [2, 3]
    assert model.config.open_tasks() == [] and "amazon" in model.hft_router.tasks()
    weights = {name: its for name, its in after.items() if name.endswith(".safetensors")}
    assert main(["train", str(tmp_path / "more.yaml"), "--resume"]) == 0
    assert "are learnt already: nothing was trained" in capsys.readouterr().out
    assert {name: its for name, its in files_in(out).items() if name in weights} == weights
    assert main(["eval", str(out), "--recipe", str(tmp_path / "more.yaml"), "--samples", "2"]) == 0
    assert "amazon-more" in capsys.readouterr().out


def test_a_model_that_goes_on_learning_is_killed_and_resumed(learnt, data, tmp_path, monkeypatch, capsys):
    """In its own folder: to the bytes of what is learnt without a break."""
    text = f"from_model: {learnt}\nhierarchy: {{new: [yelp], newer: [new]}}\nmixtures: {{}}\ndatasets: {{}}\n"
    (tmp_path / "more.yaml").write_text(f"{text}data: {data}\nmax_steps: 3\nsave_steps: 1\n")
    for task in ("new", "newer"):
        shutil.copytree(data / "cb", data / task)
    command = ["train", str(tmp_path / "more.yaml"), "--output_dir"]
    assert main([*command, str(tmp_path / "whole")]) == 0
    step, count = HFTTrainer.training_step, iter(range(100))

    def killed(self, *args, **kwargs):
        if next(count) == 5:  # in the second stage, after a checkpoint
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(HFTTrainer, "training_step", killed)
    assert main([*command, str(learnt)]) == 130
    assert list(learnt.glob("stage-4/checkpoint-*"))
    assert main([*command, str(learnt), "--hierarchy", "{new: [yelp], newer: [mnli]}", "--resume"]) == 2
    assert f"or remove that one (`hft remove {learnt} --task newer`)." in capsys.readouterr().err
    assert main([*command, str(learnt), "--rank", "5", "--resume"]) == 2
    assert "`rank` is 5, and '" in capsys.readouterr().err
    assert main([*command, str(learnt), "--resume"]) == 0
    whole, resumed = (
        {name: its for name, its in files_in(folder).items() if name.endswith(".safetensors") and "stage-" not in name}
        for folder in (tmp_path / "whole", learnt)
    )
    assert len(whole) > 8 and resumed == whole


def test_a_model_that_goes_on_learning_keeps_its_record(learnt, data, tmp_path, monkeypatch):
    """Also where `--resume` finds nothing to resume, and where a kill in the first scores comes between."""
    shutil.copytree(data / "cb", data / "new")
    text = f"from_model: {learnt}\nhierarchy: {{new: [yelp]}}\npage_tasks: []\ndata: {data}\nmax_steps: 1\n"
    (tmp_path / "more.yaml").write_text(text)
    past = [["sst2", "mnli"], ["yelp", "cb", "rte"]]
    begin = StageScores.begin

    def killed(*_):
        raise KeyboardInterrupt

    for out, kill in ((tmp_path / "fresh", False), (tmp_path / "killed", True), (learnt, True)):
        command = ["train", str(tmp_path / "more.yaml"), "--output_dir", str(out)]
        if kill:
            monkeypatch.setattr(StageScores, "begin", killed)
            assert main(command) == 130
            monkeypatch.setattr(StageScores, "begin", begin)
        assert main([*command, "--resume"]) == 0
        assert [stage["tasks"] for stage in RunRecord.load(out).stages] == [*past, ["new"]]


def test_a_model_goes_on_over_its_backbone_in_4_bit_where_it_is_now(backbones, data, tmp_path, quantizable, capsys):
    """As it was trained, without a word of it in the recipe; of another place only if its own is gone."""
    shutil.copytree(backbones["llama"], tmp_path / "old")
    command = tiny_run(backbones, data, tmp_path, "--backbone", str(tmp_path / "old"), "--max_steps", "1")
    command[command.index("--load_in_4bit") + 1] = "true"
    assert main(command) == 0
    text = f"from_model: {tmp_path / 'run'}\nhierarchy: {{cb2: [mnli]}}\ndata: {data}\nmax_steps: 1\n"
    (tmp_path / "more.yaml").write_text(text)
    (data / "cb").rename(data / "cb2")
    (tmp_path / "old").rename(tmp_path / "here")
    elsewhere = ["train", str(tmp_path / "more.yaml"), "--output_dir", str(tmp_path / "more")]
    assert main(elsewhere) == 1
    assert "If it is elsewhere, say where" in capsys.readouterr().err
    assert main([*elsewhere, "--backbone", str(tmp_path / "here")]) == 0
    held = RunRecord.load(tmp_path / "more").quantization
    assert held["load_in_4bit"] is True and held["bnb_4bit_quant_type"] == "nf4"
    assert held == RunRecord.load(tmp_path / "run").quantization


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--hierarchy", "{yelp: []}"], "The parents of task 'yelp' are [], and '"),
        (["--hierarchy", "{new: [yelb]}"], "Task 'new' names the unknown parent 'yelb'. Did you mean 'yelp'?"),
        (["--hierarchy", "{yelp: [sst2]}"], "has learnt all tasks of this recipe (yelp); name a new one under `hier"),
        (["--backbone", "other/backbone"], "`backbone` is 'other/backbone', and that of '"),
        (["--target_modules", "[q_proj]"], "`target_modules` is ['q_proj'], and that of '"),
        (["--memory_config", "{slots: 3}"], "`memory_config` is {'slots': 3}, and that of '"),
        (["--memory_config", "{slotz: 3}"], "`memory_config` has the unknown key 'slotz'. Did you mean 'slots'?"),
        (
            ["--mixtures", "{yelp: [new]}"],
            "`mixtures['yelp']` names 'new', from whose rows 'yelp' has not learnt, and",
        ),
        (["--from_model", "/nowhere"], "There is no folder '/nowhere'"),
        (["--from_model", "null"], "lacks the key 'backbone'."),
    ],
)
def test_recipes_that_do_not_fit_the_model_they_go_on_from(learnt, data, tmp_path, capsys, monkeypatch, more, message):
    """They are refused before a backbone or a row is loaded, and nothing changes."""
    (tmp_path / "more.yaml").write_text(f"from_model: {learnt}\nhierarchy: {{new: [yelp]}}\ndata: {data}\n")
    before = files_in(learnt)
    monkeypatch.setattr(hft.HFTForCausalLM, "from_pretrained", None)
    assert main(["train", str(tmp_path / "more.yaml"), "--output_dir", str(learnt), *more]) != 0
    assert message in capsys.readouterr().err
    assert files_in(learnt) == before
