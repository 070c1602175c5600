"""LoRA and its kin: W0 + s BA.

LoRA (Hu et al., ICLR 2022) with s = alpha/r; rsLoRA (Kalajdzievski, 2023) with s = alpha/√r; DoRA
(Liu et al., ICML 2024) scales each row of that to the length m.

Files: `lora_A.weight` `[r, in]`, `lora_B.weight` `[out, r]`; DoRA's m, `lora_magnitude_vector`
`[out]`; with `lora_bias` B's own, `lora_B.bias` `[out]`; with `bias` the layers' own.
"""

import math
from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field, FiniteFloat, PositiveInt, model_validator
from torch import Tensor

from flora.adapters.config import BiasedConfig, Shape, saved_bias
from flora.adapters.core import LayerFactors, Layers
from flora.adapters.targets import by_pattern
from flora.errors import InvalidAdapterError


class Config(BiasedConfig):
    r: PositiveInt = 8
    lora_alpha: FiniteFloat = 8.0
    use_rslora: bool = False
    use_dora: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    lora_bias: bool = False
    rank_pattern: dict[str, PositiveInt] = Field(default_factory=dict)
    alpha_pattern: dict[str, FiniteFloat] = Field(default_factory=dict)
    # The other starts (pissa, olora, corda, loftq, lora_ga) rewrite W0 when PEFT reads them.
    init_lora_weights: Literal[True, False, "gaussian", "eva", "orthogonal"] = True
    read_by_fill = frozenset({"lora_alpha", "use_rslora", "use_dora", "alpha_pattern"})
    inert = BiasedConfig.inert | {
        "ensure_weight_tying",
        "eva_config",
        "fan_in_fan_out",
        "lora_dropout",
        "megatron_core",
        "qalora_group_size",
    }

    @model_validator(mode="after")
    def _go_together(self) -> "Config":
        if self.use_dora and self.lora_bias:
            raise ValueError("use_dora and lora_bias cannot go together")
        return self


def shapes(config: Config, module: str) -> dict[str, Shape]:
    r = by_pattern(config.rank_pattern, module, config.r)
    found: dict[str, Shape] = {"lora_A.weight": (r, "in"), "lora_B.weight": ("out", r)}
    if config.use_dora:
        found["lora_magnitude_vector"] = ("out",)
    if config.lora_bias:
        found["lora_B.bias"] = ("out",)
    return found


def fill(config: Config, module: str, params: Mapping[str, Tensor], base: Layers) -> LayerFactors:
    bias = saved_bias(params)
    if "lora_A.weight" not in params:
        return LayerFactors(bias=bias)
    down, up = params["lora_A.weight"], params["lora_B.weight"]
    r = down.shape[0]
    alpha = by_pattern(config.alpha_pattern, module, config.lora_alpha)
    scaling = alpha / (math.sqrt(r) if config.use_rslora else r)
    up = up.T * scaling
    if (own := params.get("lora_B.bias")) is not None:
        under = base.bias(module) if bias is None else bias
        bias = own * scaling + (0 if under is None else under.to(own))
    if (magnitude := params.get("lora_magnitude_vector")) is None:
        return LayerFactors(down=down, up=up, bias=bias)
    a = magnitude / _row_norm(module, down, up, base)
    return LayerFactors(
        hadamard_in=down.new_ones(1, down.shape[1]),
        hadamard_out=a.unsqueeze(0),
        down=down,
        up=up * a,
        bias=bias,
    )


def init(
    config: Config, module: str, base: Layers, generator: torch.Generator
) -> dict[str, Tensor]:
    """The identity: A as `nn.Linear` starts (PEFT's choice), B = 0, m = ‖W0‖ by row.

    Raises InvalidAdapterError where the config asks for another start, or for biases.
    """
    wanted = {"init_lora_weights": True, "bias": "none", "lora_bias": False}
    for name, value in wanted.items():
        if getattr(config, name) is not value:
            raise InvalidAdapterError(f"{name} = {getattr(config, name)!r} cannot be trained here")
    r = by_pattern(config.rank_pattern, module, config.r)
    out_features, in_features = base.shapes[module]
    bound = 1 / math.sqrt(in_features)
    params = {
        "lora_A.weight": torch.empty(r, in_features).uniform_(-bound, bound, generator=generator),
        "lora_B.weight": torch.zeros(out_features, r),
    }
    if config.use_dora:
        params["lora_magnitude_vector"] = base.row_norm2(module).sqrt().float().cpu()
    return params


@torch.no_grad()
def _row_norm(module: str, down_RI: Tensor, up_RO: Tensor, base: Layers) -> Tensor:
    """‖W0 + UᵀV‖ by row, `[out]`, from W0's products alone; a constant for gradients (section 4.3).

    ‖W0 + UᵀV‖² = ‖W0‖² + 2 Σ_k U_k ∘ W0 V_k + diag(Uᵀ (V Vᵀ) U).
    """
    cross_RO = base.product(module, down_RI).to(up_RO)
    norm2_O = base.row_norm2(module).to(up_RO)
    norm2_O = norm2_O + (2 * cross_RO * up_RO).sum(dim=0)
    norm2_O = norm2_O + ((down_RI @ down_RI.T @ up_RO) * up_RO).sum(dim=0)
    return norm2_O.clamp(min=0).sqrt()
