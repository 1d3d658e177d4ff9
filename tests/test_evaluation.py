import copy
import math

import pytest
import torch
from datasets import Dataset

import hft
from hft.trainers.curriculum import BlockSampler, Stage, open_stages
from hft.trainers.evaluation import (
    EvalSet,
    generate_answers,
    option_likelihoods,
    points_and_error,
    routes_of,
    score_options,
    score_task,
)
from hft.trainers.metrics import OPTIONS, exact_match, find_metric, metric_name, rouge_l
from hft.trainers.row_tokens import prompt_and_answers, tokenize_rows
from hft.trainers.task_data import OneTaskCollator, split_by_task
from hft.trainers.transfer import average_performance, backward_transfer, forgetting, format_matrix, forward_transfer

from .tiny import grow


def test_forgetting_by_hand():
    matrix = [{"a": 90.0, "b": 50.0}, {"a": 70.0, "b": 60.0, "c": 80.0}, {"a": 80.0, "b": 40.0, "c": 80.0, "d": 10.0}]
    assert forgetting(matrix) == pytest.approx(
        ((90 - 80) + (60 - 40) + 0) / 3
    )  # d was learnt last and cannot be forgotten
    assert forgetting(matrix[:1]) == 0.0
    assert forgetting([{"a": 1.0}, {"a": 1.0, "b": 0.0}]) == 0.0


def test_transfer_by_hand():
    matrix = [{"a": 90.0, "b": 50.0}, {"a": 70.0, "b": 60.0, "c": 80.0}]
    assert average_performance(matrix) == 70.0
    assert backward_transfer(matrix) == pytest.approx((-20 + 10) / 2)
    assert backward_transfer(matrix, over="T") == pytest.approx((-20 + 10) / 3)
    assert forgetting(matrix, over="T") == pytest.approx((20 - 10) / 3)
    assert forward_transfer({"c": 30.0}, {"a": 1.0, "c": 20.0}) == 10.0
    assert forward_transfer({}, {"a": 1.0}) == 0.0 == backward_transfer(matrix[:1])
    with pytest.raises(ValueError, match="it is 'T-1'"):
        forgetting(matrix, over="T-2")


def test_metrics_by_name(monkeypatch):
    row = {"completion": "the cat sat"}
    assert find_metric("exact_match")("The cat sat ", row) == 1.0
    assert find_metric("rouge_l") is rouge_l
    assert rouge_l("a cat sat down", row) == pytest.approx(4 / 7)  # 2 words of 3 and of 4
    assert find_metric("options") == OPTIONS == metric_name(OPTIONS)
    assert find_metric("operator:contains")("abc", "b") is True
    gym = find_metric("reasoning_gym:chain_sum")
    entry = {"question": "1 + 2 =", "answer": "3", "metadata": {}}
    assert gym(" 3\n", {"entry": entry}) == 1.0 and gym("The answer is 3", {"entry": entry}) == 0.0
    assert metric_name(exact_match) == "exact match"
    for name, message in (
        ("exact_mach", "exact_match"),
        ("no_module:f", "could not be imported"),
        ("operator:nothing", "could not be imported"),
        (".relative:f", "could not be imported"),
        (":f", "could not be imported"),
        ("reasoning_gym:chain_sums", "no family 'chain_sums'"),
    ):
        with pytest.raises(ValueError, match=message):
            find_metric(name)


@pytest.mark.parametrize("task", ["d", "backbone"])
def test_the_options_metric_takes_chat_rows_and_routes(model, tokenizer, task):
    options = ["yes", "no", "so so"]
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Is it {i}?"}],
            "options": options,
            "completion": [{"role": "assistant", "content": options[i % 3]}],
        }
        for i in range(6)
    ]
    scores = score_task(model, tokenizer, EvalSet(rows, OPTIONS), task, batch_size=4)
    prompts = [
        tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False) for row in rows
    ]
    plain = [
        {"prompt": prompt, "options": options, "completion": row["completion"][0]["content"]}
        for prompt, row in zip(prompts, rows, strict=True)
    ]
    assert scores == score_options(model, tokenizer, plain, None if task == "backbone" else task)[0]
    model.add_routes("a", [tokenizer(prompt)["input_ids"] for prompt in prompts])
    routed = score_task(model, tokenizer, EvalSet(rows, OPTIONS), None)
    names = routes_of(model, tokenizer, rows)
    alone = [
        score_task(model, tokenizer, EvalSet([row], OPTIONS), name)[0] for row, name in zip(rows, names, strict=True)
    ]
    assert routed == alone
    with pytest.raises(ValueError, match="not among the options"):
        score_task(model, tokenizer, EvalSet([{**rows[0], "options": ["maybe"]}], OPTIONS), task)


def test_an_option_ends_as_the_chat_template_ends_an_answer(model, tokenizer):
    """Whatever the tokenizer's own end of text is: Gemma and Phi end a turn otherwise, and only that was learnt."""
    other = copy.deepcopy(tokenizer)
    turn = other.bos_token_id
    other.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<s>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{i}?"}],
            "completion": [{"role": "assistant", "content": answer}],
            "options": ["so", "so so"],
        }
        for i, answer in enumerate(["so", "so so"] * 3)
    ]
    for row, learnt in zip(rows, tokenize_rows(rows, other), strict=True):
        labels = [label for label in learnt["labels"] if label != -100]
        _, (found,) = prompt_and_answers(other, row["prompt"], [row["completion"][0]["content"]])
        assert found[-1] == turn and labels[: len(found)] == found and turn not in found[:-1]
    assert prompt_and_answers(other, "plain", ["so"])[1][0][-1] == other.eos_token_id != turn
    whole = [prompt_and_answers(other, row["prompt"], row["options"]) for row in rows]
    found = option_likelihoods(model, other, rows, "a")
    for (ids, tails), its in zip(whole, found, strict=True):
        for tail, likelihood in zip(tails, its, strict=True):
            with torch.no_grad():
                log_TV = model(torch.tensor([ids + tail]), task="a").logits[0].log_softmax(-1)
            expected = sum(log_TV[len(ids) - 1 + place, token].item() for place, token in enumerate(tail))
            assert likelihood == pytest.approx(expected, abs=1e-3)


def test_answers_are_greedy_whatever_the_backbone_generates_by(model, tokenizer):
    prompts = [f"is it {i}" for i in range(4)]
    expected = generate_answers(model, tokenizer, prompts, "d", 8)
    model.generation_config.update(repetition_penalty=5.0, num_beams=3, no_repeat_ngram_size=1)
    assert generate_answers(model, tokenizer, prompts, "d", 8) == expected


def test_the_matrix_as_text():
    text = format_matrix([{"a": 90.0}, {"a": 90.0, "long-name": 5.25}], ["a", "long-name"])
    assert text.splitlines() == [
        "                      a  long-name",
        "after stage 1      90.0          -",
        "after stage 2      90.0        5.2",
    ]


@pytest.mark.parametrize("task", [None, "d"])
def test_options_are_scored_as_one_by_one(model, tokenizer, task):
    """Prompts of different lengths, options of different lengths and numbers: each as if it were alone."""
    options = [[" yes", " no"], [" very good", " bad", " so so"], [" a", " b"]]
    rows = [
        {"prompt": f"Is {'it ' * (i % 5)}{i}?", "options": options[i % 3], "completion": options[i % 3][i % 2]}
        for i in range(9)
    ]
    right, loss = score_options(model, tokenizer, rows, task, batch_size=4)
    for row, is_right, its_loss in zip(rows, right, loss, strict=True):
        prompt = tokenizer(row["prompt"])["input_ids"]
        losses = []
        for option in row["options"]:
            answer = tokenizer(option, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
            with torch.no_grad():
                logits = model(torch.tensor([prompt + answer]), task=task).logits[0].log_softmax(-1)
            losses.append(-sum(float(logits[len(prompt) - 1 + i, token]) for i, token in enumerate(answer)))
        best = row["options"][losses.index(min(losses))]
        assert is_right == float(best == row["completion"])
        assert its_loss == pytest.approx(losses[row["options"].index(row["completion"])], rel=1e-4)


def test_mean_and_error():
    mean, error = points_and_error([0, 1, 1, 1])
    assert mean == 75 and error == pytest.approx(100 * (0.1875 * 4 / 3 / 4) ** 0.5)


def test_exact_match_reads_both_row_forms():
    assert exact_match(" Good\n", {"completion": "good"}) == 1.0
    assert exact_match("goods", {"completion": [{"role": "assistant", "content": "good"}]}) == 0.0


def test_answers_do_not_depend_on_batch_or_order(model, tokenizer):
    prompts = ["one", "twenty-two plus", "3", "four hundred and", "fi"]
    together = generate_answers(model, tokenizer, prompts, "d", max_new_tokens=5, batch_size=3)
    assert together == [generate_answers(model, tokenizer, [prompt], "d", max_new_tokens=5)[0] for prompt in prompts]
    assert together != generate_answers(model, tokenizer, prompts, "backbone", max_new_tokens=5)
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    scores = score_task(
        model, tokenizer,
        EvalSet([{"prompt": chat, "completion": "x"} for chat in chats], score=lambda answer, row: float(len(answer) > 0)),
        "d",
    )  # fmt: skip
    assert len(scores) == 5


def test_messages_and_strings_in_one_call(model, tokenizer, monkeypatch):
    """A string begins with the tokenizer's own token, messages with what their template writes."""
    prompts = [[{"role": "user", "content": "hello and good day"}], "one", "two"]
    seen: list[bool] = []
    asked = type(tokenizer).__call__

    def watch(self, texts, **options):
        seen.append(options.get("add_special_tokens"))
        return asked(self, texts, **options)

    monkeypatch.setattr(type(tokenizer), "__call__", watch)
    together = generate_answers(model, tokenizer, prompts, "d", max_new_tokens=4)
    assert seen[-2:] == [True, False]
    assert together == [generate_answers(model, tokenizer, [prompt], "d", max_new_tokens=4)[0] for prompt in prompts]


def test_what_is_no_number_is_not_right(model, tokenizer):
    rows = [{"prompt": "x", "completion": answer, "options": ["a", "b"]} for answer in ("a", "b")]
    torch.nn.init.constant_(model.get_output_embeddings().weight, float("nan"))
    right, losses = score_options(model, tokenizer, rows, "d")
    assert right == [0.0, 0.0] and all(map(math.isnan, losses))


class TestBlockSampler:
    def test_every_block_holds_one_task_and_every_row_comes(self):
        sizes = {"a": 5, "b": 12, "c": 1}
        sampler = BlockSampler(sizes, block_size=4, seed=0)
        task_of_row = [task for task, size in sizes.items() for _ in range(size)]
        counts = dict.fromkeys(range(18), 0)
        for epoch in range(12):
            sampler.set_epoch(epoch)
            order = list(sampler)
            assert len(order) == len(sampler) == 4 * (2 + 3 + 1)
            for i in range(0, len(order), 4):
                assert len({task_of_row[row] for row in order[i : i + 4]}) == 1
            for row in order:
                counts[row] += 1
        # rows of a task come equally often, to one: a's 12 epochs of 8 over 5 rows, and so on
        for task, size in sizes.items():
            of_task = [counts[row] for row in counts if task_of_row[row] == task]
            assert max(of_task) - min(of_task) <= 1, (task, size)

    def test_half_a_pass_goes_on_in_the_next_epoch(self):
        """Two halves are one pass: the same rows in the same order; a task never goes without a block."""
        whole, half = BlockSampler({"a": 16}, 2, 0), BlockSampler({"a": 16, "b": 1}, 2, 0, {"a": 0.5, "b": 0.1})
        seen = []
        for epoch in range(2):
            half.set_epoch(epoch)
            order = list(half)
            assert len(order) == len(half) == 8 + 2
            seen += [row for row in order if row < 16]
        assert seen == list(whole)
        assert BlockSampler({"a": 16}, 2, 0, {"a": 3}).num_blocks("a") == 24

    def test_order_depends_on_seed_and_epoch_only(self):
        def order(seed, epoch):
            sampler = BlockSampler({"a": 9, "b": 9}, 2, seed)
            sampler.set_epoch(epoch)
            return list(sampler)

        assert order(1, 3) == order(1, 3)
        assert order(1, 3) != order(1, 4) and order(1, 3) != order(2, 3)

    def test_a_tasks_own_order_does_not_depend_on_its_siblings(self):
        alone = [row for row in BlockSampler({"b": 9}, 2, 0)]
        together = [row - 4 for row in BlockSampler({"a": 4, "b": 9, "c": 3}, 2, 0) if 4 <= row < 13]
        assert alone == together

    def test_tasks_that_learn_together_share_blocks_and_others_do_not(self):
        sizes = {"a": 12, "b": 20, "c": 8}
        mixed = BlockSampler(sizes, 8, 0, turns_a_block=4, together=["c", "a"])
        apart = BlockSampler(sizes, 8, 0)
        turns, order = mixed.turns(0), list(mixed)
        task_of_row = [task for task, size in sizes.items() for _ in range(size)]
        assert [task_of_row[row] for row in order] == [task for task in turns for _ in range(2)]
        blocks = [set(turns[i : i + 4]) for i in range(0, len(turns), 4)]
        assert {"a", "c"} in blocks and all(block == {"b"} or "b" not in block for block in blocks)
        for task in sizes:  # as many rows of each, in the order that it has alone
            assert [row for row in order if task_of_row[row] == task] == [r for r in apart if task_of_row[r] == task]
            assert turns.count(task) == 4 * apart.turns(0).count(task)
        assert mixed.turns_after(1, 3) == turns[4:12]
        assert list(BlockSampler(sizes, 8, 0, together=sizes)) == list(apart)  # a block of one turn holds one task
        assert list(BlockSampler(sizes, 8, 0, turns_a_block=4)) == list(apart)


def test_stages_are_the_levels_that_are_open():
    tree = hft.Hierarchy({"a": [], "b": ["a"], "c": [], "d": ["b"]})
    assert open_stages(tree, []) == [Stage(1, ("a", "c"), 3), Stage(2, ("b",), 3), Stage(3, ("d",), 3)]
    assert open_stages(tree, ["a", "b"]) == [Stage(1, ("c",), 3), Stage(3, ("d",), 3)]
    assert open_stages(tree, "abcd") == []
    assert str(Stage(2, ("b", "x"), 3)) == "stage 2/3: b, x"


def test_a_batch_of_two_tasks_is_refused():
    with pytest.raises(ValueError, match=r"A micro-batch holds rows of the tasks with the ids \[0, 1\], and only one"):
        OneTaskCollator(lambda rows: {})([{"hft_task": 0}, {"hft_task": 1}])


def test_an_empty_dataset_with_a_task_column():
    with pytest.raises(ValueError, match="`train_dataset` is empty"):
        split_by_task(Dataset.from_dict({"task": [], "text": []}), ["a"], "train_dataset")


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_options_are_scored_behind_prompts_longer_than_a_sliding_window(backbones, tokenizer, family):
    """And an option of nothing is only the end of the text."""
    model = hft.HFTForCausalLM.from_backbone(backbones[family], {"a": []}, rank=3)
    grow(model)
    model.eval()
    rows = [{"prompt": "abc " * i, "options": ["yes", "", "may be"], "completion": "yes"} for i in (20, 9)]
    for task in ("a", None):
        found = option_likelihoods(model, tokenizer, rows, task)
        for row, likelihoods in zip(rows, found, strict=True):
            prompt = tokenizer(row["prompt"])["input_ids"]
            for option, likelihood in zip(row["options"], likelihoods, strict=True):
                tail = tokenizer(option, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
                with torch.no_grad():
                    logits = model(torch.tensor([prompt + tail]), task=task, use_cache=False).logits[0].log_softmax(-1)
                whole = sum(float(logits[len(prompt) - 1 + i, token]) for i, token in enumerate(tail))
                assert likelihood == pytest.approx(whole, abs=1e-3)
    cut = option_likelihoods(model, tokenizer, rows, "a", prompts=[tokenizer("ab")["input_ids"]] * len(rows))
    short = option_likelihoods(model, tokenizer, [{**row, "prompt": "ab"} for row in rows], "a")
    assert [pytest.approx(its) for its in short] == cut
    nothing = {"prompt": "", "options": ["x"], "completion": "x"}
    with pytest.raises(ValueError, match="The prompt '' has no tokens, and there is nothing to answer"):
        option_likelihoods(model, tokenizer, [rows[0], nothing], "a")
    with pytest.raises(ValueError, match="The prompt '' has no tokens, and there is nothing to answer"):
        generate_answers(model, tokenizer, ["abc", ""], "a")
    alone = option_likelihoods(model, tokenizer, [{"prompt": "abc", "options": [""], "completion": ""}], "a")
    assert len(alone[0]) == 1
