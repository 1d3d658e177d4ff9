"""Families: the maths by hand, gradients against autograd's own, and what a tiny model finds."""

import random
import time
from dataclasses import replace

import pytest
import torch
import yaml
from tqdm.auto import tqdm

import hft
from hft.refresh_hft import frozen
from hft.trainers import plan_hierarchy
from hft.trainers.cli import main
from hft.trainers.families import Overlaps, family_names, find_families
from hft.trainers.overlap import measure_overlaps, overlaps_of
from hft.trainers.pilots import take_sample
from hft.trainers.planner import make_plan
from hft.trainers.recipes import read_recipe

from .test_planner import QUICK, command, data, fresh, probe, rows_of, state, write  # noqa: F401


SETTINGS = replace(QUICK, pilot_rows=128, form_rows=80, gradient_rows=48)


def overlaps(**pairs: float) -> Overlaps:
    """`a_b=0.5`: the overlap of a and b; without an error."""
    return Overlaps({frozenset(pair.split("_")): (value, 0.0) for pair, value in pairs.items()})


def tasks() -> dict[str, list[dict]]:
    """The two halves of one task's rows, and the same prompts with the other answer."""
    rows = rows_of("same", 320)
    contrary = [{**row, "completion": {"a": "b", "b": "a"}[row["completion"]]} for row in rows[:160]]
    return {"one": rows[:160], "half": rows[160:], "contrary": contrary}


class TestMaths:
    def test_groups_merge_by_their_mean_overlap(self):
        found = overlaps(a_b=0.9, a_c=0.5, b_c=0.2, a_d=0.7, b_d=-0.2, c_d=0.1)
        assert find_families("abcd", found) == [["a", "b", "c"]]  # d: mean 0.2
        assert find_families("abcd", found, smallest=0.4) == [["a", "b"]]
        assert find_families("dcba", found) == find_families("abcd", found)
        assert find_families("abcd", overlaps(a_b=0.29, c_d=0.31)) == [["c", "d"]]  # others were not measured
        assert find_families("a", Overlaps({})) == find_families("", Overlaps({})) == []

    def test_an_error_outweighs_an_overlap(self):
        pair = frozenset("ab")
        assert find_families("ab", Overlaps({pair: (0.8, 0.41)})) == []
        assert find_families("ab", Overlaps({pair: (0.8, 0.39)})) == [["a", "b"]]
        assert find_families("ab", Overlaps({pair: (0.8, 0.41)}), num_errors=1) == [["a", "b"]]

    def test_a_name_that_is_free(self):
        assert family_names([["a"], ["b"]], ["Family1", "x"]) == {"family2": ["a"], "family3": ["b"]}

    def test_a_plan_with_a_family(self):
        probes = {
            "a": probe(0.3, b=0.4, c=0.0, d=0.0),
            "b": probe(0.2, a=0.5, c=0.3, d=0.0),
            "c": probe(0.1, a=0.0, b=0.0, d=0.0),
            "d": probe(0.4, a=0.3, b=0.0, c=0.0),
        }
        found = overlaps(a_b=0.8, a_c=0, b_c=0, a_d=0, b_d=0, c_d=0)
        plan = make_plan(probes, overlaps=found)
        assert plan.families == {"family1": ["a", "b"]}
        assert plan.parents == {"family1": [], "c": [], "b": ["family1", "c"], "a": ["family1"], "d": ["a"]}
        reason = {(edge.parent, edge.child): edge.reason for edge in plan.edges}
        assert reason["b", "a"] == reason["a", "b"] == "both stand on family1, which learns from both"
        assert plan.share("a", "family1") == pytest.approx(0.8) and plan.shares("b")["c"] > 0
        assert plan.hierarchy().level("d") == 3
        assert make_plan(probes, overlaps=found, max_parents=1).parents["b"] == ["family1"]
        assert make_plan(probes).families == {}

    def test_a_hundred_tasks_take_less_than_a_second(self):
        draw = random.Random(0)
        names = [f"t{i:02}" for i in range(100)]
        pairs = {frozenset((a, b)): (draw.gauss(0.1, 0.2), 0.05) for a in names for b in names if a < b}
        begin = time.process_time()
        families = find_families(names, Overlaps(pairs))
        assert time.process_time() - begin < 1 and families
        placed = [task for its in families for task in its]
        assert len(placed) == len(set(placed))


class TestGradients:
    def test_the_overlap_is_the_cosine_of_means_and_its_error_the_jackknifes(self):
        torch.manual_seed(0)
        common_P = torch.randn(4096)
        gradients = {name: common_P + 2 * torch.randn(num_groups, 4096) for name, num_groups in (("a", 6), ("b", 9))}
        ((overlap, error),) = overlaps_of(gradients).of.values()
        mean = {name: its.mean(0) for name, its in gradients.items()}
        assert overlap == pytest.approx(float(torch.cosine_similarity(mean["a"], mean["b"], dim=0)), abs=1e-5)

        def without(name: str, group: int) -> float:
            rest = torch.cat([gradients[name][:group], gradients[name][group + 1 :]]).mean(0)
            return float(torch.cosine_similarity(rest, mean["b" if name == "a" else "a"], dim=0))

        variance = 0.0
        for name, its in gradients.items():
            left = [without(name, group) for group in range(len(its))]
            average = sum(left) / len(left)
            variance += sum((one - average) ** 2 for one in left) * (len(left) - 1) / len(left)
        assert error == pytest.approx(variance**0.5, rel=1e-3)

    def test_halves_of_a_task_are_alike_and_the_contrary_is_not(self, fresh, tokenizer):  # noqa: F811
        samples = {name: take_sample(name, rows, tokenizer, SETTINGS) for name, rows in tasks().items()}
        before = state(fresh)
        with frozen(fresh), tqdm(disable=True) as bar:
            found = measure_overlaps(fresh, samples, SETTINGS, bar)
            again = measure_overlaps(fresh, samples, SETTINGS, bar)
        assert state(fresh) == before and found == again
        alike, contrary = found.of[frozenset(("one", "half"))], found.of[frozenset(("one", "contrary"))]
        assert alike[0] > 0.5 and contrary[0] < 0 and alike[0] - contrary[0] > 2 * (alike[1] + contrary[1])
        assert [name for name, *_ in found.nearest("one")] == ["half", "contrary"]


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
    assert f"{root}  learns from the rows of {', '.join(members)}: their gradients overlap" in shown
    assert "not half (" in shown and f": both stand on {root}, which learns from both" in shown
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
    assert main(again) == 0
    assert read_recipe(tmp_path / "2.yaml").mixtures == recipe.mixtures
    assert main([*again, "--no_families"]) == 0
    assert read_recipe(tmp_path / "2.yaml").mixtures == {} and root not in read_recipe(tmp_path / "2.yaml").hierarchy


def test_no_families_beside_learnt_tasks_for_few_rows_or_if_unwanted(fresh, tokenizer):  # noqa: F811
    rows = {name: its for name, its in tasks().items() if name != "contrary"}

    def plan(**more):
        return plan_hierarchy(fresh, {**rows, **more.pop("rows", {})}, processing_class=tokenizer, settings=SETTINGS,
                              progress=False, **more)  # fmt: skip

    few = plan(rows={"sign": rows_of("sign", 8)})
    assert few.families == {"family1": ["half", "one"]} and not few.overlaps.nearest("sign")
    assert plan(families=False).families == {}
    fresh.add_task("old")
    fresh.seal(["old"])
    assert plan().families == {} and "old" in plan().parents
