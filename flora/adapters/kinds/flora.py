"""FLoRA (Wen & Chaudhuri, ICLR 2024): W0 ∘ (Σ_j a_j b_jᵀ) / r.

Files: `flora_A` `[r, out]` holds the a_j, `flora_B` `[r, in]` the b_j.
"""

from collections.abc import Mapping

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from flora.adapters.config import BlockConfig, Shape
from flora.adapters.core import LayerFactors, Layers
from flora.adapters.targets import by_pattern
from flora.errors import InvalidAdapterError

SPREAD = 0.1
"""Standard deviation of the start's ε: at 0 all ranks stay equal for ever, tiny ones are slow."""


class Config(BlockConfig):
    r: PositiveInt = 1
    rank_pattern: dict[str, PositiveInt] = Field(default_factory=dict)
    share_input: bool = False
    inert = BlockConfig.inert | {"init_weights"}


def shapes(config: Config, module: str) -> dict[str, Shape]:
    r = by_pattern(config.rank_pattern, module, config.r)
    return {"flora_A": (r, "out"), "flora_B": (r, "in")}


def fill(
    config: Config,
    module: str,
    params: Mapping[str, Tensor],
    base: Layers,
) -> LayerFactors:
    a, b = params["flora_A"], params["flora_B"]
    return LayerFactors(hadamard_out=a / a.shape[0], hadamard_in=b)


def init(
    config: Config, module: str, base: Layers, generator: torch.Generator
) -> dict[str, Tensor]:
    """The identity to rounding: A = 1, B = 1 + ε, where ε sums to zero over the ranks.

    Raises InvalidAdapterError for `share_input`, as a layer alone has none to share with.
    """
    if config.share_input:
        raise InvalidAdapterError("share_input is for training with PEFT: see flora.FloraConfig")
    r = by_pattern(config.rank_pattern, module, config.r)
    out_features, in_features = base.shapes[module]
    noise = SPREAD * torch.randn(r, in_features, generator=generator)
    return {
        "flora_A": torch.ones(r, out_features),
        "flora_B": 1 + noise - noise.mean(dim=0),
    }
