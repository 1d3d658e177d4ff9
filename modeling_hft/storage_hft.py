"""Loading and saving an HFT model: on a backbone, slim, or full."""

import contextlib
import copy
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import logging

from .attention_hft import best_attention, goes_to_gpu
from .backbone_hft import (
    check_dtype,
    check_is_decoder,
    check_own_code,
    commit_of,
    decoder_of,
    key_mapping_of,
    without_weights,
)
from .configuration_hft import HFTConfig, HFTGatingConfig, HFTMemoryConfig, HFTRouterConfig, check_keys, of_backbone
from .files_hft import ROUTER_FILE, SHARED_FILE, disk_errors, finish_writing, replacing
from .hierarchy_hft import Hierarchy, nearest
from .nodes_hft import adapted_linears
from .slim_hft import HFTSlimFiles, read_config


logger = logging.get_logger(__name__)

AUTO_MAP = {
    "AutoConfig": "configuration_hft.HFTConfig",
    "AutoModel": "modeling_hft.HFTModel",
    "AutoModelForCausalLM": "modeling_hft.HFTForCausalLM",
}

# What `PreTrainedModel.save_pretrained` and `push_to_hub` take besides.
_HUB_ARGUMENTS = ("commit_message", "commit_description", "private", "token", "revision", "create_pr", "tags")
_SAVE_ARGUMENTS = {
    *("repo_id", *_HUB_ARGUMENTS),
    *("variant", "safe_serialization", "save_peft_format", "distributed_checkpoint"),
}
_NO_MATTER = {"save_function", "save_original_format"}  # of `PreTrainedModel`'s, for files in other forms than HFT's
# What tells where a repository's files come from; everything else says how to load the model.
_DOWNLOAD = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class HFTStorage(HFTSlimFiles):
    """The part of `HFTPreTrainedModel` that reads and writes. `super()` is `PreTrainedModel`."""

    @classmethod
    def from_backbone(
        cls,
        backbone: str | os.PathLike,
        hierarchy: Mapping[str, Sequence[str]] | None = None,
        *,
        rank: int = 16,
        target_modules: str | list[str] = "all-linear",
        gating_config: dict[str, Any] | PreTrainedConfig | None = None,
        memory_config: dict[str, Any] | PreTrainedConfig | None = None,
        router_config: dict[str, Any] | PreTrainedConfig | None = None,
        attn_implementation: str = "auto",
        **kwargs: Any,
    ):
        """A new HFT model on a pretrained decoder.

        Args:
            backbone: Hub id or folder of a decoder.
            hierarchy: task -> parents; tasks may also be added later with `add_task`.
            rank: R of a node.
            target_modules: `"all-linear"` or the last names of linears.
            gating_config, memory_config, router_config: see `HFTGatingConfig`, `HFTMemoryConfig`, `HFTRouterConfig`.
            attn_implementation: `"auto"` takes the fastest that is installed: FlashAttention-2 for half precision that is
                loaded onto a GPU (in 4 bit, or by `device_map`), else PyTorch's own; a name is taken at its word.
            kwargs: as for `from_pretrained`: `quantization_config`, `dtype`, `device_map`, `revision`, `token`, ...

        Raises:
            ValueError: parents that form no hierarchy (unknown, named twice, or in a cycle); a backbone that is no decoder,
                or has code of its own or no `nn.Linear`; an unknown key, or a dtype that is none; `subfolder` or `variant`.
            OSError: if the backbone cannot be found.
            ImportError: if bitsandbytes or flash-attention is asked for and not installed.
        """
        backbone = os.fspath(backbone)
        tree = Hierarchy(hierarchy or {})
        if os.path.isdir(backbone):
            backbone = os.path.abspath(backbone)  # a relative name would mean another folder elsewhere
        check_keys(HFTGatingConfig, "gating_config", gating_config)
        check_keys(HFTMemoryConfig, "memory_config", memory_config)
        check_keys(HFTRouterConfig, "router_config", router_config)
        _check_places(kwargs)
        download = _download(kwargs)
        check_own_code(backbone, PreTrainedConfig.get_config_dict(backbone, **download)[0])
        text_config = AutoConfig.from_pretrained(backbone, **download)
        if text_config.model_type == HFTConfig.model_type:
            raise ValueError(f"'{backbone}' is an HFT model itself; load it with from_pretrained and use add_task.")
        check_is_decoder(backbone, text_config)
        # Naming the family here gives a clear error before anything heavy is loaded.
        adapted_linears(decoder_of(without_weights(text_config)), target_modules)
        config = HFTConfig(
            text_config=text_config,
            gating_config=gating_config,
            memory_config=memory_config,
            router_config=router_config,
            rank=rank,
            target_modules=target_modules,
            backbone=backbone,
            backbone_revision=commit_of(backbone, download),
            dtype=text_config.dtype,
        )
        model = cls._load_backbone(config, attn_implementation=attn_implementation, **kwargs)
        # It is saved nowhere yet. By the backbone's name others (DPO's reference, PEFT) would load that in its place.
        model.name_or_path = model.config.name_or_path = ""
        for task in tree.names:
            model.add_task(task, tree.parents(task))
        return model

    @classmethod
    def _load_backbone(cls, config: HFTConfig, **kwargs: Any):
        """A model without tasks, its backbone loaded from the backbone's own repository."""
        files, _ = PreTrainedConfig.get_config_dict(config.backbone, **_download(kwargs))
        vars(config.text_config).pop("quantization_config", None)
        if "quantization_config" in files:  # the repository itself is quantised
            config.quantization_config = files["quantization_config"]
        if mapping := key_mapping_of(config.text_config):
            kwargs["key_mapping"] = {**mapping, **(kwargs.get("key_mapping") or {})}
        model, _ = cls._load_whole(config.backbone, config=config, **kwargs)
        if getattr(model, "_hf_peft_config_loaded", False):
            raise ValueError(
                f"'{config.backbone}' holds a PEFT adapter beside the weights, which transformers attached, and HFT's "
                "backbone is the plain one. Merge it first, or move it (and make it a task by `import_lora`)."
            )
        return model

    @classmethod
    def _load_whole(cls, repo: str | None, *model_args: Any, **kwargs: Any):
        """As `PreTrainedModel.from_pretrained`, but nothing that the model needs may be missing."""
        text_config = kwargs["config"].text_config
        given = kwargs.get("dtype", kwargs.get("torch_dtype"))
        if not isinstance(given, dict):  # which transformers takes, too: a part of the model -> its dtype
            check_dtype("dtype", given)
        if kwargs.get("attn_implementation") == "auto":
            config = kwargs["config"]
            dtype = config.dtype if given in (None, "auto") else given
            quantization = kwargs.get("quantization_config") or getattr(config, "quantization_config", None)
            kwargs["attn_implementation"] = best_attention(
                without_weights(text_config),
                goes_to_gpu(kwargs.get("device_map"), quantization is not None),
                getattr(torch, dtype) if isinstance(dtype, str) else dtype,
            )
        for name in of_backbone(kwargs, text_config):
            setattr(text_config, name, kwargs.pop(name))
        try:
            model, info = super().from_pretrained(repo, *model_args, **{**kwargs, "output_loading_info": True})
        except SafetensorError as error:
            raise OSError(
                f"A weight file in '{repo}' is no whole safetensors file ({error}); it was cut short or damaged. "
                "Copy or download it again."
            ) from error
        missing = sorted(info["missing_keys"])
        if missing:
            raise ValueError(
                f"'{repo}' does not fit its config.json: its weights lack {missing[0]!r} ({len(missing)} such). "
                "Copy or download it again, or is it another model?"
            )
        for name, parameter in model.named_parameters():  # as `read_tensors` gives them
            if name.startswith("hft_") and parameter.device.type == "cpu":
                parameter.data = parameter.data.clone()
        if offloaded := [name for name, p in model.named_parameters() if "hft_" in name and p.device.type == "meta"]:
            raise ValueError(
                f"`device_map` puts what HFT owns ({offloaded[0]}, {len(offloaded)} such) where it cannot be computed with; "
                "give hft_nodes, hft_memory and hft_gates a device, and offload parts of the backbone instead."
            )
        model._place_own()
        model._finish()
        return model, info

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args: Any,
        config: HFTConfig | str | os.PathLike | None = None,
        backbone: str | os.PathLike | None = None,
        tasks: Sequence[str] | None = None,
        **kwargs: Any,
    ):
        """Loads a saved HFT model, slim or full, as `PreTrainedModel.from_pretrained` does.

        Args:
            pretrained_model_name_or_path: Hub id or folder of the HFT model (not of a backbone: see `from_backbone`); None
                with a `config` and a whole `state_dict`, which knows of no routes.
            config: a config or where one is; read from the same place by default.
            backbone: where to take the backbone of a slim model from instead of where its config says.
            tasks: only these sealed tasks of a slim model and what they stand on; no other task's file is read. The router
                still knows the others, and has the plain backbone answer their prompts. All tasks by default.
            kwargs: as for transformers: `quantization_config`, `dtype`, `device_map`, `attn_implementation`, ... In the full
                form a `dtype` with fewer bits rounds the tasks, too.

        Raises:
            OSError: if a file is missing or cut short, or the backbone cannot be found.
            ValueError: if files do not fit the config, the repository is not an HFT model, `tasks` names an unknown or
                open one, or `device_map` offloads what HFT owns.
        """
        if pretrained_model_name_or_path is None:
            if not isinstance(config, HFTConfig) or kwargs.get("state_dict") is None:
                raise ValueError("Without a folder or Hub id, from_pretrained takes a config and all of a state_dict.")
            model, loading_info = cls._load_whole(None, *model_args, config=copy.deepcopy(config), **kwargs)
            return (model, loading_info) if kwargs.get("output_loading_info") else model
        repo = os.fspath(pretrained_model_name_or_path)
        kwargs.pop("adapter_kwargs", None)  # carries this repository's commit, which is not the backbone's
        download = _download(kwargs)
        info = kwargs.pop("output_loading_info", False)
        if isinstance(config, (str, os.PathLike)):
            elsewhere = {name: value for name, value in download.items() if name not in ("revision", "subfolder")}
            config = read_config(os.fspath(config), **elsewhere)
        if finish_writing(repo, download.get("subfolder")) and config is not None:  # read before that
            left_out, config = config.left_out, read_config(repo, **download)
            tasks = [name for name in config.task_names() if name not in left_out] if left_out else tasks
        if config is None:
            config = read_config(repo, **download)
        if tasks is not None:
            config = config.only(tasks)
        config = copy.deepcopy(config)
        if not config.slim:
            if backbone is not None:
                raise ValueError(f"'{repo}' holds the full form, its backbone in it; load it without `backbone`.")
            model, loading_info = cls._load_whole(repo, *model_args, config=config, **kwargs)
            model._read_router(repo, config.router_config.tasks, **download)
            return (model, loading_info) if info else model

        entries, config.tasks, pages, config.pages = config.tasks, [], config.pages, []
        if backbone is not None:
            config.backbone, config.backbone_revision = os.fspath(backbone), None
        if os.path.isdir(config.backbone):
            config.backbone = os.path.abspath(config.backbone)  # a relative name would mean another folder elsewhere
        source = {name: value for name, value in kwargs.items() if name not in ("revision", "subfolder")}
        _check_places(source)
        if config.backbone_revision is not None:
            source["revision"] = config.backbone_revision
        try:
            model = cls._load_backbone(config, **source)
        except OSError as error:
            raise OSError(
                f"The backbone '{config.backbone}' of the slim model '{repo}' could not be loaded: {error} "
                "If it is elsewhere, say where: from_pretrained(..., backbone=...)."
            ) from error
        model.config.tasks, model.config.pages = entries, pages
        model.hierarchy = model.config.hierarchy()
        model._make_room()
        model._read_tasks(repo, entries, pages, **download)
        model._read_router(repo, config.router_config.tasks, **download)
        model._finish()
        model.name_or_path = model.config.name_or_path = repo
        if model.can_generate() and kwargs.get("generation_config") is None:
            with contextlib.suppress(OSError):  # then the backbone's holds
                model.generation_config = GenerationConfig.from_pretrained(repo, **download)
        as_found = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
        return (model, as_found) if info else model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "50GB",
        *,
        slim: bool = True,
        **kwargs: Any,
    ) -> None:
        """Saves the model with its code, so that it loads where this package is not installed.

        All files change, or none, whatever happens: see `replacing`.

        Args:
            save_directory: a folder; made if missing.
            is_main_process: only the main process writes.
            state_dict: the tensors of a full model if they are not the model's own; the slim form takes the model's own.
            push_to_hub: also upload, to `repo_id` or the folder's name.
            max_shard_size: of the full form; a task is one file.
            slim: tasks only, one file each, and the name of the backbone (`True`), or everything.
            kwargs: as for `PreTrainedModel.save_pretrained` and `push_to_hub`; `save_function` and `save_original_format`
                change nothing.

        Raises:
            OSError: if the folder cannot be written.
            ValueError: a merged task, or an attached PEFT adapter; `push_to_hub` of the full form; a slim form that could
                not name its backbone, or is to be a variant; the backbone's own folder; a variant in the folder of a slim
                model; a part of a model in the place of the whole; or a slim form in the place of a full one whose backbone
                is nowhere else.
            TypeError: an unknown argument.
        """
        self._check_unmerged()
        if getattr(self, "_hf_peft_config_loaded", False):
            raise ValueError(
                "A PEFT adapter is attached, which HFT's files do not hold: save its weights by themselves "
                "(peft.get_peft_model_state_dict), and delete_adapter it first."
            )
        kwargs = {name: value for name, value in kwargs.items() if name not in _NO_MATTER}
        if unknown := kwargs.keys() - _SAVE_ARGUMENTS:
            odd = min(unknown)
            raise TypeError(
                f"save_pretrained got the unknown argument {odd!r}. {nearest(odd, ['slim', *_SAVE_ARGUMENTS])}"
            )
        if push_to_hub and not slim:
            raise ValueError(
                "push_to_hub uploads the slim form; save the full form and upload its folder with `hf upload`."
            )
        repo_id = kwargs.pop("repo_id", os.path.basename(os.path.abspath(save_directory)))
        hub = {name: kwargs.pop(name) for name in _HUB_ARGUMENTS if name in kwargs}
        finds_backbone = self._check_place(save_directory, slim, kwargs.get("variant"))
        if is_main_process:
            # Weights of the other form, which a reader would take for this one's, and shards of an older save.
            own = ("model.*safetensors*",) if slim else (SHARED_FILE, f"{SHARED_FILE}.index.json")
            stale = ("model-*-of-*.safetensors", ROUTER_FILE, *own)
            stale = () if kwargs.get("variant") else stale  # of which a folder may hold several
            with replacing(save_directory, stale=stale) as folder, disk_errors(save_directory):
                if slim:
                    self._write_tasks(folder)
                else:
                    # As they are called here: a family's way back to its own names would change HFT's, too.
                    full = {"state_dict": state_dict, "max_shard_size": max_shard_size, "save_original_format": False}
                    super().save_pretrained(folder, **full, **kwargs)
                self._write_router(folder)
                self._write_config_and_code(folder, slim)
            if slim and not finds_backbone:
                logger.warning(
                    f"'{save_directory}' names the backbone '{self.config.backbone}', which is not there now; who loads it "
                    "must say where it is: from_pretrained(..., backbone=...)."
                )
        if push_to_hub:
            self.push_to_hub(repo_id, **hub)

    def _write_config_and_code(self, folder: os.PathLike, slim: bool) -> None:
        config = copy.deepcopy(self.config)
        config.slim = slim
        # FSDP makes a class of its own of a model's, whose code is not ours.
        own_class = next(made for made in type(self).__mro__ if "_auto_class" in vars(made))
        config.architectures = [own_class.__name__]
        config.auto_map = dict(AUTO_MAP)
        config.dtype = str(self.backbone.dtype).removeprefix("torch.")
        config.text_config._name_or_path = ""  # it would be a folder of this machine
        if slim:
            vars(config).pop("quantization_config", None)  # the reader chooses how to hold the backbone
        custom_object_save(own_class, folder)
        config.save_pretrained(folder)
        if self.can_generate():
            generation_config = copy.deepcopy(self.generation_config)
            if "task" in vars(generation_config):  # a reader skips what is not transformers' own where this is set
                generation_config._from_model_config = False
            generation_config.save_pretrained(folder)


def _check_places(kwargs: Mapping[str, Any]) -> None:
    if odd := [name for name in ("subfolder", "variant") if kwargs.get(name)]:
        raise ValueError(f"`{odd[0]}` is not supported: a slim model could not say where its backbone is.")


def _download(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name in _DOWNLOAD}
