"""Asking the router: features of prompts from the backbone's lowest layers, and which tasks answer them.

B batch, T tokens, D hidden size.
"""

import contextlib
import dataclasses
import math
import re
import statistics
import threading
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from .hierarchy_hft import BACKBONE
from .padding_hft import left_padded
from .path_hft import HFTPath, on_path
from .router_hft import HFTRoute


class _EnoughError(Exception):
    """The layers that a prompt is routed by have run."""


class HFTRouting:
    """The part of `HFTPreTrainedModel` that finds out which task a prompt belongs to."""

    def route(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> list[HFTRoute]:
        """Which task each prompt belongs to.

        Args:
            input_ids: [B, T].
            attention_mask: [B, T]; by default all tokens count.

        Returns:
            A decision a row, with names and probabilities.
        """
        return self.route_features(self.prompt_features(input_ids, attention_mask))

    def route_features(self, features_ND: torch.Tensor) -> list[HFTRoute]:
        """As `route`, for N prompts whose features `features_of` or `prompt_features` gave."""
        return [
            dataclasses.replace(route, task=BACKBONE, reason=f"it belongs to {route.task}, which is not loaded")
            if route.task in self.config.left_out
            else route
            for route in self.hft_router.route(features_ND, self.config.whole_hierarchy())
        ]

    def add_routes(self, task: str, prompts: Sequence[Sequence[int]], batch_size: int = 16) -> None:
        """Lets the router know a task by prompts of it. What it knows of other tasks stays.

        Args:
            task: one of the hierarchy's.
            prompts: token ids, as `generate` gets them; two or more. Every fourth is not learnt from but calibrates.
            batch_size: prompts at once.

        Raises:
            ValueError: an unknown task, fewer than two prompts, an empty one, or one whose hidden states are not finite.
        """
        self.hierarchy.check(task)
        self._check_prompts(task, prompts)
        features_ND = self.features_of(prompts, batch_size)
        held_out_N = torch.arange(len(prompts), device="cpu") % 4 == 0
        self.hft_router.add(task, features_ND[~held_out_N], features_ND[held_out_N])

    def _check_prompts(self, task: str, prompts: Sequence[Sequence[int]]) -> None:
        if len(prompts) < 2:
            raise ValueError(f"The router got {len(prompts)} prompts of task {task!r}; give two or more.")
        if empty := [place for place, prompt in enumerate(prompts) if not len(prompt)]:
            raise ValueError(f"Prompt {empty[0]} of task {task!r} has no tokens ({len(empty)} such); leave it out.")
        if isinstance(prompts, str) or any(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"The prompts of task {task!r} are texts; give token ids: tokenizer(texts)['input_ids'].")

    def features_of(self, prompts: Sequence[Sequence[int]], batch_size: int = 16) -> torch.Tensor:
        """The features [N, D] of N prompts, given as token ids, computed in batches of similar length; on the CPU."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        device = self.get_input_embeddings().weight.device
        features_ND = torch.zeros(len(prompts), self.config.text_config.hidden_size, device="cpu")
        for begin in range(0, len(order), batch_size):
            chosen = order[begin : begin + batch_size]
            ids_BT, mask_BT = left_padded([prompts[i] for i in chosen], device)
            features_ND[chosen] = self.prompt_features(ids_BT, mask_BT).cpu()
        return features_ND

    @torch.no_grad()
    def prompt_features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """The mean hidden state [B, D] of each prompt's own tokens after the backbone's first layers, float32.

        Only `router_config.layer` layers run, without any task. Tokens at the beginning and end that are the chat template's
        do not count, nor do tokens before the last ones that the backbone can hold. NaN for a row of nothing but padding,
        infinite where hidden states are not finite.

        Raises:
            ValueError: prompts without tokens.
        """
        self._check_unmerged()  # it looks at the backbone's own features
        if input_ids.ndim != 2:
            raise ValueError(
                f"`input_ids` has the shape {list(input_ids.shape)}; the router reads rows of tokens, [B, T]."
            )
        if input_ids.shape[-1] == 0:
            raise ValueError(f"`input_ids` has the shape {list(input_ids.shape)}: there are no tokens to route by.")
        mask_BT = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        if longest := getattr(self.config.text_config, "max_position_embeddings", None):
            input_ids, mask_BT = _last_tokens(input_ids, mask_BT, longest)
        # Found by the linears in them: the config's number of layers is a lower one while transformers drafts by early exit.
        layers = self.base_model.get_submodule(statistics.mode(re.split(r"\.\d+\.", n)[0] for n in self._layer_of))
        caught: list[torch.Tensor] = []
        asks = threading.get_ident()

        # Another thread that has met the hook calls it without `kwargs` once it is removed.
        def stop(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] = MappingProxyType({})) -> None:
            if threading.get_ident() != asks:
                return  # another thread's pass goes on
            caught.append(args[0] if args else kwargs["hidden_states"])
            raise _EnoughError

        hook = layers[self.hft_router.layer].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            with on_path(HFTPath(self._owner, ())), _without_dropout(self.base_model):
                self.base_model(
                    input_ids=input_ids,
                    attention_mask=mask_BT,
                    position_ids=(mask_BT.cumsum(1) - 1).clamp(min=0),
                    use_cache=False,
                )
        except _EnoughError:
            pass
        finally:
            hook.remove()
        hidden_BTD = caught[0].float()
        if hidden_BTD.ndim > 3:  # several residual streams
            hidden_BTD = hidden_BTD.flatten(2, -2).mean(2)
        own_BT = self._own_tokens(input_ids, mask_BT).to(hidden_BTD.device)
        total_BD = (hidden_BTD * own_BT[..., None]).sum(1)
        count_B1 = own_BT.sum(1, keepdim=True)
        mean_BD = (total_BD / count_B1).nan_to_num(math.inf, math.inf, -math.inf)
        return mean_BD.where(count_B1 > 0, math.nan)

    def _own_tokens(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """1 for the tokens of a prompt that are not the chat template's [B, T]."""
        prefix, suffix = self.config.router_config.prefix or [], self.config.router_config.suffix or []
        place_BT = attention_mask.cumsum(1) - 1  # among the row's real tokens
        count_B1 = attention_mask.sum(1, keepdim=True)
        real_BT = attention_mask.bool()
        own_BT = real_BT
        for constant, index_BT in (
            (prefix, place_BT),
            (suffix, place_BT - count_B1 + len(suffix)),
        ):
            if constant:
                within_BT = real_BT & (index_BT >= 0) & (index_BT < len(constant))
                expected = torch.tensor(constant, device=input_ids.device)[index_BT.clamp(0, len(constant) - 1)]
                matches_B1 = ((input_ids == expected) | ~within_BT).all(1, keepdim=True)
                own_BT = own_BT & ~(within_BT & matches_B1)
        nothing_left_B1 = ~own_BT.any(1, keepdim=True)
        return own_BT | (real_BT & nothing_left_B1)


def _last_tokens(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Up to `count` columns with the last tokens of each row [B, T], wherever its padding is, and their mask."""
    if input_ids.shape[1] <= count:
        return input_ids, attention_mask
    place_BT = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    # Padding before tokens, which keep their order.
    order_BT = torch.where(attention_mask.bool(), place_BT, place_BT - input_ids.shape[1]).argsort(dim=1)[:, -count:]
    return input_ids.gather(1, order_BT), attention_mask.gather(1, order_BT)


@contextlib.contextmanager
def _without_dropout(decoder: nn.Module) -> Iterator[None]:
    """Inside, the decoder is in evaluation mode. Nothing is written where it is already: other threads may use it."""
    training = [module for module in decoder.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
