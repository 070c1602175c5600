"""Layers of one input that are merged into one, as q, k and v are in serving."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch
from torch import Tensor

from flora.ops import Backend, Linear, Operands, get_backend
from flora.ops.adapted_linear import Adapted
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


class Merged:
    """Layers whose outputs stand side by side, to be prepared for rows as `Adapted` is.

    base:   the merged product, without the bias.
    slices: the layers, one of them touched at least.
    pure:   as `adapted_linear` has it; of all bases.
    """

    def __init__(
        self,
        base: BaseProduct,
        slices: Sequence[Slice],
        *,
        pure: bool = False,
        backend: str = "auto",
    ) -> None:
        groups = next(len(own.factors.pairs) for own in slices if own.factors is not None)
        self.base, self.slices, self.backend = base, slices, backend
        self.layers = [
            Adapted(
                own.base,
                own.factors or _untouched(groups),
                bias=own.bias,
                weight=own.weight,
                pure=pure,
                backend=backend,
            )
            for own in slices
        ]

    def prepare(self, x: Tensor, rows: Sequence[int], *, same_input: bool = False) -> Linear:
        """The layers for these rows, as a function of x: `[S, N, in]` to `[S, N, Σ out]`.

        x:          S rows of N tokens.
        same_input: whether each group has one b for all layers: its copies then go through the
                    merged product, where the backend merges. So they do where no group scales
                    the input, and without such a backend nothing. Else each layer has its own.

        Raises ShapeError where sizes do not fit, BackendError.
        """
        module = get_backend(self.backend, x.device)
        operands = [layer.operands(x, rows) for layer in self.layers]
        sizes = [own.out_features for own in self.slices]
        if merge := getattr(module, "merge", None):
            linear: Linear | None = merge(x, self.base, operands, sizes, same_input=same_input)
            if linear is not None:
                return linear
        return _one_by_one(module, x, self.base, operands, sizes)


@lru_cache(maxsize=64)
def _untouched(groups: int) -> BatchFactors:
    """The factors of a layer that no group touches."""
    return BatchFactors(pairs=(0,) * groups, ranks=(0,) * groups, biased=(False,) * groups)


def _one_by_one(
    module: Backend,
    x: Tensor,
    base: BaseProduct,
    operands: Sequence[Operands],
    sizes: Sequence[int],
) -> Linear:
    """Each layer with its own product; where none is scaled, with its columns of the merged one."""
    if any(own.factors.hadamard is not None for own in operands):
        linears = [module.prepare(x, own) for own in operands]
        return lambda x_SNI: torch.cat([linear(x_SNI) for linear in linears], dim=-1)
    product: list[Tensor] = []  # of the x that runs

    def columns(x_SNI: Tensor, *, of: int) -> Tensor:  # noqa: ARG001
        y_SNO: Tensor = product[0].split(sizes, dim=-1)[of]
        return y_SNO

    linears = [
        module.prepare(x, replace(own, base=partial(columns, of=number), pure=False))
        for number, own in enumerate(operands)
    ]

    def linear(x_SNI: Tensor) -> Tensor:
        product[:] = [base(x_SNI)]
        y_SNO = torch.cat([own(x_SNI) for own in linears], dim=-1)
        product.clear()
        return y_SNO

    return linear
