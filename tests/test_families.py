"""Families: the maths by hand, gradients against autograd's own, and what a tiny model finds."""

import itertools
import math
import random
import statistics
import time
from dataclasses import replace

import pytest
import torch
import yaml
from tqdm.auto import tqdm

import hft
from hft.refresh_hft import frozen
from hft.trainers import plan_command, plan_hierarchy, probes
from hft.trainers.cli import main
from hft.trainers.families import Overlaps, Trial, family_names, find_families, try_root
from hft.trainers.overlap import evenly, group_gradients, measure_overlaps, overlaps_of
from hft.trainers.pilots import pilot, take_sample
from hft.trainers.plan_report import as_text
from hft.trainers.plan_report import reasons as reasons_of
from hft.trainers.planner import make_plan
from hft.trainers.recipes import read_recipe

from .test_planner import QUICK, command, data, fresh, probe, rows_of, state, write  # noqa: F401


SETTINGS = replace(QUICK, gradient_rows=48)


def overlaps(**pairs: float | tuple[float, float]) -> Overlaps:
    """`a_b=0.5`: the overlap of a and b; without an error, or `a_b=(0.5, 0.1)`, with one."""
    of: dict[str, dict[str, tuple[float, float]]] = {}
    for pair, value in pairs.items():
        one, other = pair.split("_")
        values = value if isinstance(value, tuple) else (value, 0.0)
        of.setdefault(one, {})[other] = of.setdefault(other, {})[one] = values
    return Overlaps(of)


def tasks() -> dict[str, list[dict]]:
    """The two halves of one task's rows, and the same prompts with the other answer."""
    rows = rows_of("same", 320)
    contrary = [{**row, "completion": {"a": "b", "b": "a"}[row["completion"]]} for row in rows[:160]]
    return {"one": rows[:160], "half": rows[160:], "contrary": contrary}


class TestMaths:
    def test_groups_merge_by_their_mean_overlap(self):
        pairs = dict(a_b=0.9, a_c=0.5, b_c=0.2, a_d=0.7, b_d=-0.2, c_d=0.1)
        assert find_families(overlaps(**pairs), smallest=0.3) == [["a", "b", "c"]]  # d: mean 0.2
        assert find_families(overlaps(**pairs), smallest=0.4) == [["a", "b"]]
        assert find_families(overlaps(**dict(reversed(pairs.items()))), smallest=0.15) == [["a", "b", "c", "d"]]
        assert find_families(overlaps(a_b=0.49, c_d=0.51)) == [["c", "d"]]  # others were not measured
        assert find_families(Overlaps({})) == []

    def test_an_error_outweighs_an_overlap_and_stops_no_other_pair(self):
        assert find_families(overlaps(a_b=(0.8, 0.41))) == []
        assert find_families(overlaps(a_b=(0.8, 0.39))) == [["a", "b"]]
        assert find_families(overlaps(a_b=(0.8, 0.41)), num_errors=1) == [["a", "b"]]
        others = dict(a_c=0.0, a_d=0.0, b_c=0.0, b_d=0.0)
        assert find_families(overlaps(a_b=(0.8, 0.41), c_d=(0.7, 0.05), **others)) == [["c", "d"]]
        assert find_families(overlaps(a_b=0.9, a_c=math.nan, b_c=math.nan)) == [["a", "b"]]

    def test_a_name_that_is_free(self):
        assert family_names([["a"], ["b"]], ["Family1", "x"]) == {"family2": ["a"], "family3": ["b"]}

    def test_a_plan_with_a_family(self):
        probes = {
            "a": probe(0.3, b=0.4, c=0.0, d=0.4),
            "b": probe(0.2, a=0.5, c=0.3, d=0.0),
            "c": probe(0.1, a=0.0, b=0.0, d=0.0),
            "d": probe(0.4, a=0.3, b=0.0, c=0.0),
        }
        found = overlaps(a_b=0.8, a_c=0, b_c=0, a_d=0, b_d=0, c_d=0)
        trial = Trial(("a", "b", "d"), ("a", "b"), 0.1, 0.02, {"a": 0.8, "b": 0.4, "d": 0.0})
        plan = make_plan(probes, trials=[trial], overlaps=found)
        assert plan.families == {"family1": ["a", "b"]}
        assert plan.parents == {"family1": [], "c": [], "b": ["family1"], "a": ["family1"], "d": ["a"]}
        reason = {(edge.parent, edge.child): edge.reason for edge in plan.edges}
        assert reason["a", "d"] == "it helps most" and {child for _, child in reason} == {"c", "d"}
        assert plan.share("a", "family1") == pytest.approx(0.8) and plan.hierarchy().level("d") == 3
        assert make_plan(probes).families == {} and make_plan(probes).parents["b"] == ["c"]

    def test_a_root_is_taken_unless_it_is_worse_beyond_its_errors(self):
        own = {"a": [0.5, 0.7, 0.5, 0.7] * 2, "b": [2.0, 2.2, 1.8, 2.0] * 2}
        backbone = {"a": [1.2] * 8, "b": [1.0] * 8}

        def tried(by: float, noise: float = 0.0, num_errors: float = 2.0) -> Trial:
            common = {"b": [loss + by * 2.0 for loss in own["b"]]}
            common["a"] = [loss + by * 0.6 + noise * sign for loss, sign in zip(own["a"], (1, -1) * 4, strict=True)]
            return try_root(own, common, backbone, num_errors)

        better, worse = tried(-0.1), tried(0.1)
        assert better.family == ("a", "b") and better.excess == pytest.approx(-0.1) and worse.family == ()
        assert better.tasks == worse.tasks == ("a", "b") and better.helps == pytest.approx(
            {"a": 1 - 0.54 / 1.2, "b": 0.0}
        )
        assert str(worse) == "one pilot of all their rows leaves 10.0 ± 0.0 % more loss than a pilot each"
        doubtful = tried(0.1, noise=0.2)  # an error of 0.2 / 0.6 * sqrt(8 / 7) / sqrt(8) / 2 = 0.063
        assert doubtful.family and doubtful.error == pytest.approx(0.063, abs=1e-4)
        assert not tried(0.1, noise=0.2, num_errors=1.5).family
        assert tried(0.04).family  # whatever its error: another seed does as much
        solved = try_root({"a": [0.0, 0.002]}, {"a": [0.004, 0.006]}, {"a": [1.0, 1.0]})
        assert solved.excess == pytest.approx(0.04)  # of 0.1 nats at least
        few = try_root(*({task: its[:7] for task, its in part.items()} for part in (own, backbone, backbone)))
        assert few.excess > 0.1 and few.family and str(few) == "nothing can be told from so few rows"
        broken = try_root(own, {**own, "b": [math.nan] * 8}, backbone)
        assert not broken.family and broken.helps["b"] == 0
        assert str(broken) == "it could not be measured (a loss is not finite)"

    def test_tasks_that_clearly_lose_by_a_root_leave_it_to_the_others(self):
        own = {task: [1.0, 1.1, 0.9, 1.0] * 2 for task in "abcd"}

        def tried(**factors: float) -> Trial:
            common = {task: [loss * by for loss in own[task]] for task, by in factors.items()}
            return try_root(own, common, own)

        trial = tried(d=2.0, c=1.9, b=0.9, a=1.0)
        assert trial.tasks == ("a", "b", "c", "d") and trial.family == ("a", "b")
        assert tried(d=2.0, c=1.9, a=1.0).family == ()  # a alone is no family
        assert tried(a=1.3, b=0.8, c=0.8, d=0.8).family == ("b", "c", "d")  # also where the mean is no worse

    def test_a_hundred_tasks_take_less_than_a_second(self):
        draw = random.Random(0)
        names = [f"t{i:02}" for i in range(100)]
        pairs = {f"{a}_{b}": (draw.gauss(0.1, 0.2), 0.05) for a in names for b in names if a < b}
        begin = time.process_time()
        families = find_families(overlaps(**pairs))
        assert time.process_time() - begin < 1 and families
        placed = [task for its in families for task in its]
        assert len(placed) == len(set(placed))


class TestGradients:
    def test_an_overlap_is_a_cosine_whatever_the_length_and_the_other_tasks(self):
        torch.manual_seed(0)
        form_P, *own_P = torch.randn(5, 4096)
        means = {task: form_P + its_P for task, its_P in zip("abc", own_P, strict=False)} | {"d": own_P[3]}
        gradients = {task: mean_P + 0.1 * torch.randn(6, 4096) for task, mean_P in means.items()}
        found = overlaps_of(gradients)
        for one, other in itertools.permutations("abcd", 2):
            cosine = torch.cosine_similarity(gradients[one].mean(0), gradients[other].mean(0), dim=0)
            assert found.of[one][other][0] == pytest.approx(float(cosine), abs=1e-5)
        assert found.of["a"]["b"][0] == pytest.approx(0.5, abs=0.05) and abs(found.of["a"]["d"][0]) < 0.05
        scaled = overlaps_of({task: its * (i + 1) for i, (task, its) in enumerate(gradients.items())})
        assert scaled.of["a"]["b"] == pytest.approx(found.of["a"]["b"], abs=1e-4)
        pair = overlaps_of({task: gradients[task] for task in "ab"})
        assert pair.of["a"]["b"] == pytest.approx(found.of["a"]["b"], abs=1e-5)
        assert overlaps_of({"a": gradients["a"]}).of == {"a": {}} and overlaps_of({}).of == {}

    def test_the_error_is_the_spread_over_fresh_rows(self):
        torch.manual_seed(0)
        mean_KP = torch.randn(512) + torch.randn(4, 512)
        mean_KP[1] = mean_KP[0] + 0.5 * torch.randn(512)

        def drawn() -> tuple[float, float]:
            found = overlaps_of(
                {
                    task: mean_P + 2 * torch.randn(8 + 2 * i, 512)
                    for i, (task, mean_P) in enumerate(zip("abcd", mean_KP, strict=True))
                }
            )
            assert found.of["a"]["b"] == found.of["b"]["a"]
            return found.of["a"]["b"]

        drawn_overlaps, errors = zip(*(drawn() for _ in range(200)), strict=True)
        ratio = statistics.mean(errors) / statistics.stdev(drawn_overlaps)
        assert 0.9 < ratio < 1.6

    def test_answers_take_turns(self):
        rows = [{"labels": [-100, answer, 9]} for answer in (1, 1, 1, 2, 3, 2)]
        assert [row["labels"][1] for row in evenly(rows)] == [1, 2, 3, 1, 2, 1]

    def test_groups_of_rows_have_autograds_gradients(self, fresh, tokenizer):  # noqa: F811
        sample = take_sample("one", tasks()["one"], tokenizer, SETTINGS)
        rows, quick = sample.pilot[:20], replace(SETTINGS, pilot_steps=0)
        with frozen(fresh):
            gradient_MP = group_gradients(fresh, rows, SETTINGS)
            assert len(gradient_MP) == 5
            assert len(group_gradients(fresh, rows[:11], SETTINGS)) == 2  # whole groups only
            with pilot(fresh, rows, quick) as name:
                fresh.set_trainable([name])
                ups = [factor for key, factor in fresh.task_parameters(name).items() if ".B_" in key]
                with torch.enable_grad():
                    whole = torch.autograd.grad(torch.stack(fresh.row_losses(name, rows)).mean(), ups)
                fresh.set_trainable([])
        values = torch.cat([gradient.flatten() for gradient in whole])
        draw = torch.Generator().manual_seed(SETTINGS.seed)
        chosen = torch.randint(len(values), (gradient_MP.shape[1],), generator=draw)
        torch.testing.assert_close(gradient_MP.mean(0), values[chosen], rtol=1e-3, atol=1e-5)

    def test_tasks_of_one_form_are_alike_and_others_are_not(self, fresh, tokenizer):  # noqa: F811
        samples = {name: take_sample(name, rows, tokenizer, SETTINGS) for name, rows in tasks().items()}
        before = state(fresh)
        equal = [{**row, "completion": "a"} for row in tasks()["one"]]
        samples |= {"equal": take_sample("equal", equal, tokenizer, SETTINGS)}
        samples |= {"sign": take_sample("sign", rows_of("sign", 160), tokenizer, SETTINGS)}
        with frozen(fresh), tqdm(disable=True) as bar:
            found = measure_overlaps(fresh, samples, SETTINGS, bar)
            again = measure_overlaps(fresh, dict(reversed(samples.items())), SETTINGS, bar)
        assert state(fresh) == before and found == again
        alike, contrary, other = (found.of["one"][task] for task in ("half", "contrary", "sign"))
        assert alike[0] > 0.99 and alike[0] - contrary[0] > 2 * (alike[1] + contrary[1])
        assert other[0] + 2 * other[1] < 0.5
        assert contrary[0] > 0.5  # what the answers are counts for more than which is right: told in the README
        assert [name for name, *_ in found.nearest("one")] == ["half", "contrary", "sign"]  # equal: nothing to learn

    def test_gradients_that_are_not_finite_make_no_family(self, fresh, tokenizer):  # noqa: F811
        samples = {name: take_sample(name, rows, tokenizer, SETTINGS) for name, rows in tasks().items()}
        with torch.no_grad():
            fresh.get_input_embeddings().weight.fill_(math.nan)
        with frozen(fresh), tqdm(disable=True) as bar:
            assert measure_overlaps(fresh, samples, SETTINGS, bar).of == {}


def test_a_family_is_printed_drawn_written_trained_and_planned_again(command, data, tmp_path, capsys):  # noqa: F811
    for task in ("one", "half"):
        write(data / task, tasks()[task])
    base = yaml.safe_load((tmp_path / "base.yaml").read_text())
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({**base, "metric": {"other": "rouge_l"}, "report_to": "none"}))
    assert main([*command, "--out", str(tmp_path / "tree.svg")]) == 0
    shown, text = capsys.readouterr().out, (tmp_path / "plan.yaml").read_text()
    recipe = read_recipe(tmp_path / "plan.yaml")
    (root,) = (root for root, its in recipe.mixtures.items() if {"one", "half"} <= set(its))
    members = recipe.mixtures[root]
    assert all(recipe.hierarchy[task][:1] == [root] for task in members) and recipe.hierarchy[root] == []
    assert "# A family's root learns from the rows of all its tasks" in text
    assert f"{root}  learns from the rows of {', '.join(members)}: one pilot of all their rows leaves " in shown
    assert f"on {root}, which learns from it, too; other parents are not considered" in shown
    assert "overlap of gradients (1: the same, 0 or less: unrelated): " in shown and "sign: complexity" in shown
    assert f"# learns from the rows of {', '.join(members)}" in text
    assert f"<!-- {root} -->" in (tmp_path / "tree.svg").read_text()
    assert shown.count(f"\n{root} ") == 1  # a line of its own among the costs
    assert main(["train", str(tmp_path / "plan.yaml")]) == 0
    model = hft.HFTForCausalLM.from_pretrained(tmp_path / "run")
    assert set(model.hft_router.tasks()) == {"same", "copy", "sign", "one", "half"}
    again = [
        *command[:2],
        str(tmp_path / "plan.yaml"),
        "--steps",
        "2",
        "--rows",
        "16",
        "--yaml",
        str(tmp_path / "2.yaml"),
    ]
    by_hand = (
        f"page_tasks: [{root}]\nroute_tasks: [{root}]\ntask_passes: {{{root}: 2}}\ntask_learning_rates: {{{root}: 1}}"
    )
    with open(tmp_path / "plan.yaml", "a") as file:  # what was said of a root that the plan lets go of
        file.write(f"\n{by_hand}\n")
    assert main(again) == 0
    found = read_recipe(tmp_path / "2.yaml")
    assert found.mixtures == recipe.mixtures and found.training_arguments() == recipe.training_arguments()
    (tmp_path / "2.yaml").unlink()
    assert main([*again, "--no_families"]) == 0
    assert read_recipe(tmp_path / "2.yaml").mixtures == {} and root not in read_recipe(tmp_path / "2.yaml").hierarchy


def test_a_plan_is_written_before_it_is_drawn_and_before_steps_are_timed(command, tmp_path, monkeypatch, capsys):  # noqa: F811
    def fails(*_):
        raise ValueError("nothing works here")

    recipe, picture = tmp_path / "plan.yaml", tmp_path / "new" / "tree.svg"
    for name, drawn in (("plan_costs", True), ("draw_plan", False)):
        monkeypatch.setattr(plan_command, name, fails)
        recipe.unlink(missing_ok=True)
        assert main([*command, "--no_families", "--out", str(picture)]) == 2
        shown = capsys.readouterr()
        assert "hft: error: nothing works here" in shown.err and f"The recipe is in {recipe}" in shown.out
        assert set(read_recipe(recipe).hierarchy) == {"same", "copy", "sign"} and "in all" not in recipe.read_text()
        assert picture.exists() == drawn
        picture.unlink(missing_ok=True)


def test_a_plan_of_a_recipe_that_packs_stops_early_cuts_and_pushes(command, tmp_path, capsys):  # noqa: F811
    more = {"packing": True, "mastery_patience": 1, "rank_tolerance": 0.01, "eval_strategy": "steps", "eval_on_start": True,
            "push_to_hub": True, "hub_model_id": "me/mine", "refining_rate": 1.0}  # fmt: skip
    base = yaml.safe_load((tmp_path / "base.yaml").read_text())
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({**base, **more}))
    assert main(command) == 0
    assert "Next: hft train" in capsys.readouterr().out and "# in all" in (tmp_path / "plan.yaml").read_text()
    found = read_recipe(tmp_path / "plan.yaml")
    assert found.mixtures and found.refining_rate == 1 and found.training["push_to_hub"] is True
    assert not (tmp_path / "run").exists()


def test_numbers_out_of_range_are_refused_before_anything_is_measured(fresh, tokenizer, monkeypatch):  # noqa: F811
    monkeypatch.setattr(probes, "take_sample", None)
    for name, value, least in (("max_parents", 0, 1), ("num_errors", -1.0, 0), ("num_errors", math.nan, 0)):
        with pytest.raises(ValueError, match=f"`{name}` is {value}; it must be {least} or more"):
            plan_hierarchy(fresh, tasks(), processing_class=tokenizer, **{name: value})


def test_no_families_beside_learnt_tasks_for_few_rows_or_if_unwanted(fresh, tokenizer):  # noqa: F811

    def plan(**more):
        alike = {task: tasks()[task] for task in ("one", "half")}
        return plan_hierarchy(fresh, {**alike, **more.pop("rows", {})}, processing_class=tokenizer, settings=SETTINGS,
                              progress=False, **more)  # fmt: skip

    def plan_of(**rows):
        return plan_hierarchy(fresh, rows, processing_class=tokenizer, settings=SETTINGS, progress=False)

    few = plan(rows={"sign": rows_of("sign", 8)})
    assert few.families == {"family1": ["half", "one"]} and not few.overlaps.nearest("sign")
    reasons = [line for task in ("sign", "one") for line in reasons_of(few, task)]
    assert "overlap of gradients: not measured (too few rows, one answer only, or not finite)" in reasons
    pair = plan_of(one=tasks()["one"], sign=rows_of("sign", 8))
    reasons = [line for task in ("sign", "one") for line in reasons_of(pair, task)]
    assert (
        "overlap of gradients: not measured (of the others: too few rows, one answer only, or not finite)" in reasons
    )
    assert plan_of(one=tasks()["one"], half=tasks()["half"]).families == {"family1": ["half", "one"]}
    assert not any("overlap" in line for line in reasons_of(plan_of(one=tasks()["one"]), "one"))
    assert not any("overlap" in line for line in reasons_of(plan(families=False), "one"))
    assert plan(families=False).families == {} and len(plan(families=False).edges) == 2
    fresh.add_task("old")
    fresh.seal(["old"])
    assert plan().families == {} and "old" in plan().parents


def test_a_task_that_contradicts_others_gets_no_root_with_them_though_their_gradients_overlap(fresh, tokenizer):  # noqa: F811
    plan = plan_hierarchy(fresh, tasks(), processing_class=tokenizer, settings=SETTINGS, progress=False)
    (trial,) = plan.trials
    assert trial.tasks == ("contrary", "half", "one") and trial.excess > 2 * trial.error
    assert plan.families == {"family1": ["half", "one"]} and plan.parents["contrary"] == []
    text = as_text(plan)
    assert f"no root for contrary, half, one together: {trial}; too much for contrary" in text
    assert "learns from the rows of half, one, of whom none clearly loses by it (see `no root for`)" in text
    assert {edge.child for edge in plan.edges} == {"contrary"} and len(
        plan.edges
    ) == 2  # read through others after all
    more = {**tasks(), "sign": rows_of("sign", 160)}
    plan = plan_hierarchy(fresh, more, processing_class=tokenizer, settings=SETTINGS, progress=False)
    assert plan.trials[0].tasks == ("contrary", "half", "one", "sign") != plan.trials[0].family
    assert "contrary" not in {task for family in plan.families.values() for task in family}
