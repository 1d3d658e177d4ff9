"""The plan's maths by hand, the measurements on a tiny model, and `hft plan --data` as a person runs it."""

import copy
import gzip
import json
import math
import random
import re
import sys
import time
from dataclasses import replace

import pytest
import torch
import yaml

import hft
from hft.trainers import plan_hierarchy
from hft.trainers.calibration import calibrated_losses
from hft.trainers.cli import main
from hft.trainers.pilots import ProbeSettings, pilot, take_sample
from hft.trainers.planner import TaskProbe, make_plan
from hft.trainers.probes import nearest_tasks
from hft.trainers.recipes import read_recipe
from hft.trainers.row_tokens import tokenize_rows

from .tiny import snapshot


QUICK = ProbeSettings(pilot_rows=32, pilot_steps=6, batch_size=4, pilot_rank=2, probe_rows=16, learning_rate=5e-2)


def probe(complexity: float, base: float = 1.0, error: float = 0.01, rows: int = 32, **gains: float) -> TaskProbe:
    """A task whose loss falls by `gains[other]` through another, with a little noise."""
    draw = random.Random(0)
    losses = {"backbone": [base] * rows}
    for other, gain in gains.items():
        losses[other] = [base - gain + draw.gauss(0, 0.02) for _ in range(rows)]
    return TaskProbe(complexity, error, losses)


class TestMaths:
    def test_a_chain_is_found_and_what_is_implied_is_dropped(self):
        probes = {
            "c": probe(0.9, a=0.3, b=0.5),
            "a": probe(0.1, b=0.3, c=0.3),
            "b": probe(0.5, a=0.4, c=0.4),
            "alone": probe(0.7, a=0.0, b=-0.2, c=0.001),
        }
        plan = make_plan(probes)
        assert plan.parents == {"a": [], "b": ["a"], "c": ["b"], "alone": []}
        reason = {(edge.parent, edge.child): edge.reason for edge in plan.edges}
        assert reason["b", "c"] == "it helps most" and reason["a", "c"] == "already on the path, through b"
        assert reason["c", "a"] == "it is more complex (0.90, a 0.10)"
        assert reason["b", "alone"] == "it does not help"
        assert len(plan.edges) == sum(len(its.losses) - 1 for its in probes.values())  # a reason for each pair
        assert [edge.parent for edge in plan.edges_of("c")] == ["b", "a"]
        assert plan.share("c", "b") == pytest.approx(0.5, abs=0.02) and plan.share("alone", "b") == 0

    def test_options_and_free_answers_are_not_compared_in_complexity(self):
        others = {"c": 0.0, "d": 0.01, "e": -0.01}  # what three more pilots, which are no candidates, give
        simple, free = probe(0.1, b=0.3), replace(probe(0.5, a=0.5, **others), has_options=False)
        assert make_plan({"a": simple, "b": probe(0.5, a=0.2)}).parents == {"a": [], "b": ["a"]}
        assert make_plan({"a": simple, "b": replace(free, losses=probe(0.5, a=0.2, **others).losses)}).parents == {
            "a": ["b"],
            "b": [],
        }
        assert make_plan({"a": simple, "b": free}).parents == {"a": [], "b": ["a"]}  # the greater gain decides

    def test_a_second_parent_must_add_something(self):
        """a and b each know half of z's rows; c knows what a knows."""
        known, unknown = [0.02] * 32, [1.0] * 32
        losses = {"backbone": [1.0] * 64, "a": unknown + known, "b": known + unknown, "c": unknown + known}
        probes = {name: probe(0.1 + i / 100, error=0) for i, name in enumerate("abc")}
        probes["z"] = TaskProbe(0.9, 0.01, losses)
        for most in (2, 3):
            plan = make_plan(probes, num_errors=1, max_parents=most)
            reason = {edge.parent: edge.reason for edge in plan.edges_of("z")}
            assert plan.parents["z"] == ["a", "b"] and reason["b"].startswith("it adds to a (")
        assert reason["c"].startswith("it adds nothing to a and b")
        assert make_plan(probes, num_errors=1, max_parents=1).parents["z"] == ["a"]

    def test_what_any_pilot_gives_is_nobodys_help(self):
        roots = {name: probe(0.1 + i / 100) for i, name in enumerate("abcd")}
        plan = make_plan({**roots, "z": probe(0.9, a=0.3, b=0.3, c=0.3, d=0.6)})
        assert plan.parents["z"] == ["d"] and plan.share("z", "d") == pytest.approx(0.3 / 0.7, abs=0.05)
        few = make_plan({**{name: roots[name] for name in "abc"}, "z": probe(0.9, a=0.3, b=0.3, c=0.3)})
        assert few.parents["z"]  # three have no middle

    def test_rounding_is_no_help(self):
        z = TaskProbe(0.9, 0.0, {"backbone": [1.0] * 32, "a": [1.0 - 1e-9] * 32})
        assert make_plan({"a": probe(0.1), "z": z}).parents["z"] == []

    def test_identical_tasks_make_one_edge_and_no_cycle(self):
        twins = {"x": probe(0.5, y=0.4), "y": probe(0.5, x=0.4)}
        plan = make_plan(twins)
        assert plan.parents == make_plan(dict(reversed(twins.items()))).parents
        assert sorted(map(len, plan.parents.values())) == [0, 1]
        (dropped,) = (edge for edge in plan.edges if not edge.taken)
        assert "it stands on" in dropped.reason

    def test_an_error_outweighs_a_gain(self):
        draw = random.Random(1)
        noisy = TaskProbe(0.9, 0, {"backbone": [1.0] * 20, "a": [0.9 + draw.gauss(0, 3) for _ in range(20)]})
        assert make_plan({"a": probe(0.1), "z": noisy}).parents["z"] == []
        few = TaskProbe(0.9, 0, {"backbone": [1.0] * 4, "a": [0.1] * 4})
        (edge,) = make_plan({"a": probe(0.1), "z": few}).edges
        assert edge.reason == "too few rows to tell (4; 8 or more are needed)"
        broken = TaskProbe(0.9, 0, {"backbone": [1.0] * 20, "a": [math.nan] * 20})
        (edge,) = make_plan({"a": probe(0.1), "z": broken}).edges
        assert not edge.taken and "not finite" in edge.reason

    def test_a_new_task_is_placed_and_old_ones_stay(self):
        old = hft.Hierarchy({"sst2": [], "yelp": ["sst2"]})
        plan = make_plan({"amazon": probe(0.01, sst2=0.2, yelp=0.5)}, existing=old)
        assert plan.parents == {"sst2": [], "yelp": ["sst2"], "amazon": ["yelp"]}
        with pytest.raises(ValueError, match="The task 'yelp' is in the model already"):
            make_plan({"yelp": probe(0.1)}, existing=old)

    @pytest.mark.parametrize(
        ("probes", "numbers", "message"),
        [
            ({}, {}, "There are no tasks to plan"),
            ({"a": probe(0.1)}, {"max_parents": 0}, "`max_parents` is 0; it must be 1 or more."),
            ({"a": probe(0.1)}, {"num_errors": -1}, "`num_errors` is -1; it must be 0 or more."),
        ],
    )
    def test_wrong_plans(self, probes, numbers, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            make_plan(probes, **numbers)

    def test_a_hundred_tasks_take_less_than_a_second_and_no_order_matters(self):
        draw = random.Random(0)
        names = [f"t{i}" for i in range(100)]
        probes = {
            name: probe(
                draw.random(), **{other: draw.gauss(0, 0.2) for other in draw.sample(names, 17) if other != name}
            )
            for name in names
        }
        begin = time.process_time()
        plan = make_plan(probes)
        assert time.process_time() - begin < 1
        shuffled = dict(draw.sample(sorted(probes.items()), 100))
        assert make_plan(shuffled).parents == plan.parents
        assert max(map(len, plan.parents.values())) <= 2
        tree = plan.hierarchy()  # raises if there is a cycle
        for edge in plan.edges:
            assert edge.reason and edge.taken == (edge.parent in tree.parents(edge.child))
        for task in names:
            for up in tree.parents(task):
                assert not any(up in tree.path(other) for other in tree.parents(task) if other != up)


class TestCalibration:
    """Form and confidence do not count; knowledge does."""

    options = ([["yes", "no"]] * 40, [i % 2 for i in range(40)])

    def mean(self, likelihoods):
        losses = calibrated_losses(likelihoods, self.options[1], self.options[0])
        assert len(losses) == 40
        return sum(losses) / 40

    def test_scale_and_offset_do_not_count(self):
        draw = random.Random(0)
        clue = [draw.gauss(0, 1) + (2 if answer == 0 else -2) for answer in self.options[1]]
        plain = self.mean([[x, 0.0] for x in clue])
        assert self.mean([[9 * x - 20, 9.0] for x in clue]) == pytest.approx(plain, abs=1e-5)
        assert plain < 0.5

    def test_knowing_nothing_is_guessing_and_knowing_all_is_near_zero(self):
        draw = random.Random(0)
        assert self.mean([[0.0, 0.0]] * 40) == pytest.approx(math.log(2), abs=0.02)
        assert self.mean([[-50.0, 0.0]] * 40) == pytest.approx(math.log(2), abs=0.02)  # always "no", and sure of it
        assert self.mean([[draw.gauss(0, 3), 0.0] for _ in range(40)]) > 0.6
        assert self.mean([[3.0 - 6 * answer, 0.0] for answer in self.options[1]]) < 0.15

    def test_options_that_differ_and_what_is_not_finite(self):
        losses = calibrated_losses([[1.0, 0.0], [0.0, 2.0, 1.0]] * 6, [0, 1] * 6, [["a", "b"], ["c", "d", "e"]] * 6)
        assert all(0 < loss < 0.8 for loss in losses)
        assert all(map(math.isnan, calibrated_losses([[math.nan, 0.0]] * 8, [0] * 8, [["a", "b"]] * 8)))


def test_a_pilot_that_came_apart_is_left_out_whatever_the_order():
    through = {"a": 0.7, "n": math.nan, "b": 0.7, "c": 0.7, "d": 0.4}

    def plan_of(order: str) -> list[str]:
        probes = {name: probe(0.1) for name in through}
        losses = {
            "backbone": [1.0] * 32,
            **{name: [through[name] + 0.001 * (i % 2) for i in range(32)] for name in order},
        }
        return make_plan({**probes, "z": TaskProbe(0.9, 0.01, losses)}).parents["z"]

    assert {tuple(plan_of(order)) for order in ("abcnd", "anbcd", "nabcd", "dcbna")} == {("d",)}
    assert plan_of("and") == plan_of("nda") == ["d"]


def test_a_pilot_that_teaches_the_form_of_answers_better_is_no_parent():
    """Of free answers: by as much as the others differ among themselves; rows say nothing of that. Nor is one of two."""
    draw = random.Random(0)

    def plan_of(through: dict[str, float], has_options: bool) -> list[str]:
        losses = {name: [loss + draw.gauss(0, 0.02) for _ in range(32)] for name, loss in through.items()}
        losses["backbone"] = [sum(row) / len(row) for row in zip(*losses.values(), strict=True)]
        probes = {name: probe(0.1) for name in through}
        return make_plan({**probes, "z": TaskProbe(0.9, 0.01, losses, has_options=has_options)}).parents["z"]

    spread, clear = {"a": 1.0, "b": 1.1, "c": 0.9, "d": 0.8}, {"a": 1.0, "b": 1.01, "c": 0.99, "d": 0.5}
    assert plan_of(spread, True) != [] and plan_of(spread, False) == []
    assert plan_of(clear, False) == ["d"] and plan_of({"a": 1.0, "d": 0.5}, False) == []


def rows_of(rule: str, count: int = 40, options: bool = True) -> list[dict]:
    """`same` and `copy` are one task in two wordings; `sign` is another."""
    rows = []
    for i in range(count):
        letter = "ab"[i * 7 % 5 % 2]
        answer = {"same": letter, "copy": letter, "sign": "xy"[i % 2]}[rule]
        row = {"prompt": f"{rule} {letter} {i % 3}:", "completion": answer}
        rows.append({**row, "options": ["a", "b"] if rule != "sign" else ["x", "y"]} if options else row)
    return rows


@pytest.fixture
def fresh(backbones):
    return hft.HFTForCausalLM.from_backbone(backbones["llama"], {}, memory_config={"slots": 2})


def state(model) -> tuple:
    return (
        snapshot(model),
        copy.deepcopy(model.config.to_dict()),
        [name for name, parameter in model.named_parameters() if parameter.requires_grad],
        model.training,
        torch.get_rng_state().tolist(),
    )


@pytest.mark.parametrize("options", [True, False])
def test_planning_is_deterministic_and_leaves_the_model_as_it_was(model, tokenizer, options):
    model.seal(["a", "b", "c", "e", "f"])
    model.train()
    before = state(model)
    data = {rule: rows_of(rule, options=options) for rule in ("same", "sign")}
    plans = [plan_hierarchy(model, data, processing_class=tokenizer, settings=QUICK, progress=False) for _ in range(2)]
    assert state(model) == before
    assert plans[0] == plans[1]
    assert set(plans[0].probes["sign"].losses) == {"backbone", *"abcef", "same"}
    assert {name: plans[0].parents[name] for name in model.hierarchy.names} == {
        name: list(model.hierarchy.parents(name)) for name in model.hierarchy.names
    }


def test_the_model_comes_back_also_when_planning_breaks_off(fresh, tokenizer, monkeypatch):
    before = state(fresh)
    calls = []

    def broken(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return [[0.0, 1.0]] * 16

    monkeypatch.setattr("hft.trainers.probes.option_likelihoods", broken)
    with pytest.raises(KeyboardInterrupt):
        data = {rule: rows_of(rule) for rule in ("same", "sign")}
        plan_hierarchy(fresh, data, processing_class=tokenizer, settings=QUICK, progress=False)
    assert state(fresh) == before


def test_a_pilot_learns_its_rows(fresh, tokenizer):
    sample = take_sample("same", rows_of("same"), tokenizer, QUICK)

    def loss(task):
        with torch.no_grad():
            return float(sum(fresh.row_losses(task, sample.tokens)))

    with pilot(fresh, sample.pilot, QUICK) as name:
        assert loss(name) < 0.8 * loss("backbone")
        fresh.add_task("pilotx")  # a name that a person's task may have
        with pilot(fresh, sample.pilot, QUICK) as other:
            assert other not in (name, "pilotx")
    assert fresh.hierarchy.names == ("pilotx",)


def test_a_pilot_finds_a_free_name(fresh, tokenizer):
    fresh.add_task("Pilot")
    with pilot(fresh, tokenize_rows(rows_of("same", 8), tokenizer), QUICK) as name:
        assert name.lower() not in ("pilot", "")
    assert fresh.hierarchy.names == ("Pilot",)


def test_a_parent_that_knows_the_answers_is_found(fresh, tokenizer):
    """An old task that was trained on the same question becomes the new one's parent; an untrained one does not."""
    rows = rows_of("same", 160)
    sample = take_sample("same", rows, tokenizer, replace(QUICK, pilot_steps=60))
    with pilot(fresh, sample.pilot, replace(QUICK, pilot_steps=60)) as name:
        learnt = {key: value.detach().clone() for key, value in fresh.task_parameters(name).items()}
        rank = QUICK.pilot_rank
    fresh.add_task("teacher", rank=rank)
    fresh.add_task("idle", rank=rank)
    with torch.no_grad():
        for key, parameter in fresh.task_parameters("teacher").items():
            parameter.copy_(learnt[key.replace("teacher", name)])
    fresh.seal(["teacher", "idle"])
    plan = plan_hierarchy(fresh, {"new": rows}, processing_class=tokenizer, settings=QUICK, progress=False)
    assert plan.parents["new"] == ["teacher"]
    (idle,) = (edge for edge in plan.edges if edge.parent == "idle")
    assert idle.gain == 0 and idle.reason == "it does not help"


def test_prompts_are_cut_so_that_any_option_fits_behind_them(fresh, tokenizer):
    rows = [{"prompt": "a" * 400 + f"{i}", "completion": "y", "options": ["y", "n" * 9]} for i in range(8)]
    sample = take_sample("long", rows, tokenizer, replace(QUICK, max_length=64))
    whole = [tokenizer(row["prompt"])["input_ids"] for row in sample.probe]
    assert sample.prompts == [ids[-(64 - 1 - 9) :] for ids in whole]
    assert max(len(row["input_ids"]) for row in sample.tokens) <= 64


def test_rows_to_measure_on_are_none_of_the_pilots_and_have_several_answers(tokenizer):
    rows = [{"prompt": f"{i % 10}", "completion": "y" if i % 10 else "n"} for i in range(40)]
    sample = take_sample("twice", rows, tokenizer, QUICK)
    learnt = {tuple(row["input_ids"]) for row in sample.pilot}
    twice = sum(tuple(row["input_ids"]) in learnt for row in sample.tokens)
    assert twice > 0 and f"{twice} of the 16 rows to measure on come twice" in sample.note
    for seed in range(8):
        sample = take_sample("rare", rows[:10], tokenizer, replace(QUICK, seed=seed))
        assert {row["completion"] for row in sample.probe} == {"y", "n"}
        learnt = {tuple(row["input_ids"]) for row in sample.pilot}
        assert not learnt & {tuple(row["input_ids"]) for row in sample.tokens} and len(learnt) == 5


def test_a_picture_that_cannot_be_drawn_is_known_before_anything_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["plan", "--data", str(tmp_path), "--out", str(tmp_path / "tree.svg")]) == 1
    assert "needs matplotlib" in capsys.readouterr().err


def test_candidates_are_the_nearest_by_their_prompts(fresh, tokenizer):
    def rows(text, count=12):
        return [{"prompt": f"{text} {i}", "completion": "z"} for i in range(count)]

    samples = {
        name: take_sample(name, rows(text), tokenizer, QUICK)
        for name, text in {"a1": "aaaa aaaa", "a2": "aaaa aaab", "z1": "!?!?!?", "z2": "!?!?!!"}.items()
    }
    assert nearest_tasks(fresh, samples, 1) == {"a1": {"a2"}, "a2": {"a1"}, "z1": {"z2"}, "z2": {"z1"}}
    assert nearest_tasks(fresh, samples, 3)["a1"] == {"a2", "z1", "z2"}


@pytest.fixture
def data(tmp_path):
    """A folder as cl14 has them: two wordings of one task, another, and one that is a free answer."""
    for task, count in (("same", 40), ("copy", 40), ("sign", 40)):
        write(tmp_path / "data" / task, [{**row, "prompt": row["prompt"]} for row in rows_of(task, count)])
    return tmp_path / "data"


def without_costs(text):
    return [line for line in text.splitlines() if not line.startswith("# ")]


def write(folder, rows):
    folder.mkdir(parents=True)
    lines = [
        {"instruction": "?", "options": row.get("options", []), "input": row["prompt"], "output": row["completion"]}
        for row in rows
    ]
    for split in ("train", "validation"):
        with gzip.open(folder / f"{split}.jsonl.gz", "wt") as file:
            file.write("\n".join(json.dumps(line) for line in lines))


@pytest.fixture
def command(backbones, data, tmp_path):
    """`hft plan --data` on the tiny backbone, not quantised."""
    text = f"backbone: {backbones['llama']}\nhierarchy: {{other: []}}\nrank: 2\nmax_steps: 2\nmax_length: 96\n"
    text += f"report_to: none\noutput_dir: {tmp_path / 'run'}\n"
    (tmp_path / "base.yaml").write_text(text)
    plan = str(tmp_path / "plan.yaml")
    base = str(tmp_path / "base.yaml")
    return ["plan", "--data", str(data), "--recipe", base, "--steps", "2", "--rows", "16", "--yaml", plan]


def test_a_plan_is_printed_drawn_written_trained_and_extended(command, data, tmp_path, capsys):
    command = [*command, "--no_families"]  # of which tests/test_families.py tells
    assert main([*command, "--out", str(tmp_path / "tree.svg")]) == 0
    shown = capsys.readouterr().out
    assert "Next: hft train" in shown and "Why (in brackets: " in shown
    tree = yaml.safe_load((tmp_path / "plan.yaml").read_text())["hierarchy"]
    num_levels = len(hft.Hierarchy(tree).levels())
    assert "timed-short" not in shown  # the tasks that steps are timed on are nobody's business
    assert re.search(rf"\nin all +{2 * num_levels} ", shown) and "Peak of a step with rows of " in shown
    assert re.search(rf"\n# in all +{2 * num_levels} ", (tmp_path / "plan.yaml").read_text())
    assert set(tree) == {"same", "copy", "sign"}
    for task, parents in tree.items():
        for other in set(tree) - {task}:
            verb = "on" if other in parents else "not"
            assert re.search(
                rf"^    {verb} {other} \([+-]\d\.\d+ ± \d\.\d+\): \w+", shown.split(f"\n{task}: ")[1], re.M
            )
            assert f"# {verb} {other} (" in (tmp_path / "plan.yaml").read_text()
    assert "<!-- same -->" in (tmp_path / "tree.svg").read_text()
    recipe = read_recipe(tmp_path / "plan.yaml")
    assert recipe.data == str(data) and recipe.model["rank"] == 2 and recipe.hierarchy == tree
    first = (tmp_path / "plan.yaml").read_text()
    (tmp_path / "plan.yaml").unlink()
    assert main(command) == 0  # the same plan and reasons again; only the times of steps differ
    assert without_costs((tmp_path / "plan.yaml").read_text()) == without_costs(first)

    assert main(["train", str(tmp_path / "plan.yaml")]) == 0
    write(data / "again", rows_of("same", 40))
    capsys.readouterr()
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    more = tmp_path / "more.yaml"
    extend = [*command[:-3], "--yaml", str(more), "--model", str(tmp_path / "run"), "--task", "again"]
    kept = (data / "again/validation.jsonl.gz").rename(tmp_path / "kept")
    with open(tmp_path / "base.yaml", "a") as base:
        base.write("stage_eval_samples: 2\n")
    assert main(extend) == 0
    shown, said = capsys.readouterr()
    assert "There is no again/validation.jsonl (1 such), and `stage_eval_samples` goes by it" in said
    kept.rename(data / "again/validation.jsonl.gz")
    assert re.search(r"again should stand on .*\.\nIn Python: model.add_task\('again', parents=\[.*\]\)", shown)
    assert f"Next: hft train {more}" in shown
    assert re.search(r"What it would take:\n.*\nagain  +\d+ .*\nstages .*\nin all .*\nPeak of a step", shown)
    assert all(re.search(rf"(on|not) {old} \(", shown) for old in tree) and "\nsame:" not in shown
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    assert main(extend) == 2
    assert f"'{more}' is here already and may have been edited" in capsys.readouterr().err
    assert main([*extend[:-1], "same", "--yaml", str(tmp_path / "other.yaml")]) == 2
    assert "The task 'same' is in the model already" in capsys.readouterr().err
    recipe = read_recipe(more)
    assert (recipe.from_model, recipe.backbone, list(recipe.hierarchy)) == (str(tmp_path / "run"), None, ["again"])
    assert re.search(r"^  # complexity .*\n(  # .*\n)*  again: \[", more.read_text(), re.M)
    assert main(["train", str(more)]) == 0
    for path, old in before.items():
        assert path.parent.name not in ("tasks", "pages") or path.read_bytes() == old
    assert hft.HFTForCausalLM.from_pretrained(tmp_path / "run").config.sealed_tasks()[-1] == "again"
    capsys.readouterr()
    write(data / "third", rows_of("same", 40))  # without a recipe: the model's own folder grows, and is held as it was
    more.unlink()
    plain = [*command[:3], *command[5:-3], "--model", str(tmp_path / "run"), "--yaml", str(more)]
    assert main(plain) == 0
    recipe = read_recipe(more)
    assert recipe.training["output_dir"] == str(tmp_path / "run") and list(recipe.hierarchy) == ["third"]
    assert "rank" not in recipe.model and recipe.quantization == {}
    assert main(["plan", "--data", str(more), "--backbone", "other"]) == 2
    assert "--backbone does not go with the recipe's `from_model`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Give --data, a folder or recipe to find a hierarchy for, or --model"),
        (["--data", "EMPTY"], "holds no tasks; each is a folder in it with a train.jsonl or train.jsonl.gz."),
        (["--data", "DATA", "--task", "sine"], "Unknown task 'sine'. Did you mean 'sign'?"),
        (["--data", "DATA", "--out", "tree.gif"], "'tree.gif' should end in .png, .svg or .pdf."),
        (["--data", "DATA", "--rows", "0"], "--rows is 0; it must be 1 or more."),
        (["--data", "/nowhere/recipe.yaml"], "There is no file '/nowhere/recipe.yaml', and no recipe"),
        (["--data", "nowhere"], "A folder of that name there is not either."),
        (["--data", "nowhere", "--recipe", "cl14-small"], "--data is 'nowhere', and there is no such folder."),
    ],
)
def test_wrong_commands(data, tmp_path, capsys, arguments, message):
    places = {"EMPTY": str(tmp_path), "DATA": str(data)}
    assert main(["plan", *(places.get(word, word) for word in arguments)]) == 2
    assert message in capsys.readouterr().err


def test_a_plan_that_may_have_been_edited_is_not_overwritten(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan.yaml").write_text("edited")
    assert main(command[:-2]) == 2
    assert "'plan.yaml' is here already and may have been edited; delete it, or name" in capsys.readouterr().err
    assert (tmp_path / "plan.yaml").read_text() == "edited"


def test_names_that_cannot_be_tasks_are_refused_before_measuring(command, data, capsys):
    (data / "same").rename(data / "my.task")
    assert main(command) == 2
    output = capsys.readouterr()
    assert "'my.task'" in output.err and "radients" not in output.err + output.out


def test_a_model_that_has_all_tasks(command, fresh, tokenizer, tmp_path, capsys):
    for task in ("same", "copy", "sign"):
        fresh.add_task(task)
    fresh.save_pretrained(tmp_path / "whole")
    tokenizer.save_pretrained(tmp_path / "whole")
    assert main([*command[:-2], "--model", str(tmp_path / "whole")]) == 2
    assert "The model has all tasks of" in capsys.readouterr().err
    with pytest.raises(ValueError, match="The task 'same' is in the model already"):
        plan_hierarchy(fresh, {"same": rows_of("same")}, processing_class=tokenizer)


class TestOddData:
    def plan(self, model, tokenizer, families=True, **data):
        return plan_hierarchy(
            model, data, processing_class=tokenizer, settings=QUICK, families=families, progress=False
        )

    def test_one_task(self, fresh, tokenizer):
        plan = self.plan(fresh, tokenizer, only=rows_of("same"))
        assert plan.parents == {"only": []} and plan.edges == ()

    def test_ten_rows(self, fresh, tokenizer):
        plan = self.plan(fresh, tokenizer, small=rows_of("same", 10), sign=rows_of("sign"))
        assert plan.parents["small"] == []
        (edge,) = plan.edges_of("small")
        assert "only 5 rows to measure on" in plan.probes["small"].note
        assert "too few rows to tell (5;" in edge.reason or "more complex" in edge.reason

    def test_rows_without_answers(self, fresh, tokenizer):
        rows = [{**row, "completion": ""} if i % 4 == 0 else row for i, row in enumerate(rows_of("same"))]
        plan = self.plan(fresh, tokenizer, some=rows)
        assert plan.probes["some"].note.startswith("10 rows without an answer were left out")
        with pytest.raises(
            ValueError, match="Task 'none' has 0 rows with an answer, of 40; a plan needs four or more"
        ):
            self.plan(fresh, tokenizer, none=[{**row, "completion": None} for row in rows])
        with pytest.raises(ValueError, match="The rows of task 'text' have text; planning needs `prompt`"):
            self.plan(fresh, tokenizer, text=[{"text": "x"}] * 9)

    def test_all_answers_are_equal(self, fresh, tokenizer):
        rows = [{**row, "completion": "a"} for row in rows_of("same")]
        plan = self.plan(fresh, tokenizer, equal=rows, sign=rows_of("sign"))
        assert plan.probes["equal"].complexity == 0 and plan.parents["equal"] == []
        assert "all answers are equal" in plan.probes["equal"].note

    def test_another_language(self, fresh, tokenizer):
        """Words that the tokenizer hardly knows: the task is placed, on measurements, like any other."""
        words = {"yes": "да", "no": "нет", "a": "один", "b": "два"}

        def foreign(row):
            prompt = " ".join(words.get(word, word[::-1] + "ж") for word in row["prompt"].split())
            options = [words.get(option.strip(), option + "ж") for option in row["options"]]
            return {
                "prompt": prompt,
                "completion": options[row["options"].index(row["completion"])],
                "options": options,
            }

        tasks = {"same": rows_of("same"), "foreign": [foreign(row) for row in rows_of("same")]}
        plan = self.plan(fresh, tokenizer, families=False, **tasks)
        assert {edge.child for edge in plan.edges} == {"same", "foreign"} and all(edge.reason for edge in plan.edges)
        assert all(math.isfinite(edge.gain) for edge in plan.edges)

    def test_identical_tasks(self, fresh, tokenizer):
        twins = {"one": rows_of("same"), "two": rows_of("same")}
        for more in ({}, {"sign": rows_of("sign")}):
            (family,) = self.plan(fresh, tokenizer, **more, **twins).families.values()
            assert {"one", "two"} <= set(family)
        plan = self.plan(fresh, tokenizer, families=False, **twins)
        one, two = plan.probes["one"], plan.probes["two"]
        assert one.complexity == two.complexity and one.losses["two"] == two.losses["one"]
        assert sum(map(len, plan.parents.values())) <= 1 and all(edge.reason for edge in plan.edges)

    def test_free_answers(self, fresh, tokenizer):
        """What any pilot gives, the form, is no gain; of two tasks nothing can be said."""
        free = {name: rows_of(name, options=False) for name in ("same", "copy", "sign")}
        plan = self.plan(fresh, tokenizer, families=False, **free)
        for task in free:
            assert sum(edge.gain for edge in plan.edges_of(task)) == pytest.approx(0, abs=1e-4)
        two = self.plan(fresh, tokenizer, families=False, same=free["same"], sign=free["sign"])
        assert two.parents == {"same": [], "sign": []}
        assert all("cannot be told apart" in probe.note for probe in two.probes.values())
