"""Rows as users of TRL give them: formats, columns of their own, and forms that hold nothing to learn."""

import copy
import json
import re
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from datasets import ClassLabel, Dataset, concatenate_datasets

import hft
from hft.trainers import HFTTrainer, HFTTrainingConfig
from hft.trainers.evaluation import EvalSet, routes_of, score_task
from hft.trainers.routes import prompts_of
from hft.trainers.row_tokens import prompt_and_answers, prompt_ids, template_arguments, tokenize_rows
from hft.trainers.task_data import learnable

from .test_trainer import make, rows
from .tiny import fill


USER, ANSWER = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "you"}
TOOLS = [{"type": "function", "function": {"name": "look", "description": "up"}}]
TOKENS = [{"input_ids": [5 + i, 9, 8, 7], "labels": [-100, -100, 8, 7]} for i in range(6)]


@pytest.fixture
def trainer(backbones, tokenizer, tmp_path):
    """Of two tasks that answer differently."""
    made = make(backbones, tokenizer, tmp_path, {"a": [], "e": []}, {"a": rows(1, 3), "e": rows(2, 3)})
    fill(made.model)
    return made


def losses(found: dict) -> dict:
    return {name: loss for name, loss in found.items() if name.endswith("_loss")}


def test_a_format_is_taken_off_and_a_transform_is_not(trainer):
    for made in (Dataset.from_list(TOKENS), rows(3, 4)):
        expected = losses(trainer.evaluate({"a": made, "e": made}))
        names = concatenate_datasets([made.add_column("task", [task] * len(made)) for task in "ae"])
        for its in (made.with_format("torch"), made.with_format("numpy", columns=made.column_names[:1])):
            assert losses(trainer.evaluate({"a": its, "e": its})) == expected
        assert losses(trainer.evaluate(names.with_format("torch"))) == expected
    assert losses(trainer.evaluate(trainer._prepared["a"].with_format("torch"))).keys() == {"eval_loss"}
    with pytest.raises(ValueError, match=r"cannot prepare a dataset that uses `Dataset.with_transform\(\)`"):
        trainer.evaluate({"a": rows(3).with_transform(lambda its: its)})


def test_a_column_of_numbers_called_task_is_the_users_own(trainer):
    made = Dataset.from_list(TOKENS)
    expected = losses(trainer.evaluate({"a": made}))
    assert losses(trainer.evaluate({"a": made.add_column("task", [1] * 6)})) == expected
    with pytest.raises(ValueError, match=r"`eval_dataset` has data for the unknown task 99\. Valid: 'a', 'e'\."):
        trainer.evaluate(made.add_column("task", [99] * 6))
    classes = ClassLabel(names=["e", "a"])
    assert losses(trainer.evaluate(made.add_column("task", [1] * 6).cast_column("task", classes))) == expected


def test_prepared_rows_are_of_the_task_that_they_are_given_for(trainer):
    expected = losses(trainer.evaluate({"a": rows(1, 3), "e": rows(2, 3)}))
    prepared = [trainer._prepared[task] for task in "ae"]
    assert losses(trainer.evaluate(concatenate_datasets(prepared))) == expected
    assert list(losses(trainer.evaluate(prepared[1])).values()) == [expected["eval_e_loss"]]
    assert losses(trainer.evaluate({"a": prepared[1]})) == losses(trainer.evaluate({"a": rows(2, 3)}))


def test_predictions_are_of_rows_in_any_form(trainer):
    made = rows(2, 3)
    expected = trainer.evaluate({"e": made})["eval_e_loss"]
    for given in ({"e": made}, made.add_column("task", ["e"] * 3), trainer._prepared["e"]):
        found = trainer.predict(given)
        assert found.metrics["test_loss"] == pytest.approx(expected) and len(found.label_ids) == 3
    with pytest.raises(
        ValueError, match=r"`test_dataset` has rows of 2 tasks \(a, e\), and predictions are of one; call"
    ):
        trainer.predict({"a": made, "e": made})
    with pytest.raises(ValueError, match="`test_dataset` is one Dataset without a column 'task'"):
        trainer.predict(made)


def test_the_first_stages_batches_can_be_seen_before_training(backbones, tokenizer, tmp_path):
    model = hft.HFTForCausalLM.from_backbone(backbones["llama"], {"a": [], "b": ["a"]}, rank=3)
    model.add_task("e")  # of the first stage, too, and not beside its sibling
    args = HFTTrainingConfig(str(tmp_path), bf16=False, per_device_train_batch_size=2)
    train = {task: rows(10 * i, 4) for i, task in enumerate("abe")}
    trainer = HFTTrainer(model, args, train, processing_class=tokenizer)
    prompts, all_rows = set(), trainer.train_dataset
    for batch in trainer.get_train_dataloader():
        prompts |= set(re.findall(r"t(\d+)t plus", tokenizer.decode(batch["input_ids"].flatten().tolist())))
    assert prompts == {"0", "20"} and trainer.stage is None and trainer.train_dataset is all_rows


@pytest.mark.parametrize(
    ("made", "options"),
    [
        ([{"input_ids": [7, 8, 9], "labels": [7, -100, -100]}] * 3, {}),
        ([{"input_ids": [7]}] * 3, {}),
        ([{"input_ids": [7]}] * 3, {"packing": True, "max_length": 2}),
        ([{"text": "abc"}] * 3, {"max_length": 1}),
    ],
)
def test_what_no_token_predicts_is_not_learnt(backbones, tokenizer, tmp_path, made, options):
    """A task would be sealed at a loss of 0."""
    message = "Nothing is left to learn in the 3 rows of task 'a': all labels are masked, or on a first token, which"
    with pytest.raises(ValueError, match=message):
        make(backbones, tokenizer, tmp_path, {"a": []}, {"a": Dataset.from_list(made)}, **options)


def test_what_begins_a_packed_sequence_is_predicted_by_nothing():
    for labels, lengths, is_learnt in (
        ([5, 5, -100], [1, 2], False),
        ([5, -100, 5], [2, 1], False),
        ([-100, 5, 5], [1, 2], True),
        ([-100, 5, -100], [3], True),
    ):
        ready = Dataset.from_list(
            [{"labels": [7, -100], "seq_lengths": [2]}, {"labels": labels, "seq_lengths": lengths}]
        )
        with nullcontext() if is_learnt else pytest.raises(ValueError, match="Nothing is left to learn in the 2 rows"):
            assert len(learnable("a", ready, ready, 3, True)) == 2


WRONG = [
    ([{"question": "q", "answer": "x"}], "The rows of task 'a' (question, answer) lack 'text'; give 'prompt' and"),
    ([{"prompt": "q"}], "The rows of task 'a' (prompt) lack 'completion'; give 'prompt' and 'completion', or"),
    ([{"prompt": "p", "chosen": "x", "rejected": "y"}], "(prompt, chosen, rejected) lack 'completion'"),
    (
        [{"prompt": "p", "completion": its} for its in ("x", None)],
        "Row 1 of task 'a' has nothing in 'completion';",
    ),
    ([{"messages": its} for its in ([USER, ANSWER], [])], "Row 1 of task 'a' has nothing in 'messages'; fill it"),
    ([{"prompt": "q", "completion": [ANSWER]}], "The rows of task 'a' (prompt, completion) cannot be tokenised: "),
    (
        [{"input_ids": [5, 6], "labels": [5]}],
        "Row 0 of task 'a' has 1 'labels' for 2 'input_ids'; give one for each",
    ),
    ([{"input_ids": [5, 6], "completion_mask": [0, 1, 1]}], "Row 0 of task 'a' has 3 'completion_mask' for 2"),
]


def test_wrong_rows_are_named_by_their_task(trainer):
    for made, message in WRONG:
        with pytest.raises(ValueError, match=re.escape(message)):
            trainer.evaluate({"a": Dataset.from_list(made)})


def test_wrong_rows_of_a_run_that_prepares_nothing(backbones, tokenizer, tmp_path):
    options = {"dataset_kwargs": {"skip_prepare_dataset": True}}
    message = "`skip_prepare_dataset` is set, and the rows of task 'a' (prompt, completion) are not tokenised; give"
    with pytest.raises(ValueError, match=re.escape(message)):
        make(backbones, tokenizer, tmp_path, {"a": []}, {"a": rows(1, 3)}, **options)


def test_a_mask_of_answers_means_that_prompts_are_not_learnt(trainer):
    masked = Dataset.from_list([{"input_ids": row["input_ids"], "completion_mask": [0, 0, 1, 1]} for row in TOKENS])
    assert losses(trainer.evaluate({"a": masked})) == losses(trainer.evaluate({"a": Dataset.from_list(TOKENS)}))
    assert prompts_of(masked, trainer.processing_class, 2) == prompts_of(Dataset.from_list(TOKENS), None, 2) != []


@pytest.fixture(scope="module")
def with_tools(tokenizer):
    """A tokenizer whose chat template shows tools and one argument of its own."""
    made = copy.deepcopy(tokenizer)
    made.chat_template = (
        "{% for tool in tools or [] %}[{{ tool['function']['name'] }}]{% endfor %}{{ mood or '' }}"
        + made.chat_template
    )
    return made


TALKS = {
    "prompt": {"prompt": [USER], "completion": [ANSWER]},
    "tools": {"prompt": [USER], "completion": [ANSWER], "tools": TOOLS},
    "json": {"prompt": [USER], "completion": [ANSWER], "tools": json.dumps(TOOLS)},
    "mood": {"prompt": [USER], "completion": [ANSWER], "chat_template_kwargs": {"mood": "merry"}},
}


def test_tools_and_template_arguments_are_part_of_the_prompt(backbones, with_tools, tmp_path):
    """Of those that are trained, those that the router learns, and those that are answered."""
    train = {name: Dataset.from_list([row] * 2) for name, row in TALKS.items()}
    trainer = make(backbones, with_tools, tmp_path, {name: [] for name in TALKS}, train)
    asked = []

    def generate(input_ids, **kwargs):
        asked.append(input_ids[0].tolist())
        return torch.cat([input_ids, input_ids[:, :1]], 1)

    spy = SimpleNamespace(training=False, device="cpu", generate=generate)
    spy.eval = spy.train = lambda *_: None
    spy.features_of, spy.route_features = asked.extend, lambda features: []
    for name, row in TALKS.items():
        ids, labels = (trainer._prepared[name][0][column] for column in ("input_ids", "labels"))
        prompt = [token for token, label in zip(ids, labels, strict=True) if label == -100]
        shown = {"prompt": "", "tools": "[look]", "json": "[look]", "mood": "merry"}[name]
        assert with_tools.decode(prompt).startswith(shown + "<|user|>hello")
        assert prompts_of(train[name], with_tools, 1) == [prompt]
        assert tokenize_rows([row], with_tools) == [{"input_ids": ids, "labels": labels}]
        score_task(spy, with_tools, EvalSet([row]), "a")
        routes_of(spy, with_tools, [row])
        assert asked == [prompt] * 2
        asked.clear()
        template = template_arguments(row)
        assert prompt_ids(with_tools, row["prompt"], **template) == prompt
        assert prompt_and_answers(with_tools, row["prompt"], ["you"], **template) == (prompt, [ids[len(prompt) :]])


def test_a_conversation_that_ends_with_a_question_is_all_prompt(tokenizer):
    talk = [USER, ANSWER, {"role": "user", "content": "and now?"}]
    (found,) = prompts_of(Dataset.from_list([{"messages": talk}]), tokenizer, 1)
    assert found == prompt_ids(tokenizer, talk)


def test_the_router_learns_no_prompts_that_were_formatted_away(backbones, tokenizer, tmp_path, caplog):
    model = hft.HFTForCausalLM.from_backbone(backbones["llama"], {"a": [], "e": []}, rank=3)
    args = HFTTrainingConfig(
        str(tmp_path), bf16=False, max_steps=2, save_strategy="no", completion_only_loss=False, disable_tqdm=True
    )
    tokens = Dataset.from_list([{**row, "input_ids": [5 + i, 9 + i, 8, 7]} for i, row in enumerate(TOKENS)])

    def trainer(formatting_func):
        train = {"a": rows(1, 3), "e": tokens}
        return HFTTrainer(model, args, train, processing_class=tokenizer, formatting_func=formatting_func)

    with pytest.raises(
        ValueError, match=r"`formatting_func` does not suit the rows of task 'a' \(prompt, completion\)"
    ):
        trainer(lambda row: [row["prompt"]])
    with caplog.at_level("WARNING"):
        trainer(lambda row: f"{row['completion']}, {row['prompt']}").train()
    assert model.hft_router.tasks() == ("e",)
    assert caplog.text.count("The router does not learn to know a: `formatting_func` does not say where a prompt") == 1
