"""Does the router know which of fourteen tasks it is asked, and when it is asked something else?

    python examples/benchmarks/routing.py --data DIR [--split test]

No training: the router's sums from 256 training prompts a task. Three forms of prompt: instructions as they are; one shared
instruction a family; instructions and option lists stripped. General prompts, which belong to none of the tasks, should go
to the backbone. Choices (layer, features, ridge) were made on validation rows with `--grid`; `--split test` is the result,
with general prompts of its own.
"""

import itertools
from collections import Counter

import torch
from datasets import load_dataset
from harness import cell, parser, prepare, todo
from hft_methods import CL14

import hft
from hft.router_hft import HFTRouter
from hft.trainers.compute_dtype import device_here
from hft.trainers.routes import template_tokens


FAMILIES = {
    "What do people think?": ("sst2", "imdb", "amazon", "yelp"),
    "How do the sentences relate?": ("cb", "rte", "mnli"),
    "Compare the two.": ("qqp", "wic", "copa"),
    "Answer from the passage.": ("boolq", "multirc"),
    "What is it about?": ("agnews", "dbpedia"),
}
SHARED = {task: sentence for sentence, tasks in FAMILIES.items() for task in tasks}
FORMS = ("as they are", "shared", "stripped")
# What people ask a chat model for besides: for each split in words of its own, and with reasoning-gym families of its own.
TOPICS = {
    "validation": (
        "the French Revolution", "black holes", "sourdough bread", "a broken bicycle chain", "jazz", "my sister's wedding",
        "Python decorators", "tax returns", "the city of Lisbon", "sleep", "a job interview", "tomatoes",
    ),
    "test": (
        "the Silk Road", "volcanoes", "growing basil", "a leaking tap", "chess openings", "a farewell party",
        "SQL joins", "renting a flat", "the coast of Norway", "headaches", "learning Spanish", "old cameras",
    ),
}  # fmt: skip
ASKS = {
    "validation": (
        "Tell me about {}.", "Write a short poem about {}.", "Give me five tips on {}.", "Explain {} to a child.",
        "I have a question concerning {}: where do I start?", "Draft an e-mail about {} to a colleague.",
    ),
    "test": (
        "What should I know about {}?", "Make a quiz with three questions on {}.", "Could you recommend a book on {}?",
        "Why do people care about {}?", "Help me plan a talk on {}, ten minutes long.", "Tell a joke about {}.",
    ),
}  # fmt: skip
GAMES = {
    "validation": ("chain_sum", "leg_counting", "family_relationships", "calendar_arithmetic", "word_sorting", "gcd"),
    "test": ("basic_arithmetic", "letter_counting", "number_sorting", "time_intervals", "spell_backward", "lcm"),
}


def general_prompts(split: str) -> list[str]:
    """Prompts of no task: 72 small requests, and questions of reasoning-gym families where it is installed."""
    prompts = [ask.format(topic) for ask, topic in itertools.product(ASKS[split], TOPICS[split])]
    try:
        import reasoning_gym
    except ImportError:
        return prompts
    for family in GAMES[split]:
        prompts += [entry["question"] for entry in reasoning_gym.create_dataset(family, size=12, seed=5)]
    return prompts


def question(row: dict, task: str, form: str) -> str:
    """A row's prompt in one of the forms."""
    if form == "stripped":
        return row["input"].strip()
    instruction = row["instruction"] if form == "as they are" else SHARED[task]
    return f"{instruction}\nOptions: {', '.join(row['options'])}\n{row['input'].strip()}".lstrip()


def main() -> None:
    arguments = parser(__doc__.splitlines()[0], "routing.jsonl")
    arguments.add_argument("--split", default="validation", choices=["validation", "test"])
    arguments.add_argument("--grid", action="store_true", help="try layers, features and ridges (validation only)")
    args = arguments.parse_args()
    backbone, tokenizer = prepare(args.backbone)
    prefix, suffix = template_tokens(tokenizer)

    def encode(text: str) -> list[int]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][-160:]
        return [*prefix, *ids, *suffix]

    rows = {}
    for task, split in itertools.product(CL14, ("train", args.split)):
        dataset = load_dataset("json", data_files=f"{args.data}/{task}/{split}.jsonl.gz", split="train").shuffle(
            seed=0
        )
        rows[task, split] = list(dataset.select(range(min(len(dataset), 256 if split == "train" else 200))))
    general = [encode(text) for text in general_prompts(args.split)]

    model = hft.HFTForCausalLM.from_backbone(
        backbone, CL14, dtype=torch.bfloat16, rank=1, router_config={"prefix": prefix, "suffix": suffix}
    ).to(device_here())

    def features(form: str) -> dict[str, torch.Tensor]:
        found = {}
        for task, split in rows:
            found[task, split] = model.features_of([encode(question(row, task, form)) for row in rows[task, split]])
        return {**found, "general": model.features_of(general)}

    def run(found: dict, **config) -> dict:
        shape = model.config.text_config
        router = HFTRouter(hft.HFTRouterConfig(**config), shape.hidden_size, shape.num_hidden_layers)
        for task in CL14:
            learnt = found[task, "train"]
            place = torch.arange(len(learnt))
            router.add(task, learnt[place % 4 != 0], learnt[place % 4 == 0])
        confusion, right, first, total = {}, {}, 0, 0
        for task in CL14:
            decisions = router.route(found[task, args.split], model.hierarchy)
            confusion[task] = dict(Counter(route.task for route in decisions).most_common())
            right[task] = round(100 * confusion[task].get(task, 0) / len(decisions), 2)
            best = [route.names[max(range(len(CL14)), key=route.probabilities.__getitem__)] for route in decisions]
            first, total = first + sum(name == task for name in best), total + len(best)
        strange = router.route(found["general"], model.hierarchy)
        return {
            "value": round(sum(right.values()) / len(right), 3),
            "likeliest": round(100 * first / total, 3),
            "false_activation": round(100 * sum(route.task != "backbone" for route in strange) / len(strange), 3),
            "tasks": right,
            "confusion": confusion,
            "general": dict(Counter(route.task for route in strange).most_common()),
            "layer": model.hft_router.layer,
        }

    if args.grid:
        for layer in (1, 2, 3, 5):
            model.hft_router.layer = layer
            found = {form: features(form) for form in FORMS}
            for num_features, ridge in itertools.product((256, 512, 1024), (1e-4, 1e-3, 1e-2)):
                results = [run(found[form], num_features=num_features, ridge=ridge) for form in FORMS]
                print(layer, num_features, ridge,
                      [(r["value"], r["likeliest"], r["false_activation"]) for r in results], flush=True)  # fmt: skip
        return
    for form, seed in todo(args.out, f"routing-{args.split}", list(FORMS), 1):
        with cell(args.out, f"routing-{args.split}", form, seed) as result:
            result.update(run(features(form)))


if __name__ == "__main__":
    main()
