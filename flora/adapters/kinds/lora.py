"""LoRA (Hu et al., ICLR 2022) and rsLoRA (Kalajdzievski, 2023): W0 + s BA, s = alpha/r or alpha/√r.

Files: `lora_A.weight` `[r, in]`, `lora_B.weight` `[out, r]`.
"""

import math
from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field, FiniteFloat, PositiveInt
from torch import Tensor

from flora.adapters.core import LayerFactors
from flora.adapters.targets import AdapterConfig, by_pattern
from flora.errors import InvalidAdapterError


class Config(AdapterConfig):
    r: PositiveInt = 8
    lora_alpha: FiniteFloat = 8.0
    use_rslora: bool = False
    rank_pattern: dict[str, PositiveInt] = Field(default_factory=dict)
    alpha_pattern: dict[str, FiniteFloat] = Field(default_factory=dict)
    bias: Literal["none"] = "none"
    # The other starts (pissa, olora, corda, loftq, lora_ga) rewrite W0 when PEFT reads them.
    init_lora_weights: Literal[True, False, "gaussian", "eva", "orthogonal"] = True
    read_by_fill = frozenset({"lora_alpha", "use_rslora", "alpha_pattern"})
    inert = AdapterConfig.inert | {
        "ensure_weight_tying",
        "eva_config",
        "fan_in_fan_out",
        "lora_dropout",
        "megatron_core",
        "qalora_group_size",
    }


def shapes(config: Config, module: str) -> dict[str, tuple[int | str, ...]]:
    r = by_pattern(config.rank_pattern, module, config.r)
    return {"lora_A.weight": (r, "in"), "lora_B.weight": ("out", r)}


def fill(config: Config, module: str, params: Mapping[str, Tensor]) -> LayerFactors:
    down, up = params["lora_A.weight"], params["lora_B.weight"]
    r = down.shape[0]
    alpha = by_pattern(config.alpha_pattern, module, config.lora_alpha)
    scaling = alpha / (math.sqrt(r) if config.use_rslora else r)
    return LayerFactors(down=down, up=up.T * scaling)


def init(
    config: Config, module: str, shape: tuple[int, int], generator: torch.Generator
) -> dict[str, Tensor]:
    """The identity: A as `nn.Linear` starts (PEFT's choice), B = 0.

    Raises InvalidAdapterError where the config asks for another start.
    """
    if config.init_lora_weights is not True:
        raise InvalidAdapterError(
            f"init_lora_weights = {config.init_lora_weights!r} is not supported"
        )
    r = by_pattern(config.rank_pattern, module, config.r)
    out_features, in_features = shape
    bound = 1 / math.sqrt(in_features)
    return {
        "lora_A.weight": torch.empty(r, in_features).uniform_(-bound, bound, generator=generator),
        "lora_B.weight": torch.zeros(out_features, r),
    }
