"""The model that a recipe trains: a new one on its backbone, or a saved one that goes on learning."""

import os
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import hft
from hft.configuration_hft import check_keys
from hft.slim_hft import read_config

from .hft_config import HFTTrainingConfig
from .loading import load_tokenizer
from .recipes import HOW_TO_LOAD, Recipe
from .run_record import RunRecord


def learnt_already(recipe: Recipe) -> set[str]:
    """The tasks that the model which a recipe goes on from has learnt; none without one. Only its config is read.

    Raises:
        ValueError: the recipe wants another backbone, other settings, or other parents of a task that the model has.
        OSError: there is no such model.
    """
    if recipe.from_model is None:
        return set()
    config = read_config(recipe.from_model)
    check_going_on(recipe, config)
    return set(config.sealed_tasks())


def tokenizer_of(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The tokenizer of the model that a recipe trains; OSError if it cannot be loaded."""
    if recipe.from_model is not None:
        return load_tokenizer(recipe.from_model)
    try:
        return AutoTokenizer.from_pretrained(recipe.backbone)
    except OSError as error:
        raise OSError(f"The backbone '{recipe.backbone}' could not be loaded: {error}") from error


def model_of(recipe: Recipe) -> PreTrainedModel:
    """The model that a recipe trains, not yet trained: on its backbone, or the one it goes on from, with the tasks it lacks.

    Args:
        recipe: one that fits the model that it goes on from, see `learnt_already`.

    Raises:
        ValueError, OSError: as `from_backbone` and `from_pretrained`.
    """
    if recipe.from_model is None:
        assert recipe.backbone is not None  # as `read_recipe` sees to
        return hft.HFTForCausalLM.from_backbone(
            recipe.backbone, recipe.hierarchy, quantization_config=recipe.quantization_config(), **recipe.model
        )
    model = load_again(recipe, recipe.from_model, attn_implementation="auto")
    tree = model.hierarchy.extended(recipe.hierarchy)
    for task in tree.names:
        if task not in model.hierarchy:
            model.add_task(task, tree.parents(task), recipe.model.get("rank"))
    return model


def load_again(recipe: Recipe, where: str, as_trained: bool = False, **defaults: Any) -> PreTrainedModel:
    """A saved model, held as a recipe says; where it says nothing of quantization, as it was trained in that folder.

    Args:
        recipe: of its training, or of one that goes on from it.
        where: folder or Hub id of the model.
        as_trained: hold it as it was trained, if that is known, whatever the recipe says.
        defaults: what of `attn_implementation`, `dtype` and `device_map` the recipe may leave out.
    """
    held = RunRecord.load(Path(where)).quantization
    if held is not None and (as_trained or not recipe.quantization):
        recipe.quantization = held
    how = {**defaults, **{key: recipe.model[key] for key in HOW_TO_LOAD if key in recipe.model}}
    config = read_config(where)
    if recipe.backbone is not None and config.slim and has_moved(config.backbone):
        how["backbone"] = recipe.backbone
    return hft.HFTForCausalLM.from_pretrained(where, quantization_config=recipe.quantization_config(), **how)


def checkpoint_layers(model: PreTrainedModel, recipe: Recipe) -> None:
    """Lets pilots and refreshes checkpoint layers as training does; not on a CPU, which has memory and lacks speed."""
    training, usual = recipe.training, HFTTrainingConfig.__dataclass_fields__["gradient_checkpointing"].default
    wanted = training.get("activation_checkpointing", training.get("gradient_checkpointing", usual))
    if wanted and model.device.type != "cpu":
        model.gradient_checkpointing_enable({"use_reentrant": False})


def has_moved(backbone: str) -> bool:
    """Whether a saved model's backbone was a folder that is not here."""
    return os.path.isabs(backbone) and not os.path.isdir(backbone)


def check_going_on(recipe: Recipe, config: hft.HFTConfig) -> None:
    """Whether a recipe fits the model that it goes on from, of which only the config is read.

    Raises:
        ValueError: another backbone, other settings, other parents of a task that the model has, or unknown ones.
    """
    given, saved = {"backbone": recipe.backbone, **recipe.model}, config.to_dict()
    for key, its in given.items():
        if key in ("rank", *HOW_TO_LOAD) or its is None or (key == "backbone" and has_moved(saved[key])):
            continue
        if key in config.sub_configs:
            check_keys(config.sub_configs[key], key, its)
        there = {name: saved[key].get(name) for name in its} if isinstance(its, dict) else saved[key]
        if its != there and not (key == "backbone" and os.path.abspath(its) == there):
            raise ValueError(
                f"`{key}` is {its!r}, and that of '{recipe.from_model}', which is to go on learning, is {there!r}; all "
                "tasks of a model share it: leave it out, or train a new model."
            )
    known = config.hierarchy()
    for task, parents in recipe.hierarchy.items():
        if task in known and tuple(parents) != known.parents(task):
            raise ValueError(
                f"The parents of task {task!r} are {parents}, and '{recipe.from_model}' has it with "
                f"{list(known.parents(task))}; give these, leave the task out, choose another name for a new one, or remove "
                f"that one (`hft remove {recipe.from_model} --task {task}`)."
            )
        rank = recipe.model.get("rank")
        if task in config.open_tasks() and rank not in (None, config.task(task)["rank"]):
            raise ValueError(
                f"`rank` is {rank}, and '{recipe.from_model}' has begun to learn {task!r} with {config.task(task)['rank']}; "
                f"give that again, or remove the task (`hft remove {recipe.from_model} --task {task}`)."
            )
    for root, members in recipe.mixtures.items():
        new = [task for task in members if task not in known]
        if root in config.sealed_tasks() and new:
            raise ValueError(
                f"`mixtures[{root!r}]` names {new[0]!r}, from whose rows {root!r} has not learnt, and it is sealed in "
                f"'{recipe.from_model}'; take {new[0]!r} out of `mixtures` (it stands on {root!r} all the same)."
            )
    known.extended(recipe.hierarchy)
