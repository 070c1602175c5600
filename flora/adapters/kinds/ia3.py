"""IA3 (Liu et al., NeurIPS 2022): l ∘ (W0 x + bias); in a feed-forward layer W0 (l ∘ x) + bias.

Files: `ia3_l`, `[out, 1]`, or `[1, in]` for the layers that `feedforward_modules` means.
"""

import re
from collections.abc import Mapping
from typing import Self

import torch
from pydantic import Field, field_validator
from torch import Tensor

from flora.adapters.config import AdapterConfig, Shape, check_pattern
from flora.adapters.core import LayerFactors, Layers


class Config(AdapterConfig):
    feedforward_modules: list[str] | str = Field(default_factory=list)
    rank_field = None
    read_by_fill = frozenset({"feedforward_modules"})
    inert = AdapterConfig.inert | {"fan_in_fan_out", "init_ia3_weights"}

    @field_validator("feedforward_modules")
    @classmethod
    def _pattern_compiles(cls, value: list[str] | str) -> list[str] | str:
        if isinstance(value, str):
            check_pattern(value)
        return value

    def with_targets(self, names: list[str]) -> Self:
        """As a pattern where PEFT would miss a name among those of the targets."""
        config, endings = super().with_targets(names), self.feedforward_modules
        if isinstance(endings, str) or set(endings) <= set(names):
            return config
        pattern = f".*(?:{'|'.join(map(re.escape, endings))})"
        return config.model_copy(update={"feedforward_modules": pattern})

    def scales_input(self, module: str) -> bool:
        """Whether a layer is a feed-forward one, by PEFT's rule."""
        if isinstance(self.feedforward_modules, str):
            return re.fullmatch(self.feedforward_modules, module) is not None
        return any(module.endswith(ending) for ending in self.feedforward_modules)


def shapes(config: Config, module: str) -> dict[str, Shape]:
    return {"ia3_l": (1, "in") if config.scales_input(module) else ("out", 1)}


def fill(config: Config, module: str, params: Mapping[str, Tensor], base: Layers) -> LayerFactors:
    scale = params["ia3_l"].reshape(1, -1)
    out_features, in_features = base.shapes[module]
    if config.scales_input(module):
        return LayerFactors(hadamard_in=scale, hadamard_out=scale.new_ones(1, out_features))
    bias = base.bias(module)
    return LayerFactors(
        hadamard_in=scale.new_ones(1, in_features),
        hadamard_out=scale,
        bias=None if bias is None else scale[0] * bias.to(scale),
    )


def init(
    config: Config,
    module: str,
    base: Layers,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """The identity: ones."""
    out_features, in_features = base.shapes[module]
    scales_input = config.scales_input(module)
    return {"ia3_l": torch.ones(1, in_features) if scales_input else torch.ones(out_features, 1)}
