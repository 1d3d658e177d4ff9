"""Training HFT models with TRL."""

from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .hft_config import HFTTrainingConfig
    from .hft_trainer import HFTTrainer

__all__ = ["HFTTrainer", "HFTTrainingConfig"]


def __getattr__(name: str) -> Any:
    """TRL takes seconds to import, which `hft --help` should not."""
    if name == "HFTTrainer":
        from .hft_trainer import HFTTrainer

        return HFTTrainer
    if name == "HFTTrainingConfig":
        from .hft_config import HFTTrainingConfig

        return HFTTrainingConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
