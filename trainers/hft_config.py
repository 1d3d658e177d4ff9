"""The arguments of `HFTTrainer`."""

from dataclasses import dataclass, field

from torch import accelerator
from trl import SFTConfig


@dataclass
class HFTTrainingConfig(SFTConfig):
    """TRL's `SFTConfig` with what a hierarchy adds. Where nothing else is said, a number counts for one stage.

    Unlike `SFTConfig`, it picks the CPU by itself where there is no accelerator, and its learning rate suits low-rank nodes
    with scaling 1 rather than whole models.

    Args:
        learning_rate: of the nodes.
        gate_learning_rate: of the gates. They are single numbers near 1, so they take larger steps than the nodes.
        num_train_epochs, max_steps: of one stage.
        per_device_train_batch_size: rows of one micro-batch; they always belong to one task, and so do all micro-batches
            of an optimizer step.
    """

    learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of the nodes."})
    gate_learning_rate: float = field(default=1e-2, metadata={"help": "Learning rate of the gates."})

    def __post_init__(self):
        if not accelerator.is_available():
            self.use_cpu = True
        if self.train_sampling_strategy != "random":
            raise ValueError(
                f"`train_sampling_strategy` is {self.train_sampling_strategy!r}, but a micro-batch must hold one task, so "
                "HFT orders the rows itself; leave it at 'random'."
            )
        if self.activation_checkpointing is None:  # TRL still sets the field's old name, of which transformers warns
            self.activation_checkpointing = self.gradient_checkpointing
        if self.load_best_model_at_end:
            raise ValueError(
                "`load_best_model_at_end` is not supported: each stage evaluates other tasks, so no one metric "
                "could choose for all of them."
            )
        super().__post_init__()
