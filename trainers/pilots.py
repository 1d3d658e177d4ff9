"""The rows that the planner looks at, and short trainings on some of them."""

import contextlib
import dataclasses
import random
from collections.abc import Iterator, Mapping, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hft.tasks_hft import forked_rng

from .metrics import Row, reference
from .row_tokens import prompt_and_answers, template_arguments, tokenize_rows


PILOT = "pilot"  # the scratch task's name; a letter is added while it is taken


@dataclasses.dataclass(frozen=True)
class ProbeSettings:
    """How much is measured.

    Args:
        pilot_rows, pilot_steps, batch_size: what a pilot learns from, its optimizer steps and their rows.
        pilot_rank, learning_rate: of its node.
        probe_rows: rows a task that losses are measured on; no pilot learns from them, unless they come twice.
        gradient_rows: rows a task that its gradient is taken over.
        max_length: longer rows lose their beginning; tokens.
        max_candidates: how many other new tasks are measured as parents of one: those whose prompts are nearest to its
            own in the features that the router goes by. All of them up to this number + 1 tasks. Tasks that the model has
            learnt are all measured.
        seed: of the choice and order of rows and of the pilots' factors.
    """

    pilot_rows: int = 128
    pilot_steps: int = 24
    batch_size: int = 8
    pilot_rank: int = 8
    learning_rate: float = 2e-3
    probe_rows: int = 48
    gradient_rows: int = 64
    max_length: int = 256
    max_candidates: int = 16
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Sample:
    """The rows of a task that the planner looks at.

    Args:
        pilot: tokenised rows to learn from.
        probe: rows to measure on, as given.
        prompts: of the same, token ids, cut at their beginning so that any option fits behind them.
        tokens: the same, tokenised.
        has_options: whether each of them names options, so that losses can be taken over these alone.
        note: what is odd about the data; empty if nothing.
    """

    pilot: list[dict[str, list[int]]]
    probe: list[Row]
    prompts: list[list[int]]
    tokens: list[dict[str, list[int]]]
    has_options: bool
    note: str


def take_sample(task: str, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, settings: ProbeSettings) -> Sample:
    """Chooses rows for the pilot and others to measure on; the same for the same rows and seed.

    Where there are several answers, the rows to measure on have several, too.

    Raises:
        ValueError: rows of another form, or fewer than four with an answer.
    """
    rows = list(rows)
    for row in rows[:1]:
        if "prompt" not in row or "completion" not in row:
            raise ValueError(
                f"The rows of task {task!r} have {', '.join(row)}; planning needs `prompt` and `completion`."
            )
    labelled = [row for row in rows if row["prompt"] and row["completion"] and reference(row)]
    if len(labelled) < 4:
        raise ValueError(
            f"Task {task!r} has {len(labelled)} rows with an answer, of {len(rows)}; a plan needs four or more. Plan "
            "without its folder, and add it to the plan's `hierarchy` by hand: `hft train` takes fewer."
        )
    notes = [f"{len(rows) - len(labelled)} rows without an answer were left out"] if len(labelled) < len(rows) else []
    random.Random(settings.seed).shuffle(labelled)
    num_probe = min(settings.probe_rows, len(labelled) // 2)
    other = next((place for place, row in enumerate(labelled) if reference(row) != reference(labelled[0])), 0)
    if other >= num_probe:  # one answer fills the rows to measure on, and there is another
        labelled[num_probe - 1], labelled[other] = labelled[other], labelled[num_probe - 1]
    probe, pilot = labelled[:num_probe], labelled[num_probe : num_probe + settings.pilot_rows]
    if not other:
        notes.append("all answers are equal: there is nothing to learn but their form")
    elif num_probe < 16:
        notes.append(f"only {num_probe} rows to measure on: errors are large")
    in_probe, in_pilot = ([repr((row["prompt"], reference(row))) for row in its] for its in (probe, pilot))
    if twice := sum(map(set(in_pilot).__contains__, in_probe)):
        notes.append(f"{twice} of the {num_probe} rows to measure on come twice, and the pilot learns from them")
    has_options = all(
        len(row.get("options") or ()) > 1 and reference(row) in row["options"] and "" not in row["options"]
        for row in probe
    )
    return Sample(
        tokenize_rows(pilot, tokenizer, settings.max_length),
        probe,
        [_cut_prompt(row, tokenizer, settings.max_length) for row in probe],
        tokenize_rows(probe, tokenizer, settings.max_length),
        has_options,
        "; ".join(notes),
    )


def _cut_prompt(row: Row, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[int]:
    answers = row.get("options") or [reference(row)]
    ids, found = prompt_and_answers(tokenizer, row["prompt"], answers, **template_arguments(row))
    room = max_length - max(map(len, found))
    return ids[-max(room, 1) :]


@contextlib.contextmanager
def pilot(
    model: PreTrainedModel, rows: Sequence[Mapping[str, Sequence[int]]], settings: ProbeSettings
) -> Iterator[str]:
    """A scratch task that has learnt these rows for a few steps from the plain backbone; it is gone after the block."""
    name, taken = PILOT, [task.lower() for task in (*model.hierarchy.names, *model.config.left_out)]
    while name.lower() in taken:  # names that differ in case only would be one file
        name += "x"
    with forked_rng(model):
        torch.manual_seed(settings.seed)
        model.add_task(name, rank=settings.pilot_rank)
    try:
        model.set_trainable([name])
        factors = [factor for key, factor in model.task_parameters(name).items() if not key.startswith("hft_gates.")]
        optimizer = torch.optim.AdamW(factors, lr=settings.learning_rate, weight_decay=0.0)
        order: list[int] = []
        draw = random.Random(settings.seed)
        for step in range(settings.pilot_steps):
            while len(order) < settings.batch_size:
                order += draw.sample(range(len(rows)), len(rows))
            chosen, order = order[: settings.batch_size], order[settings.batch_size :]
            warm, left = (step + 1) / 3, 1 - step / settings.pilot_steps
            optimizer.param_groups[0]["lr"] = settings.learning_rate * min(1.0, warm, left)
            for factor, its in zip(
                factors, model.loss_gradients(name, [rows[i] for i in chosen], factors), strict=True
            ):
                factor.grad = its
            torch.nn.utils.clip_grad_norm_(factors, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        model.set_trainable([])
        yield name
    finally:
        model.remove_task(name)
