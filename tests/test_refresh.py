"""Refreshing gates: backward transfer that can never hurt."""

import copy
import itertools
import math
import random
import re

import pytest
import torch

import hft
from hft import refresh_hft
from hft.refresh_hft import frozen, mean_and_error

from .naive import naive_logits
from .test_model import prompts
from .tiny import bits, grow, snapshot


@pytest.fixture
def grown(backbones) -> hft.HFTForCausalLM:
    """An old root a, and a younger branch e -> f beside it."""
    made = hft.HFTForCausalLM.from_backbone(backbones["llama"], {"a": []}, rank=3, memory_config={"slots": 2})
    grow(made)
    made.add_task("e")
    made.add_task("f", ["e"])
    grow(made)
    return made


def rows_like(model, teacher: str, count: int = 24) -> list[dict[str, list[int]]]:
    """Rows whose labels are what another task would answer."""
    rows = []
    for i in range(count):
        ids = prompts(1, 5 + i % 3, seed=i)
        with torch.no_grad():
            answer = model(ids, task=teacher).logits[0].argmax(-1).tolist()
        rows.append({"input_ids": ids[0].tolist(), "labels": [-100, -100, *answer[1:-1]]})
    return rows


def test_an_old_task_takes_what_helps_it(grown):
    """Rows that the younger task f answers: a can only learn them by letting f's node in."""
    x = prompts(2, 6)
    before = snapshot(grown)
    others = {task: bits(grown(x, task=task).logits) for task in (None, "e", "f")}
    result = grown.refresh_gates("a", rows_like(grown, "f"), num_steps=40, learning_rate=0.1)
    assert result.kept and result.after < result.before - result.error
    assert {"f", "e"} & set(grown.config.task("a")["borrows"]) and grown.gates("a").sources[0] == "a"
    assert {task: bits(grown(x, task=task).logits) for task in (None, "e", "f")} == others
    changed = {name for name, value in snapshot(grown).items() if before[name] != value}
    assert changed == {"hft_gates.g_a"}
    assert not any(parameter.requires_grad for parameter in grown.parameters())
    assert str(result).startswith("a: refreshed; validation loss ")
    with torch.no_grad():
        torch.testing.assert_close(grown(x, task="a").logits, naive_logits(grown, x, ["a", "a"]), rtol=1e-4, atol=1e-4)
        mixed = grown(x, task=["a", "f"]).logits
        torch.testing.assert_close(mixed, naive_logits(grown, x, ["a", "f"]), rtol=1e-4, atol=1e-4)


def test_without_a_gain_nothing_changes_to_the_bit(grown):
    """Rows that the task itself answers leave nothing to gain."""
    x = prompts(2, 6)
    before, tasks, logits = snapshot(grown), copy.deepcopy(grown.config.tasks), bits(grown(x, task="a").logits)
    parameter = grown.hft_gates.of("a")
    rows = rows_like(grown, "a")
    result = grown.refresh_gates("a", rows, num_steps=3, validation=[{**row, "labels": row["labels"]} for row in rows])
    assert not result.kept
    assert "a: left as it was" in str(result)
    assert (snapshot(grown), grown.config.tasks) == (before, tasks)
    assert grown.hft_gates.of("a") is parameter
    assert bits(grown(x, task="a").logits) == logits


def test_gates_that_came_apart_are_not_kept(grown):
    before = snapshot(grown)
    result = grown.refresh_gates("a", rows_like(grown, "f"), num_steps=3, learning_rate=1e30)
    assert not result.kept and "a: left as it was" in str(result) and snapshot(grown) == before
    assert all(map(math.isnan, mean_and_error([1.0, math.nan, 2.0]))) and math.isnan(
        mean_and_error([1.0, math.inf])[1]
    )
    assert mean_and_error([1.0, 3.0]) == (2.0, 1.0) and mean_and_error([1.0]) == (1.0, 0.0)


@pytest.mark.parametrize(("errors", "kept"), [(0.5, False), (2.0, True)])
def test_a_gain_counts_only_beyond_its_standard_error(grown, monkeypatch, errors, kept):
    """Losses by hand: of n differences that lie s above or below their mean in turn, the error is s / (n - 1)^0.5."""
    gain = errors * 0.01
    after = [2.0 - gain - away for away in [0.01 * 7**0.5, -0.01 * 7**0.5] * 4]
    losses = iter([[2.0] * 8, after])
    monkeypatch.setattr(type(grown), "losses", lambda *args: next(losses))
    before, tasks = snapshot(grown), copy.deepcopy(grown.config.tasks)
    result = grown.refresh_gates("a", rows_like(grown, "f"), num_steps=2)
    assert (result.kept, result.error) == (kept, pytest.approx(0.01))
    assert result.before - result.after == pytest.approx(gain)
    assert ((snapshot(grown), grown.config.tasks) == (before, tasks)) == (not kept)


def test_an_interrupted_refresh_changes_nothing(grown, monkeypatch):
    before, tasks = snapshot(grown), copy.deepcopy(grown.config.tasks)
    rows = rows_like(grown, "f")

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(grown), "_drop_small_gates", stop)
    with pytest.raises(KeyboardInterrupt):
        grown.refresh_gates("a", rows, num_steps=2)
    assert (snapshot(grown), grown.config.tasks) == (before, tasks)


def test_small_gates_become_exactly_zero_and_are_not_read(grown):
    grown.refresh_gates("a", rows_like(grown, "f"), num_steps=40, learning_rate=0.1, threshold=0.05)
    gates = grown.gates("a")
    assert not ((gates.values != 0) & (gates.values.abs() < 0.05)).any()
    for source, mean in gates.mean().items():
        assert mean > 0 or source == "a"


def test_a_child_of_a_refreshed_task_starts_as_it(grown, tmp_path):
    assert grown.refresh_gates("a", rows_like(grown, "f"), num_steps=40, learning_rate=0.1).kept
    x = prompts(2, 6)
    for parents in (["a"], ["a", "f"]):
        name = f"child{len(parents)}"
        grown.add_task(name, parents)
        entry = grown.config.task(name)
        assert len(set(grown.sources(name).labels())) == len(grown.sources(name))
        assert not set(entry["borrows"]) & set(grown.hierarchy.path(name))
    expected = grown(x, task="a").logits
    torch.testing.assert_close(grown(x, task="child1").logits, expected, rtol=1e-5, atol=1e-5)
    grown.save_pretrained(tmp_path)
    loaded = hft.HFTForCausalLM.from_pretrained(tmp_path)
    for task in ("a", "child1", "child2"):
        assert bits(loaded(x, task=task).logits) == bits(grown(x, task=task).logits)


def test_a_model_whose_parent_was_refreshed_is_built_from_its_config(grown, tmp_path):
    """A child that was there before reads less than its parent now does."""
    grown.add_task("child", ["a"])
    assert grown.refresh_gates("a", rows_like(grown, "f"), num_steps=40, learning_rate=0.1).kept
    assert set(grown.sources("a").labels()) - set(grown.sources("child").labels())
    empty = type(grown)(grown.config)
    assert empty.hierarchy.names == grown.hierarchy.names
    assert empty.gates("child").values.shape == grown.gates("child").values.shape


def test_the_losses_are_those_of_rows_alone(grown):
    """Left padding and kept positions change nothing."""
    rows = rows_like(grown, "f", 7)
    together = grown.losses("f", rows, 7)
    for row, loss in zip(rows, together, strict=True):
        alone = grown(torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]]), task="f").loss
        assert loss == pytest.approx(float(alone), rel=1e-4)


def test_gradients_are_those_of_all_rows_at_once_however_many_a_pass_has_room_for(grown, monkeypatch):
    rows = rows_like(grown, "f", 7)
    rows[3] = {"input_ids": prompts(1, 30, seed=9)[0].tolist(), "labels": [-100] * 25 + [1, 2, 3, 4, 5]}
    gates = grown.hft_gates.of("f")
    with frozen(grown):
        gates.requires_grad_(True)
        (expected,) = torch.autograd.grad(torch.stack(grown.row_losses("f", rows)).mean(), [gates])
        losses = grown.losses("f", rows, 7)
        for tokens, logits in ((2**11, 2**26), (14, 2**26), (2**11, 800), (1, 1)):
            monkeypatch.setattr(refresh_hft, "MOST_TOKENS", tokens)
            monkeypatch.setattr(refresh_hft, "MOST_LOGITS", logits)
            (found,) = grown.loss_gradients("f", rows, [gates])
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
            assert grown.losses("f", rows, 7) == pytest.approx(losses, rel=1e-4)
    assert expected.any()


def test_a_pass_has_so_many_tokens_and_logits_and_no_more_passes_than_needed(grown, monkeypatch):
    vocab_size, draw = grown.config.text_config.vocab_size, random.Random(0)
    monkeypatch.setattr(refresh_hft, "MOST_TOKENS", 60)
    monkeypatch.setattr(refresh_hft, "MOST_LOGITS", 25 * vocab_size)

    def room(part):
        scored = [
            len(row["labels"]) - next(i for i, label in enumerate(row["labels"]) if label != -100) for row in part
        ]
        longest = max(len(row["labels"]) for row in part)
        return len(part) == 1 or (len(part) * longest <= 60 and len(part) * max(scored) <= 25)

    for count in range(30):
        rows = []
        for _ in range(count):
            prompt, answer = draw.randint(1, 40), draw.randint(1, 30)
            rows.append({"input_ids": [1] * (prompt + answer), "labels": [-100] * prompt + [2] * answer})
        parts = list(grown._parts(rows))
        assert [row for part in parts for row in part] == rows and all(map(room, parts))
        assert not any(room([*part, after[0]]) for part, after in itertools.pairwise(parts))


def test_layers_are_checkpointed_in_evaluation_if_they_are_in_training(grown):
    rows, gates, passes = rows_like(grown, "f", 4), grown.hft_gates.of("f"), []
    grown.base_model.layers[0].self_attn.register_forward_hook(lambda *_: passes.append(1))
    with frozen(grown):
        gates.requires_grad_(True)
        (expected,) = grown.loss_gradients("f", rows, [gates])
        assert len(passes) == 1
        grown.gradient_checkpointing_enable({"use_reentrant": False})
        (found,) = grown.loss_gradients("f", rows, [gates])
        assert len(passes) == 3 and not any(module.training for module in grown.modules())
        grown.losses("f", rows, 4)
        assert len(passes) == 4
    assert bits(found) == bits(expected)


def test_a_first_token_has_no_loss_whatever_its_neighbours(grown):
    """Plain text is scored on all tokens; a row that is padded has something before its first one."""
    texts = [prompts(1, length, seed=length)[0].tolist() for length in (4, 9)]
    rows = [{"input_ids": ids, "labels": ids} for ids in texts]
    assert grown.losses("f", rows, 2) == pytest.approx(grown.losses("f", rows, 1), rel=1e-4)


@pytest.mark.parametrize(
    ("name", "number", "least"), [("num_steps", 0, 1), ("batch_size", 0, 1), ("threshold", -1, 0)]
)
def test_numbers_out_of_range_are_refused(grown, name, number, least):
    with pytest.raises(ValueError, match=f"`{name}` of the refresh is {number}; it must be {least} or more"):
        grown.refresh_gates("a", [], **{name: number})


def test_wrong_refreshes(grown):
    grown.add_task("open")
    for task, rows, message in [
        ("open", 9, "Task 'open' is not sealed"),
        ("aa", 9, "Unknown task 'aa'. Did you mean 'a'?"),
        ("a", 3, "needs two rows or more to learn from and two to validate on; there are 2 and 1."),
        ("a", 0, "there are 0 and 0."),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            grown.refresh_gates(task, rows_like(grown, "f", rows))


@pytest.mark.parametrize("row", [{"input_ids": [5], "labels": [5]}, {"input_ids": [5, 6, 7], "labels": [6, 7]}])
def test_rows_without_a_loss_are_refused(grown, row):
    message = f"A row of task 'a' has {len(row['input_ids'])} tokens and {len(row['labels'])} labels"
    with pytest.raises(ValueError, match=message):
        grown.row_losses("a", [{"input_ids": [5, 6], "labels": [5, 6]}, row])


def test_without_a_head_there_is_no_loss(grown, tmp_path):
    grown.save_pretrained(tmp_path)
    with pytest.raises(TypeError, match=r"HFTModel has no head to compute a loss with; load HFTForCausalLM."):
        hft.HFTModel.from_pretrained(tmp_path).refresh_gates("a", rows_like(grown, "f"))
