"""Answers that a model generates or chooses, and their scores."""

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hft.hierarchy_hft import BACKBONE
from hft.refresh_hft import mean_and_error

from .metrics import OPTIONS, Metric, Row, exact_match, find_metric, metric_name, reference, without_thoughts
from .row_tokens import Messages, opening_length, prompt_and_answers, prompt_ids, template_arguments


# Whatever the backbone's generation config says: a penalty on repetition would be one on options that the prompt names.
GREEDY = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None,
          "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}  # fmt: skip


@dataclass(frozen=True)
class EvalSet:
    """What a task is tested on.

    Args:
        rows: prompt-completion rows, as TRL takes them: strings, or lists of messages, with `tools` if need be.
        score: an answer and its row -> a number from 0 to 1, or the name of one, see `find_metric`; `OPTIONS` chooses the
            likeliest of each row's "options" instead of generating.
        max_new_tokens: where an answer is cut off.

    Raises:
        ValueError: an unknown metric; where it is used, a score that is no number from 0 to 1.
    """

    rows: Sequence[Row]
    score: Metric | str = exact_match
    max_new_tokens: int = 16

    def __post_init__(self):
        if isinstance(self.score, str):
            object.__setattr__(self, "score", find_metric(self.score))


@torch.inference_mode()
def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Messages],
    task: str | Sequence[str] | None = None,
    max_new_tokens: int = 16,
    batch_size: int = 16,
    progress: str | None = None,
    templates: Sequence[Mapping[str, Any]] | None = None,
) -> list[str]:
    """Greedy answers, in batches of prompts of similar length, padded on the left.

    Args:
        model: an HFT model.
        tokenizer: its tokenizer, with a chat template if prompts are messages.
        prompts: strings, or lists of messages.
        task: whose path to take, or one name a prompt; `"backbone"` for the plain backbone; None lets the router choose for
            each prompt.
        max_new_tokens: where an answer is cut off if no end-of-text token came; not counted is what the chat template
            writes before each, see `opening_length`.
        batch_size: prompts generated at once.
        progress: text before a progress bar; None for no bar.
        templates: what each prompt of messages hands to the chat template besides, see `template_arguments`; None: nothing.

    Returns:
        The answers in the order of the prompts, without special tokens, and without what a reasoning model thinks first.

    Raises:
        ValueError: a prompt without tokens.
    """
    texts = [
        prompt
        if isinstance(prompt, str)
        else tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False, **template)
        for prompt, template in zip(prompts, templates or [{}] * len(prompts), strict=True)
    ]
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    opening = opening_length(tokenizer, templates or [{}]) if any(not isinstance(its, str) for its in prompts) else 0
    answers = [""] * len(texts)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    # A chat template writes its own special tokens, so messages and strings do not share a batch.
    kinds = ([i for i in order if isinstance(prompts[i], str) == is_plain] for is_plain in (True, False))
    batches = [its[begin : begin + batch_size] for its in kinds for begin in range(0, len(its), batch_size)]
    was_training = model.training
    model.eval()
    bar = tqdm(total=len(texts), desc=progress, disable=progress is None, leave=False)
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    try:
        for chosen in batches:
            special = isinstance(prompts[chosen[0]], str)
            batch = tokenizer(
                [texts[i] for i in chosen], return_tensors="pt", padding=True, add_special_tokens=special
            ).to(model.device)
            for i, length in zip(chosen, batch["attention_mask"].sum(1).tolist(), strict=True):
                _check_tokens(texts[i], length)
            with_answer = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                task=task if task is None or isinstance(task, str) else [task[i] for i in chosen],
                max_new_tokens=max_new_tokens + opening,
                **GREEDY,
            )
            new = with_answer[:, batch["input_ids"].shape[1] :]
            for i, answer in zip(chosen, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
                answers[i] = without_thoughts(answer)
            bar.update(len(chosen))
    finally:
        tokenizer.padding_side = side
        bar.close()
        model.train(was_training)
    return answers


def score_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: EvalSet,
    task: str | None,
    batch_size: int = 16,
    progress: str | None = None,
) -> list[float]:
    """The score of each row of a task's test set; arguments as for `generate_answers`."""
    if data.score == OPTIONS:
        return _score_options_on(model, tokenizer, data.rows, task, batch_size, progress)
    prompts = [row["prompt"] for row in data.rows]
    templates = [template_arguments(row) for row in data.rows]
    answers = generate_answers(model, tokenizer, prompts, task, data.max_new_tokens, batch_size, progress, templates)
    scores = [data.score(answer, row) for answer, row in zip(answers, data.rows, strict=True)]
    for place, score in enumerate(scores):
        if not isinstance(score, numbers.Real) or not -1e-6 <= float(score) <= 1 + 1e-6:  # not a number is neither
            raise ValueError(
                f"The metric {metric_name(data.score)!r} gave {score!r} for row {place} (answer {answers[place]!r:.60}, "
                f"{'routed' if task is None else f'task {task!r}'}); a score is a number from 0 to 1."
            )
    return [min(max(float(score), 0.0), 1.0) for score in scores]  # without what was rounded


def _score_options_on(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    task: str | None,
    batch_size: int,
    progress: str | None,
) -> list[float]:
    """`score_options` for a task as `generate` names it: `"backbone"`, or None for the router's choice of each row."""
    names = [task] * len(rows) if task is not None else routes_of(model, tokenizer, rows)
    scores = [0.0] * len(rows)
    was_training = model.training
    model.eval()
    bar = tqdm(total=len(rows), desc=progress, disable=progress is None, leave=False)
    for name in dict.fromkeys(names):
        places = [i for i, other in enumerate(names) if other == name]
        chosen = [rows[i] for i in places]
        right, _loss = score_options(model, tokenizer, chosen, None if name == BACKBONE else name, batch_size)
        for i, score in zip(places, right, strict=True):
            scores[i] = score
        bar.update(len(places))
    bar.close()
    model.train(was_training)
    return scores


def routes_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> list[str]:
    """Which task, or `"backbone"`, the router finds for the prompt of each row."""
    prompts = [prompt_ids(tokenizer, row["prompt"], **template_arguments(row)) for row in rows]
    return [route.task for route in model.route_features(model.features_of(prompts))]


def score_options(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    task: str | None,
    batch_size: int = 32,
) -> tuple[list[float], list[float]]:
    """Whether the right option is the likeliest, for each row, and how likely it is.

    An option's likelihood is that of its tokens and their end after the prompt, see `prompt_and_answers`. No normalisation
    by length. The prompt is computed once; each option goes on from its cache.

    Args:
        model: an HFT model, or any causal language model if `task` is None.
        tokenizer: its tokenizer.
        rows: {"prompt", "completion", "options"}: strings or messages; the answer is one of the options.
        task: whose path to take; None for the plain backbone.
        batch_size: prompts at once.

    Returns:
        1.0 or 0.0 a row (0.0 where a likelihood is no number); and the loss a row: -log p(right option and its end |
        prompt), in nats.

    Raises:
        ValueError: a row without options, or whose answer is none of them.
    """
    for row in rows:
        if reference(row) not in (row.get("options") or ()):
            raise ValueError(
                f"The answer {reference(row)!r} is not among the options {row.get('options')}; the metric 'options' needs "
                "rows with a list `options` that holds the answer."
            )
    found = option_likelihoods(model, tokenizer, rows, task, batch_size)
    answers = right_options(rows)
    right = [
        float(its.index(max(its)) == answer and not any(map(math.isnan, its)))
        for its, answer in zip(found, answers, strict=True)
    ]
    return right, [-its[answer] for its, answer in zip(found, answers, strict=True)]


def right_options(rows: Sequence[Row]) -> list[int]:
    """The place of each row's answer among its options."""
    return [row["options"].index(reference(row)) for row in rows]


def _check_tokens(prompt: str | Messages, length: int) -> None:
    if not length:
        raise ValueError(
            f"The prompt {prompt!r} has no tokens, and there is nothing to answer; this tokenizer adds none of its own."
        )


@torch.inference_mode()
def option_likelihoods(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    task: str | None,
    batch_size: int = 32,
    prompts: Sequence[list[int]] | None = None,
) -> list[list[float]]:
    """log p(option and its end | prompt) of each option of each row, in nats; see `prompt_and_answers`.

    Args:
        model, tokenizer, rows, task, batch_size: as for `score_options`.
        prompts: the rows' prompts as token ids, which may be cut; whole by default.

    Raises:
        ValueError: a prompt without tokens.
    """
    which = {} if task is None else {"task": task}
    asked = [prompt_and_answers(tokenizer, row["prompt"], row["options"], **template_arguments(row)) for row in rows]
    if prompts is None:
        prompts = [prompt for prompt, _ in asked]
    for row, ids in zip(rows, prompts, strict=True):
        _check_tokens(row["prompt"], len(ids))
    order = sorted(range(len(rows)), key=lambda i: len(prompts[i]))
    found: list[list[float]] = [[] for _ in rows]
    last = torch.tensor([-1], device="cpu")  # as an index, for plain models too: see HFTForCausalLM.forward
    for begin in range(0, len(order), batch_size):
        chosen = order[begin : begin + batch_size]
        ids = [prompts[i] for i in chosen]
        length = max(map(len, ids))
        pad = tokenizer.eos_token_id  # masked
        prompt_BT = torch.tensor([[pad] * (length - len(row)) + row for row in ids], device=model.device)
        mask_BT = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in ids], device=model.device)
        position_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
        first = model(
            prompt_BT,
            attention_mask=mask_BT,
            position_ids=position_BT,
            use_cache=True,
            logits_to_keep=last,
            **which,
        )
        cache, first_BV = first.cache, first.logits[:, -1].float().log_softmax(-1)
        cache.activate_past_recording()  # else what left a sliding window could not be brought back
        options = [asked[i][1] for i in chosen]
        num_options = max(map(len, options))
        likelihood = torch.full((len(chosen), num_options), -torch.inf, device="cpu")
        for option in range(num_options):
            tails = [its[option] if option < len(its) else [pad] for its in options]
            longest = max(map(len, tails))
            tail_BT = torch.tensor([tail + [pad] * (longest - len(tail)) for tail in tails], device=model.device)
            known_BT = torch.tensor(
                [[1] * len(tail) + [0] * (longest - len(tail)) for tail in tails], device=model.device
            )
            log_BTV = first_BV[:, None]
            if longest > 1:
                logits_BTV = model(
                    tail_BT[:, :-1],
                    attention_mask=torch.cat([mask_BT, known_BT[:, :-1]], 1),
                    position_ids=position_BT[:, -1:] + 1 + torch.arange(longest - 1, device=model.device),
                    cache=cache,
                    use_cache=True,
                    **which,
                ).logits
                cache.crop(1 - longest)
                log_BTV = torch.cat([log_BTV, logits_BTV.float().log_softmax(-1)], 1)
            total_B = (log_BTV.gather(-1, tail_BT[..., None])[..., 0] * known_BT).sum(1)
            has_option = torch.tensor([option < len(its) for its in options], device="cpu")
            likelihood[has_option, option] = total_B.cpu()[has_option]
        for i, its in zip(chosen, likelihood.tolist(), strict=True):
            found[i] = its[: len(rows[i]["options"])]
    return found


def points_and_error(scores: Sequence[float]) -> tuple[float, float]:
    """The mean in points (0 to 100) and its standard error."""
    mean, error = mean_and_error(scores)
    return 100 * mean, 100 * error
