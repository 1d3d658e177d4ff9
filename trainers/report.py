"""The model card."""

import os
from importlib import resources
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedModel


def write_model_card(model: PreTrainedModel, folder: str | os.PathLike) -> None:
    """Writes README.md: the backbone, the tree, and how to load.

    Args:
        model: an HFT model.
        folder: where to; made if missing.
    """
    config = model.config
    on_hub = config.backbone is not None and not os.path.isdir(config.backbone)  # never a folder of this machine
    data = ModelCardData(
        base_model=config.backbone if on_hub else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["hft", "continual-learning"],
    )
    template = resources.files("hft.hub_configs") / "model_card.md"
    with resources.as_file(template) as path:
        card = ModelCard.from_template(
            data,
            template_path=str(path),
            tree=model.hierarchy.draw(),
            tasks=list(model.hierarchy.names),
            backbone=config.backbone if on_hub else "a local backbone",
        )
    Path(folder).mkdir(parents=True, exist_ok=True)
    card.save(Path(folder) / "README.md")
