"""The benchmarks' own maths, and (slow) each method for a few steps on a tiny backbone, by the real entry point."""

import gzip
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset


BENCHMARKS = Path(__file__).parent.parent / "examples/benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import bfloat16_products  # noqa: E402
import summary  # noqa: E402
import table  # noqa: E402
from baselines import METHODS, orthogonality  # noqa: E402
from harness import cell, read_cells, rows_of_roots, todo  # noqa: E402
from unfinished import Work  # noqa: E402

from hft.trainers.curriculum import BlockSampler  # noqa: E402
from hft.trainers.mixtures import passes_of  # noqa: E402


def test_olora_penalty_by_hand():
    new = [torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0, 1.0]])]
    old = [
        [torch.tensor([[3.0, -1.0]]), torch.tensor([[1.0, -1.0]])],
        [torch.tensor([[0.0, 1.0]]), torch.tensor([[2.0, 0.0]])],
    ]
    # |1*3| + |2*-1| + |1-1|, and |0| + |2| + |2|
    assert float(orthogonality(new, old)) == (3 + 2 + 0) + (0 + 2 + 2)
    assert float(orthogonality(new, [])) == 0.0


def test_bfloat16_products_through_float32_are_those_of_the_machine():
    torch.manual_seed(0)

    def random(*sizes):
        return torch.randn(*sizes).bfloat16()

    x_BI, weight_OI, bias_O, left, right, middle = (
        random(64, 576), random(96, 576), random(96), random(2, 3, 17, 32), random(2, 3, 32, 9), random(6, 17, 9)
    )  # fmt: skip

    def products():
        leaves = [x_BI.clone().requires_grad_(), weight_OI.clone().requires_grad_()]
        y_BO = torch.nn.functional.linear(*leaves, bias_O)
        y_BO.square().sum().backward()
        batches = left.flatten(0, 1), right.flatten(0, 1)
        return [
            y_BO.detach(),
            *(leaf.grad for leaf in leaves),
            x_BI @ weight_OI.T,
            torch.addmm(bias_O, x_BI, weight_OI.T, alpha=0.3, beta=2.0),
            left @ right,
            torch.baddbmm(middle, *batches, alpha=2.0, beta=0.5),
            x_BI[:0] @ weight_OI.T,
            x_BI.double() @ weight_OI.T.double(),
            torch.ones(2, 3, dtype=torch.long) @ torch.ones(3, 1, dtype=torch.long),
        ]

    native = products()
    bfloat16_products.use_float32_products()
    try:
        through_float32 = products()
    finally:
        bfloat16_products.withdraw()
    for expected, actual in zip(native, through_float32, strict=True):
        assert (actual.dtype, actual.shape, actual.stride()) == (expected.dtype, expected.shape, expected.stride())
        error = (actual.double() - expected.double()).norm()
        assert error <= 1e-3 * expected.double().norm()  # of one rounding to bfloat16: 2**-9, of few entries


def test_a_cell_is_run_once_and_whole_or_not_at_all(tmp_path):
    out = tmp_path / "cells.jsonl"
    with cell(out, "x", "one", 0) as result:
        result["value"] = 1.5
    with pytest.raises(KeyboardInterrupt), cell(out, "x", "two", 0) as result:
        result["value"] = 2.5
        raise KeyboardInterrupt
    (line,) = read_cells(out)
    assert (line["name"], line["setting"], line["seed"], line["value"]) == ("x", "one", 0, 1.5)
    assert {"seconds", "machine", "versions"} <= line.keys()
    assert list(todo(out, "x", ["one", "two"], 2)) == [("two", 0), ("one", 1), ("two", 1)]


def test_what_a_cell_has_done_is_kept_until_it_ends(tmp_path):
    out, asked = tmp_path / "cells.jsonl", []

    def ask(work: Work, name: str) -> list:
        return work.remember(name, lambda: asked.append(name) or [name, 0.1])

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), cell(out, "x", "a b", 0) as result:
            assert ask(result.work, "one") == ["one", 0.1]
            with result.work.training() as folder:
                folder.mkdir(parents=True, exist_ok=True)
            raise KeyboardInterrupt
    with cell(out, "x", "a b", 0) as result:
        assert result.work.is_begun() and ask(result.work, "one") == ["one", 0.1] and ask(result.work, "two")
        with result.work.training() as again:
            assert again == folder and again.is_dir()
        with result.work.training() as other:
            assert other != folder
    assert asked == ["one", "two"] and not list((tmp_path / ".unfinished").iterdir())
    with cell(out, "x", "nothing kept", 0):
        assert not list((tmp_path / ".unfinished").iterdir())

    with cell(out, "x", "taken", 0):
        with pytest.raises(OSError, match="Another command on this machine writes to"), cell(out, "x", "taken", 0):
            pass
        assert len(read_cells(out)) == 2
    assert len(read_cells(out)) == 3

    Work(tmp_path / "w", {"machine": "a"}).remember("one", lambda: 1)
    assert Work(tmp_path / "w", {"machine": "a"}).remember("one", lambda: 2) == 1
    assert Work(tmp_path / "w", {"machine": "b"}).remember("one", lambda: 2) == 2  # never half by one, half by another


def test_headline_figures_come_from_pairs_of_seeds(tmp_path, monkeypatch):
    monkeypatch.setattr(summary, "RESULTS", tmp_path)
    values = {"full": [60, 64, 62], "flat": [59, 60], "no_gates": [50]}
    lines = [
        json.dumps({"name": "ablation-200", "setting": setting, "seed": seed, "value": value})
        for setting, its in values.items()
        for seed, value in enumerate(its)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    figures = summary.headline()
    assert figures == {"ablation.full_minus_flat": 2.5, "ablation.full_minus_flat_se": 1.5}  # gaps of 1 and 4


def test_the_quality_tables_by_hand(tmp_path, monkeypatch):
    """Two seeds; the better rate of seed 0 counts. One LoRA learns a but not b, whose majority is as high."""

    def line(method, rate, seed, a, b, routed=None):
        def scores(a, b):
            its = {"a": {"accuracy": a, "se": 2.0}, "b": {"accuracy": b, "se": 2.0}}
            return {"ap": (a + b) / 2, "tasks": its, "majority": {"a": 50.0, "b": 60.0}}

        test = scores(a, b) | ({"routed": scores(*routed)} if routed else {})
        return {"name": "quality-small-family", "setting": f"{method}@{rate}", "seed": seed, "method": method,
                "learning_rate": rate, "validation": scores(a, b), "test": test, "value": (a + b) / 2,
                "stored": 2_000_000}  # fmt: skip

    cells = [line("single", 1, 0, 56, 61), line("single", 1, 1, 58, 63), line("single", 2, 0, 50, 50),
             line("joint", 1, 0, 60, 60), line("joint", 1, 1, 62, 60),
             line("hft_chains", 2, 0, 64, 66, (64, 64)), line("hft_chains", 2, 1, 66, 66, (66, 66)),
             line("hft_root_thirds", 2, 0, 70, 70), line("hft_root_thirds", 2, 1, 60, 60),
             line("hft_families", 2, 0, 40, 40), line("hft_families", 2, 1, 50, 50, (50, 48)),
             line("hft_planned", 2, 0, 64, 70)]  # fmt: skip
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, cells)))
    monkeypatch.setattr(summary, "RESULTS", tmp_path)
    assert table.learnable(summary.read("quality-small-family")) == ["a"]
    shown = table.quality("small", "family")
    assert "| one LoRA a task | 2 | 59.5 ± 1.0 | 57.0 ± 1.0 |  | 2.0 M |" in shown
    assert "| HFT, routed | 2 | 65.0 ± 1.0 | 65.0 ± 1.0 |  | 2.0 M |" in shown
    assert "| b | 60.0 | no | 62.0 ± 1.0 | 60.0 ± 0.0 | 66.0 ± 0.0 |" in table.quality_tasks("small", "family")
    assert table.hierarchies("small", "family").splitlines()[2:] == [
        "| the planner's | 1 | 67.0 | 67.0 |  |",
        "| chains | 2 | 65.5 ± 0.5 | 65.5 ± 0.5 | 65.0 ± 1.0 |",
        "| one root for all, thirds, pages | 2 | 65.0 ± 5.0 | 65.0 ± 5.0 |  |",
        "| a root a family | 2 | 45.0 ± 5.0 | 45.0 ± 5.0 | 49.0 (1 of them) |",
    ]
    learnt = {"a": [60.0, 59.0], "b": [65.0, 65.0]}
    ours = {"seed": 1, "method": "sequential", "test": {"forgetting": 1.0, "just_learnt": learnt}}
    assert table.transfer(ours, cells[:2]) == (-1.0, None)
    cells[1]["test"]["first"] = {"a": 57.0, "b": 62.0}
    assert table.transfer(ours, cells[:2]) == (-1.0, 3.0)  # above that seed's own LoRAs on the same rows
    assert table.transfer({**ours, "seed": 2}, cells[:2]) == table.transfer(cells[3], cells[:2]) == ()
    stays = {"forgetting": 0.0, "just_learnt": {"a": [60.0, 60.0], "b": [65.0, 65.0]}}  # of some rows; of all: 66, 66
    hft = {**cells[6], "test": {**cells[6]["test"], **stays}}
    assert table.transfer(hft, cells[:2]) == (0.0, (66 - 58 + 66 - 63) / 2)
    figures = summary.quality()
    assert (
        figures["quality.small.family.hft_minus_joint"] == 5.0 and figures["quality.small.family.learnable_tasks"] == 1
    )
    assert figures["quality.small.family.ap_learnable_hft"] == 65.0
    # Chosen: better than `hft_root_thirds` on validation rows, and `hft_planned` has run one seed only.
    assert figures["quality.small.family.hft_chains_minus_joint"] == 5.0
    assert figures["quality.small.family.ap_hft_routed"] == 65.0 and table.own_hierarchy({}) is None


def test_the_memorys_table_by_hand(tmp_path, monkeypatch):
    def score(accuracy, off=None):
        return {"accuracy": accuracy} | ({"without page 1": {"accuracy": off}} if off is not None else {})

    added = {"a": {"a": [1.0, 2.0], "page:1": [3.0, 0.0]}}
    cells = [
        {"setting": "first", "seed": 0, "tasks": {"a": score(80.0, 60.0)}, "added": added},
        {"setting": "first", "seed": 1, "tasks": {"a": score(82.0, 60.0)}, "added": added},
        {"setting": "a: without page 1", "seed": 0, "tasks": {"a": score(70.0)}, "added": added},
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(json.dumps({"name": "memory", **cell}) for cell in cells))
    monkeypatch.setattr(summary, "RESULTS", tmp_path)
    first, other = table.memory().splitlines()[2:]
    assert first == "| a | first, writing page 1 together | 81.0 ± 1.0 | 60.0 ± 0.0 | 50.0 ± 0.0 % |"
    assert other == "| a | later, without page 1 | 70.0 |  |  |"


@pytest.mark.parametrize("parents_of_z, regret", [([], (0 + 2 + 3) / 3), (["root"], (0 + 2 + 0) / 3)])
def test_the_planners_figures_by_hand(tmp_path, monkeypatch, parents_of_z, regret):
    """Three children with two parents each; the plan takes the right one, the wrong one, and none or a family's root."""
    truth = {"a>x": 5, "b>x": 1, "a>y": 4, "b>y": 2, "a>z": 3, "b>z": -1}
    gains = {"a>x": 0.6, "b>x": 0.1, "a>y": 0.2, "b>y": 0.3, "a>z": 0.05, "b>z": 0.0}
    complexity = {child: {"a loss, of tokens": value} for child, value in zip("xyz", (0.2, 0.3, 0.9), strict=True)}
    measures = {"hierarchy": {"x": ["a"], "y": ["b"], "z": parents_of_z}}
    measures.update(help={"calibrated": gains, "gradient": truth}, complexity=complexity)
    more = []
    if parents_of_z:
        tasks = {"z": {"accuracy": 57.0}}
        cell = {"setting": "families", "value": 57.0, "hierarchy": {"root": [], "z": ["root"]}, "tasks": tasks}
        more = [{**cell, "seed": seed} for seed in range(2)]
    lines = []
    for seed in range(2):
        lines.append({"setting": "measures", "seed": seed, "value": 2, **measures})
        lines += [
            {"setting": f"alone: {child}", "seed": seed, "value": 50, "need": {"steps": steps, "rank": 4 - steps},
             "tasks": {child: {"loss": 1.0}}}
            for child, steps in zip("xyz", (1, 2, 3), strict=True)
        ]  # fmt: skip
        lines += [
            {"setting": pair, "seed": seed, "value": 50 + gain, "tasks": {pair[-1]: {"loss": 1 + gain / 9}}}
            for pair, gain in truth.items()
        ]
    lines.append({"setting": "estimate", "seed": 0, "value": 0.1, "errors": {"seconds": 0.1, "bytes": -0.02}})
    lines.append({"setting": "fourteen", "seed": 0, "value": 321.0})
    lines += more
    text = [json.dumps({"name": "planner", **line}) for line in lines]
    full = {"name": "ablation-200", "setting": "full", "value": 58, "tasks": {"x": {"loss": 0.7}, "y": {"loss": 0.9}}}
    root = {**full, "setting": "root"}
    text += [json.dumps({**full, "seed": seed}) for seed in range(2)]
    text += [
        json.dumps({**root, "seed": seed, "value": 60 + seed, "tasks": {"x": {"loss": 0.5 + seed}}})
        for seed in range(2)
    ]
    text += [
        json.dumps({"name": "quality-small-family", "setting": method, "method": method, "learning_rate": 2e-3,
                    "seed": seed, "value": 0, "test": {"ap": ap + seed * more, "tasks": {"x": {"loss": loss}}}})
        for method, ap, more, loss in (("hft_root_no_memory", 61, 2, 0.8), ("hft_families", 60, 1, 0.9))
        for seed in range(2)
    ]  # fmt: skip
    (tmp_path / "p.jsonl").write_text("\n".join(text))
    monkeypatch.setattr(summary, "RESULTS", tmp_path)
    figures = summary.planner()
    assert figures["planner.parent_regret_points"] == pytest.approx(regret, abs=1e-3)
    assert figures["planner.rank_correlation"] == 1.0  # the gradients'
    assert figures["planner.rank_correlation_with_losses"] == -1.0
    by_hand = 1 - 6 * (0 + 1 + 1 + 4 + 4 + 0) / (6 * 35)
    assert figures["planner.rank_correlation_calibrated"] == pytest.approx(by_hand, abs=1e-3)
    assert figures["planner.steps_needed_by_a_loss_of_tokens"] == 1.0
    assert figures["planner.rank_needed_by_a_loss_of_tokens"] == -1.0
    assert figures["planner.seconds_14_tasks"] == 321.0 and figures["planner.memory_estimate_error"] == -0.02
    short = [figures[f"planner.{what}_found_minus_chains_short{se}"] for what in ("ap", "loss") for se in ("", "_se")]
    assert short == [2.5, 0.5, 0.2, 0.5]
    assert figures["planner.ap_found_minus_hand"] == 1.5 and figures["planner.ap_found_minus_hand_se"] == 0.5
    assert figures["planner.loss_found_minus_hand"] == -0.1


def test_a_rate_is_chosen_over_the_seeds_that_all_rates_have_run():
    def cells(values):
        return [{"learning_rate": r, "seed": s, "value": v} for r, its in values.items() for s, v in enumerate(its)]

    assert table.own_rate(cells({1e-3: [66.5], 2e-3: [65.2, 80.0]})) == 1e-3  # seed 0 only
    assert table.own_rate(cells({1e-3: [66.5, 63.0], 2e-3: [65.2, 66.0]})) == 2e-3
    later = [{"learning_rate": 4e-3, "seed": 1, "value": 99.0}]  # not tuned
    assert table.own_rate([*cells({1e-3: [66.5], 2e-3: [65.2]}), *later]) == 1e-3


def test_a_familys_root_and_its_tasks_share_the_steps():
    families = {"root": ["a", "b"]}
    train = {task: Dataset.from_list([{"row": f"{task}{i}"} for i in range(6)]) for task in "abc"}
    assert [row["row"] for row in rows_of_roots(train, families)["root"]] == [
        f"{t}{i}" for t in "ab" for i in range(6)
    ]
    passes = passes_of(families, root_share=2 / 3)
    seen = {
        task: BlockSampler({task: rows}, 1, 0, passes) for task, rows in {"root": 12, "a": 6, "b": 6, "c": 6}.items()
    }
    assert {task: len(sampler) for task, sampler in seen.items()} == {"root": 8, "a": 2, "b": 2, "c": 6}


def test_the_gpus_figures_by_hand(tmp_path, monkeypatch):
    """A try on a CPU, which has no peak, gives no figure."""
    cells = {
        "8b hft": (3000, 12.5),
        "8b trl": (2500, 11.0),
        "1b hft": (9000, 4.0),
        "tiny hft": (1, 1),
        "135m hft": (5, None),
    }
    lines = [
        {
            "name": "gpu",
            "setting": setting,
            "seed": 0,
            "value": value,
            **({"peak_allocated_gib": peak} if peak else {}),
        }
        for setting, (value, peak) in cells.items()
    ]
    lines.append({"name": "compile", "setting": "decode", "seed": 0, "value": 1.5})
    (tmp_path / "g.jsonl").write_text("\n".join(map(json.dumps, lines)))
    monkeypatch.setattr(summary, "RESULTS", tmp_path)
    assert summary.headline() == {
        "speed.compiled_decode": 1.5,
        "gpu.peak_gib_8b": 12.5,
        "gpu.peak_gib_8b_trl": 11.0,
        "gpu.tokens_per_second_vs_trl_8b": 1.2,
        "gpu.peak_gib_1b": 4.0,
    }


@pytest.mark.parametrize("method", ["hft", "trl"])
def test_the_gpu_script_on_a_tiny_shape(tmp_path, monkeypatch, method):
    """The whole of a cell's process, but on the CPU: the backbone is in NF4 and most of it is no 16-bit weight."""
    import gpu
    from random_backbones import config_of, random_backbone

    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    torch.use_deterministic_algorithms(False)
    backbone = random_backbone(config_of("tiny", "sdpa"), torch.device("cpu"))
    kinds = {type(module).__name__ for module in backbone.base_model.modules()}
    assert "Linear4bit" in kinds and "Linear" not in kinds
    assert not [name for name, tensor in (*backbone.named_parameters(), *backbone.named_buffers()) if tensor.is_meta]
    result = gpu.measure(method, "tiny", 32, 6)
    assert result["steps"] == 6 and result["value"] > 0 and 4 < result["loss"] < 9  # a uniform guess: 6.2
    assert result["attention"] == gpu.best_attention()
    # A LoRA of rank 16, or a node of rank 16 and a page of 8 slots, beside each linear of both layers.
    per_rank = 2 * sum((64 + 64, 64 + 32, 64 + 32, 64 + 64, 64 + 128, 64 + 128, 128 + 64))
    gates = result["trained_parameters_a_step"] - {"hft": 24, "trl": 16}[method] * per_rank
    assert 0 < gates < 100 if method == "hft" else gates == 0
    assert "peak_allocated_gib" not in result or torch.cuda.is_available()


def test_hft_around_a_random_backbone_sees_what_it_should():
    """No later token, and in a packed row no other document."""
    from random_backbones import config_of, hft_on, random_backbone

    model = hft_on(random_backbone(config_of("tiny", "sdpa"), torch.device("cpu")), {"a": []}, 4).eval()
    x = torch.arange(3, 15)[None]
    other = torch.cat([x[:, :-1], x[:, -1:] + 1], dim=1)
    positions = torch.tensor([[*range(5), *range(7)]])
    with torch.no_grad():
        assert torch.equal(model(x).logits[:, :-1], model(other).logits[:, :-1])
        packed = model(x, position_ids=positions, use_cache=False).logits[:, 5:]
        apart = torch.cat([x[:, :5] + 20, x[:, 5:]], dim=1)
        assert torch.equal(packed, model(apart, position_ids=positions, use_cache=False).logits[:, 5:])


def test_the_gpu_script_goes_on_after_a_cell_that_failed(tmp_path, monkeypatch, capsys):
    import gpu

    whole_run = subprocess.run

    def run(command, **options):
        if "--one" not in command:  # what tells the machine's name
            return whole_run(command, **options)
        if "tiny hft" in command:
            raise subprocess.CalledProcessError(9, command)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", command[1:])
            gpu.main()

    monkeypatch.setattr(gpu.subprocess, "run", run)
    monkeypatch.setattr(gpu, "measure", lambda *_: {"value": 3.0, "loss": 1.0})
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--shapes", "tiny", "--out", str(tmp_path / "gpu.jsonl")])
    with pytest.raises(SystemExit, match="1"):
        gpu.main()
    shown = capsys.readouterr().out
    assert "tiny hft: failed with code 9; its output is above. Going on." in shown
    assert [cell["setting"] for cell in read_cells(tmp_path / "gpu.jsonl")] == ["tiny trl"]


def test_the_summary_is_one_flat_json_object():
    done = subprocess.run([sys.executable, BENCHMARKS / "summary.py", "--json"], capture_output=True, text=True)
    figures = json.loads(done.stdout)
    assert figures and all(isinstance(value, int | float) for value in figures.values())


def test_speeds_figures_and_table_by_hand(tmp_path, monkeypatch):
    import table

    lines = [
        {"setting": "train path 4", "value": 1.2, "ratio": {"hft": 1.2, "hft without memory": 1.1}},
        {"setting": "train tasks 64", "value": 1.01, "ratio": {"64 tasks": 1.01}},
        {"setting": "decode", "value": 1.3, "ratio": {"task": 1.3, "folded": 1.25, "routed": 1.31, "merged": 1.0}},
        {"setting": "load 1 of 64", "value": 0.5, "times": {"one": 1.23456, "all": 2.4}, "bytes_per_task": 9_800_000},
        {"setting": "instead", "value": 1.4, "ratio": {"train": {"4 active": 1.4, "poly": 2.0}, "decode": {"poly": 3.0}},
         "does_not_run": {"xlora": "TypeError"}},
    ]  # fmt: skip
    text = [json.dumps({"name": "speed", "seed": 0, **line}) for line in lines]
    (tmp_path / "speed.jsonl").write_text("\n".join(text))
    monkeypatch.setattr(summary, "RESULTS", tmp_path)
    assert summary.speed() == {
        "speed.train_ratio_path4": 1.2,
        "speed.train_ratio_64_tasks": 1.01,
        "speed.decode_ratio": 1.3,
        "speed.decode_ratio_folded": 1.25,
        "speed.decode_ratio_merged": 1.0,
        "speed.load_seconds_1_of_64": 1.235,
        "speed.bytes_per_task": 9_800_000,
    }
    assert table.speed().splitlines()[2:] == [
        "| a training step on a path of 4, over one PEFT LoRA's | 1.20 | ≤ 1.05 | hft without memory 1.10 |",
        "| a training step with 64 tasks, over one with 4 | 1.01 | ≤ 1.02 |  |",
        "| a token on a path of 4 nodes, over the backbone's | 1.30 | ≤ 1.10; folded, routed 1.00 "
        "| folded 1.25, routed 1.31, merged 1.00 |",
        "| loading one task of 64, over loading all | 0.50 |  | 1.2 s, 9.8 MB a task |",
        "| a training step with 4 active PEFT LoRAs, over one's | 1.40 |  "
        "| train: poly 2.00, decode: poly 3.00, xlora: does not run |",
    ]


@pytest.mark.slow
def test_each_speed_is_measured(backbones, tmp_path):
    """On a tiny backbone, where calls cost more than sums: ratios are near 1, and equal things nearer."""
    settings = ["train path 1", "train path 8", "train tasks 4", "train tasks 16", "decode", "load 1 of 64", "instead"]
    out = tmp_path / "speed.jsonl"
    command = [sys.executable, BENCHMARKS / "speed.py", "--settings", ",".join(settings), "--rounds", "5",
               "--backbone", backbones["llama"], "--out", out]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    cells = {cell["setting"]: cell for cell in read_cells(out)}
    assert list(cells) == settings
    assert 0.5 < cells["train tasks 4"]["value"] < 2 and 0.3 < cells["train tasks 16"]["value"] < 3
    assert 0.5 < cells["train path 1"]["value"] < 4 and len(cells["train path 1"]["dominated_by"]) == 6
    decode = cells["decode"]["ratio"]
    assert 0.5 < decode["merged"] < 2 and decode["folded"] > 0.7 and decode["task"] < 6
    load = cells["load 1 of 64"]
    assert load["value"] < 1 and load["files_read"] == ["model.safetensors", "tasks/t1.safetensors"]
    rank, features = 16, 2 * (2 * 64 + 2 * 48 + 3 * 72)  # two layers: q and o, k and v, the three of the MLP
    assert 0 < load["bytes_per_task"] - 4 * rank * features < 8192  # a header beside the tiny backbone's float32
    assert set(cells["instead"]["ratio"]["train"]) == {"4 active", "poly"}
    assert "scalings" in cells["instead"]["does_not_run"]["xlora, training"]


def write_tasks(folder, tasks):
    """Rows in the form of cl14: more for a test than a batch takes."""
    for task in tasks:
        (folder / task).mkdir(parents=True)
        for split, count in (("train", 6), ("validation", 6), ("test", 40)):
            rows = [
                {
                    "instruction": f"{task}?",
                    "options": ["yes", "no"],
                    "input": f"t {i}",
                    "output": ["yes", "no"][i % 2],
                }
                for i in range(count)
            ]
            with gzip.open(folder / task / f"{split}.jsonl.gz", "wt") as file:
                file.write("\n".join(json.dumps(row) for row in rows))


def test_steps_needed_by_hand():
    import planner

    losses = {0: 9.0, 5: 2.1, 10: 1.1, 15: 1.0, 20: 1.3}
    assert planner.steps_needed(losses, guess=2.0) == 10 and planner.steps_needed(losses, guess=1.5) == 15
    assert planner.steps_needed(losses, guess=0.9) == 20  # it was not learnt
    rows = [{"labels": [-100, answer, 9]} for answer in (1, 1, 1, 2)]
    assert planner.guessing_loss(rows) == pytest.approx((3 * math.log(4 / 3) + math.log(4)) / 8)


def test_a_task_in_other_words():
    from planner_measures import exchanged, in_other_words

    row = {
        "prompt": "very good, good or bad? x",
        "completion": " very good",
        "options": [" bad", " good", " very good"],
    }
    (found,) = in_other_words([row], {"very good": "a", "good": "b", "bad": "c"})
    assert found == {"prompt": "a, b or c? x", "completion": " a", "options": [" c", " b", " a"]}
    (wrong,) = exchanged([row], {"very good": "bad", "bad": "very good"})
    assert wrong == {**row, "completion": " bad"} and exchanged([row], {}) == [row]


@pytest.mark.parametrize("family", ["syllogism", "ransom_note"])
def test_questions_that_no_benchmark_trains_on_have_two_answers(family):
    pytest.importorskip("reasoning_gym")
    from quality import GAMES, game_rows

    rows = game_rows(family)
    assert len(rows) == 100 and all(row["completion"] in row["options"] for row in rows)
    assert {row["completion"] for row in rows} == set(rows[0]["options"]) == {f" {answer}" for answer in GAMES[family]}


def test_cells_of_another_backbone_are_others(tmp_path, monkeypatch):
    import harness

    def run(backbone):
        monkeypatch.setattr(harness, "_backbone", backbone)
        for setting, seed in todo(tmp_path / "c.jsonl", "x", ["a"], 1):
            with cell(tmp_path / "c.jsonl", "x", setting, seed) as result:
                result["value"] = len(str(backbone))

    for backbone in (None, "other", "other", None):
        run(backbone)
    assert [line.get("backbone") for line in read_cells(tmp_path / "c.jsonl")] == [None, "other"]
    monkeypatch.setattr(summary, "RESULTS", tmp_path)
    assert summary.read("x")["a", 0]["value"] == 4  # of the default one


def test_a_table_of_what_was_run(tmp_path, monkeypatch):
    """Settings without cells are left out; gaps are over seeds that the full method has, too."""
    import table

    values = {("full", 0): 60, ("flat", 0): 57, ("flat", 1): 10}
    lines = [
        json.dumps({"name": "ablation-200", "setting": setting, "seed": seed, "value": value,
                    "tasks": {"x": {"loss": value / 100}}})
        for (setting, seed), value in values.items()
    ]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(summary, "RESULTS", tmp_path)
    assert table.ablation().splitlines()[2:] == [
        "| the full method, on hand-made chains | 1 | 60.0 |  | 0.600 |  |",
        "| without parents | 1 | 57.0 | 3.0 | 0.570 | -0.030 |",
    ]


def cells_of(script: str, folder: Path, backbones, *arguments) -> list[dict]:
    """The cells that a script makes of the tasks in `folder / "data"`, one seed, on a tiny backbone."""
    out = folder / "cells.jsonl"
    command = [sys.executable, BENCHMARKS / script, "--data", folder / "data", "--out", out, "--seeds", "1",
               "--backbone", backbones["llama"], *arguments]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return read_cells(out)


CUT_OFF = """
# Each cell whole, and again by runs that end as soon as they have written down something new.
import sys, unfinished, quality
from pathlib import Path

methods, data, backbone, folder = sys.argv[1].split(","), *sys.argv[2:]
unfinished.SAVE_STEPS = 2
quality.BUDGETS["small"]["batch"] = 4

class CutOff(Exception):
    pass

def run(out):
    sys.argv[1:] = ["--data", data, "--backbone", backbone, "--out", str(Path(folder) / out)]
    quality.Benchmark(arguments.parse_args()).run(method, 1e-3, 0)

def cut_off(work):
    note(work)
    there = {*work._kept["values"], *map(str, work.folder.rglob("*"))}
    if not there <= seen:
        seen.update(there)
        raise CutOff

arguments = quality.parser("", "")
arguments.set_defaults(tasks="sst2,yelp", budget="small")
for method in methods:
    run("whole.jsonl")
    note, unfinished.Work.note, runs, seen = unfinished.Work.note, cut_off, 0, set()
    while True:
        try:
            runs += 1
            run("pieces.jsonl")
        except CutOff:
            continue
        break
    unfinished.Work.note = note
    print(method, runs)
"""


def without_times(line: dict) -> dict:
    return {key: value for key, value in line.items() if key not in ("seconds", "peak_gib")}


@pytest.mark.slow
@pytest.mark.parametrize(
    "methods",
    [
        "hft_root_no_memory,hft_shared,hft_arriving,hft_planned",
        "single,joint,single_float32,joint_float32,sequential_replay,olora,osf,arrow",
    ],
)
def test_a_cell_in_pieces_is_the_cell(methods, backbones, tmp_path):
    """Cut off at each checkpoint, each end of a training and each score: the same numbers, to the last bit."""
    write_tasks(tmp_path / "data", ("sst2", "yelp", "agnews", "copa", "boolq"))
    command = [sys.executable, "-c", CUT_OFF, methods, tmp_path / "data", backbones["llama"], tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=BENCHMARKS)
    assert done.returncode == 0, done.stderr[-3000:]
    whole, pieces = read_cells(tmp_path / "whole.jsonl"), read_cells(tmp_path / "pieces.jsonl")
    assert [line["method"] for line in whole] == methods.split(",")
    assert list(map(without_times, pieces)) == list(map(without_times, whole))
    assert not list((tmp_path / ".unfinished").iterdir())  # a cell that has ended leaves nothing
    assert int(done.stdout.split()[-1]) > 10


@pytest.mark.slow
def test_parts_are_switched_off(backbones, tmp_path):
    from ablation import TREE

    write_tasks(tmp_path / "data", TREE)
    whole, gates, flat = cells_of("ablation.py", tmp_path, backbones, "--settings", "full,no_gates,flat")
    assert whole["hierarchy"] == gates["hierarchy"] == TREE and flat["hierarchy"] == {task: [] for task in TREE}
    assert all(gate == 1 for its in gates["gates"].values() for gate in its.values())
    assert any(gate != 1 for its in whole["gates"].values() for gate in its.values())
    for task, change in whole["refreshed"]["changes"].items():
        same = whole["refreshed"]["tasks"][task] == whole["tasks"][task]
        assert same or change["kept"], task  # a refresh that is not kept changes nothing
        assert not change["kept"] or change["before"] - change["after"] > change["error"] - 1e-4


@pytest.mark.slow
def test_the_planners_truth_is_measured(backbones, tmp_path):
    tasks = ["sst2", "yelp", "amazon", "rte", "mnli", "cb", "agnews"]
    more = [f"{task}, {how}" for task in ("amazon", "rte") for how in ("other words", "exchanged")]
    write_tasks(tmp_path / "data", tasks)
    measures, alone, pair, words = cells_of(
        "planner.py", tmp_path, backbones, "--settings", "measures,alone: cb,mnli>cb,words"
    )
    assert set(words["overlaps"]) <= {f"{one}>{other}" for one in (*tasks, *more) for other in (*tasks, *more)}
    assert set(measures["complexity"]) == set(tasks)
    assert "0" in alone["need"]["losses"] and str(alone["need"]["steps"]) in alone["need"]["losses"]
    assert 1 <= alone["need"]["rank"] <= 16 and set(alone["tasks"]) == set(pair["tasks"]) == {"cb"}


@pytest.mark.slow
def test_the_planners_hierarchy_is_measured_on_messages(backbones, tmp_path):
    from planner_chat import FAMILIES, TREE

    write_tasks(tmp_path / "data", TREE)
    plan, found, families = cells_of("planner_chat.py", tmp_path, backbones, "--settings", "plan,found,families")
    assert found["hierarchy"] == plan["hierarchy"] and set(found["tasks"]) == set(families["tasks"]) == set(TREE)
    assert (
        families["hierarchy"]["cb"] == ["inference"]
        and families["hierarchy"].keys() - TREE.keys() == FAMILIES["alike"].keys()
    )


@pytest.mark.slow
def test_tasks_with_little_in_common_are_planned_and_learnt(backbones, tmp_path):
    from planner_chat import ORDER

    write_tasks(tmp_path / "data", ["sst2", "rte", "agnews"])
    plan, root = cells_of("planner_chat.py", tmp_path, backbones, "--tasks", "unlike", "--settings", "plan,root")
    assert set(root["tasks"]) == set(ORDER["unlike"]) == plan["hierarchy"].keys() - plan["families"].keys()
    assert set(plan["trials"][0]["tasks"]) == {"find", "reverse", "add"}  # of the others there are too few rows


@pytest.mark.slow
def test_tasks_refine_what_a_root_has_learnt(backbones, tmp_path):
    from quality import FAMILY

    write_tasks(tmp_path / "data", FAMILY)
    settings = "root 2;root 2, tasks 1 at 2e-4"
    root, tasks = cells_of("refining.py", tmp_path, backbones, "--settings", settings)
    assert set(root["tasks"]) == set(tasks["tasks"]) == set(FAMILY) and root["tasks"] != tasks["tasks"]


@pytest.mark.slow
def test_what_each_task_takes_on_disk(backbones, tmp_path):
    from hft_methods import CL14

    write_tasks(tmp_path / "data", CL14)
    whole, least = cells_of("growth.py", tmp_path, backbones, "--tolerances", "0,1e9")
    assert all(its[:2] == [16, 1] for its in least["trims"].values()) and set(least["trims"]) == set(CL14)
    small, large = (list(its["cumulative"].values()) for its in (least, whole))
    assert 2 * small[-1] < large[-1] and large == sorted(large) and len(large) == len(CL14)
    assert large[-1] + whole["pages_and_shared"] == whole["value"] == sum(whole["bytes"].values())


@pytest.mark.slow
def test_each_method_runs(backbones, tmp_path):
    write_tasks(tmp_path / "data", ("sst2", "yelp", "agnews", "copa", "boolq"))
    cells = cells_of("quality.py", tmp_path, backbones, "--tasks", "sst2,yelp")
    from quality import ALL

    assert {cell["method"] for cell in cells} == set(ALL) and set(METHODS) < set(ALL)
    for line in cells:
        assert set(line["test"]["tasks"]) == {"sst2", "yelp"} and 0 <= line["test"]["ap"] <= 100
        sees_a_sequence = line["method"].startswith(("sequential", "olora", "osf", "hft"))
        assert ("forgetting" in line["test"]) == sees_a_sequence
        if line["method"].startswith("hft"):
            assert line["test"]["forgetting"] == 0.0 and list(line["test"]["just_learnt"]) == ["sst2", "yelp"]
            assert all(before == after for before, after in line["test"]["just_learnt"].values())


@pytest.mark.slow
def test_the_ways_of_gates_to_zero(backbones, tmp_path):
    from gates import PARENTS, WAYS

    write_tasks(tmp_path / "data", ("sst2", "agnews", "yelp"))
    cells = {cell["setting"]: cell for cell in cells_of("gates.py", tmp_path, backbones)}
    assert set(cells) == {f"{parent}: {way}" for parent in PARENTS for way in WAYS}
    for parent in PARENTS:
        assert set(cells[f"{parent}: fixed"]["gates"].values()) == {1.0}  # nothing learns
        moved, shrunk = (cells[f"{parent}: {way}"]["gates"][parent] for way in ("lr 2e-1", "lr 2e-1, shrink 0.2"))
        assert shrunk <= moved


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unrelated", "related"])
def test_what_a_page_holds_is_measured(backbones, tmp_path, name):
    from memory import WAYS, WORLDS

    world = WORLDS[name]
    write_tasks(tmp_path / "data", (*world.first, *world.later))
    first, *others = cells_of("memory.py", tmp_path, backbones, "--world", name)
    assert set(first["tasks"]) == set(world.first) and len(others) == len(world.later) * len(WAYS)
    for task in world.first:
        assert sum(first["added"][task]["page:1"]) > 0 and "without page 1" in first["tasks"][task]
    for line in others:
        task, way = line["setting"].split(": ")
        assert (way == "without page 1") == ("without page 1" not in line["tasks"][task])


@pytest.mark.slow
def test_the_router_is_asked_in_three_forms(backbones, tmp_path):
    from hft_methods import CL14
    from routing import FORMS, general_prompts

    write_tasks(tmp_path / "data", CL14)
    cells = cells_of("routing.py", tmp_path, backbones, "--split", "validation")
    assert [cell["setting"] for cell in cells] == list(FORMS)
    for line in cells:
        assert set(line["tasks"]) == set(CL14) and sum(line["general"].values()) == len(general_prompts("validation"))
        assert line["value"] <= line["likeliest"]
    assert not set(general_prompts("validation")) & set(general_prompts("test"))
