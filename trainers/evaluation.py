"""Answers that a model generates, their scores, and what a sequence of stages did to them."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase


Row = Mapping[str, Any]
Messages = Sequence[Mapping[str, str]]


def exact_match(answer: str, row: Row) -> float:
    """1.0 if the answer is the row's, but for case and outer white space, else 0.0."""
    return float(answer.strip().lower() == reference(row).strip().lower())


def reference(row: Row) -> str:
    """The right answer in a prompt-completion row."""
    completion = row["completion"]
    return completion if isinstance(completion, str) else completion[-1]["content"]


@dataclass(frozen=True)
class EvalSet:
    """What a task is tested on.

    Args:
        rows: prompt-completion rows, as TRL takes them: strings, or lists of messages.
        score: an answer and its row -> a number from 0 to 1.
        max_new_tokens: where an answer is cut off.
    """

    rows: Sequence[Row]
    score: Callable[[str, Row], float] = exact_match
    max_new_tokens: int = 16


@torch.inference_mode()
def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Messages],
    task: str | None = None,
    max_new_tokens: int = 16,
    batch_size: int = 16,
    progress: str | None = None,
) -> list[str]:
    """Greedy answers, in batches of prompts of similar length, padded on the left.

    Args:
        model: an HFT model.
        tokenizer: its tokenizer, with a chat template if prompts are messages.
        prompts: strings, or lists of messages.
        task: whose path to take; `"backbone"` for the plain backbone; None lets the router choose for each prompt.
        max_new_tokens: where an answer is cut off if no end-of-text token came.
        batch_size: prompts generated at once.
        progress: text before a progress bar; None for no bar.

    Returns:
        The answers in the order of the prompts, without special tokens.
    """
    texts = [
        prompt
        if isinstance(prompt, str)
        else tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        for prompt in prompts
    ]
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    answers = [""] * len(texts)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    was_training = model.training
    model.eval()
    bar = tqdm(total=len(texts), desc=progress, disable=progress is None, leave=False)
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    try:
        for begin in range(0, len(order), batch_size):
            chosen = order[begin : begin + batch_size]
            # A chat template writes its own special tokens.
            special = isinstance(prompts[chosen[0]], str)
            batch = tokenizer(
                [texts[i] for i in chosen], return_tensors="pt", padding=True, add_special_tokens=special
            ).to(model.device)
            with_answer = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                task=task,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
            )
            new = with_answer[:, batch["input_ids"].shape[1] :]
            for i, answer in zip(chosen, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
                answers[i] = answer
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
    prompts = [row["prompt"] for row in data.rows]
    answers = generate_answers(model, tokenizer, prompts, task, data.max_new_tokens, batch_size, progress)
    return [data.score(answer, row) for answer, row in zip(answers, data.rows, strict=True)]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str | Messages) -> list[int]:
    """The token ids of a prompt as `generate` gets it: a string, or messages with the template's call for an answer."""
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=False)


def score_options(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    task: str | None,
    batch_size: int = 32,
) -> tuple[list[float], list[float]]:
    """Whether the right option is the likeliest, for each row, and how likely it is.

    An option's likelihood is that of its tokens and the end of text after the prompt. No normalisation by length. The
    prompt is computed once; each option goes on from its cache.

    Args:
        model: an HFT model, or any causal language model if `task` is None.
        tokenizer: its tokenizer.
        rows: {"prompt", "completion", "options"}: strings or messages; the answer is one of the options.
        task: whose path to take; None for the plain backbone.
        batch_size: prompts at once.

    Returns:
        1.0 or 0.0 a row; and the loss a row: -log p(right option and end of text | prompt), in nats.
    """
    found = option_likelihoods(model, tokenizer, rows, task, batch_size)
    answers = [row["options"].index(reference(row)) for row in rows]
    right = [float(its.index(max(its)) == answer) for its, answer in zip(found, answers, strict=True)]
    return right, [-its[answer] for its, answer in zip(found, answers, strict=True)]


@torch.inference_mode()
def option_likelihoods(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    task: str | None,
    batch_size: int = 32,
) -> list[list[float]]:
    """log p(option and end of text | prompt) of each option of each row, in nats; arguments as for `score_options`."""
    which = {} if task is None else {"task": task}
    prompts = [prompt_ids(tokenizer, row["prompt"]) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: len(prompts[i]))
    found: list[list[float]] = [[] for _ in rows]
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
            logits_to_keep=1,
            **which,
        )
        cache, first_BV = first.past_key_values, first.logits[:, -1].float().log_softmax(-1)
        num_options = max(len(rows[i]["options"]) for i in chosen)
        likelihood = torch.full((len(chosen), num_options), -torch.inf)
        for option in range(num_options):
            texts = [rows[i]["options"][option] if option < len(rows[i]["options"]) else "" for i in chosen]
            tails = [
                tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for text in texts
            ]
            longest = max(map(len, tails))
            tail_BT = torch.tensor([tail + [pad] * (longest - len(tail)) for tail in tails], device=model.device)
            known_BT = torch.tensor(
                [[1] * len(tail) + [0] * (longest - len(tail)) for tail in tails], device=model.device
            )
            logits_BTV = model(
                tail_BT[:, :-1],
                attention_mask=torch.cat([mask_BT, known_BT[:, :-1]], 1),
                position_ids=position_BT[:, -1:] + 1 + torch.arange(longest - 1, device=model.device),
                past_key_values=cache,
                use_cache=True,
                **which,
            ).logits
            cache.crop(1 - longest)
            log_BTV = torch.cat([first_BV[:, None], logits_BTV.float().log_softmax(-1)], 1)
            total_B = (log_BTV.gather(-1, tail_BT[..., None])[..., 0] * known_BT).sum(1)
            has_option = torch.tensor([option < len(rows[i]["options"]) for i in chosen])
            likelihood[has_option, option] = total_B.cpu()[has_option]
        for i, its in zip(chosen, likelihood.tolist(), strict=True):
            found[i] = its[: len(rows[i]["options"])]
    return found


def mean_and_error(scores: Sequence[float]) -> tuple[float, float]:
    """The mean in points (0 to 100) and its standard error."""
    mean = sum(scores) / len(scores)
    variance = sum((score - mean) ** 2 for score in scores) / max(len(scores) - 1, 1)
    return 100 * mean, 100 * math.sqrt(variance / len(scores))


def forgetting(matrix: Sequence[Mapping[str, float]]) -> float:
    """How much of the best score that each task ever had since it was learnt is gone at the end, averaged over tasks.

    The forgetting measure of Chaudhry et al. 2018 (https://arxiv.org/abs/1801.10112, section 3), with the maximum over all
    stages from the one that learnt the task to the last but one; over the tasks learnt before the last stage.

    Args:
        matrix: a row a stage, in order: the tasks learnt so far -> their scores.

    Returns:
        In the unit of the scores; 0.0 if no task was learnt before the last stage.
    """
    old = [task for task in matrix[-1] if any(task in row for row in matrix[:-1])]
    lost = [max(row[task] for row in matrix[:-1] if task in row) - matrix[-1][task] for task in old]
    return sum(lost) / len(lost) if lost else 0.0


def format_matrix(matrix: Sequence[Mapping[str, float]], names: Sequence[str]) -> str:
    """The task-by-stage matrix as text: a row a stage, a column a task, a dash where the task is not learnt yet."""
    width = max(6, *(len(name) for name in names))
    lines = [" " * 14 + "  ".join(name.rjust(width) for name in names)]
    for stage, row in enumerate(matrix, start=1):
        cells = [f"{row[name]:.1f}" if name in row else "-" for name in names]
        lines.append(f"after stage {stage} " + "  ".join(cell.rjust(width) for cell in cells))
    return "\n".join(lines)
