"""HiRA (Huang et al., ICLR 2025): W0 + W0 ∘ (BA), without a scaling.

Files: `hira_A` `[r, in]`, `hira_B` `[out, r]`.
"""

import math
from collections.abc import Mapping

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from flora.adapters.config import BlockConfig, Shape
from flora.adapters.core import LayerFactors, Layers
from flora.errors import InvalidAdapterError


class Config(BlockConfig):
    r: PositiveInt = 32
    rank_pattern: dict[str, PositiveInt] = Field(default_factory=dict)
    inert = BlockConfig.inert | {"fan_in_fan_out", "hira_dropout", "init_weights"}


def shapes(config: Config, module: str) -> dict[str, Shape]:
    # PEFT 0.21 follows the pattern for a model's second adapter only: then the tensors say.
    r = "rank" if config.rank_pattern else config.r
    return {"hira_A": (r, "in"), "hira_B": ("out", r)}


def fill(
    config: Config,
    module: str,
    params: Mapping[str, Tensor],
    base: Layers,
) -> LayerFactors:
    """One pair of ones for W0 itself, then (B[:, j], A[j])."""
    b, a = params["hira_A"], params["hira_B"].T
    return LayerFactors(
        hadamard_in=torch.cat([b.new_ones(1, b.shape[1]), b]),
        hadamard_out=torch.cat([a.new_ones(1, a.shape[1]), a]),
    )


def init(
    config: Config, module: str, base: Layers, generator: torch.Generator
) -> dict[str, Tensor]:
    """The identity: A as `nn.Linear` starts (PEFT's choice), B = 0.

    Raises InvalidAdapterError for a rank_pattern, which PEFT would not read.
    """
    if config.rank_pattern:
        raise InvalidAdapterError("rank_pattern cannot be trained here: PEFT does not read it")
    out_features, in_features = base.shapes[module]
    bound = 1 / math.sqrt(in_features)
    return {
        "hira_A": torch.empty(config.r, in_features).uniform_(-bound, bound, generator=generator),
        "hira_B": torch.zeros(out_features, config.r),
    }
