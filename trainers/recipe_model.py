"""The model that a recipe trains: a new one on its backbone, or a saved one that goes on learning."""

import os

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import hft
from hft.slim_hft import read_config

from .loading import load_tokenizer
from .recipes import HOW_TO_LOAD, Recipe


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

    Raises:
        ValueError, OSError: as `learnt_already`, `from_backbone` and `from_pretrained`.
    """
    quantization = recipe.quantization_config()
    if recipe.from_model is None:
        assert recipe.backbone is not None  # as `read_recipe` sees to
        return hft.HFTForCausalLM.from_backbone(
            recipe.backbone, recipe.hierarchy, quantization_config=quantization, **recipe.model
        )
    how = {"attn_implementation": "auto", **{key: recipe.model[key] for key in HOW_TO_LOAD if key in recipe.model}}
    model = hft.HFTForCausalLM.from_pretrained(recipe.from_model, quantization_config=quantization, **how)
    check_going_on(recipe, model.config)
    learnt = {task: model.hierarchy.parents(task) for task in model.hierarchy.names}
    tree = hft.Hierarchy({**learnt, **recipe.hierarchy})
    for task in tree.names:
        if task not in learnt:
            model.add_task(task, tree.parents(task), recipe.model.get("rank"))
    return model


def check_going_on(recipe: Recipe, config: hft.HFTConfig) -> None:
    """Whether a recipe fits the model that it goes on from, of which only the config is read.

    Raises:
        ValueError: another backbone, other settings, other parents of a task that the model has, or unknown ones.
    """
    given, saved = {"backbone": recipe.backbone, **recipe.model}, config.to_dict()
    for key, its in given.items():
        if key in ("rank", *HOW_TO_LOAD) or its is None:
            continue
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
    hft.Hierarchy({**{task: known.parents(task) for task in known.names}, **recipe.hierarchy})
