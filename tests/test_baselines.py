"""The benchmarks' baselines of one LoRA are what a user of TRL and PEFT would run: the same losses, the same bits."""

import re
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig
from transformers import AutoModelForCausalLM, set_seed
from trl import SFTConfig, SFTTrainer

from .test_same_as_plain import NF4, row_for
from .tiny import bits


sys.path.insert(0, str(Path(__file__).parent.parent / "examples/benchmarks"))

import baselines


SEED, RANK = 3, 4
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TRAINING = {"max_steps": 5, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "lr_scheduler_type": "linear",
            "warmup_steps": 2, "max_length": 32}  # fmt: skip


def plain(backbone: Path, tokenizer, folder: Path, rows: Dataset):
    """The model that TRL's trainer makes of a backbone in NF4 and a `LoraConfig`."""
    set_seed(SEED)
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(
            backbone, quantization_config=NF4, attn_implementation=baselines.attention()
        ),
        SFTConfig(
            str(folder), seed=SEED, use_cpu=not torch.accelerator.is_available(), gradient_checkpointing=False,
            save_strategy="no", disable_tqdm=True, report_to="none", **TRAINING,
        ),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LINEARS, task_type="CAUSAL_LM"),
    )  # fmt: skip
    trainer.train()
    return trainer.model


@pytest.mark.parametrize(("method", "tasks"), [("joint", ["a", "b"]), ("sequential", ["a"])])
def test_a_baseline_is_trls_own_training(backbones, tokenizer, tmp_path, quantizable, capsys, method, tasks):
    """`joint` on the rows of all tasks, `sequential` on those of its first one."""
    train = {task: Dataset.from_list([row_for(task, i) for i in range(12)]) for task in tasks}

    def loss_and_lora(model) -> tuple[list[str], dict[str, bytes]]:
        """The mean loss that was printed in the end, and what was learnt."""
        loss = re.findall(r"'train_loss': '([\d.]+)'", capsys.readouterr().out)
        return loss, {name: bits(p) for name, p in model.named_parameters() if "lora_" in name}

    setup = baselines.Setup(str(backbones["llama"]), tokenizer, tasks, train, {}, RANK, TRAINING, SEED)
    found = loss_and_lora(baselines.METHODS[method](setup).model_of("a"))
    rows = concatenate_datasets([train[task] for task in tasks])
    expected = loss_and_lora(plain(backbones["llama"], tokenizer, tmp_path, rows))
    assert found == expected
    assert len(found[0]) == 1 and len(found[1]) == 2 * 14
