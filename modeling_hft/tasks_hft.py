"""The life of a task: added, started with its stage, trained, sealed; or removed."""

import contextlib
import importlib
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from .configuration_hft import check_rank
from .gates_hft import HFTGateTable
from .hierarchy_hft import check_new_name
from .nodes_hft import flat
from .room_hft import HFTRoom
from .trimmed_hft import HFTTrim


class HFTTasks(HFTRoom):
    """The part of `HFTPreTrainedModel` that adds, starts, seals and removes tasks."""

    def gates(self, task: str) -> HFTGateTable:
        """A task's gates as a table: a row a layer, a column for each node and page that it reads.

        Raises:
            ValueError: an unknown task.
        """
        self.hierarchy.check(task)
        return HFTGateTable(task, self.sources(task).labels(), self.hft_gates.of(task).detach().cpu().clone())

    def add_task(self, name: str, parents: Sequence[str] = (), rank: int | None = None) -> None:
        """Adds a task that begins as its parents (the mean of them) and is ready to train.

        Args:
            name: 1 to 64 letters, digits, '_' or '-'.
            parents: the tasks that it builds on; none for a root.
            rank: R of its node; the config's by default.

        Raises:
            ValueError: a name that is taken or cannot be a file's, an unknown parent, or a rank below 1.
        """
        self._check_unfolded()
        check_new_name(name)
        if name in self.hierarchy:
            state = "sealed" if self.config.task(name)["sealed"] else "open, and can be trained or resumed"
            raise ValueError(f"The task {name!r} is a duplicate: this model has one, {state}; choose another name.")
        if name.lower() in map(str.lower, self.config.left_out):
            raise ValueError(f"The task {name!r} is in the whole of which this model is a part; choose another name.")
        rank = check_rank(self.config.rank if rank is None else rank, name)
        parents = _listed(parents)
        hierarchy = self.hierarchy.extended({name: parents})
        entry = {"name": name, "parents": parents, "rank": rank, "sealed": False, "pages": [], "borrows": []}
        with self._same_room_on_error(), torch.inference_mode(False), torch.no_grad():
            self.hierarchy = hierarchy
            self.config.tasks.append(entry)
            self._make_node(entry)
            for nodes in self.hft_nodes.values():
                nodes.reset_parameters(name)
            self._begin_as_parents(name)

    @torch.no_grad()
    def import_lora(
        self,
        name: str,
        adapter: str | os.PathLike,
        parents: Sequence[str] = (),
        prompts: Sequence[Sequence[int]] = (),
        **download: Any,
    ) -> None:
        """Adds a sealed task whose node is a plain PEFT LoRA for the same backbone; as a root, it gives PEFT's logits.

        Args:
            name: 1 to 64 letters, digits, '_' or '-'.
            adapter: folder or Hub id.
            parents: sealed tasks whose paths it is added to; none for a root.
            prompts: token ids of prompts that it is for, two or more, so that the router knows it; may be left out.
            download: `revision`, `token`, ... of the adapter.

        Raises:
            ValueError: an adapter that is no plain LoRA, or for another backbone; a name or parent as in `add_task`; or
                within `activate`.
            OSError: if there is no adapter.
            ImportError: in a model loaded as remote code, without the package.
        """
        try:  # by its name: what ships to the Hub must not need it
            reader = importlib.import_module("hft.lora_io_hft")
        except ImportError as error:
            raise ImportError(
                "Importing a LoRA needs the package hft itself; install it from its repository."
            ) from error
        self._check_inactive()  # else what fails could not be undone
        if len(prompts):
            self._check_prompts(name, prompts)
        factors, parents = reader.read_lora(adapter, self, **download), _listed(parents)
        for parent in parents:
            if not self.config.task(parent)["sealed"]:
                raise ValueError(
                    f"Task {name!r} would stand on {parent!r}, which is not sealed; seal {parent!r} first."
                )
        with self._same_room_on_error():
            self.add_task(name, parents, rank=max(len(down_RI) for down_RI, _ in factors.values()))
            for linear in self._layer_of:
                down_RI, up_OR = self.hft_nodes[flat(linear)].pair(name)
                down_RI.zero_()
                up_OR.zero_()
                if linear in factors:
                    rank = len(factors[linear][0])
                    down_RI[:rank], up_OR[:, :rank] = factors[linear]
            # As it was learnt, whatever gates start at.
            self.hft_gates.of(name)[:, self.sources(name).nodes.index(name)] = 1.0
            self.seal([name])
            if len(prompts):
                self.add_routes(name, prompts)

    def remove_task(self, name: str, cascade: bool = False) -> list[str]:
        """Removes a task. What others compute does not change; the ids of later tasks move up.

        A memory page that no other task reads goes with it. The router still tells its prompts, whose sums and held-out
        features stay in its file: the plain backbone answers them. With the last task that it knows, they go, too.

        Args:
            name: the task.
            cascade: also remove all that depends on it: its descendants, and tasks that read its node since a refresh.

        Returns:
            The removed tasks.

        Raises:
            ValueError: an unknown task, or one that others depend on; a folded model; or within `activate`.
        """
        self._check_unfolded()
        self._check_inactive()
        self.hierarchy.check(name)
        removed, more = [], [name]
        while more:  # a refreshed task may read a node of a deeper level
            removed += more
            others = (other for other in self.hierarchy.names if other not in removed)
            more = [other for other in others if set(removed) & set(self.sources(other).nodes)]
        if len(removed) > 1 and not cascade:
            mutual = [other for other in removed[1:] if other in self.sources(name).nodes]
            how = f"Remove {'the others' if mutual else 'them'} first, or all with cascade=True (`hft remove --cascade`)."
            if mutual:  # since a refresh
                how = f"It reads {', '.join(mutual)}, too, which can only be removed together with it. {how}"
            raise ValueError(f"Task {name!r} cannot be removed: {', '.join(removed[1:])} depend on it. {how}")
        tasks = [entry for entry in self.config.tasks if entry["name"] not in removed]
        read = {page_id for entry in tasks for page_id in entry["pages"]}
        for module, names in (
            *((nodes, removed) for nodes in self.hft_nodes.values()),
            *(
                (memory, [str(page["id"]) for page in self.config.pages if page["id"] not in read])
                for memory in self.hft_memory.values()
            ),
        ):
            for one in names:
                module.remove(one)
        for task in removed:
            self.hft_gates.remove(task)
            self.hft_router.remove(task)
        self._forget_factors()  # they may be of what was removed
        self.config.tasks = tasks
        self.config.pages = [page for page in self.config.pages if page["id"] in read]
        for page in self.config.pages:
            page["writers"] = [writer for writer in page["writers"] if writer not in removed]
        self.hierarchy = self.config.hierarchy()
        return removed

    def start_stage(self, tasks: Iterable[str], writers: Iterable[str] | None = None) -> None:
        """Begins a stage: these tasks, and nothing else, become trainable, and get a memory page that they write together.

        Tasks that have learnt nothing yet begin as what their parents are now, and may read all pages that are sealed.
        (`add_task` made them what their parents were then.) A task whose node is no longer silent is left as it is.

        Args:
            tasks: one level, as a rule, on what is sealed; that a task's ground may not move under it, `seal` sees to.
            writers: those of them that write the page; None: all. Without any there is no page.

        Raises:
            ValueError: if one of them is unknown or sealed, or one of `writers` is not of the stage; or within `activate`.
        """
        self._check_inactive()
        tasks = self._each_once(tasks)
        writers = None if writers is None else list(writers)
        for writer in writers or ():
            self.hierarchy.check(writer)
            if writer not in tasks:
                raise ValueError(f"`writers` names {writer!r}, which is not of this stage: {', '.join(tasks)}.")
        self.set_trainable(tasks)  # checks the names before anything changes
        self._forget_factors()  # a stage needs the memory that those of sealed tasks take
        new = [task for task in tasks if not self._has_learnt(task)]
        without = [task for task in new if self._open_page(task) is None and (writers is None or task in writers)]
        with torch.inference_mode(False):
            if without and self.config.memory_config.read != "off":
                self._add_page(without)
            sealed = [page["id"] for page in self.config.pages if page["sealed"]]
            for task in new:
                own = self._open_page(task)
                self._begin_as_parents(task, sealed if own is None else [*sealed, own])
        self.set_trainable(tasks)

    def _each_once(self, tasks: Iterable[str]) -> list[str]:
        """These tasks, lowest first; ValueError if one is unknown, or they are one string."""
        if isinstance(tasks, str):
            raise ValueError(f"The tasks are the string {tasks!r}; give a list: [{tasks!r}].")
        return sorted(dict.fromkeys(tasks), key=self.hierarchy.level)

    def _has_learnt(self, task: str) -> bool:
        return any(nodes.pair(task)[1].any() for nodes in self.hft_nodes.values())

    def _is_written(self, page: Mapping[str, Any]) -> bool:
        values = [memory.pair(str(page["id"]))[1] for memory in self.hft_memory.values()]
        return page["sealed"] or any(bool(up_OS.any()) for up_OS in values if up_OS.device.type != "meta")

    def _add_page(self, writers: Sequence[str]) -> None:
        page_id = 1 + max((page["id"] for page in self.config.pages), default=0)
        slots = self.config.memory_config.slots
        page = {"id": page_id, "slots": slots, "sealed": False, "writers": list(writers)}
        self.config.pages.append(page)
        self._make_page(page)
        with torch.no_grad(), forked_rng(self):
            # Keys that depend on nothing but the page: a stage that is started again starts from the same ones.
            torch.manual_seed(page_id)
            for memory in self.hft_memory.values():
                memory.reset_parameters(str(page_id))

    @torch.no_grad()
    def _begin_as_parents(self, task: str, pages: Iterable[int] = ()) -> None:
        """Lets a task read what its parents read, and further pages, with its parents' gates."""
        entry = self.config.task(task)
        parents = self.hierarchy.parents(task)
        path = self.hierarchy.path(task)
        above = [self.config.task(parent) for parent in parents]
        entry["borrows"] = list(dict.fromkeys(node for up in above for node in up["borrows"] if node not in path))
        entry["pages"] = sorted({page_id for up in above for page_id in up["pages"]} | set(pages))
        self._make_gates(task)
        self._reset_gates(task)
        self.hft_gates.of(task).requires_grad_(bool(self.learning_gates(task)))

    def _reset_gates(self, task: str) -> None:
        parents = self.hierarchy.parents(task)
        own = self._open_page(task)  # a sibling may have written it already, if the stage is started again
        silent = [str(page["id"]) for page in self.config.pages if page["id"] == own or not self._is_written(page)]
        self.hft_gates.reset_parameters(task, {name: self.sources(name) for name in (task, *parents)}, parents, silent)

    def set_trainable(self, tasks: Iterable[str]) -> None:
        """Makes what these tasks train trainable, and nothing else: see `learning_parameters`.

        Raises:
            ValueError: if one of them is unknown or sealed.
        """
        self._check_unfolded()
        tasks = list(tasks)
        for task in tasks:
            if self.config.task(task)["sealed"]:
                raise ValueError(f"Task {task!r} is sealed and cannot train again; add a task with it as its parent.")
        self.requires_grad_(False)
        for task in tasks:
            for parameter in self.learning_parameters(task).values():
                parameter.requires_grad_(True)

    @torch.inference_mode(False)
    @torch.no_grad()
    def seal(
        self,
        tasks: Iterable[str],
        rank_tolerance: float | None = None,
        validation: Mapping[str, Iterable[Mapping[str, Sequence[int]]]] | None = None,
    ) -> list[HFTTrim]:
        """Ends the learning of these tasks for good: from here on, what they compute does not change any more.

        Of tasks that are sealed already nothing changes.

        Their nodes and the page that they wrote are rounded to the backbone's dtype, in which they compute; gates stay
        float32.

        Args:
            tasks: their names.
            rank_tolerance: cut each node, but no page, to the smallest rank that keeps the task's mean loss within this many
                nats a token, see `trim`; None: no cuts.
            validation: task -> tokenised rows that this is judged by.

        Returns:
            What each cut found out; empty without `rank_tolerance`.

        Raises:
            ValueError: if one of them is unknown, or stands on a task that is not sealed, or writes a page together with a
                task that would stay open, or has learnt numbers that are not finite; with `rank_tolerance`, as `trim`. Then
                nothing has changed.
        """
        self._check_unfolded()
        tasks = [task for task in self._each_once(tasks) if not self.config.task(task)["sealed"]]
        for task in tasks:
            for parent in self.hierarchy.parents(task):
                if not self.config.task(parent)["sealed"] and parent not in tasks:
                    raise ValueError(
                        f"Task {task!r} stands on {parent!r}, which is not sealed; seal {parent!r} first."
                    )
        pages = [page for page in self.config.pages if not page["sealed"] and set(page["writers"]) & set(tasks)]
        for page in pages:
            for other in page["writers"]:
                if other not in tasks:
                    raise ValueError(
                        f"Task {other!r} still writes the memory page {page['id']} together with {', '.join(tasks)}; "
                        "seal the tasks of a stage together."
                    )
        for task in tasks:
            for name, parameter in self.learning_parameters(task).items():
                rounded = parameter if name.startswith("hft_gates.") else parameter.to(self.backbone.dtype)
                if not bool(rounded.isfinite().all()):
                    raise ValueError(
                        f"Task {task!r} has learnt numbers that are not finite in {rounded.dtype} ({name}), so it is not "
                        "sealed: its training diverged. Begin it anew with a lower learning rate; in a run, delete its "
                        "stage's folder and resume."
                    )
        trims = []
        if rank_tolerance is not None:
            rows = {task: list((validation or {}).get(task, ())) for task in tasks}
            for task in tasks:
                self._check_trim(task, rows[task], rank_tolerance)
            trims = self._trim_all(rows, rank_tolerance)
        for entry, parameters in [
            *((self.config.task(task), self.task_parameters(task)) for task in tasks),
            *((page, self.page_parameters(page["id"])) for page in pages),
        ]:
            entry.update(sealed=True, dtype=str(self.backbone.dtype).removeprefix("torch."))
            for name, parameter in parameters.items():
                parameter.requires_grad_(False)
                parameter.grad = None
                if not name.startswith("hft_gates."):
                    parameter.data = parameter.data.to(self.backbone.dtype)
        return trims


def forked_rng(model: HFTTasks) -> contextlib.AbstractContextManager[None]:
    """A block that draws random numbers on the model's devices and leaves the generators as they were."""
    used = {device.index or 0 for device in model._device_of().values() if device.type == "cuda"}
    return torch.random.fork_rng(devices=sorted(used))


def _listed(parents: Any) -> Any:
    """Parents as a list, once, since they may be a generator; what `Hierarchy` refuses, as it is."""
    return parents if parents is None or isinstance(parents, str) else list(parents)
