"""Training in several processes: what they agree on, and who writes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import FullyShardedDataParallelPlugin, TorchDynamoPlugin, reduce
from transformers import PreTrainedModel, TrainingArguments
from transformers.utils import logging


logger = logging.get_logger(__name__)


class HFTProcesses:
    """The part of `HFTTrainer` that knows of other processes, and of what accelerate would do to the model.

    All processes take the same task in the same micro-batch, since a turn of `BlockSampler` is what they take together.
    What other tasks of the stage own gets no gradient from it, and DDP must look for it (`ddp_find_unused_parameters`);
    a parameter that no process used in a step keeps no gradient, so the optimizer leaves it alone. Where the
    micro-batches of a step are of different tasks (`mixed_steps`), DDP remembers what each of them used, and averages it
    with the last, which therefore is never one of a task that has left by mastery while others learn.

    Under FSDP only the backbone is sharded. Nodes, gates and pages are small, change with each stage, and differ in dtype;
    each process holds them whole, and their gradients are averaged here, before they are clipped.
    """

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        """As the Trainer's, but accelerate compiles nothing: it would make each task's name part of the graph."""
        return {**super()._build_accelerator_args(**kwargs), "dynamo_plugin": TorchDynamoPlugin(backend="no")}

    def create_accelerator_and_postprocess(self) -> None:
        """As the Trainer's; under FSDP, what HFT owns stays out of it."""
        super().create_accelerator_and_postprocess()
        if self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            check_fsdp(plugin)
            model = self.model
            plugin.ignored_modules = [model.hft_nodes, model.hft_memory, model.hft_gates]

    def _place_own(self) -> None:
        """Under FSDP nobody else takes to the device what is not sharded."""
        if self.is_fsdp_enabled:
            for own in (self.model.hft_nodes, self.model.hft_memory, self.model.hft_gates):
                own.to(self.accelerator.device)

    @contextmanager
    def _nothing_is_sharded(self) -> Iterator[None]:
        """What a run saves and resumes from is not: under FSDP, too, the main process alone writes it, as without."""
        is_fsdp_enabled, self.is_fsdp_enabled = self.is_fsdp_enabled, False
        try:
            yield
        finally:
            self.is_fsdp_enabled = is_fsdp_enabled

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        with self._nothing_is_sharded():
            super().save_model(*args, **kwargs)

    def _save_optimizer_and_scheduler(self, *args: Any, **kwargs: Any) -> None:
        with self._nothing_is_sharded():
            super()._save_optimizer_and_scheduler(*args, **kwargs)

    def _load_optimizer_and_scheduler(self, *args: Any, **kwargs: Any) -> None:
        with self._nothing_is_sharded():
            super()._load_optimizer_and_scheduler(*args, **kwargs)

    def _summed(self, *numbers: torch.Tensor) -> list[float]:
        """Each number, summed over all processes."""
        here = [n.detach().float().to(self.accelerator.device) for n in numbers]  # a model may be spread over cards
        return self.accelerator.reduce(torch.stack(here), "sum").tolist()

    def _average_gradients(self) -> None:
        """Once an optimizer step: what DDP does for parameters that FSDP left whole."""
        if self.is_fsdp_enabled and self.accelerator.sync_gradients:
            for parameter in self.model.parameters():
                if parameter.requires_grad and parameter.grad is not None:
                    parameter.grad = reduce(parameter.grad, "mean")


def use_one_gpu(args: TrainingArguments, model: PreTrainedModel) -> None:
    """A process trains on one GPU, or on those that its model is spread over.

    Where it sees several, transformers would wrap the model in `nn.DataParallel`, whose copies have no parameters of the
    names that HFT looks for.
    """
    if args.n_gpu > 1 and len(set((getattr(model, "hf_device_map", None) or {}).values())) < 2:
        logger.warning(
            f"This process sees {args.n_gpu} GPUs and trains on one; start it with `accelerate launch` to use all of them."
        )
        args._n_gpu = 1


def check_fsdp(plugin: FullyShardedDataParallelPlugin) -> None:
    """Raises ValueError for ways of FSDP in which HFT's own parameters would come out wrong."""
    if plugin.fsdp_version != 2:
        raise ValueError("HFT trains under FSDP version 2 only; set `fsdp_version: 2` in accelerate's configuration.")
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "`fsdp_cpu_ram_efficient_loading` loads weights in one process only, and HFT's own are not sent on to the "
            "others; set it to false in accelerate's configuration."
        )
