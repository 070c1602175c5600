"""VeRA (Kopiczko et al., ICLR 2024): W0 + diag(λ_b) B diag(λ_d) A, A and B random and shared.

Files: `vera_lambda_b` `[out]`, `vera_lambda_d` `[r]`; for all layers together `vera_A`
`[r, largest in]` and `vera_B` `[largest out, r]`, of which each layer takes its first columns and
rows. Where these are not saved they are drawn anew.
"""

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from flora.adapters.config import BiasedConfig, Shape, saved_bias
from flora.adapters.core import LayerFactors, Layers
from flora.errors import InvalidAdapterError


class Config(BiasedConfig):
    r: PositiveInt = 256
    projection_prng_key: int = Field(default=0, ge=-(2**63), lt=2**64)
    save_projection: bool = True
    bias: Literal["none", "all", "vera_only"] = "none"
    read_by_fill = frozenset({"projection_prng_key", "save_projection"})
    inert = BiasedConfig.inert | {"d_initial", "fan_in_fan_out", "init_weights", "vera_dropout"}

    def shared(self) -> Mapping[str, Shape]:
        if not self.save_projection:
            return {}
        return {"vera_A": (self.r, "in"), "vera_B": ("out", self.r)}

    def derived(self, out_features: int, in_features: int) -> Mapping[str, Tensor]:
        a, b = _projections(self.r, out_features, in_features, self.projection_prng_key)
        return {"vera_A": a, "vera_B": b}


def shapes(config: Config, module: str) -> dict[str, Shape]:
    return {"vera_lambda_b": ("out",), "vera_lambda_d": (config.r,)}


def fill(
    config: Config,
    module: str,
    params: Mapping[str, Tensor],
    base: Layers,
) -> LayerFactors:
    bias = saved_bias(params)
    if "vera_lambda_b" not in params:
        return LayerFactors(bias=bias)
    out_features, in_features = base.shapes[module]
    down = params["vera_lambda_d"].unsqueeze(1) * params["vera_A"][:, :in_features]
    up = params["vera_lambda_b"] * params["vera_B"][:out_features].T
    return LayerFactors(down=down, up=up, bias=bias)


def init(
    config: Config, module: str, base: Layers, generator: torch.Generator
) -> dict[str, Tensor]:
    """The identity: λ_b = 0, λ_d = 0.1 (the paper's choice).

    Raises InvalidAdapterError where the config asks for biases.
    """
    if config.bias != "none":
        raise InvalidAdapterError(f"bias = {config.bias!r} cannot be trained here")
    return {
        "vera_lambda_b": torch.zeros(base.shapes[module][0]),
        "vera_lambda_d": torch.full((config.r,), 0.1),
    }


@lru_cache(maxsize=2)
def _projections(r: int, out_features: int, in_features: int, key: int) -> tuple[Tensor, Tensor]:
    """A and B as PEFT draws them: Kaiming's uniform distribution, on the CPU, A first."""
    generator = torch.Generator("cpu").manual_seed(key)

    def draw(rows: int, columns: int) -> Tensor:
        bound = math.sqrt(3) * math.sqrt(2) / math.sqrt(columns)
        return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)

    return draw(r, in_features), draw(out_features, r)
