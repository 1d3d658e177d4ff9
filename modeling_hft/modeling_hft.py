"""HFT: a frozen decoder, and beside it what a hierarchy of tasks owns and shares.

    y = W x + sum over the memory pages p that task t reads of g[t, p, layer] * V_p K_p x
            + sum over the nodes n on task t's path         of g[t, n, layer] * B_n A_n x

The backbone is any decoder of transformers whose layers are made of `nn.Linear`; it stays whole under `backbone`, so its
parameters keep the names that they have in their own repository. What HFT owns lives beside it (`hft_nodes`,
`hft_memory`, `hft_gates`). The two meet in one place, `_attach`: a forward hook on each adapted linear.

B batch, T tokens, L layers, R rank of a path.
"""

import copy
import numbers
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from .backbone_hft import keep_weights
from .configuration_hft import HFTConfig
from .folded_hft import HFTFolding
from .fused_hft import HFTFused
from .gates_hft import HFTGates
from .generation_hft import HFTGenerationMixin, Task, check_is_task, num_rows_of
from .hierarchy_hft import BACKBONE, Hierarchy, nearest
from .kept_hft import HFTKept
from .memory_hft import HFTMemory
from .nodes_hft import HFTFactors, HFTNodes, adapted_linears, beside, flat
from .passed_on_hft import HFTPassedOn
from .path_hft import HFTConstants, HFTOwner, HFTPath, HFTTaskPath, Pair, active_path, made_paths, on_path
from .refresh_hft import HFTRefreshing
from .router_hft import HFTRouter
from .routing_hft import HFTRouting
from .storage_hft import HFTStorage
from .tasks_hft import HFTTasks
from .trimmed_hft import HFTTrimming
from .upload_hft import HFTUploading


class HFTPreTrainedModel(
    HFTTasks,
    HFTTrimming,
    HFTFolding,
    HFTRefreshing,
    HFTRouting,
    HFTStorage,
    HFTUploading,
    HFTPassedOn,
    PreTrainedModel,
):
    """What `HFTModel` and `HFTForCausalLM` share: the backbone, the tasks, saving and loading.

    Its parts, which use one another's names with an underscore:

        HFTOwnership    owned_hft.py      whose a parameter is
        HFTRoom         room_hft.py       empty parameters for what the config lists, and where they are
        HFTTasks        tasks_hft.py      tasks are added, started, sealed, removed
        HFTTrimming     trimmed_hft.py    a node is cut to the rank that it needs
        HFTFolding      folded_hft.py     one task is made ready for serving
        HFTRefreshing   refresh_hft.py    a sealed task's gates learn anew; losses of rows
        HFTRouting      routing_hft.py    the router is taught and asked
        HFTStorage      storage_hft.py    saving and loading; slim_hft.py: what tasks have learnt
        HFTUploading    upload_hft.py     to the Hub
        HFTPassedOn     passed_on_hft.py  what transformers asks of the whole model, and the backbone answers
    """

    config_class = HFTConfig
    config: HFTConfig
    base_model_prefix = "backbone"  # a plain repository's keys load as `backbone.<key>`
    supports_gradient_checkpointing = True
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: HFTConfig):
        super().__init__(copy.deepcopy(config))  # adding a task writes into it; two models must not share one
        config = self.config
        self.backbone = AutoModelForCausalLM.from_config(config.text_config, dtype=torch.get_default_dtype())
        self._layer_of = adapted_linears(self.base_model, config.target_modules)
        self._is_stateful = self.backbone._is_stateful
        self._hooks = []
        self._kept = HFTKept()
        self._constants = HFTConstants()
        self._owner = HFTOwner()
        self.hierarchy: Hierarchy = config.hierarchy()
        self.hft_nodes = nn.ModuleDict()
        for name, layer in self._layer_of.items():
            linear = self.base_model.get_submodule(name)
            self.hft_nodes[flat(name)] = HFTNodes(linear.in_features, linear.out_features, layer)
        memory = config.memory_config
        self.hft_memory = nn.ModuleDict()
        for name in adapted_linears(self.base_model, memory.target_modules) if memory.read != "off" else ():
            if nodes := beside(self.hft_nodes, name):
                self.hft_memory[flat(name)] = HFTMemory(nodes.in_features, nodes.out_features, nodes.layer)
        if memory.read != "off" and not self.hft_memory:
            raise ValueError(
                f"The memory's `target_modules` ({memory.target_modules}) are none of those that carry nodes "
                f"({config.target_modules}); name some of these, or switch the memory off: memory_config={{'read': 'off'}}."
            )
        starts = (config.gating_config.init, memory.init, memory.root_init)
        self.hft_gates = HFTGates(1 + max(self._layer_of.values()), *starts)
        self.hft_router = HFTRouter(
            config.router_config, config.text_config.hidden_size, config.text_config.num_hidden_layers
        )
        self._make_room()
        self.post_init()
        self._finish()

    def _attach(self) -> None:
        """The one place where backbone and HFT meet: a hook on each adapted linear.

        Done again after a quantiser has replaced the linears.
        """
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._fused = {}
        for name in self._layer_of:
            nodes, memory = self.hft_nodes[flat(name)], beside(self.hft_memory, name)
            fused = self._fused[name] = HFTFused(name, nodes, memory, self._owner)
            self._hooks.append(self.base_model.get_submodule(name).register_forward_hook(fused.on_linear))

    def activate(
        self, task: Task | None, num_rows: int | None = None, rank: int | None = None
    ) -> AbstractContextManager[None]:
        """Within the block, passes that name no task of their own take this one.

        `forward` and `generate` take `task=` themselves; this is for code that calls parts of the model. It holds for this
        thread: in one that is started within the block, `forward` runs the plain backbone and `generate` asks the router.
        Coroutines and generators share their thread: they must not await or yield within a block; let them give `task=`.

        Args:
            task: a name, a name a row, or ids [B]; `"backbone"` for the plain backbone, None to change nothing.
            num_rows: B, to check a list against.
            rank: of one name only: make all linears' factors now, filled with zeros up to this R, so that a decoder compiled
                inside meets the same graph for every task (see `fold`). Within, no parameter may change, and one backward
                pass may run.

        What tasks read, and ranks, cannot change within (`start_stage`, `refresh_gates`, `trim`, `remove_task`, `restore`,
        `import_lora`).

        Raises:
            ValueError: an unknown name, or another number of names than of rows; a rank that is too small, or given while a
                task is folded or with several names.
            RuntimeError: in the end of a block that ends before one that was begun within it.
        """
        if rank is not None and task is not None and self._rows(task, num_rows) != [None]:
            self._check_unfolded()
            if not isinstance(task, str):
                raise ValueError(f"`rank` is for one task by name, and `task` is {task!r}; leave `rank` out.")
            return on_path(self._ready_path(task, rank)[0])
        return nullcontext() if task is None else on_path(self._path(task, num_rows))

    def _one_pass(self, task: Task | None, num_rows: int | None) -> AbstractContextManager[None]:
        """As `activate`, for a single pass: parameters do not change within it, so what is right when it begins stays so."""
        if task is None:
            if self._folded_path is not None:
                return on_path(self._folded_path)
            if (path := active_path(self._owner)) is not None:
                path.check(num_rows)
            return nullcontext()
        made = None if torch.compiler.is_compiling() else made_paths()
        if made is None:
            return on_path(self._path(task, num_rows, is_one_pass=True))
        rows = tuple(self._rows(task, num_rows))
        if (self._owner, rows) not in made:
            made[self._owner, rows] = self._path(task, num_rows, is_one_pass=True).with_wide_factors()
        return on_path(made[self._owner, rows])

    def _path(self, task: Task, num_rows: int | None, is_one_pass: bool = False) -> HFTPath:
        rows = self._rows(task, num_rows)
        if self._folded is not None:
            return self._on_folded(rows)
        names = [name for name in dict.fromkeys(rows) if name is not None]
        if not names:
            return HFTPath(self._owner, ())
        kept = [self._kept_factors(name, len(names), is_one_pass) for name in names]
        paths = tuple(map(self._task_path, names, kept))
        if len(set(rows)) == 1:
            return HFTPath(self._owner, paths)
        places = [len(names) if row is None else names.index(row) for row in rows]
        in_order = places == list(range(len(rows)))
        return HFTPath(self._owner, paths, self._constants.of(places, paths[0].gates.device), in_order)

    def _kept_factors(self, task: str, num_tasks: int, is_one_pass: bool) -> dict[str, Pair] | None:
        """What linears may use again of earlier passes, and add to."""
        if torch.compiler.is_compiling():
            self._kept.clear()  # a compiled training step may change parameters without raising their versions
            return None
        factors = None
        if self.config.task(task)["sealed"]:  # else an optimizer may change them without raising their versions
            factors = self._kept.of(task, self._read_parameters(task), num_tasks)
        if not is_one_pass:
            return None
        return {} if factors is None and made_paths() is not None else factors

    def _task_path(self, task: str, kept: dict[str, Pair] | None) -> HFTTaskPath:
        sources = self.sources(task)
        ranks = [self.config.task(node)["rank"] for node in sources.nodes]
        num_node_columns = sum(ranks)
        ranks += [self.config.page(int(page))["slots"] for page in sources.pages]
        gates_LN = self.hft_gates.of(task)
        source_of_column_R = [source for source, rank in enumerate(ranks) for _ in range(rank)]
        columns = self._constants.of(source_of_column_R, gates_LN.device)
        learns_N = None
        if gates_LN.requires_grad:
            places = range(len(sources))  # a sealed task's gates want gradients in a refresh only, all of them
            learning = places if self.config.task(task)["sealed"] else self.learning_gates(task)
            learns_N = self._constants.of([place in learning for place in places], gates_LN.device)
        return HFTTaskPath(task, sources, gates_LN, columns, num_node_columns, kept, learns_N=learns_N)

    def _rows(self, task: Task, num_rows: int | None) -> list[str | None]:
        """The names in `task`, checked; one if it is one for all rows. None for the backbone."""
        if not isinstance(task, Iterable):
            raise ValueError(f"`task` is {task!r}; give a name, a name a row, or ids.")
        if isinstance(task, str):
            names: list[str | None] = [task]
        else:
            given = task.reshape(-1).tolist() if isinstance(task, torch.Tensor) else list(task)
            is_ids = isinstance(task, torch.Tensor) or any(isinstance(one, numbers.Integral) for one in given)
            names = self._names_of(given) if is_ids else given
            if not names or num_rows not in (None, len(names)):
                raise ValueError(f"`task` names {len(names)} tasks for {num_rows} rows; give one name, or one a row.")
        for name in names:
            if name is not None and not isinstance(name, str):
                raise ValueError(f"`task` holds {name!r}; give a name, a name a row, or ids.")
        names = [None if name in (None, BACKBONE) else name for name in names]
        for name in names:
            if name in self.config.left_out:
                raise ValueError(
                    f"Task {name!r} was left out when this part of a model was loaded: load it with `tasks`."
                )
            if name is not None and name not in self.hierarchy:
                raise ValueError(f"Unknown task {name!r}. {nearest(name, [*self.hierarchy.names, BACKBONE])}")
        return names

    def _names_of(self, ids: list[Any]) -> list[str | None]:
        known: list[str | None] = [*self.config.task_names(), None]  # so -1 is the backbone
        for i in (ids := [-1 if i is None else i for i in ids]):
            if not isinstance(i, numbers.Integral) or isinstance(i, bool):
                raise ValueError(f"`task` holds {i!r}; give whole ids, or names.")
            if not -1 <= int(i) < len(known) - 1:
                raise ValueError(f"`task` holds the id {i}; ids go from -1 (the backbone) to {len(known) - 2}.")
        return [known[int(i)] for i in ids]

    def _finish(self) -> None:
        """What must be done again whenever transformers has filled or replaced modules."""
        self._attach()
        self.set_trainable(self.config.open_tasks())
        keep_weights(self.backbone)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, HFTFactors):
            for name in module.names():
                module.reset_parameters(name)
        elif isinstance(module, HFTGates):
            for task in self.hierarchy.names:
                self._reset_gates(task)
        else:
            super()._init_weights(module)

    def dequantize(self, *args: Any, **kwargs: Any):
        self._check_unfolded()
        model = super().dequantize(*args, **kwargs)
        self._finish()
        return model


class HFTModel(HFTPreTrainedModel):
    """The decoder on a task's path, without the head: last hidden states [B, T, D]."""

    _auto_class = "AutoModel"

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Any | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        task: Task | None = None,
        cache: Any | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Runs the decoder.

        Args:
            input_ids, attention_mask, position_ids: [B, T]; `inputs_embeds` [B, T, D] may replace the first.
            past_key_values, cache: the keys and values of earlier tokens, by its older and its newer name.
            task: a name, a name a row, or ids [B]; None for the task that is folded or active, else the plain backbone.
            kwargs: as for the backbone's decoder; another word for `task` is a TypeError.
        """
        check_is_task(kwargs)
        given = {
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            "cache": cache,
        }
        kwargs |= {name: value for name, value in given.items() if value is not None}
        with self._one_pass(task, num_rows_of(input_ids, inputs_embeds)):
            return self.base_model(
                input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
            )


class HFTForCausalLM(HFTPreTrainedModel, HFTGenerationMixin):
    """The whole language model on a task's path."""

    _auto_class = "AutoModelForCausalLM"

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Any | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        task: Task | None = None,
        cache: Any | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Runs the backbone with the nodes on the task's path.

        Args:
            input_ids, attention_mask, position_ids: [B, T]; `inputs_embeds` [B, T, D] may replace the first.
            past_key_values, cache: the keys and values of earlier tokens, by its older and its newer name.
            labels: [B, T], -100 where there is no loss.
            task: a name, a name a row, or ids [B] (places in `config.tasks`, -1 for the backbone); None for the task that is
                folded or active, else the plain backbone.
            kwargs: as for the backbone; another word for `task` is a TypeError.

        Returns:
            What the backbone returns: logits [B, T, V], the loss if there are labels, the cache.
        """
        check_is_task(kwargs)
        given = inputs_embeds if input_ids is None else input_ids
        if given is not None and isinstance(logits_to_keep, int) and logits_to_keep > 0 and self.device.type == "cpu":
            # As an index, which copies these positions: of a slice, a CPU's matmul copies the head's weights once a row.
            length = given.shape[1]
            logits_to_keep = torch.arange(max(length - logits_to_keep, 0), length, device="cpu")
        caches = {"past_key_values": past_key_values, "cache": cache}
        kwargs |= {name: given for name, given in caches.items() if given is not None}
        with self._one_pass(task, num_rows_of(input_ids, inputs_embeds)):
            return self.backbone(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                labels=labels,
                use_cache=use_cache,
                logits_to_keep=logits_to_keep,
                **kwargs,
            )
