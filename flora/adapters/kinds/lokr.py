"""LoKr (Yeh et al., LyCORIS, ICLR 2024): W0 + s W1 ⊗ W2, a Kronecker product, s = alpha/r.

Files: `lokr_w1` `[out1, in1]` or its halves `lokr_w1_a` `[out1, r]` and `lokr_w1_b` `[r, in1]`; W2
likewise; out = out1·out2, in = in1·in2.
"""

import math
from collections.abc import Mapping

import torch
from pydantic import Field, FiniteFloat, PositiveInt
from torch import Tensor

from flora.adapters.config import BlockConfig, Shape
from flora.adapters.core import LayerFactors, Layers
from flora.adapters.targets import by_pattern
from flora.errors import InvalidAdapterError


class Config(BlockConfig):
    r: PositiveInt = 8
    alpha: FiniteFloat = 8.0
    rank_pattern: dict[str, PositiveInt] = Field(default_factory=dict)
    alpha_pattern: dict[str, FiniteFloat] = Field(default_factory=dict)
    decompose_both: bool = False
    decompose_factor: int = Field(default=-1, ge=-1)
    optional = frozenset(f"lokr_w{i}{half}" for i in (1, 2) for half in ("", "_a", "_b"))
    read_by_fill = frozenset({"alpha", "alpha_pattern", "r", "rank_pattern"})
    inert = BlockConfig.inert | {
        "init_weights",
        "module_dropout",
        "rank_dropout",
        "rank_dropout_scale",
    }


def shapes(config: Config, module: str) -> dict[str, Shape]:
    r = by_pattern(config.rank_pattern, module, config.r)
    found: dict[str, Shape] = {}
    for i in (1, 2):
        found |= {f"lokr_w{i}": (f"out{i}", f"in{i}")}
        found |= {f"lokr_w{i}_a": (f"out{i}", r), f"lokr_w{i}_b": (r, f"in{i}")}
    return found


def fill(config: Config, module: str, params: Mapping[str, Tensor], base: Layers) -> LayerFactors:
    """(A1 B1) ⊗ (A2 B2) = (A1 ⊗ A2)(B1 ⊗ B2): as many ranks as the two have, multiplied.

    Raises InvalidAdapterError where W1 or W2 is missing.
    """
    up1, down1 = _halves(params, "lokr_w1")
    up2, down2 = _halves(params, "lokr_w2")
    r = by_pattern(config.rank_pattern, module, config.r)
    scaling = by_pattern(config.alpha_pattern, module, config.alpha) / r
    return LayerFactors(down=torch.kron(down1, down2), up=torch.kron(up1, up2).T * scaling)


def _halves(params: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    """A `[o, l]` and B `[l, i]` with AB = W; an identity and W where W is whole."""
    whole, up, down = (params.get(f"{name}{half}") for half in ("", "_a", "_b"))
    if whole is None:
        if up is None or down is None:
            raise InvalidAdapterError(f"{name} is missing, as a whole or as its two halves")
        if up.shape[1] <= min(up.shape[0], down.shape[1]):
            return up, down
        whole = up @ down
    o, i = whole.shape
    identity = torch.eye(min(o, i)).to(whole)
    return (identity, whole) if o <= i else (whole, identity)


def init(
    config: Config, module: str, base: Layers, generator: torch.Generator
) -> dict[str, Tensor]:
    """The identity, split as PEFT splits: W1 = 0 (or its A), W2 as `nn.Linear` starts."""
    from peft.tuners.lokr.layer import factorization

    r = by_pattern(config.rank_pattern, module, config.r)
    outs, ins = (factorization(size, config.decompose_factor) for size in base.shapes[module])
    params = {}
    for i, (o, n) in enumerate(zip(outs, ins, strict=True), 1):
        is_split = r < max(o, n) / 2 and (i == 2 or config.decompose_both)
        sizes = {"_a": (o, r), "_b": (r, n)} if is_split else {"": (o, n)}
        for half, (rows, columns) in sizes.items():
            bound = 0 if i == 1 and half != "_b" else 1 / math.sqrt(columns)
            value = torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)
            params[f"lokr_w{i}{half}"] = value
    return params
