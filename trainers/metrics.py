"""How an answer is scored: an answer and its row -> a number from 0 to 1."""

import functools
import importlib
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from hft.hierarchy_hft import nearest


Row = Mapping[str, Any]
Metric = Callable[[str, Row], float]

# Not a function of an answer: the model chooses the likeliest of the row's options, and nothing is generated.
OPTIONS = "options"


def reference(row: Row) -> str:
    """The right answer in a prompt-completion row."""
    completion = row["completion"]
    return without_thoughts(completion if isinstance(completion, str) else completion[-1]["content"])


def without_thoughts(answer: str) -> str:
    """What follows the thoughts that an answer begins with, as reasoning models and their chat templates mark them.

    Some templates open them in the prompt, so that the answer only closes them.
    """
    thoughts, end, rest = answer.partition("</think>")
    begins = thoughts.lstrip().startswith("<think>") or "<think>" not in thoughts
    return rest.lstrip() if end and begins else answer


def exact_match(answer: str, row: Row) -> float:
    """1.0 if the answer is the row's, but for case and outer white space, else 0.0."""
    return float(answer.strip().lower() == reference(row).strip().lower())


def rouge_l(answer: str, row: Row) -> float:
    """The F-measure of the longest common subsequence of words, stemmed (Lin 2004, ROUGE-L), by the package rouge-score.

    Its words are made of the letters a to z and digits, so it suits English.

    Raises:
        ImportError: without rouge-score.
    """
    return _rouge().score(reference(row), answer)["rougeL"].fmeasure


@functools.cache
def _rouge() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError("The metric rouge_l needs rouge-score: pip install rouge-score.") from error
    return RougeScorer(["rougeL"], use_stemmer=True)


def _reasoning_gym(family: str) -> Metric:
    """1.0 where reasoning-gym's own scorer gives full marks; it also gives some for an answer inside a sentence."""
    try:
        from reasoning_gym import get_score_answer_fn
    except ImportError as error:
        raise ImportError(
            f"The metric reasoning_gym:{family} needs reasoning-gym: pip install reasoning-gym."
        ) from error
    score = get_score_answer_fn(family)

    def full_marks(answer: str, row: Row) -> float:
        if "entry" not in row:
            raise ValueError(
                f"The metric reasoning_gym:{family} reads the column `entry`, which a row lacks (it has {', '.join(row)})."
            )
        return float(score(answer.strip(), row["entry"]) >= 0.99)

    return full_marks


METRICS: dict[str, Metric] = {"exact_match": exact_match, "rouge_l": rouge_l}


def find_metric(name: str) -> Metric | str:
    """A metric by its name.

    Args:
        name: `"exact_match"`; `"rouge_l"`; `"options"`: the likeliest of the row's options, nothing is generated;
            `"reasoning_gym:<family>"`, which reads the row's column `entry`; or `"module:function"`, your own function of an
            answer and its row, with a value from 0 to 1.

    Returns:
        The function, or `OPTIONS`.

    Raises:
        ValueError: a name that is none of these, or a function that is not there.
        ImportError: a package that is missing.
    """
    if name == OPTIONS:
        return OPTIONS
    if name in METRICS:
        return METRICS[name]
    module, colon, function = name.partition(":")
    if not colon:
        raise ValueError(
            f"Unknown metric {name!r}. {nearest(name, [*METRICS, OPTIONS])} Or give module:function, or "
            "reasoning_gym:<family>."
        )
    if module == "reasoning_gym":
        try:
            return _reasoning_gym(function)
        except ValueError as error:
            raise ValueError(f"reasoning-gym has no family {function!r} (metric {name!r}).") from error
    if os.getcwd() not in sys.path:  # an installed command does not look where it is called
        sys.path.append(os.getcwd())
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, TypeError, ValueError) as error:  # the latter two: of a relative or no name
        raise ValueError(f"The metric {name!r} could not be imported: {error}.") from error


def metric_name(metric: Metric | str) -> str:
    """How a metric is called in tables."""
    if isinstance(metric, str):
        return metric
    return getattr(metric, "__name__", type(metric).__name__).replace("_", " ")
