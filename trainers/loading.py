"""A saved model and its tokenizer, as commands load them."""

import os
from pathlib import Path

from transformers import AutoTokenizer, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

import hft
from hft.configuration_hft import HFTConfig
from hft.slim_hft import read_config

from .compute_dtype import fast_dtype
from .run_record import RunRecord


def load_model(model: str | os.PathLike, load_in_4bit: bool | None = False) -> PreTrainedModel:
    """A saved HFT model, with its backbone in NF4 if that is asked for; raises as `from_pretrained`.

    Args:
        model: folder or Hub id.
        load_in_4bit: hold the backbone in NF4; None: as it was trained in that folder, in 16 or 32 bit if that is not known.
    """
    if load_in_4bit is None and (held := RunRecord.load(Path(model)).quantization):
        config = BitsAndBytesConfig(**held)
    elif load_in_4bit:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,  # as all recipes have it
            bnb_4bit_compute_dtype=fast_dtype(),
        )
    else:
        config = None
    return hft.HFTForCausalLM.from_pretrained(model, quantization_config=config, device_map="auto")


def load_tokenizer(model: str | os.PathLike, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a saved HFT model: the backbone's where the model was saved, or pushed, without one.

    Args:
        model: folder or Hub id.
        revision: of a Hub id: branch, tag or commit.

    Raises:
        OSError: if the backbone, whose it is then, cannot be found.
    """
    lenient = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    if cached_file(os.fspath(model), "tokenizer_config.json", revision=revision, **lenient) is None:
        return _backbones_tokenizer(read_config(os.fspath(model), revision=revision))
    try:
        return AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=False)
    except OSError:
        raise
    except Exception as error:  # tokenizers raises nothing narrower
        raise OSError(
            f"The tokenizer in '{model}' cannot be read ({error}); copy it from the backbone again."
        ) from error


def own_tokenizer(model: PreTrainedModel, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of an HFT model in memory: where it came from, or the backbone's, if it has been saved nowhere yet."""
    name = model.config.name_or_path
    return load_tokenizer(name, revision) if name else _backbones_tokenizer(model.config)


def _backbones_tokenizer(config: HFTConfig) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(config.backbone, revision=config.backbone_revision, trust_remote_code=False)
