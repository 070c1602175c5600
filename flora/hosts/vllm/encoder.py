"""The encoder of an encoder-decoder model, such as Whisper's, which takes items and not tokens.

In a step it runs over the items, such as audio, of the requests that begin. What it makes of them
goes, in the same step and order, through the decoder's cross-attention, which keeps it.
"""

from typing import Any

from torch import Tensor, nn
from vllm.model_executor.layers.attention import CrossAttention

from flora.errors import ShapeError
from flora.hosts.vllm.layers import Current

ENCODER = "encoder"
"""The module of an encoder-decoder model that is its encoder."""

CROSS = "kv_proj"
"""The layer of a cross-attention that makes keys and values of the encoder's output."""


class Items(Current):
    """The items that the encoder takes in a step; a unit is an item."""

    def split(self, x: Tensor, units: tuple[int, ...]) -> tuple[tuple[int, ...], Tensor]:
        """See `Current.split`.

        x: `[items, columns, in]`, or `[items · columns, in]` where they are laid one after another.

        Raises ShapeError where x is not of all items of the step.
        """
        count, outer = len(units), x.shape[:-1]
        fits = outer[0] == count if len(outer) > 1 else outer[0] % count == 0
        if not fits:
            raise ShapeError(f"an encoder's layer at {tuple(outer)}, its step at {count} items")
        return units, x.reshape(count, -1, x.shape[-1])


def in_encoder(name: str) -> bool:
    """Whether a layer of that name is the encoder's."""
    return ENCODER in name.split(".")


def reads_encoder(model: nn.Module, name: str) -> bool:
    """Whether a layer of that name takes the encoder's output."""
    parent, _, own = name.rpartition(".")
    beside = model.get_submodule(parent).children()
    return own == CROSS and any(isinstance(module, CrossAttention) for module in beside)


def map_items(model: Any) -> None:
    """Have vLLM say the adapter of each item, as it does for towers that have a LoRA of their own.

    It asks the model for an item's tokens: one of each, so that a unit is an item.
    """
    model.get_mm_lora_token_counts = lambda **_: (1, None)
