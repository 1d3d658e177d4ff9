"""The configuration of an HFT model: a picture of its hierarchy, readable in config.json."""

import copy
import math
import numbers
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec

from .hierarchy_hft import Hierarchy, nearest


# The layout of config.json and of the weight files. Raised when an older reader would misread a newer model.
FORMAT_VERSION = 1


@strict
class HFTGatingConfig(PreTrainedConfig):
    """How a task decides, layer by layer, how much of each node on its path flows in.

    Args:
        init: a task's gate on its own node, which does not learn with it; not 0. The gates on its ancestors start at its
            parents' values, so that a child begins as its parent, and learn.
        trainable: `False` keeps these at their start, too: the ablation "without gates". A refresh moves all.

    Raises:
        ValueError: an `init` of 0, through which nothing could learn.
    """

    model_type = "hft_gating"
    base_config_key = "gating_config"

    init: float | int = 1.0
    trainable: bool = True

    def __post_init__(self, **kwargs):
        if self.init == 0 or not math.isfinite(self.init):
            raise ValueError(
                f"`init` of the gates is {self.init}, and a node behind such a gate cannot learn; give another number."
            )
        super().__post_init__(**kwargs)


@strict
class HFTMemoryConfig(PreTrainedConfig):
    """The task-agnostic memory: pages of key-value slots beside linears, one page a stage.

    Args:
        read: `"linear"`: a page adds V K x, so that a task's path stays one plain LoRA. `"off"`: there is no memory.
        slots: S, the slots of a new page at each linear; 1 or more.
        target_modules: the linears that carry slots, among those that carry nodes: `"all-linear"` or a list of last names.
        init: a task's gate on its own stage's page, which does not learn with it; not 0.
        root_init: a root's gates on pages that were there before it, at the start: 0, so that it begins as the backbone. A
            child's start at its parents' values.

    Raises:
        ValueError: a number of slots below 1, or an `init` of 0.
    """

    model_type = "hft_memory"
    base_config_key = "memory_config"

    read: Literal["off", "linear"] = "linear"
    slots: int = 8
    target_modules: str | list[str] = "all-linear"
    init: float | int = 1.0
    root_init: float | int = 0.0

    def __post_init__(self, **kwargs):
        if self.slots < 1:
            raise ValueError(f"`slots` is {self.slots}; a page needs 1 or more.")
        if self.init == 0 or not math.isfinite(self.init):
            raise ValueError(
                f"`init` of the memory is {self.init}, and a page behind such a gate cannot learn; give another number."
            )
        super().__post_init__(**kwargs)


@strict
class HFTRouterConfig(PreTrainedConfig):
    """How prompts find their task, see `HFTRouter`.

    Args:
        layer: how many of the backbone's layers a prompt runs through to be routed: 1 or more, fewer than all. None: an
            eighth of them.
        num_features: M, random features; 1 or more.
        ridge: the penalty, as a share of the mean diagonal of the features' second moments; above 0.
        confidence: how likely the likeliest task must be; below, the prompt goes to an ancestor or to the backbone. 0 to 1.
        prefix, suffix: ids of the tokens that a chat template puts around every prompt, which do not count.
        tasks: those that the router knows by their prompts. In a model's config, always those that its router has sums of.

    Raises:
        ValueError: a number out of its range.
    """

    model_type = "hft_router"
    base_config_key = "router_config"

    layer: int | None = None
    num_features: int = 1024
    ridge: float | int = 1e-3
    confidence: float | int = 0.5
    prefix: list[int] | None = None
    suffix: list[int] | None = None
    tasks: list[str] | None = None

    def __post_init__(self, **kwargs):
        if self.layer is not None and self.layer < 1:
            raise ValueError(f"`layer` of the router is {self.layer}; it must be 1 or more.")
        if self.num_features < 1 or not 0 < self.ridge < math.inf or not 0 <= self.confidence <= 1:
            raise ValueError(
                f"The router's `num_features` is {self.num_features} (1 or more), its `ridge` {self.ridge} (above 0), its "
                f"`confidence` {self.confidence} (0 to 1); one of them is out of its range."
            )
        self.prefix, self.suffix, self.tasks = list(self.prefix or []), list(self.suffix or []), list(self.tasks or [])
        super().__post_init__(**kwargs)


# What `from_pretrained` takes for a decoder's config, whether that says them or not.
_BACKBONE_KEYS = {"use_cache", "output_hidden_states", "output_attentions"}
_DTYPES = ("float64", "float32", "bfloat16", "float16")  # of sealed tasks and pages
# Keys of a decoder's config that are the whole model's, too, or no setting.
_BOTH = {"dtype", "torch_dtype", "quantization_config", "tie_word_embeddings", "architectures", "auto_map", "model_type",
         "name_or_path", "transformers_version"}  # fmt: skip


@strict
class HFTConfig(PreTrainedConfig):
    """A frozen decoder and the tasks that stand on it.

    Unlike a decoder's own config, this one holds the decoder's as `text_config` and adds a list of tasks. The slim form
    on disk also names the repository that the decoder's weights come from.

    Args:
        text_config: the backbone's own config.
        gating_config: see `HFTGatingConfig`.
        memory_config: see `HFTMemoryConfig`.
        router_config: see `HFTRouterConfig`.
        tasks: one entry a task, in the order of creation: `{"name", "parents", "rank", "sealed", "pages", "borrows"}`: the
            ids of the memory pages that it reads, and the nodes that it reads beside its path. Without the others, a name is
            an open root of rank `rank` that reads no page. A sealed task, or page, also has the `"dtype"` of its factors,
            and a task in the slim form a `"hash"` (`lineage`).
        pages: one entry a memory page: `{"id", "slots", "sealed", "writers"}`, the last being the tasks that write it.
        rank: the rank R of the nodes of new tasks; 1 or more.
        target_modules: the linears that carry nodes: `"all-linear"` (every `nn.Linear` in a decoder layer), or a list of
            last names such as `["q_proj", "v_proj"]`.
        backbone: the Hub id or the folder of the backbone's weights.
        backbone_revision: the commit of `backbone` that the tasks were trained on; `None` for a folder.
        slim: whether the weight files hold the tasks only (`True`) or the backbone too.
        left_out: in a part of a model (see `only`), the tasks of the whole that it lacks, with their parents.
        format_version: the layout of the files, see `FORMAT_VERSION`.

    Raises:
        ValueError: parents that form no `Hierarchy`, a rank below 1, a task that reads a page or a node that is
            not there, or a format from a newer version.
    """

    model_type = "hft"
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = {
        "text_config": SubConfigSpec(AutoConfig, model_type="llama"),
        "gating_config": SubConfigSpec(HFTGatingConfig),
        "memory_config": SubConfigSpec(HFTMemoryConfig),
        "router_config": SubConfigSpec(HFTRouterConfig),
    }

    text_config: dict[str, Any] | PreTrainedConfig | None = None
    gating_config: dict[str, Any] | PreTrainedConfig | None = None
    memory_config: dict[str, Any] | PreTrainedConfig | None = None
    router_config: dict[str, Any] | PreTrainedConfig | None = None
    tasks: list[dict[str, Any]] | None = None
    pages: list[dict[str, Any]] | None = None
    rank: int = 16
    target_modules: str | list[str] = "all-linear"
    backbone: str | None = None
    backbone_revision: str | None = None
    slim: bool = True
    left_out: dict[str, list[str]] | None = None
    format_version: int = FORMAT_VERSION

    def __post_init__(self, **kwargs):
        if self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"This model was saved in HFT format {self.format_version}, and this version reads formats up to "
                f"{FORMAT_VERSION}. Upgrade the package hft."
            )
        check_rank(self.rank)
        # A copy: entries change as tasks are sealed, and a config may be shared.
        defaults = {"parents": [], "rank": self.rank, "sealed": False, "pages": [], "borrows": []}
        self.tasks = [copy.deepcopy({**defaults, **task}) for task in self.tasks or []]
        self.pages = copy.deepcopy(self.pages or [])
        self.left_out = copy.deepcopy(self.left_out or {})
        for kind, entries, key in (
            ("tasks", self.tasks, "name"),
            *(("pages", self.pages, key) for key in ("id", "slots", "sealed", "writers")),
        ):
            if bare := [entry for entry in entries if key not in entry]:
                raise ValueError(f"An entry of `{kind}` lacks {key!r}: {bare[0]}. Was config.json edited, or cut?")
        for entry in (*self.tasks, *self.pages):
            if entry.get("dtype", "float32") not in _DTYPES:
                what = entry.get("name", entry.get("id"))
                raise ValueError(f"`dtype` of {what!r} is {entry['dtype']!r}. {nearest(str(entry['dtype']), _DTYPES)}")
        names = [task["name"] for task in self.tasks]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"The task {name!r} is a duplicate in `tasks`; each name stands once.")
        ids = [page["id"] for page in self.pages]
        if twice := [page_id for page_id in ids if ids.count(page_id) > 1]:
            raise ValueError(f"The page {twice[0]!r} is a duplicate in `pages`; each id stands once.")
        for task in self.tasks:
            if odd := sorted(task.keys() - {*defaults, "name", "dtype", "hash"}):
                raise ValueError(
                    f"Task {task['name']!r} has the unknown key {odd[0]!r}. {nearest(odd[0], list(defaults))}"
                )
            task["rank"] = check_rank(task["rank"], task["name"])
            for kind, known in (("pages", ids), ("borrows", names)):
                for other in task[kind]:
                    if other not in known:
                        raise ValueError(f"Task {task['name']!r} reads {other!r} in `{kind}`. {nearest(other, known)}")
                    if task[kind].count(other) > 1:
                        raise ValueError(f"Task {task['name']!r} reads {other!r} twice in `{kind}`; name it once.")
        if isinstance(self.text_config, PreTrainedConfig):
            # A copy: transformers writes into it, too, as the attention, which a model may be running by.
            self.text_config = copy.deepcopy(self.text_config)
        super().__post_init__(**kwargs)
        self.tie_word_embeddings = self.text_config.tie_word_embeddings
        path_of = self.hierarchy().path  # raises if the tasks are no hierarchy
        for task in self.tasks:
            if twice := [node for node in task["borrows"] if node in path_of(task["name"])]:
                raise ValueError(
                    f"Task {task['name']!r} borrows {twice[0]!r}, which is on its path already; leave it out."
                )
            if task["sealed"] and (open_ups := [up for up in task["parents"] if up in self.open_tasks()]):
                raise ValueError(
                    f"Task {task['name']!r} is sealed, and its parent {open_ups[0]!r} is not; parents are first."
                )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any):
        """As transformers', with what auto classes hand over from `from_pretrained`.

        Names in `tasks=[...]` choose a part; another `backbone` has no known commit; what says how a decoder runs is for
        the backbone's own config.
        """
        text_config = config_dict.get("text_config")
        own = {name: kwargs.pop(name) for name in of_backbone(kwargs, text_config or {})}
        if own and isinstance(text_config, dict):
            config_dict = {**config_dict, "text_config": {**text_config, **own}}
        if kwargs.get("backbone") is not None:
            config_dict = {**config_dict, "backbone_revision": None}
            kwargs["backbone"] = os.fspath(kwargs["backbone"])
        for name in ("backbone", "tasks"):  # None is as good as not given
            if name in kwargs and kwargs[name] is None:
                del kwargs[name]
        chosen = kwargs.get("tasks")
        if not isinstance(chosen, str) and (chosen is None or not all(isinstance(task, str) for task in chosen)):
            return super().from_dict(config_dict, **kwargs)
        del kwargs["tasks"]
        made = super().from_dict(config_dict, **kwargs)
        return (made[0].only(chosen), made[1]) if isinstance(made, tuple) else made.only(chosen)

    def only(self, tasks: Sequence[str]) -> "HFTConfig":
        """The config of a part of the model: these tasks, whatever they stand on, and the pages that any of them reads.

        Args:
            tasks: names of sealed tasks.

        Raises:
            ValueError: an unknown or open task, a string instead of a list, or a model saved in the full form.
        """
        if isinstance(tasks, str):
            raise ValueError(f"`tasks` is the string {tasks!r}; give a list: [{tasks!r}].")
        if not self.slim:
            raise ValueError(
                "`tasks` chooses files of a slim model, and this one is saved in the full form, all tasks in one file; "
                "load it whole."
            )
        wanted, kept = list(tasks), set()
        while wanted:
            task = self.task(wanted.pop())
            if not task["sealed"]:
                raise ValueError(f"`tasks` names {task['name']!r}, which still trains; load the whole model to go on.")
            if task["name"] not in kept:
                kept.add(task["name"])
                wanted += [*task["parents"], *task["borrows"]]
        part = copy.deepcopy(self)
        part.tasks = [task for task in part.tasks if task["name"] in kept]
        read = {page_id for task in part.tasks for page_id in task["pages"]}
        part.pages = [page for page in part.pages if page["id"] in read]
        part.left_out.update({task["name"]: list(task["parents"]) for task in self.tasks if task["name"] not in kept})
        return part

    def hierarchy(self) -> Hierarchy:
        """The tasks as a `Hierarchy`."""
        return Hierarchy({task["name"]: task["parents"] for task in self.tasks})

    def whole_hierarchy(self) -> Hierarchy:
        """The tasks and those that were left out."""
        parents = {**self.left_out, **{task["name"]: task["parents"] for task in self.tasks}}
        return Hierarchy({task: [up for up in its if up in parents] for task, its in parents.items()})

    def task_names(self) -> list[str]:
        """The names in the order of creation; a task's id is its place here."""
        return [task["name"] for task in self.tasks]

    def open_tasks(self) -> list[str]:
        """The tasks that can still learn."""
        return [task["name"] for task in self.tasks if not task["sealed"]]

    def sealed_tasks(self) -> list[str]:
        """The tasks that never change again."""
        return [task["name"] for task in self.tasks if task["sealed"]]

    def task(self, name: str) -> dict[str, Any]:
        """The entry of one task; ValueError, naming the nearest, if there is none."""
        for task in self.tasks:
            if task["name"] == name:
                return task
        raise ValueError(f"Unknown task {name!r}. {nearest(name, self.task_names())}")

    def sealed_task(self, name: str) -> dict[str, Any]:
        """The entry of a sealed task; ValueError if there is none, or it is still open."""
        task = self.task(name)
        if not task["sealed"]:
            raise ValueError(f"Task {name!r} is not sealed, as this needs; train it to its end first.")
        return task

    def page(self, page_id: int) -> dict[str, Any]:
        """The entry of one memory page; ValueError if there is none."""
        for page in self.pages:
            if page["id"] == page_id:
                return page
        ids = ", ".join(str(page["id"]) for page in self.pages)
        raise ValueError(f"Unknown memory page {page_id!r}; pages have numbers, and there are: {ids or 'none'}.")


def of_backbone(names: Iterable[str], text_config: Mapping[str, Any] | PreTrainedConfig) -> list[str]:
    """Which arguments of `from_pretrained` are settings of the backbone's own config."""
    its = text_config.to_dict() if isinstance(text_config, PreTrainedConfig) else text_config
    known = {key for key in its if not key.startswith("_")} - _BOTH - HFTConfig.__annotations__.keys()
    return [name for name in names if name in known | _BACKBONE_KEYS]


def check_rank(rank: Any, task: str | None = None) -> int:
    """A rank as JSON takes it: of a task's node, or of new tasks'.

    Raises:
        ValueError: no whole number, or one below 1.
    """
    if not isinstance(rank, numbers.Integral) or isinstance(rank, bool) or rank < 1:
        what = "`rank`" if task is None else f"`rank` of task {task!r}"
        raise ValueError(f"{what} is {rank!r}; a node needs a whole rank of 1 or more.")
    return int(rank)


def check_keys(config_class: type[PreTrainedConfig], name: str, given: Any) -> None:
    """Raises ValueError for unknown keys of a config, which transformers takes without a word."""
    known = list(config_class.__annotations__)
    for key in given if isinstance(given, dict) else ():
        if key not in known:
            raise ValueError(f"`{name}` has the unknown key {key!r}. {nearest(key, known)}")
