"""A YAML recipe -> a model and the trainer's arguments. A key that nobody knows is refused. Its data: `recipe_data.py`."""

import contextlib
import dataclasses
import functools
import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import BitsAndBytesConfig

from hft.backbone_hft import check_dtype
from hft.configuration_hft import HFTConfig
from hft.hierarchy_hft import Hierarchy, nearest
from hft.hub_configs import shipped_recipes

from .hft_config import TASK_NUMBERS, HFTTrainingConfig
from .kinds import check_kind, field_types, kinds_of
from .mixtures import REFINING_RATE, ROOT_SHARE, check_mixtures, check_standing


# What a recipe says besides the keys of HFTConfig, BitsAndBytesConfig and HFTTrainingConfig (SFTConfig).
HOW_TO_LOAD = ("attn_implementation", "dtype", "device_map")
MODEL_KEYS = ("rank", "target_modules", "gating_config", "memory_config", "router_config", *HOW_TO_LOAD)
# Keys that transformers says are text, and of which it takes True, too.
_TRUE_TOO = ("fsdp", "resume_from_checkpoint")


@dataclasses.dataclass
class Recipe:
    """A run: which backbone learns which tasks from which data, and how.

    Args:
        hierarchy: task -> parents. With `from_model` parents may be the model's, and its own tasks need not be named.
        backbone: Hub id or folder; needed without `from_model`.
        from_model: folder or Hub id of a saved HFT model that goes on learning: the tasks that it lacks are added to it, and
            what it has learnt stays as it is. `rank` is of the new tasks; linears, gates, memory and router are the model's,
            and what the recipe says of them must be as they are. Without keys of BitsAndBytesConfig its backbone is held as
            it was when the model was last trained in that folder.
        datasets: task -> where it comes from and how a row is read, see `load_task`; not needed with `data`.
        mixtures, root_share, refining_rate: see `HFTTrainingConfig`. A mixture has no rows of its own, and is not tested.
        data: a folder with `<task>/<split>.jsonl`, plain or as `.jsonl.gz`, of rows {instruction, options, input, output};
            takes the place of `datasets`.
        train_samples: rows of each task to train on, a random choice that is always the same; None for all.
        eval_samples: the same for evaluation.
        max_input_tokens: a longer input loses the middle of its longest line, the passage, so that neither question nor
            options are lost (`row_tokens.shortened`).
        max_new_tokens: where a generated answer is cut off.
        metric: how answers are scored, see `find_metric`: one name, or one a task: `{task: name}`.
        stage_eval_samples: rows of each task's validation split that are answered before, between and after the stages;
            None: none.
        model: keys of HFTConfig, and how to load.
        quantization: keys of BitsAndBytesConfig.
        training: keys of HFTTrainingConfig.
    """

    hierarchy: dict[str, list[str]]
    backbone: str | None = None
    from_model: str | None = None
    datasets: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    mixtures: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    root_share: float = ROOT_SHARE
    refining_rate: float = REFINING_RATE
    data: str | None = None
    train_samples: int | None = None
    eval_samples: int | None = None
    max_input_tokens: int | None = None
    max_new_tokens: int = 16
    metric: str | dict[str, str] = "exact_match"
    stage_eval_samples: int | None = None
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    quantization: dict[str, Any] = dataclasses.field(default_factory=dict)
    training: dict[str, Any] = dataclasses.field(default_factory=dict)

    def quantization_config(self) -> BitsAndBytesConfig | None:
        """How to quantise the backbone; None: not at all. ValueError for values that it does not take."""
        try:
            config = BitsAndBytesConfig(**self.quantization)
            return config if config.load_in_4bit or config.load_in_8bit else None  # transformers would take 4 bit
        except TypeError as error:
            raise ValueError(f"A key of BitsAndBytesConfig has a wrong value: {error}.") from error

    def tree(self) -> Hierarchy:
        """The hierarchy as far as the recipe tells it: parents that it does not name, of `from_model`, as roots."""
        if self.from_model is None:
            return Hierarchy(self.hierarchy)
        named = {up: [] for ups in self.hierarchy.values() if isinstance(ups, list) for up in ups}
        return Hierarchy({**named, **self.hierarchy})

    def tasks(self) -> list[str]:
        """The tasks with rows of their own: without mixtures."""
        return [task for task in self.hierarchy if task not in self.mixtures]

    def training_arguments(self) -> dict[str, Any]:
        """The keys of HFTTrainingConfig."""
        if not self.mixtures:
            return self.training
        its = {"mixtures": self.mixtures, "root_share": self.root_share, "refining_rate": self.refining_rate}
        return {**self.training, **its}


NEEDED_KEYS = ("path", "instruction", "options", "input", "label")  # of a description in `datasets`
_SPEC_KEYS = (*NEEDED_KEYS, "name", "splits")
_SECTIONS = ("model", "quantization", "training")
RECIPE_KEYS = tuple(field.name for field in dataclasses.fields(Recipe) if field.name not in _SECTIONS)


@functools.cache
def _keys() -> dict[str, dict[str, Any]]:
    """Section -> its keys -> the types of their values."""
    parameters = inspect.signature(BitsAndBytesConfig.__init__).parameters.values()
    named = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self"]
    training = {key: its for key, its in field_types(HFTTrainingConfig).items() if key not in RECIPE_KEYS}
    return {
        "recipe": {key: field_types(Recipe)[key] for key in RECIPE_KEYS},
        "model": {key: HFTConfig.__annotations__.get(key, Any) for key in MODEL_KEYS},
        "quantization": {p.name: Any if p.default is None else type(p.default) for p in named},  # it has no type hints
        "training": {**training, **{key: training[key] | bool for key in _TRUE_TOO}},
    }


class _UniqueKeys(yaml.SafeLoader):
    """YAML itself lets a second key silently replace the first, and reads `no` as a truth value and `007` as 7: of keys and
    of tasks' names it keeps the letters."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise ValueError(f"A key in line {line} is no word; write `key: value`.")
            key_node.tag = "tag:yaml.org,2002:str"
            if key_node.value in seen:
                raise ValueError(f"The key {key_node.value!r} is a duplicate (line {line}); keep one.")
            seen.add(key_node.value)
            if key_node.value in _NAMES_IN:
                _keep_letters(value_node)
        return super().construct_mapping(node, deep)


_NAMES_IN = ("hierarchy", "mixtures", "route_tasks", "page_tasks")


def _keep_letters(node: yaml.Node) -> None:
    """Lets what YAML would read as a number, a date or a truth value be text in a list, or in the lists of a mapping."""
    if isinstance(node, yaml.MappingNode):
        for _, value_node in node.value:
            _keep_letters(value_node)
    for part in node.value if isinstance(node, yaml.SequenceNode) else ():
        if isinstance(part, yaml.ScalarNode) and part.tag != "tag:yaml.org,2002:null":
            part.tag = "tag:yaml.org,2002:str"


def read_recipe(path: str | os.PathLike, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Reads a YAML file, whose keys are all on one level.

    Args:
        path: a file, or the name of a recipe that ships with the package (`cl14-small`).
        overrides: values that take the place of the file's, from the command line.

    Raises:
        ValueError: an unknown or doubled key, a missing one, parents that form no `Hierarchy`, or data for an unknown task.
        OSError: no such file.
    """
    try:
        text = _find(path).read_text(encoding="utf-8")
        values = yaml.load(text, _UniqueKeys)  # a subclass of SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"'{path}' is no YAML: {error}") from error
    if values is None:
        raise ValueError(f"'{path}' is empty; a recipe holds `key: value` lines.")
    if not isinstance(values, dict):
        raise ValueError(f"'{path}' must hold `key: value` lines, not a {type(values).__name__}.")
    values.update(overrides or {})
    sections: dict[str, dict[str, Any]] = {name: {} for name in _keys()}
    for key, value in values.items():
        section = next((name for name, keys in _keys().items() if key in keys), None)
        if section is None:
            raise ValueError(
                f"Unknown key {key!r}. {nearest(key, [key for keys in _keys().values() for key in keys])}"
            )
        sections[section][key] = _as_meant(key, value, _keys()[section][key])
    goes_on = sections["recipe"].get("from_model") is not None
    for needed in ("hierarchy",) if goes_on else ("backbone", "hierarchy"):
        if sections["recipe"].get(needed) is None:
            raise ValueError(f"'{path}' lacks the key {needed!r}.")
    sections["training"].setdefault("output_dir", f"outputs/{Path(path).stem}")
    recipe = Recipe(
        **sections["recipe"],
        model=sections["model"],
        quantization=sections["quantization"],
        training=sections["training"],
    )
    for place in ("data", "backbone", "from_model"):
        if isinstance(value := getattr(recipe, place), str):
            setattr(recipe, place, os.path.expanduser(value))
    if not isinstance(recipe.hierarchy, dict):
        raise ValueError(f"`hierarchy` is {recipe.hierarchy!r}; give `task: [parents]` lines.")
    for task, parents in recipe.hierarchy.items():
        if isinstance(parents, list) and not any(isinstance(up, (list, dict)) for up in parents):
            recipe.hierarchy[task] = [str(up) for up in parents]
        elif parents is not None and not isinstance(parents, str):  # what is wrong with a string, `Hierarchy` says
            raise ValueError(
                f"The parents of task {str(task)!r} are {parents!r}; give a list of names: `{task}: [parent]`."
            )
    if not recipe.hierarchy and recipe.mixtures:
        raise ValueError("`hierarchy` names no task; give `task: [parents]` lines.")
    recipe.hierarchy = {str(task): parents or [] for task, parents in recipe.hierarchy.items()}
    tree = recipe.tree()
    for name in ("train_samples", "eval_samples", "stage_eval_samples", "max_input_tokens", "max_new_tokens"):
        value = getattr(recipe, name)
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"`{name}` is {value!r}; it must be a whole number of 1 or more.")
    for task, name in recipe.metric.items() if isinstance(recipe.metric, dict) else ():
        if task not in tree:
            raise ValueError(f"`metric` names the unknown task {task!r}. {nearest(task, tree.names)}")
        check_kind(f"metric[{task!r}]", name, str)
    _check_mixtures(recipe, tree)
    _check_datasets(recipe, tree)
    _check_loading(recipe)
    return recipe


def _check_loading(recipe: Recipe) -> None:
    """What the backbone is and how it is held, as far as it can be told before it is loaded."""
    is_folder = recipe.backbone is not None and os.path.isdir(recipe.backbone)
    if is_folder and not os.path.isfile(os.path.join(recipe.backbone, "config.json")):
        raise ValueError(f"`backbone` is '{recipe.backbone}', a folder that holds no model (no config.json).")
    device = recipe.model.get("device_map")
    if str(device).startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"`device_map` is {device!r}, and PyTorch finds no GPU here; leave it out, or see `hft doctor`."
        )
    if recipe.model.get("target_modules") == []:
        raise ValueError("`target_modules` is []; name the linears that carry nodes, or leave it out for all of them.")
    for section, key in ((recipe.model, "dtype"), (recipe.quantization, "bnb_4bit_compute_dtype")):
        check_dtype(key, section.get(key), auto=key == "dtype")
    if (kind := recipe.quantization.get("bnb_4bit_quant_type", "nf4")) not in ("nf4", "fp4"):
        raise ValueError(f"`bnb_4bit_quant_type` is {kind!r}; it must be nf4 or fp4.")
    recipe.quantization_config()
    if recipe.quantization and not recipe.quantization.keys() & {"load_in_4bit", "load_in_8bit"}:
        key = min(recipe.quantization)
        raise ValueError(
            f"`{key}` says how a backbone is held in few bits, and nothing says that it is; add `load_in_4bit: true`, or "
            f"leave `{key}` out."
        )


def _check_datasets(recipe: Recipe, tree: Hierarchy) -> None:
    if not isinstance(recipe.datasets, dict):
        raise ValueError(f"`datasets` is {recipe.datasets!r}; describe each task's data in it, or leave it out.")
    for task, spec in recipe.datasets.items():
        if task not in tree:
            raise ValueError(f"`datasets` describes the unknown task {task!r}. {nearest(task, tree.names)}")
        if not isinstance(spec, dict):
            raise ValueError(f"`datasets[{task!r}]` is {spec!r}; give {', '.join(NEEDED_KEYS)}, or leave it out.")
        for key in spec:
            if key not in _SPEC_KEYS:
                raise ValueError(f"`datasets[{task!r}]` has the unknown key {key!r}. {nearest(key, _SPEC_KEYS)}")


def _check_mixtures(recipe: Recipe, tree: Hierarchy) -> None:
    check_mixtures(recipe.mixtures, recipe.root_share, recipe.refining_rate)
    check_standing(recipe.mixtures, tree)
    for task in recipe.mixtures:
        if task in recipe.datasets:
            raise ValueError(
                f"`mixtures` gives {task!r} the rows of {recipe.mixtures[task]}; it can have none of its own."
            )


def _find(path: str | os.PathLike) -> Path:
    if Path(path).is_dir():
        raise ValueError(
            f"'{path}' is a folder, and a recipe is a YAML file: `hft plan --data FOLDER` writes one for a folder of tasks, "
            "and in it `from_model: FOLDER` goes on with a model."
        )
    if Path(path).exists():
        return Path(path)
    names = shipped_recipes()
    if str(path) in names:
        return names[str(path)]
    raise FileNotFoundError(f"There is no file '{path}', and no recipe of that name. {nearest(str(path), names)}")


def read_value(key: str, text: str) -> Any:
    """The value of a recipe's key as a command line gives it: as YAML, but words and paths to the letter.

    Raises:
        ValueError: no YAML.
    """
    kinds = kinds_of(next((types[key] for types in _keys().values() if key in types), Any)) - {type(None)}
    if str in kinds <= {str, bool}:
        truth = yaml.SafeLoader.bool_values if bool in kinds else {}
        return None if text == "null" else truth.get(text.lower(), text)
    loader = _UniqueKeys(text)
    try:
        node = loader.get_single_node()
        if node is not None and key in _NAMES_IN:
            _keep_letters(node)
        return None if node is None else loader.construct_document(node)
    except yaml.YAMLError:
        raise ValueError(f"--{key} has the value {text!r}, which is no YAML.") from None
    finally:
        loader.dispose()


def _as_meant(key: str, value: Any, its_type: Any) -> Any:
    """YAML 1.1 reads 1e-3 (without a dot) as a string, the words no and off as false, and text of digits as a number."""
    if value is False and key.endswith("_strategy"):
        return "no"
    if key == "memory_config" and isinstance(value, dict) and value.get("read") is False:
        return {**value, "read": "off"}
    if key in TASK_NUMBERS and isinstance(value, dict):
        return {task: _as_meant(f"{key}[{task!r}]", number, float) for task, number in value.items()}
    kinds = kinds_of(its_type) - {type(None)}
    if str in kinds <= {str, bool} and type(value) is int:  # a folder may be called 2024
        return str(value)
    if kinds == {str} and not isinstance(value, (str, type(None))):
        raise ValueError(f"`{key}` is {value!r}, as YAML reads it; it must be text: put it in quotes.")
    number = value
    if isinstance(value, str) and kinds in ({int}, {float}):
        with contextlib.suppress(ValueError):
            number = float(value)
    if isinstance(number, float) and kinds == {int} and number.is_integer():
        number = int(number)
    if kinds != {dict}:  # what those hold, what follows says better
        check_kind(key, number, its_type, given=value)
    return number
