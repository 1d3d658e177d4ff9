"""A shelf of plain PEFT LoRAs becomes one model that knows which of them it is asked.

    python examples/shelf_of_loras.py

It first makes three small LoRAs, as others would have trained them; then it imports them, and asks without naming one.
"""

import argparse
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import hft


WORDS = ("apple", "river", "stone", "cloud", "mouse", "bread", "green", "house", "light", "music", "ocean", "paper")
SHELF = {
    "shout": ("Shout this word: {}", str.upper),
    "spell": ("Spell this word letter by letter: {}", "-".join),
    "count": ("How many letters has the word {}?", lambda word: str(len(word))),
}


def rows(task: str) -> list[dict[str, str]]:
    """Prompts and answers of one of the three."""
    question, answer = SHELF[task]
    pairs = [(one, other) for one in WORDS for other in WORDS[:4]]
    return [{"prompt": question.format(one + other), "completion": f" {answer(one + other)}"} for one, other in pairs]


def train_lora(task: str, backbone: str, folder: Path, max_steps: int) -> None:
    """As anyone trains a LoRA with TRL and PEFT; HFT has no part in it."""
    config = SFTConfig(output_dir=str(folder / "run"), max_steps=max_steps, learning_rate=2e-3, report_to="none",
                       save_strategy="no", use_cpu=True, per_device_train_batch_size=8)  # fmt: skip
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SFTTrainer(backbone, config, train_dataset=Dataset.from_list(rows(task)), peft_config=lora)
    trainer.train()
    trainer.model.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--out", type=Path, default=Path("outputs/shelf"))
    parser.add_argument("--max_steps", type=int, default=12, help="steps of each LoRA")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.backbone)
    model = hft.HFTForCausalLM.from_backbone(args.backbone)  # no tasks yet
    for task in SHELF:
        train_lora(task, args.backbone, args.out / task, args.max_steps)
        prompts = [tokenizer(row["prompt"])["input_ids"] for row in rows(task)]
        model.import_lora(task, args.out / task, prompts=prompts)
    model.save_pretrained(args.out / "model")
    tokenizer.save_pretrained(args.out / "model")

    model = AutoModelForCausalLM.from_pretrained(args.out / "model").eval()
    for prompt in (*(question.format("snowflake") for question, _ in SHELF.values()), "Who wrote Hamlet?"):
        inputs = tokenizer(prompt, return_tensors="pt")
        answer, (route,) = model.generate(**inputs, max_new_tokens=16, do_sample=False, return_route=True)
        text = tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        print(f"{prompt!r} -> {route.task} ({route.reason}): {text.splitlines()[0] if text else ''!r}")


if __name__ == "__main__":
    main()
