"""Layers of one input that are merged into one, as q, k and v are in serving."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from flora.ops import Linear, get_backend
from flora.ops.adapted_linear import make_operands
from flora.ops.factors import BaseProduct, BatchFactors


@dataclass(frozen=True, eq=False, kw_only=True)
class Slice:
    """One of the layers: some of the merged W0's rows, behind those of the layer before it.

    base:    the product of these rows alone, without the bias.
    factors: None where no group touches the layer.
    bias, weight: its own.
    """

    out_features: int
    base: BaseProduct
    factors: BatchFactors | None
    bias: Tensor | None = None
    weight: Tensor | None = None


def prepare_merged(
    x: Tensor,
    base: BaseProduct,
    slices: Sequence[Slice],
    rows: Sequence[int],
    *,
    same_input: bool = False,
    pure: bool = False,
    backend: str = "auto",
) -> Linear:
    """`adapted_linear.prepare` for layers whose outputs stand side by side, `[S, N, Σ out]`.

    x:           S rows of N tokens.
    base:        the merged product, without the bias.
    slices:      the layers, one of them touched at least.
    same_input: whether each group has one b for all of them: its copies then go through the merged
                 product. So they do where no group scales the input. Else each layer has its own.
    rows, pure, backend: as `prepare`'s; all bases are pure or none.

    Raises ShapeError where sizes do not fit, BackendError.
    """
    module = get_backend(backend, x.device)
    groups = next(len(own.factors.pairs) for own in slices if own.factors is not None)
    operands = [
        make_operands(
            x,
            own.base,
            own.factors or _untouched(groups),
            rows,
            bias=own.bias,
            weight=own.weight,
            pure=pure,
            backend=backend,
        )
        for own in slices
    ]
    sizes = [own.out_features for own in slices]
    if merge := getattr(module, "merge", None):
        linear: Linear | None = merge(x, base, operands, sizes, same_input=same_input)
        if linear is not None:
            return linear
    touched = [own.factors is not None for own in slices]
    return _one_by_one(
        base,
        [
            module.prepare(x, own) if is_touched else None
            for own, is_touched in zip(operands, touched, strict=True)
        ],
        sizes,
        [own.bias for own in slices],
    )


@lru_cache(maxsize=64)
def _untouched(groups: int) -> BatchFactors:
    """The factors of a layer that no group touches."""
    return BatchFactors(pairs=(0,) * groups, ranks=(0,) * groups, biased=(False,) * groups)


def _one_by_one(
    base: BaseProduct,
    linears: Sequence[Linear | None],
    sizes: Sequence[int],
    biases: Sequence[Tensor | None],
) -> Linear:
    """Each layer that is touched on its own; the others' outputs are the merged product's."""
    ends = list(accumulate(sizes))

    def linear(x_SNI: Tensor) -> Tensor:
        product_SNO = base(x_SNI) if None in linears else None
        parts = []
        for own, end, size, bias in zip(linears, ends, sizes, biases, strict=True):
            if own is not None:
                parts.append(own(x_SNI))
            elif product_SNO is not None:
                part = product_SNO[..., end - size : end]
                parts.append(part if bias is None else part + bias)
        return torch.cat(parts, dim=-1)

    return linear
