"""Training HFT models with TRL."""

from .hft_config import HFTTrainingConfig
from .hft_trainer import HFTTrainer


__all__ = ["HFTTrainer", "HFTTrainingConfig"]
