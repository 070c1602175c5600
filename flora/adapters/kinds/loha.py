"""LoHa (Hyeon-Woo et al., FedPara, ICLR 2022): W0 + s (w1a w1b) ∘ (w2a w2b), s = alpha/r.

Files: `hada_w1_a`, `hada_w2_a` `[out, r]`; `hada_w1_b`, `hada_w2_b` `[r, in]`.
"""

import math
from collections.abc import Mapping

import torch
from pydantic import Field, FiniteFloat, PositiveInt
from torch import Tensor

from flora.adapters.config import BlockConfig, Shape
from flora.adapters.core import LayerFactors, Layers
from flora.adapters.targets import by_pattern


class Config(BlockConfig):
    r: PositiveInt = 8
    alpha: FiniteFloat = 8.0
    rank_pattern: dict[str, PositiveInt] = Field(default_factory=dict)
    alpha_pattern: dict[str, FiniteFloat] = Field(default_factory=dict)
    read_by_fill = frozenset({"alpha", "alpha_pattern"})
    inert = BlockConfig.inert | {"init_weights", "module_dropout", "rank_dropout"}


def shapes(config: Config, module: str) -> dict[str, Shape]:
    r = by_pattern(config.rank_pattern, module, config.r)
    return {
        "hada_w1_a": ("out", r),
        "hada_w1_b": (r, "in"),
        "hada_w2_a": ("out", r),
        "hada_w2_b": (r, "in"),
    }


def fill(
    config: Config,
    module: str,
    params: Mapping[str, Tensor],
    base: Layers,
) -> LayerFactors:
    """(Σ_i u_i v_iᵀ) ∘ (Σ_j p_j q_jᵀ) = Σ_ij (u_i ∘ p_j)(v_i ∘ q_j)ᵀ: r² ranks.

    Where that is more than the product itself has, the product and an identity.
    """
    up1, up2 = params["hada_w1_a"].T, params["hada_w2_a"].T
    down1, down2 = params["hada_w1_b"], params["hada_w2_b"]
    (r, in_features), out_features = down1.shape, up1.shape[1]
    scaling = by_pattern(config.alpha_pattern, module, config.alpha) / r
    if r * r <= min(in_features, out_features):
        down, up = _khatri_rao(down1, down2), _khatri_rao(up1, up2) * scaling
        return LayerFactors(down=down, up=up)
    product = (up1.T @ down1) * (up2.T @ down2) * scaling
    if in_features <= out_features:
        return LayerFactors(down=torch.eye(in_features).to(product), up=product.T)
    return LayerFactors(down=product, up=torch.eye(out_features).to(product))


def init(
    config: Config, module: str, base: Layers, generator: torch.Generator
) -> dict[str, Tensor]:
    """The identity: w2b = 0, the others as `nn.Linear` starts (PEFT's choice, and FedPara's)."""
    sizes = dict(zip(("out", "in"), base.shapes[module], strict=True))
    params = {}
    for name, dims in shapes(config, module).items():
        rows, columns = (dim if isinstance(dim, int) else sizes[dim] for dim in dims)
        bound = 1 / math.sqrt(columns)
        params[name] = torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)
    return params | {"hada_w2_b": torch.zeros_like(params["hada_w2_b"])}


def _khatri_rao(first: Tensor, second: Tensor) -> Tensor:
    """The products of each row with each, `[r², n]`."""
    return (first.unsqueeze(1) * second.unsqueeze(0)).flatten(0, 1)
