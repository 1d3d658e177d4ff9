"""Does the planner find a good hierarchy? The seven cl14 tasks of the ablation.

    python examples/benchmarks/planner.py --data DIR             # goes on where an earlier run stopped

measures: complexities and gains of all pairs by several measures side by side, and the planner's hierarchy.
alone, PARENT>CHILD: the truth: the child's accuracy with 200 rows and three epochs, without and with a parent trained so,
too. `alone` also says how many steps and which rank the task really needs.
words: the overlaps of gradients again, with two tasks three times: as they are, with other words as answers, and with the
answers exchanged.
families: the same with the roots that the planner finds, which learn from the rows of all tasks on them, and share their
steps.
estimate: what `hft plan` promises for a training against what happens, each in a process of its own.
fourteen: the seconds of a plan of all fourteen tasks.
six: the plan of the six tasks of quality.py, from the same rows.
"""

import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from ablation import EVAL_ROWS, MAX_INPUT_TOKENS, SAMPLES, TRAINING, TREE
from harness import (
    NF4,
    cell,
    find_cell,
    mean_accuracy,
    new_model,
    parser,
    peak_bytes,
    prepare,
    read_tasks,
    reset_peak,
    sample,
    score,
    todo,
    train_hft,
    with_roots,
)
from hft_methods import CL14
from planner_measures import by_pair, exchanged, in_other_words, measure_all, of_plan, overlaps_between
from quality import BUDGETS, FAMILY, read_shuffled
from transformers import TrainerCallback

from hft.trainers import plan_hierarchy
from hft.trainers.overlap import answer_of
from hft.trainers.pilots import ProbeSettings
from hft.trainers.plan_costs import plan_costs
from hft.trainers.planner import Plan, TaskProbe
from hft.trainers.recipes import Recipe
from hft.trainers.row_tokens import tokenize_rows


# Related and unrelated, easy and hard, both ways round.
PAIRS = [
    ("sst2", "yelp"), ("yelp", "amazon"), ("amazon", "yelp"), ("yelp", "sst2"), ("agnews", "yelp"), ("rte", "amazon"),
    ("rte", "cb"), ("mnli", "cb"), ("cb", "rte"), ("sst2", "cb"), ("agnews", "rte"), ("mnli", "agnews"),
]  # fmt: skip
CHILDREN = list(dict.fromkeys(child for _, child in PAIRS))
TRUTH = {**TRAINING, "num_train_epochs": 3}
LOSSES = {"eval_strategy": "steps", "eval_steps": 5, "eval_on_start": True, "per_device_eval_batch_size": 32}
RANK_TOLERANCE = 0.01  # nats a token
WORDS = {
    "amazon": {
        "very negative": "awful", "very positive": "superb", "negative": "poor", "neutral": "fine", "positive": "nice"
    },
    "rte": {"entailment": "yes", "contradiction": "no"},
}  # fmt: skip
EXCHANGED = {
    "amazon": {
        "very negative": "very positive", "very positive": "very negative", "negative": "positive", "positive": "negative"
    },
    "rte": {"entailment": "contradiction", "contradiction": "entailment"},
}  # fmt: skip
ESTIMATED = {  # setting -> the hierarchy, its families, and how its model differs
    "estimate": ({"sst2": [], "agnews": [], "yelp": ["sst2"]}, {}, {}),
    "estimate: rank 32": ({"agnews": [], "amazon": []}, {}, {"rank": 32, "memory_config": {"read": "off"}}),
    "estimate: family": (
        {"stars": [], "agnews": [], "yelp": ["stars"], "amazon": ["stars"]},
        {"stars": ["yelp", "amazon"]},
        {},
    ),
}


class Curve(TrainerCallback):
    """The validation loss by step."""

    def __init__(self, task: str):
        self.task = task
        self.losses: dict[int, float] = {}

    def on_evaluate(self, args, state, control, *, metrics, **kwargs):
        self.losses[state.global_step] = round(metrics[f"eval_{self.task}_loss"], 4)


def steps_needed(losses: Mapping[int, float], guess: float) -> int:
    """The first step after which no more than a tenth is left of what can be learnt beyond a guess; else the last.

    Args:
        losses: step -> nats a token.
        guess: of one who knows how often each answer comes, and nothing else. Most of a curve's fall is down to there.
    """
    lowest = min(losses.values())
    enough = lowest + max(0.0, guess - lowest) / 10
    return min(step for step, loss in losses.items() if loss <= enough) if lowest < guess else max(losses)


def guessing_loss(rows: Sequence[Mapping[str, Sequence[int]]]) -> float:
    """Nats a token of answers drawn as often as each comes among tokenised rows."""
    answers = [answer_of(row) for row in rows]
    surprise = [math.log(len(answers) / answers.count(answer)) for answer in answers]
    return sum(surprise) / sum(map(len, answers))


def learn_alone(
    backbone: str, tokenizer, task: str, rows: list[dict], validation: list[dict], seed: int
) -> tuple[dict, dict]:
    """A task's scores where it stands on nothing, and what it needs: steps, and rank."""
    checks, curve = sample(validation, 64, 0), Curve(task)
    model = train_hft(
        backbone, tokenizer, {task: []}, {task: sample(rows, SAMPLES, seed)}, seed, {**TRUTH, **LOSSES},
        validation={task: checks}, callbacks=[curve],
    )  # fmt: skip
    tasks = score(model, tokenizer, {task: validation}, lambda task: task)
    model.config.task(task)["sealed"] = False  # to be cut; the scores are of the whole node
    tokens = tokenize_rows(checks, tokenizer, TRAINING["max_length"])
    trim, guess = model.trim(task, tokens, RANK_TOLERANCE), round(guessing_loss(tokens), 4)
    need = {"steps": steps_needed(curve.losses, guess), "rank": trim.rank, "guess": guess, "losses": curve.losses}
    return tasks, need


def estimate(command: list[str]) -> dict:
    """What was promised, what happened, and the relative errors."""
    promised, real = (
        json.loads(
            subprocess.run(
                [*command, "--child", what], capture_output=True, text=True, check=True
            ).stdout.splitlines()[-1]
        )
        for what in ("promise", "train")
    )
    errors = {key: round(promised[key] / real[key] - 1, 4) for key in real}
    return {"value": errors["seconds"], "errors": errors, "promised": promised, "real": real}


def child(what: str, setting: str, backbone: str, tokenizer, rows: dict[str, list[dict]]) -> None:
    """Prints seconds and peak bytes of a training, promised or measured; the bytes of libraries are measured."""
    libraries, (tree, families, options) = peak_bytes(), ESTIMATED[setting]
    data = {task: sample(rows[task], SAMPLES, 0) for task in tree if task not in families}
    if what == "train":
        data, training = with_roots(data, families, TRAINING)
        reset_peak()
        begin = time.perf_counter()
        train_hft(backbone, tokenizer, tree, data, 0, training, attn_implementation="auto", **options)
        print(json.dumps({"seconds": time.perf_counter() - begin, "bytes": peak_bytes()}))
        return
    with tempfile.TemporaryDirectory() as folder:
        training = {**TRAINING, "gradient_checkpointing": False, "output_dir": folder}
        recipe = Recipe(backbone=backbone, hierarchy=tree, quantization=NF4, training=training, model=options)
        probes = {task: TaskProbe(1.0, 0.1, {"backbone": [1.0] * 9}) for task in data}
        begin = time.perf_counter()
        model = new_model(backbone, {}, attn_implementation="auto", **options)
        loading = time.perf_counter() - begin
        costs = plan_costs(Plan(tree, probes, (), families), recipe, model, data, tokenizer)
    seconds = costs.total_seconds() + loading
    print(json.dumps({"seconds": seconds, "bytes": costs.memory.total + libraries}))


def main() -> None:
    arguments = parser(__doc__.splitlines()[0], "planner.jsonl")
    pairs = [f"{parent}>{child}" for parent, child in PAIRS]
    alone = [f"alone: {task}" for task in CHILDREN]
    settings = ["measures", "words", *alone, *pairs, "families", *ESTIMATED, "fourteen", "six"]
    arguments.add_argument("--settings", default=",".join(settings), help="which of them, by commas")
    arguments.add_argument("--child", choices=["promise", "train"], help="a process of an `estimate`")
    args = arguments.parse_args()
    backbone, tokenizer = prepare(args.backbone)
    needed = TREE if "fourteen" not in args.settings or args.child else CL14
    rows, validation = read_tasks(args.data, needed, tokenizer, MAX_INPUT_TOKENS, EVAL_ROWS)
    if args.child is not None:
        child(args.child, args.settings, backbone, tokenizer, rows)
        return
    for setting, seed in todo(args.out, "planner", args.settings.split(","), args.seeds):
        if seed and setting in (*ESTIMATED, "fourteen"):
            continue
        plan = plan_in(args.out)
        if setting == "families" and not plan["families"]:
            print(f"{setting}, seed {seed}: needs the cell `measures` with seed 0 first, and families in it")
            continue
        with cell(args.out, "planner", setting, seed) as result:
            settings = ProbeSettings(max_length=TRAINING["max_length"], seed=seed)
            if setting == "measures":
                found = measure_all(new_model(backbone, {}), tokenizer, {task: rows[task] for task in TREE}, settings)
                result.update(value=sum(map(len, found["hierarchy"].values())), **found)
            elif setting == "words":
                its = {task: rows[task] for task in TREE}
                its |= {f"{task}, other words": in_other_words(rows[task], words) for task, words in WORDS.items()}
                its |= {f"{task}, exchanged": exchanged(rows[task], words) for task, words in EXCHANGED.items()}
                found = by_pair(overlaps_between(new_model(backbone, {}), tokenizer, its, settings))
                result.update(value=len(found) // 2, overlaps=found)
            elif setting == "fourteen":
                model, data = new_model(backbone, {}), {task: rows[task] for task in CL14}
                begin = time.perf_counter()
                found = plan_hierarchy(model, data, processing_class=tokenizer, settings=settings, progress=False)
                seconds = round(time.perf_counter() - begin, 1)
                result.update(value=seconds, **of_plan(found), threads=torch.get_num_threads())
            elif setting == "six":
                its = {task: read_shuffled(args.data, task, "train", tokenizer, BUDGETS["small"]) for task in FAMILY}
                data = {task: sample(its[task], SAMPLES, seed, with_options=True) for task in FAMILY}
                model = new_model(backbone, {})
                found = plan_hierarchy(model, data, processing_class=tokenizer, settings=settings, progress=False)
                result.update(value=len(found.families), **of_plan(found))
            elif setting in ESTIMATED:
                command = [
                    sys.executable,
                    __file__,
                    "--data",
                    args.data,
                    "--backbone",
                    backbone,
                    "--settings",
                    setting,
                ]
                result.update(estimate(command))
            elif setting.startswith("alone: "):
                task = setting.removeprefix("alone: ")
                tasks, need = learn_alone(backbone, tokenizer, task, rows[task], validation[task], seed)
                result.update(value=mean_accuracy(tasks), tasks=tasks, need=need)
            else:
                families = plan["families"] if setting == "families" else {}
                tree = truth_tree(setting, families)
                train = {task: sample(rows[task], SAMPLES, seed) for task in tree if task not in families}
                train, training = with_roots(train, families, TRUTH)
                model = train_hft(backbone, tokenizer, tree, train, seed, training, work=result.work)
                children = {task: validation[task] for task, parents in tree.items() if parents}
                tasks = score(model, tokenizer, children, lambda task: task, work=result.work)
                result.update(value=mean_accuracy(tasks), tasks=tasks, hierarchy=tree)


def truth_tree(setting: str, families: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Roots and the tasks on them: of all families, or PARENT>CHILD."""
    if setting != "families":
        parent, _, its_child = setting.partition(">")
        return {parent: [], its_child: [parent]}
    return {**{root: [] for root in families}, **{task: [root] for root in families for task in families[root]}}


def plan_in(out: Path) -> dict:
    """The cell of `measures` with seed 0, whose hierarchy is the planner's; one without families if it is not there yet."""
    return find_cell(out, "planner", "measures") or {"families": {}}


if __name__ == "__main__":
    main()
