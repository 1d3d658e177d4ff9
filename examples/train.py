"""A training script in TRL's style: arguments from a YAML file, from the command line, or both.

    python examples/train.py --backbone HuggingFaceTB/SmolLM2-135M-Instruct \
        --hierarchy '{"sst2": [], "yelp": ["sst2"]}' --files '{"sst2": "sst2.jsonl", "yelp": "yelp.jsonl"}' \
        --load_in_4bit true --output_dir outputs/mine --num_train_epochs 2

Each file holds rows that TRL takes: {"prompt", "completion"}, {"messages"} or {"text"}. Tasks on a root that learns from the
rows of all: `--hierarchy '{"all": [], "sst2": ["all"], "yelp": ["all"]}' --mixtures '{"all": ["sst2", "yelp"]}'`.
The same keys in a file: `python examples/train.py --config mine.yaml`.
"""

import json
from dataclasses import dataclass, field

from datasets import load_dataset
from transformers import AutoTokenizer, BitsAndBytesConfig
from trl import TrlParser

import hft
from hft.trainers import HFTTrainer, HFTTrainingConfig


@dataclass
class ModelArguments:
    """What to train on what."""

    backbone: str = field(metadata={"help": "Hub id or folder of a decoder."})
    hierarchy: str = field(metadata={"help": 'JSON: task -> parents, {"sst2": [], "yelp": ["sst2"]}'})
    files: str = field(metadata={"help": "JSON: task -> a JSON-lines file, or a pattern of them."})
    rank: int = field(default=16, metadata={"help": "Rank of a task's node."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Hold the backbone in NF4 (QLoRA)."})
    bnb_4bit_quant_storage: str = field(default="uint8", metadata={"help": "bfloat16, to shard it under FSDP."})


def main() -> None:
    parser = TrlParser((ModelArguments, HFTTrainingConfig))
    arguments, training = parser.parse_args_and_config()
    hierarchy, files = (
        json.loads(given) if isinstance(given, str) else given for given in (arguments.hierarchy, arguments.files)
    )

    tokenizer = AutoTokenizer.from_pretrained(arguments.backbone)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype="bfloat16",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_storage=arguments.bnb_4bit_quant_storage,
    )
    model = hft.HFTForCausalLM.from_backbone(
        arguments.backbone,
        hierarchy,
        rank=arguments.rank,
        quantization_config=nf4 if arguments.load_in_4bit else None,
    )
    trainer = HFTTrainer(
        model,
        training,
        train_dataset={task: load_dataset("json", data_files=file, split="train") for task, file in files.items()},
        processing_class=tokenizer,
    )
    resume = training.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if str(resume).lower() == "true" else resume)  # or a folder
    trainer.create_model_card()
    if training.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    main()
