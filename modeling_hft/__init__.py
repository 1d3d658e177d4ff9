"""Hierarchical Fine-Tuning: many tasks on one frozen backbone, learnt bottom-up, none forgotten."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_hft import HFTConfig, HFTGatingConfig, HFTMemoryConfig, HFTRouterConfig
from .gates_hft import HFTGates, HFTGateTable
from .hierarchy_hft import Hierarchy
from .lora_io_hft import export_lora
from .memory_hft import HFTMemory
from .modeling_hft import HFTForCausalLM, HFTModel, HFTPreTrainedModel
from .nodes_hft import HFTNodes
from .refresh_hft import HFTRefresh
from .router_hft import HFTRoute, HFTRouter
from .slim_hft import read_gates
from .trimmed_hft import HFTTrim


__version__ = "0.1.0"

__all__ = [
    "HFTConfig",
    "HFTForCausalLM",
    "HFTGateTable",
    "HFTGates",
    "HFTGatingConfig",
    "HFTMemory",
    "HFTMemoryConfig",
    "HFTModel",
    "HFTNodes",
    "HFTPreTrainedModel",
    "HFTRefresh",
    "HFTRoute",
    "HFTRouter",
    "HFTRouterConfig",
    "HFTTrim",
    "Hierarchy",
    "export_lora",
    "read_gates",
]

HFTConfig._auto_class = "AutoConfig"
AutoConfig.register("hft", HFTConfig)
AutoModel.register(HFTConfig, HFTModel)
AutoModelForCausalLM.register(HFTConfig, HFTForCausalLM)
