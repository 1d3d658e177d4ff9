"""Training HFT models with TRL."""

from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .hft_config import HFTTrainingConfig
    from .hft_trainer import HFTTrainer
    from .probes import plan_hierarchy

__all__ = ["HFTTrainer", "HFTTrainingConfig", "plan_hierarchy"]


def __getattr__(name: str) -> Any:
    """TRL takes seconds to import, which `hft --help` should not."""
    if name == "HFTTrainer":
        from .hft_trainer import HFTTrainer

        return HFTTrainer
    if name == "HFTTrainingConfig":
        from .hft_config import HFTTrainingConfig

        return HFTTrainingConfig
    if name == "plan_hierarchy":
        from .probes import plan_hierarchy

        return plan_hierarchy
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
