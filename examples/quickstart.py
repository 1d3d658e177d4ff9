"""Two tasks on one frozen backbone, the second on the shoulders of the first.

python examples/quickstart.py
"""

import argparse

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

import hft
from hft.trainers import HFTTrainer, HFTTrainingConfig


def rows(question: str, answer) -> Dataset:
    """Chats about the numbers from 0 to 99."""
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": question.format(n)}],
                "completion": [{"role": "assistant", "content": answer(n)}],
            }
            for n in range(100)
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--out", default="outputs/quickstart")
    parser.add_argument("--max_steps", type=int, default=-1, help="steps a stage; -1: one epoch")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.backbone)
    model = hft.HFTForCausalLM.from_backbone(args.backbone, hierarchy={"parity": [], "two-more": ["parity"]})
    data = {
        "parity": rows("Is {} even?", lambda n: "no" if n % 2 else "yes"),
        "two-more": rows("Is {} plus two even?", lambda n: "no" if n % 2 else "yes"),
    }
    training = HFTTrainingConfig(output_dir=args.out, max_steps=args.max_steps, num_train_epochs=1)
    trainer = HFTTrainer(model, args=training, train_dataset=data, processing_class=tokenizer)
    trainer.train(resume_from_checkpoint=True)  # run again, it goes on where it stopped

    model = AutoModelForCausalLM.from_pretrained(args.out)  # elsewhere, without this package: trust_remote_code=True
    chat = [{"role": "user", "content": "Is 7 plus two even?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    for task in ("backbone", "parity", "two-more"):
        answer = model.generate(**inputs, task=task, max_new_tokens=8, do_sample=False)
        print(f"{task}: {tokenizer.decode(answer[0, inputs['input_ids'].shape[1] :], skip_special_tokens=True)!r}")


if __name__ == "__main__":
    main()
