"""AdaLoRA (Zhang et al., ICLR 2023): W0 + s B diag(E) A, its ranks pruned layer by layer.

Files: `lora_A` `[l, in]`, `lora_E` `[l, 1]`, `lora_B` `[out, l]`, where l of the `init_r` ranks are
left; `rank_pattern` holds the mask of those for each layer.
"""

from collections.abc import Mapping
from typing import Literal, Self

import torch
from pydantic import FiniteFloat, NonNegativeInt, model_validator
from torch import Tensor

from flora.adapters.config import BiasedConfig, Shape, saved_bias
from flora.adapters.core import LayerFactors, Layers


class Config(BiasedConfig):
    init_r: NonNegativeInt = 12
    lora_alpha: FiniteFloat = 8.0
    rank_pattern: dict[str, list[bool]] | None = None
    bias: Literal["none", "all", "lora_only"] = "none"
    rank_field = "init_r"
    trainable = False  # PEFT's trainer prunes the ranks and keeps A and B orthogonal
    read_by_fill = frozenset({"init_r", "lora_alpha"})
    # LoRA's keys that AdaLoRA has and does not read are among them.
    inert = BiasedConfig.inert | {
        "alpha_pattern",
        "beta1",
        "beta2",
        "deltaT",
        "ensure_weight_tying",
        "fan_in_fan_out",
        "init_lora_weights",
        "lora_dropout",
        "megatron_core",
        "orth_reg_weight",
        "qalora_group_size",
        "r",
        "target_r",
        "tfinal",
        "tinit",
        "total_step",
        "use_rslora",
    }

    @model_validator(mode="after")
    def _masks_are_of_all_ranks(self) -> Self:
        masks = self.rank_pattern or {}
        if wrong := [name for name, mask in masks.items() if len(mask) != self.init_r]:
            raise ValueError(f"rank_pattern has masks of another length than init_r: {wrong}")
        return self

    def rank(self, module: str) -> int:
        """How many ranks of a layer are left."""
        mask = (self.rank_pattern or {}).get(f"{module}.lora_E")
        return self.init_r if mask is None else sum(mask)


def shapes(config: Config, module: str) -> dict[str, Shape]:
    r = config.rank(module)
    return {"lora_A": (r, "in"), "lora_E": (r, 1), "lora_B": ("out", r)}


def fill(
    config: Config,
    module: str,
    params: Mapping[str, Tensor],
    base: Layers,
) -> LayerFactors:
    bias = saved_bias(params)
    down = params.get("lora_A")
    if down is None or not len(down):
        return LayerFactors(bias=bias)
    alpha = config.lora_alpha if config.lora_alpha > 0 else len(down)
    scaling = alpha / (config.init_r + 1e-5)  # PEFT's, so that an init_r of 0 divides
    return LayerFactors(down=down, up=params["lora_B"].T * params["lora_E"] * scaling, bias=bias)


def init(
    config: Config, module: str, base: Layers, generator: torch.Generator
) -> dict[str, Tensor]:
    """The identity: A and B small and random, E = 0 (PEFT's choice)."""
    out_features, in_features = base.shapes[module]
    return {
        "lora_A": 0.02 * torch.randn(config.init_r, in_features, generator=generator),
        "lora_E": torch.zeros(config.init_r, 1),
        "lora_B": 0.02 * torch.randn(out_features, config.init_r, generator=generator),
    }
