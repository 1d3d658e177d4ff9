"""Answering prompts: each on the path of a task that is named, or that the router finds.

B batch, T tokens.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.generation import GenerationMixin
from transformers.utils import logging

from .hierarchy_hft import BACKBONE
from .path_hft import active_path, generating
from .router_hft import HFTRoute


logger = logging.get_logger(__name__)

_SIGNATURE = inspect.signature(GenerationMixin.generate)

# A task, one task a row, or a row's place in `config.tasks` (-1: the backbone) as a tensor [B].
Task = str | Sequence[str | None] | torch.Tensor


def check_is_task(kwargs: Mapping[str, Any]) -> None:
    """Raises TypeError for another word for `task`, which a decoder would pass over, and run without any."""
    for name in ("tasks", "task_name", "task_id", "task_ids"):
        if name in kwargs:
            raise TypeError(f"`{name}` is no argument of a pass: name its task, or one a row, by `task`.")


class HFTGenerationMixin(GenerationMixin):
    """The part of `HFTForCausalLM` that generates. `super()` is transformers' `GenerationMixin`."""

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        *args: Any,
        task: Task | None = None,
        return_route: bool = False,
        **kwargs: Any,
    ):
        """As `GenerationMixin.generate`, on a task's path.

        Args:
            inputs: prompts [B, T], padded on the left if they differ in length.
            task: a name, or one name a prompt; `"backbone"` for the plain backbone; also as `generation_config.task`, of the
                one that is given or else of the model's. None takes the task that is folded or active; without any it asks
                the router once, before the first token; while that knows no task, or if prompts are embeddings, the plain
                backbone answers.
            return_route: also give back the decision for each prompt.

        Returns:
            What transformers returns; with `return_route`, a pair of that and a list of `HFTRoute`.

        Raises:
            ValueError: an unknown name, another number of names than of prompts, an `assistant_model` that is HFT's, too,
                `guidance_scale` for several tasks at once, or new tokens after a cache and no task.
        """
        bound = _SIGNATURE.bind_partial(self, inputs, *args, **kwargs).arguments  # others by position, too
        kwargs = {name: value for name, value in bound.items() if name not in ("self", "inputs", "kwargs")}
        kwargs.update(bound.get("kwargs", {}))
        if task is None:  # how a request to a server can name one
            task = getattr(kwargs.get("generation_config"), "task", None) or self._folded
        if task is None and active_path(self._owner) is None:
            task = getattr(self.generation_config, "task", None)
        prompts = inputs if inputs is not None else kwargs.get("input_ids")
        num_rows = num_rows_of(prompts, kwargs.get("inputs_embeds"))
        routes = self._who_answers(task, prompts, num_rows, kwargs)
        names = [route.task for route in routes]
        around = None
        if self._drafts_or_guides(names, kwargs):
            around = names[0]
        elif task is not None or not self._active_is_ready():
            kwargs["task"] = self._for_forward(names)
        with generating(), self._one_pass(around, num_rows):
            output = super().generate(inputs, **kwargs)
        return (output, routes * (num_rows or 1) if len(routes) == 1 else routes) if return_route else output

    def _who_answers(
        self, task: Task | None, prompts: torch.Tensor | None, num_rows: int | None, kwargs: Mapping[str, Any]
    ) -> list[HFTRoute]:
        """The decision for each prompt, or one for all: the task that is given, else the active one, else the router's."""
        if task is not None:
            return [
                HFTRoute(name or BACKBONE, (), (), 0.0, "named by the caller") for name in self._rows(task, num_rows)
            ]
        if (active := active_path(self._owner)) is not None:  # `activate` around this call
            active.check(num_rows)
            return [HFTRoute(name or BACKBONE, (), (), 0.0, "active around the call") for name in active.names()]
        if prompts is None or not self.hft_router.tasks():
            return [HFTRoute(BACKBONE, (), (), 0.0, "the router was not asked")]
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.shape != prompts.shape:
            raise ValueError(
                f"`attention_mask` has the shape {list(mask.shape)} for {list(prompts.shape)} tokens, and the router "
                "needs whole prompts; to go on from a cache, name the task that made it: generate(..., task=...)."
            )
        for name in ("past_key_values", "cache"):
            if (cache := kwargs.get(name)) is not None and (length := cache.get_seq_length()):
                raise ValueError(
                    f"`{name}` holds {length} tokens as some task's path computed them, and the router may find another; "
                    "name that task: generate(..., task=...) (`return_route=True` tells it), or leave the cache out."
                )
        routes = self.route(prompts, self._mask_of_pads(prompts, kwargs) if mask is None else mask)
        for i, route in enumerate(routes):
            logger.info(f"Prompt {i} is answered by {route.task}: {route.reason}.")
        return routes

    def _drafts_or_guides(self, names: Sequence[str], kwargs: Mapping[str, Any]) -> bool:
        """Whether there are passes besides `forward`'s own, so that the task is to be active around all, not its argument.

        An assistant gets what `forward` gets, and knows no tasks; a model that drafts for itself (early exit) would make the
        task's path anew for each draft; guidance's unconditional pass does not get what `forward` gets.
        """
        if (assistant := kwargs.get("assistant_model")) is not None:
            if assistant.config.model_type == self.config.model_type:
                raise ValueError(
                    "`assistant_model` is an HFT model, too, and nothing says which of its tasks drafts; give a plain one."
                )
            return True
        if self._option("assistant_early_exit", kwargs) is not None:
            return True
        if self._option("guidance_scale", kwargs) in (None, 1):
            return False
        if len(set(names)) > 1:
            raise ValueError(
                f"`guidance_scale` needs one task for all prompts, and these have {', '.join(dict.fromkeys(names))}; "
                "generate the prompts of each task by themselves."
            )
        return True

    def _active_is_ready(self) -> bool:
        """Whether the path that is active around the call is one for all passes (as in `activate(rank=...)`, or a draft):
        naming its tasks would make another."""
        active = active_path(self._owner)
        return active is not None and all(path.kept is not None for path in active.tasks)

    def _for_forward(self, names: Sequence[str]) -> str | torch.Tensor:
        """What tells `forward` these tasks: a name, which needs no copying for each beam, or ids [B], which are repeated."""
        if len(set(names)) == 1:
            return names[0]
        known = self.config.task_names()
        ids_B = [-1 if name == BACKBONE else known.index(name) for name in names]
        return torch.tensor(ids_B)  # in main memory: each pass reads them

    def _mask_of_pads(self, prompts: torch.Tensor, kwargs: Mapping[str, Any]) -> torch.Tensor | None:
        """The mask that transformers takes where none is given: without pads, if the end of text is not one, too."""
        pad, ends = (self._option(name, kwargs) for name in ("pad_token_id", "eos_token_id"))
        if pad is None or pad in (ends if isinstance(ends, (list, tuple)) else [ends]):
            return None
        mask_BT = (prompts != pad).long()
        return mask_BT if mask_BT.any() else None

    def _option(self, name: str, kwargs: Mapping[str, Any]) -> Any:
        """What `generate` takes for one of its options: as an argument, of the configuration given, or of the model's."""
        configs = kwargs.get("generation_config"), self.generation_config
        values = (getattr(config, name, None) for config in configs)
        return kwargs.get(name, next((value for value in values if value is not None), None))

    def _prepare_generation_config(self, *args: Any, task: Task | None = None, **kwargs: Any):
        """As transformers', which would keep `task` from `forward` where a configuration has one, too.

        A static cache alone does not have a GPU compile the passes: it would do so for each task anew, but for a folded one.
        """
        config, model_kwargs = super()._prepare_generation_config(*args, **kwargs)
        vars(config).pop("task", None)
        if self._folded is None and config.compile_config is None and config.disable_compile is None:
            config.disable_compile = True
        return config, model_kwargs if task is None else {**model_kwargs, "task": task}

    def prepare_inputs_for_generation(
        self, input_ids: torch.LongTensor, inputs_embeds: torch.Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """As the backbone's own, which some families override; by `inputs_embeds` transformers sees that these are taken."""
        return self.backbone.prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)

    def _update_model_kwargs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As the backbone's own: RWKV has its state from there."""
        return self.backbone._update_model_kwargs_for_generation(*args, **kwargs)

    def _supports_default_dynamic_cache(self) -> bool:
        """As the backbone's, which transformers tells by the name of its class."""
        return self.backbone._supports_default_dynamic_cache()

    @property
    def init_continuous_batching(self):
        """As transformers', for a folded task; else it is not there, as servers see: its thread would meet no path."""
        if self._folded is None:
            raise AttributeError("init_continuous_batching")  # torch says it in its own words
        return super().init_continuous_batching

    def generate_batch(self, *args: Any, task: str | None = None, **kwargs: Any):
        """As transformers', for a folded task, which `task` may name.

        Raises:
            ValueError: no task is folded, and the plain backbone would answer; or `task` is another one.
        """
        if self._folded is None:
            raise ValueError("`generate_batch` serves one task: fold it first, model.fold(name); or use `generate`.")
        if task is not None:
            self._path(task, None)  # refuses another
        return super().generate_batch(*args, **kwargs)


def num_rows_of(input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> int | None:
    """B, or None if there is neither."""
    batch = input_ids if input_ids is not None else inputs_embeds
    return None if batch is None else batch.shape[0]
