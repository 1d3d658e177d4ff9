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
    found = None
    if args.task is None and model.hft_router.tasks():
        found = routes_of(model, tokenizer, [{"prompt": prompt} for prompt in prompts])
    answers = generate_answers(model, tokenizer, prompts, found or args.task, args.max_new_tokens)
    for place, answer in enumerate(answers):
        if found is not None:
            print(f"[{found[place]}]", file=sys.stderr, flush=True)
        print(answer, flush=True)
