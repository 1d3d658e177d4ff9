"""A plan as text, as a picture's numbers, and as a recipe that `hft train` takes and a person edits."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from hft.hierarchy_hft import BACKBONE

from .planner import Plan
from .recipes import Recipe


# What a plan of a plain folder of data trains with; a recipe given to `hft plan` takes its place.
DEFAULTS: dict[str, Any] = {
    "backbone": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "max_input_tokens": 128,
    "model": {"rank": 16, "target_modules": "all-linear"},
    "quantization": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_use_double_quant": True,
    },
    "training": {
        "output_dir": "outputs/planned",
        "num_train_epochs": 2,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "gate_learning_rate": 1e-2,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.1,  # of a stage's
        "max_length": 256,
        "gradient_checkpointing": False,
        "logging_steps": 10,
        "save_strategy": "steps",
        "save_steps": 25,
        "save_total_limit": 1,
    },
}


SHOWN_OVERLAPS = 5


def reasons(plan: Plan, task: str) -> list[str]:
    """Why a task stands where it does: its complexity, its family, its parents, and the parents that were not taken."""
    if task in plan.families:
        return [_root(plan, task)]
    probe = plan.probes[task]
    lines = [f"complexity {probe.complexity:.2f} ± {probe.complexity_error:.2f}{_behind(probe.note)}"]
    if alike := plan.overlaps.nearest(task) if plan.overlaps is not None else []:
        shown = [f"{other} {overlap:+.2f} ± {error:.2f}" for other, overlap, error in alike[:SHOWN_OVERLAPS]]
        more = ", ..." if len(alike) > SHOWN_OVERLAPS else ""
        lines.append(f"overlap of gradients (1: the same, 0 or less: unrelated): {', '.join(shown)}{more}")
    elif plan.overlaps is not None and len(plan.probes) > 1:
        its = "too few rows, one answer only, or not finite"
        why = f"of the others: {its}" if task in plan.overlaps.of else its
        lines.append(f"overlap of gradients: not measured ({why})")
    edges = plan.edges_of(task)
    if family := [up for up in plan.parents[task] if up in plan.families]:
        lines.append(f"on {family[0]}, which learns from it, too; other parents are not considered")
    elif not any(edge.taken for edge in edges):
        lines.append("a root: nothing that was measured helps it" if edges else "a root: there is no other task")
    return lines + [f"{'on ' if edge.taken else 'not '}{edge}" for edge in edges]


def _root(plan: Plan, root: str) -> str:
    trial = plan.trial(root)
    text = f"learns from the rows of {', '.join(plan.families[root])}"
    if trial.family != trial.tasks:
        return f"{text}, of whom none clearly loses by it (see `no root for`)"
    return f"{text}: {trial}{', which may be chance; in doubt tasks share' if not trial.excess <= 0 else ''}"


def _not_taken(plan: Plan) -> list[str]:
    """The roots that were tried and are not worth it."""
    return [
        f"no root for {', '.join(trial.tasks)} together: {trial}"
        + (f"; too much for {', '.join(sorted({*trial.tasks} - {*trial.family}))}" if trial.family else "")
        for trial in plan.trials
        if trial.family != trial.tasks
    ]


def _behind(note: str) -> str:
    return f"; {note}" if note else ""


def as_text(plan: Plan) -> str:
    """The tree, with complexities and how much of the loss a first parent takes away; then the reasons."""
    hierarchy = plan.hierarchy()
    notes = {root: _root(plan, root) for root in plan.families}
    for task, probe in plan.probes.items():
        notes[task] = f"complexity {probe.complexity:.2f} ± {probe.complexity_error:.2f}"
        if parents := plan.parents[task]:
            notes[task] += f"; {parents[0]} takes away {100 * plan.share(task, parents[0]):.0f} % of its loss"
    lines = [
        hierarchy.draw(notes),
        "",
        "Why (in brackets: fall of the loss through the other's pilot, nats an answer):",
        *_not_taken(plan),
    ]
    for task in hierarchy.names:
        if task in plan.probes:
            lines += [f"{task}: {reasons(plan, task)[0]}", *(f"    {line}" for line in reasons(plan, task)[1:])]
    return "\n".join(lines)


def as_recipe(plan: Plan, recipe: Recipe, estimates: Sequence[str] = ()) -> str:
    """A recipe in YAML with the plan's hierarchy, the reasons as comments.

    Args:
        plan: the hierarchy.
        recipe: everything else.
        estimates: lines for the head of the file.
    """
    lines = ["# A plan by `hft plan`. Edit it: parents stand in brackets, [] is a root. Then: hft train THIS_FILE"]
    lines += [f"# {line}".rstrip() for line in estimates]
    keys = (
        "from_model",
        "backbone",
        "data",
        "train_samples",
        "eval_samples",
        "stage_eval_samples",
        "max_input_tokens",
        "max_new_tokens",
        "metric",
    )
    values = {key: value for key in keys if (value := getattr(recipe, key)) not in (None, "exact_match")}
    lines += [_dump(values), "hierarchy:"]
    for line in _not_taken(plan):
        lines += textwrap.wrap(line, 116, initial_indent="  # ", subsequent_indent="  #   ")
    for task in plan.hierarchy().names:
        if task not in plan.probes and task not in plan.families:
            continue  # the model's own
        for line in reasons(plan, task):
            lines += textwrap.wrap(line, 116, initial_indent="  # ", subsequent_indent="  #   ")
        lines.append(f"  {_inline({task: plan.parents[task]})}")
    if plan.families:
        lines += [
            "",
            "# A family's root learns from the rows of all its tasks, for `root_share` of each epoch; then they refine",
            "# that, each by itself, at `refining_rate` of the learning rate. Who leaves a family leaves it here, too.",
        ]
        lines += ["mixtures:", *(f"  {_inline({root: its})}" for root, its in plan.families.items())]
        lines += [f"root_share: {recipe.root_share:.4g}", f"refining_rate: {recipe.refining_rate:.4g}"]
    for section in (recipe.model, recipe.quantization, recipe.training):
        if section:
            lines += ["", _dump(section)]
    if recipe.datasets and recipe.data is None:
        lines += ["", _dump({"datasets": recipe.datasets})]
    return "\n".join(lines) + "\n"


def _dump(values: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True).rstrip()


def _inline(entry: dict[str, list[str]]) -> str:
    """`task: [parent, parent]`, names quoted where YAML needs it."""
    text = yaml.safe_dump(entry, default_flow_style=True, width=10**6).strip()
    return text[1:-1]


def summary_of(plan: Plan, task: str) -> str:
    """One new task: which parents, and the line of Python that adds it."""
    parents = plan.parents[task]
    why = "; ".join(str(edge) for edge in plan.edges_of(task) if edge.taken)
    return (
        f"{task} should stand on {', '.join(parents) or f'the {BACKBONE} alone'}{_behind(why)}.\n"
        f"In Python: model.add_task({task!r}, parents={parents})"
    )
