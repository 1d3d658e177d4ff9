"""The training of `HFTTrainer` as one flat loop: what happens to whom, and when, without abstractions.

    python examples/train_loop.py --backbone HuggingFaceTB/SmolLM2-135M-Instruct --out outputs/loop

It learns sums before products: a toy, to read rather than to run. With the same rows, order and settings the trainer
arrives at the same weights, but for the rounding of sums; a test compares them. The router, which the trainer teaches, too,
is left out: see `model.add_routes`.
"""

import argparse
from operator import add, mul, sub

import torch
from transformers import AutoTokenizer, get_linear_schedule_with_warmup

import hft
from hft.trainers.curriculum import BlockSampler, open_stages
from hft.trainers.row_tokens import tokenize_rows


def toy_rows(task: str, count: int = 64) -> list[dict[str, str]]:
    """Prompts and answers of a task: {"prompt", "completion"}."""
    sign, compute = {"sums": ("+", add), "differences": ("-", sub), "products": ("*", mul)}[task]
    pairs = [(i % 10, i * 7 % 10) for i in range(count)]
    return [{"prompt": f"{a} {sign} {b} =", "completion": f" {compute(a, b)}"} for a, b in pairs]


def collate(rows: list[dict[str, list[int]]], pad: int) -> dict[str, torch.Tensor]:
    """Rows of different lengths [T_i] -> [B, T], padded on the right."""
    length = max(len(row["input_ids"]) for row in rows)

    def padded(key: str, filler: int) -> torch.Tensor:
        return torch.tensor([row[key] + [filler] * (length - len(row[key])) for row in rows])

    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (length - len(row["input_ids"])) for row in rows])
    return {"input_ids": padded("input_ids", pad), "labels": padded("labels", -100), "attention_mask": mask}


def train(
    model: hft.HFTForCausalLM,
    rows: dict[str, list[dict[str, list[int]]]],
    pad: int,
    epochs: int = 1,
    batch_size: int = 4,
    accumulation: int = 1,
    learning_rate: float = 1e-3,
    gate_learning_rate: float = 1e-2,
    max_steps: int | None = None,
    seed: int = 42,
) -> None:
    """Learns all open tasks of a model, bottom-up, and seals them.

    Args:
        model: an HFT model.
        rows: task -> tokenised rows {"input_ids", "labels"}.
        pad: id of the padding token.
        epochs, batch_size, accumulation, learning_rate, gate_learning_rate, max_steps, seed: as in HFTTrainingConfig.
    """
    for stage in open_stages(model.hierarchy, model.config.sealed_tasks()):  # one stage a level
        model.start_stage(stage.tasks)  # they begin as their parents are now, with an empty memory page to share
        gates = [gate for gate in model.hft_gates.parameters() if gate.requires_grad]
        factors = [p for name, p in model.named_parameters() if p.requires_grad and not name.startswith("hft_gates")]
        optimizer = torch.optim.AdamW(
            [{"params": factors, "lr": learning_rate}, {"params": gates, "lr": gate_learning_rate}], weight_decay=0.0
        )
        # A block is one optimizer step; the rows of each of its micro-batches belong to one task.
        num_rows = {task: len(rows[task]) for task in stage.tasks}
        sampler = BlockSampler(
            num_rows, batch_size * accumulation, seed, turns_a_block=accumulation, together=stage.tasks
        )
        stage_rows = [(task, row) for task in stage.tasks for row in rows[task]]
        steps_per_epoch = len(sampler) // sampler.block_size
        steps = epochs * steps_per_epoch if max_steps is None else max_steps
        schedule = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=0, num_training_steps=steps)

        model.train()
        for step in range(steps):
            if step % steps_per_epoch == 0:
                sampler.set_epoch(step // steps_per_epoch)
                order = list(sampler)
            begin = step % steps_per_epoch * sampler.block_size
            block = [stage_rows[i] for i in order[begin : begin + sampler.block_size]]
            total = 0.0
            num_labels = sum(label != -100 for _, row in block for label in row["labels"][1:])
            for i in range(0, len(block), batch_size):
                micro_batch = block[i : i + batch_size]
                (task,) = {task for task, _ in micro_batch}
                batch = collate([row for _, row in micro_batch], pad)
                # Only this task's path is computed, so only it, of all that is trainable, gets a gradient.
                logits = model(batch["input_ids"], attention_mask=batch["attention_mask"], task=task).logits[:, :-1]
                loss = torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1).float(), batch["labels"][:, 1:].flatten(), ignore_index=-100, reduction="sum"
                )
                (loss / num_labels).backward()
                total += loss.item() / num_labels
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            print(f"{stage}  step {step + 1}/{steps}  loss {total:.3f}")
        model.seal(stage.tasks)  # never touched again


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--out", default="outputs/loop")
    parser.add_argument("--max_steps", type=int)
    args = parser.parse_args()
    torch.manual_seed(0)
    hierarchy = {"sums": [], "differences": [], "products": ["sums"]}
    tokenizer = AutoTokenizer.from_pretrained(args.backbone)
    model = hft.HFTForCausalLM.from_backbone(args.backbone, hierarchy)
    rows = {task: tokenize_rows(toy_rows(task), tokenizer) for task in hierarchy}
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    train(model, rows, pad, max_steps=args.max_steps)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(model.hierarchy.draw())
    print(f"saved to {args.out}")


if __name__ == "__main__":
    main()
