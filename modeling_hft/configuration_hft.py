"""The configuration of an HFT model: a picture of its hierarchy, readable in config.json."""

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
        init: a task's gate on its own node at the start. The gates on its ancestors start at its parents' values, so
            that a child begins as its parent.
        trainable: `False` keeps all gates at their start: the ablation "without gates".
    """

    model_type = "hft_gating"
    base_config_key = "gating_config"

    init: float = 1.0
    trainable: bool = True


@strict
class HFTMemoryConfig(PreTrainedConfig):
    """The task-agnostic memory.

    Args:
        read: how the pages are read. `"off"`: there is no memory.
    """

    model_type = "hft_memory"
    base_config_key = "memory_config"

    read: Literal["off"] = "off"


@strict
class HFTConfig(PreTrainedConfig):
    """A frozen decoder and the tasks that stand on it.

    Unlike a decoder's own config, this one holds the decoder's as `text_config` and adds a list of tasks. The slim form
    on disk also names the repository that the decoder's weights come from.

    Args:
        text_config: the backbone's own config.
        gating_config: see `HFTGatingConfig`.
        memory_config: see `HFTMemoryConfig`.
        tasks: one entry a task, in the order of creation: `{"name", "parents", "rank", "sealed"}`; without the last three
            it is an open root of rank `rank`.
        rank: the rank R of the nodes of new tasks; 1 or more.
        target_modules: the linears that carry nodes: `"all-linear"` (every `nn.Linear` in a decoder layer), or a list of
            last names such as `["q_proj", "v_proj"]`.
        backbone: the Hub id or the folder of the backbone's weights.
        backbone_revision: the commit of `backbone` that the tasks were trained on; `None` for a folder.
        slim: whether the weight files hold the tasks only (`True`) or the backbone too.
        format_version: the layout of the files, see `FORMAT_VERSION`.

    Raises:
        ValueError: a hierarchy that is none (see `Hierarchy`), a rank below 1, or a format from a newer version.
    """

    model_type = "hft"
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = {
        "text_config": SubConfigSpec(AutoConfig, model_type="llama"),
        "gating_config": SubConfigSpec(HFTGatingConfig),
        "memory_config": SubConfigSpec(HFTMemoryConfig),
    }

    text_config: dict[str, Any] | PreTrainedConfig | None = None
    gating_config: dict[str, Any] | PreTrainedConfig | None = None
    memory_config: dict[str, Any] | PreTrainedConfig | None = None
    tasks: list[dict[str, Any]] | None = None
    rank: int = 16
    target_modules: str | list[str] = "all-linear"
    backbone: str | None = None
    backbone_revision: str | None = None
    slim: bool = True
    format_version: int = FORMAT_VERSION

    def __post_init__(self, **kwargs):
        if self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"This model was saved in HFT format {self.format_version}, and this version reads formats up to "
                f"{FORMAT_VERSION}. Upgrade: pip install -U modeling-hft."
            )
        if self.rank < 1:
            raise ValueError(f"`rank` is {self.rank}; a node needs a rank of 1 or more.")
        # A copy: entries change as tasks are sealed, and a config may be shared.
        self.tasks = [{"parents": [], "rank": self.rank, "sealed": False, **task} for task in self.tasks or []]
        names = [task["name"] for task in self.tasks]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"The task {name!r} is a duplicate in `tasks`; each name stands once.")
        super().__post_init__(**kwargs)
        self.tie_word_embeddings = self.text_config.tie_word_embeddings
        self.hierarchy()  # raises if the tasks are no hierarchy

    def hierarchy(self) -> Hierarchy:
        """The tasks as a `Hierarchy`."""
        return Hierarchy({task["name"]: task["parents"] for task in self.tasks})

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
