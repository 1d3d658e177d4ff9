"""Room for what tasks own: empty parameters for all that the config lists, each where it computes."""

from collections.abc import Mapping
from typing import Any

import torch

from .nodes_hft import flat
from .owned_hft import HFTOwnership


class HFTRoom(HFTOwnership):
    """The part of `HFTPreTrainedModel` that makes and places parameters."""

    def _make_node(self, task: Mapping[str, Any]) -> None:
        """Empty factors for a task: float32 while it can still learn, the model's dtype once it is sealed."""
        for name, device in self._device_of().items():
            self.hft_nodes[flat(name)].add(task["name"], task["rank"], _dtype(task), device)

    def _make_gates(self, task: str) -> None:
        self.hft_gates.add(task, len(self.sources(task)), self._main_device())

    def _make_page(self, page: Mapping[str, Any]) -> None:
        for name, device in self._device_of().items():
            if flat(name) in self.hft_memory:
                self.hft_memory[flat(name)].add(str(page["id"]), page["slots"], _dtype(page), device)

    @torch.inference_mode(False)
    def _make_room(self) -> None:
        """Empty parameters for all that the config lists and the model lacks; none for pages that it no longer lists."""
        listed = {str(page["id"]) for page in self.config.pages}
        for memory in self.hft_memory.values():
            for gone in set(memory.names()) - listed:
                memory.remove(gone)
        nodes, memory = next(iter(self.hft_nodes.values())), next(iter(self.hft_memory.values()), None)
        for page in self.config.pages:
            if memory is not None and str(page["id"]) not in memory.names():
                self._make_page(page)
        for task in self.config.tasks:
            if task["name"] not in nodes.names() or len(nodes.pair(task["name"])[0]) != task["rank"]:
                self._make_node(task)
            if task["name"] not in self.hft_gates.tasks() or (
                self.hft_gates.of(task["name"]).shape[1] != len(self.sources(task["name"]))
            ):
                self._make_gates(task["name"])

    def _forget_factors(self) -> None:
        """Frees the fused factors of earlier passes."""
        self._kept.clear()
        for fused in self._fused.values():
            fused.forget()

    def _device_of(self) -> dict[str, torch.device]:
        """Where the weight of each adapted linear is, or what stands beside it should be."""
        main = self._main_device()
        devices = {name: self.base_model.get_submodule(name).weight.device for name in self._layer_of}
        return {name: main if device.type == "meta" else device for name, device in devices.items()}

    def _place_own(self) -> None:
        """Puts nodes and pages beside their linears, and the gates where the model begins, wherever loading put them."""
        for name, device in self._device_of().items():
            self.hft_nodes[flat(name)].to(device)
            if flat(name) in self.hft_memory:
                self.hft_memory[flat(name)].to(device)
        self.hft_gates.to(self._main_device())

    def _main_device(self) -> torch.device:
        """That of the embeddings, else the first; "meta" (offloaded, or not loaded yet) only if all weights are there."""
        weights = (self.backbone.get_input_embeddings().weight, *self.backbone.parameters())
        return next((weight.device for weight in weights if weight.device.type != "meta"), weights[0].device)


def _dtype(entry: Mapping[str, Any]) -> torch.dtype:
    """Of a task's or a page's factors."""
    return torch.get_default_dtype() if entry["sealed"] else torch.float32
