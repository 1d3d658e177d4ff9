"""What transformers asks of the whole model, and the backbone answers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from .backbone_hft import decoder_of
from .path_hft import keep_path


class HFTPassedOn:
    """The part of `HFTPreTrainedModel` that hands over to the backbone. `super()` is `PreTrainedModel`."""

    @property
    def base_model(self) -> PreTrainedModel:
        """The decoder without its head: what trainers call when they compute the loss themselves."""
        return decoder_of(self.backbone)

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        return self.backbone.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.backbone.set_output_embeddings(new_embeddings)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """The embeddings as they are: what HFT saves does not hold any, and new ones would never learn.

        Raises:
            ValueError: another size than the backbone has.
        """
        size = self.get_input_embeddings().num_embeddings
        wanted, multiple = size if new_num_tokens is None else new_num_tokens, pad_to_multiple_of or 1
        if (wanted := -(-wanted // multiple) * multiple) != size:
            raise ValueError(
                f"The backbone has {size} embeddings and is frozen, so they cannot become {wanted}. Resize the plain "
                "model, save it, and build on that: HFTForCausalLM.from_backbone(folder)."
            )
        return self.get_input_embeddings()

    def set_attn_implementation(self, attn_implementation: str | dict, allow_all_kernels: bool = False) -> None:
        """The backbone's; a dict may name it by `text_config`, and its own parts by theirs."""
        if isinstance(attn_implementation, dict) and "text_config" in attn_implementation:
            attn_implementation = attn_implementation["text_config"]
        self.backbone.set_attn_implementation(attn_implementation, allow_all_kernels)
        self.config._attn_implementation_internal = self.backbone.config._attn_implementation

    @property
    def loss_function(self) -> Callable[..., torch.Tensor]:
        """The backbone's, which computes the loss; setting it sets that one."""
        return self.backbone.loss_function

    @loss_function.setter
    def loss_function(self, value: Callable[..., torch.Tensor]) -> None:
        self.backbone.loss_function = value

    def is_custom_code(self) -> bool:
        """Whether the backbone is: then transformers initialises less, for code that writes over what is loaded.

        HFT's own does not, and of a backbone of transformers no module may be left out, as Falcon-H1's would.
        """
        return self.backbone.is_custom_code()

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable[..., Any] = checkpoint, **kwargs: Any
    ) -> None:
        if not any(hasattr(module, "gradient_checkpointing") for module in self.backbone.modules()):
            raise ValueError(
                f"The layers of a {self.config.text_config.model_type!r} cannot be checkpointed in transformers; train with "
                "gradient_checkpointing=False."
            )
        super()._set_gradient_checkpointing(enable, keep_path(gradient_checkpointing_func), **kwargs)
