"""`hft generate`: a saved model answers prompts."""

import argparse
import sys
from typing import Any

from hft.hierarchy_hft import BACKBONE

from .evaluation import generate_answers, routes_of
from .loading import load_model, load_tokenizer
from .row_tokens import is_text


def answer_prompts(args: argparse.Namespace) -> None:
    """Prints the answers in the order of the prompts; where the router chooses, whom, on standard error.

    Raises:
        ValueError: an unknown task, no prompt, or one that is no text.
    """
    model = load_model(args.model, args.load_in_4bit)
    if args.task not in (None, BACKBONE):
        model.hierarchy.check(args.task)
    tokenizer = load_tokenizer(args.model)
    prompts: list[Any] = args.prompt or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if odd := [prompt for prompt in prompts if not is_text(prompt)]:
        raise ValueError(f"The prompt {odd[0]!r} is no UTF-8 text.")
    if not prompts:
        raise ValueError("There is no prompt: give one as an argument, or one a line on standard input.")
    if tokenizer.chat_template is not None:
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
    is_routed = args.task is None and bool(model.hft_router.tasks())
    names = [args.task] * len(prompts)
    if is_routed:
        names = routes_of(model, tokenizer, [{"prompt": prompt} for prompt in prompts])
    answers = [""] * len(prompts)
    for name in dict.fromkeys(names):
        places = [i for i, other in enumerate(names) if other == name]
        its = generate_answers(model, tokenizer, [prompts[i] for i in places], name, args.max_new_tokens)
        for i, answer in zip(places, its, strict=True):
            answers[i] = answer
    for name, answer in zip(names, answers, strict=True):
        if is_routed:
            print(f"[{name}]", file=sys.stderr, flush=True)
        print(answer, flush=True)
