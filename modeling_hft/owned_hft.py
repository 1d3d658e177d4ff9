"""Which parameters are whose: what a task reads, what it owns, and what it trains."""

from torch import nn

from .path_hft import HFTSources


class HFTOwnership:
    """The part of `HFTPreTrainedModel` that knows whose a parameter is."""

    def sources(self, task: str) -> HFTSources:
        """What a task reads: the nodes on its path, those it borrows beside it, and memory pages."""
        return HFTSources.of(self.config.task(task), self.hierarchy.path(task))

    def _open_page(self, task: str) -> int | None:
        """The page that an open task writes."""
        for page in self.config.pages:
            if task in page["writers"] and not page["sealed"]:
                return page["id"]
        return None

    def inherited(self, task: str) -> list[int]:
        """The columns of a task's gates that stand for what it found, not for its own node or its own stage's page."""
        own = {task, *(f"page:{page['id']}" for page in self.config.pages if task in page["writers"])}
        return [column for column, label in enumerate(self.sources(task).labels()) if label not in own]

    def learning_gates(self, task: str) -> list[int]:
        """The columns of an open task's gates that learn with it: those on what it inherits, if gates learn at all.

        The others keep their start: what they would scale is learning itself, its scale included.
        """
        return self.inherited(task) if self.config.gating_config.trainable else []

    def _read_parameters(self, task: str) -> list[nn.Parameter]:
        """All parameters that a task reads: its gates, and its sources' factors."""
        sources = self.sources(task)
        read = [self.hft_gates.of(task)]
        for modules, names in ((self.hft_nodes, sources.nodes), (self.hft_memory, sources.pages)):
            for factors in modules.values():
                read += factors.pairs(names)
        return read

    def task_parameters(self, task: str) -> dict[str, nn.Parameter]:
        """All that a task owns, its gates and its nodes, by the names of `named_parameters`."""
        self.hierarchy.check(task)
        own = {f"hft_gates.g_{task}": self.hft_gates.of(task)}
        for key, nodes in self.hft_nodes.items():
            own[f"hft_nodes.{key}.A_{task}"], own[f"hft_nodes.{key}.B_{task}"] = nodes.pair(task)
        return own

    def page_parameters(self, page_id: int) -> dict[str, nn.Parameter]:
        """The keys and values of a memory page at all linears, by the names of `named_parameters`."""
        self.config.page(page_id)
        own = {}
        for key, memory in self.hft_memory.items():
            own[f"hft_memory.{key}.K_{page_id}"], own[f"hft_memory.{key}.V_{page_id}"] = memory.pair(str(page_id))
        return own

    def learning_parameters(self, task: str) -> dict[str, nn.Parameter]:
        """All that an open task trains: its node, its gates if any of them learns, and the page that its stage writes."""
        page_id, own = self._open_page(task), self.task_parameters(task)
        if not self.learning_gates(task):
            del own[f"hft_gates.g_{task}"]
        return {**own, **(self.page_parameters(page_id) if page_id is not None else {})}
