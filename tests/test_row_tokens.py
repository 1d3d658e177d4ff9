"""Rows become the same token ids wherever they are used, and long ones lose what tells least."""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import trl
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hft.trainers.evaluation import EvalSet, generate_answers, score_task
from hft.trainers.metrics import exact_match, without_thoughts
from hft.trainers.row_tokens import opening_length, prompt_and_answers, prompt_ids, shortened, tokenize_rows

from .test_trainer import make


@pytest.fixture(params=["bytes", "words"])
def joining(request):
    """A tokenizer that joins blanks to the words after them; or one that puts a blank before each text, too."""
    way = {"bytes": (pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()),
           "words": (pre_tokenizers.Metaspace(), decoders.Metaspace())}[request.param]  # fmt: skip
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = way
    made.train_from_iterator(["one two: three four\nthree"] * 9, trainers.BpeTrainer(special_tokens=["<s>"]))
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<s>", pad_token="<s>")


@pytest.mark.parametrize("prompt", ["one two", "one two ", "one two: ", "one two:\n"])
@pytest.mark.parametrize("answer", ["three", " three", "\nthree"])
def test_an_answer_begins_where_the_trainer_lets_it_begin(backbones, joining, tmp_path, prompt, answer):
    tokenizer = joining
    row = {"prompt": prompt, "completion": answer}
    trainer = make(backbones, tokenizer, tmp_path, {"a": []}, {"a": Dataset.from_list([row])})
    its = trainer.train_dataset[0]
    assert tokenize_rows([row], tokenizer) == [{"input_ids": its["input_ids"], "labels": its["labels"]}]
    learnt = [label for label in its["labels"] if label != -100]
    begin, (found,) = prompt_and_answers(tokenizer, prompt, [answer])
    assert begin + found == its["input_ids"] and found == learnt
    # Beside others an answer has all that they do not share.
    begin, (one, other) = prompt_and_answers(tokenizer, prompt, [answer, "four"])
    assert (
        begin + one == its["input_ids"]
        and begin + other == tokenize_rows([{"prompt": prompt, "completion": "four"}], tokenizer)[0]["input_ids"]
    )


def test_a_blank_that_joins_the_answer_is_part_of_it(joining):
    prompt = "one two: "
    begin, (answer,) = prompt_and_answers(joining, prompt, ["three"])
    assert len(begin) < len(prompt_ids(joining, prompt))  # else the test above would say nothing
    assert joining.decode(answer[:1]).strip() == "three" and len(answer) == 2


@pytest.fixture
def thinking(tokenizer):
    """A tokenizer with Qwen3's chat template, which writes an empty thought before each answer."""
    thinking = copy.deepcopy(tokenizer)
    thinking.chat_template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()
    return thinking


def test_thoughts_are_no_part_of_an_answer(thinking):
    row = {
        "prompt": [{"role": "user", "content": "one?"}],
        "completion": [{"role": "assistant", "content": "two"}],
    }
    (ready,) = tokenize_rows([row], thinking)
    prompt = prompt_ids(thinking, row["prompt"])
    assert "<think>" in thinking.decode(ready["input_ids"][len(prompt) :])
    opening = opening_length(thinking)
    assert opening > 0 == opening_length(thinking, [{"enable_thinking": False}])
    assert thinking.decode(ready["input_ids"][len(prompt) :][:opening]).strip() == "<think>\n\n</think>"

    def generate(input_ids, max_new_tokens, **kwargs):
        assert max_new_tokens == 3 + opening
        answers = torch.tensor([ready["input_ids"][len(prompt) :]] * len(input_ids))
        return torch.cat([input_ids, answers], 1)

    model = SimpleNamespace(training=False, device="cpu", generate=generate, eval=lambda: None, train=lambda _: None)
    (answer,) = generate_answers(model, thinking, [row["prompt"]], "a", max_new_tokens=3)
    assert answer.startswith("two")
    told = {**row, "completion": [{"role": "assistant", "content": "<think>\nlong\n</think>\n\ntwo"}]}
    assert exact_match("two", told) == 1.0
    assert score_task(model, thinking, EvalSet([row], lambda found, _: float("think" in found), 3), "a") == [0.0]


@pytest.mark.parametrize("score", [2, -0.1, float("nan"), "right", None])
def test_a_metric_that_gives_no_share_is_named(tokenizer, score):
    row = {"prompt": "one", "completion": " two"}
    model = SimpleNamespace(training=False, device="cpu", eval=lambda: None, train=lambda _: None,
                            generate=lambda input_ids, **_: torch.cat([input_ids, input_ids[:, :1]], 1))  # fmt: skip
    with pytest.raises(
        ValueError, match=r"The metric 'mine' gave .* for row 0 .* task 'a'\); a score is a number from 0"
    ):

        def mine(answer: str, row: dict) -> float:
            return score

        score_task(model, tokenizer, EvalSet([row], mine), "a")


def test_what_is_no_thought_stays(thinking):
    for answer in ("a <b>word</b>", "first <think>x</think> then", "<think> without an end"):
        assert without_thoughts(answer) == answer
    assert without_thoughts("opened in the prompt</think>\n\nfour") == "four"
    assert exact_match("4", {"completion": " <think>two and two</think> 4"}) == 1.0


def test_a_score_may_be_rounded(tokenizer):
    row = {"prompt": "one", "completion": " two"}
    model = SimpleNamespace(training=False, device="cpu", eval=lambda: None, train=lambda _: None,
                            generate=lambda input_ids, **_: torch.cat([input_ids, input_ids[:, :1]], 1))  # fmt: skip
    assert score_task(model, tokenizer, EvalSet([row], lambda *_: 1 + 1e-9), "a") == [1.0]


def test_a_tokenizer_without_an_end_of_text(joining):
    joining.eos_token = None
    with pytest.raises(ValueError, match="has no end-of-text token"):
        tokenize_rows([{"prompt": "one", "completion": " two"}], joining)


LONG = " ".join(["one two three four"] * 40)


@pytest.mark.parametrize(
    "text",
    [
        f"question: who is it\npassage: {LONG}",
        f"paragraph: {LONG}\nquestion: who is it\ncandidate answer: four",
        f"sentence 1: {LONG}\nsentence 2: who is it",
    ],
)
def test_only_the_passage_is_cut(tokenizer, text):
    cut = shortened(text, tokenizer, 60)
    assert len(tokenizer(cut, add_special_tokens=False)["input_ids"]) <= 62
    assert len(cut) < len(text) and len(cut.splitlines()) == len(text.splitlines())
    for line, before in zip(cut.splitlines(), text.splitlines(), strict=True):
        assert line == before or LONG in before
    assert shortened(text, tokenizer, 10**4) == text


@pytest.mark.parametrize("end", ["\r\n", "\u2028"])
def test_other_line_ends_stay(tokenizer, end):
    cut = shortened(f"who is it{end}{LONG}{end}\nlast line", tokenizer, 60)
    assert cut.startswith(f"who is it{end}") and cut.endswith("\nlast line") and "\ufffd" not in cut


def test_of_many_lines_the_middle_is_cut(tokenizer):
    text = "\n".join(f"{word} is a line" for word in ("first", *["some"] * 50, "last"))
    cut = shortened(text, tokenizer, 30)
    assert cut.startswith("first is a line") and cut.endswith("last is a line") and len(cut) < len(text) / 4
