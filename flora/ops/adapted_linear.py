"""The front door of the operator: checks shapes, makes the plan, chooses the backend."""

from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from flora.errors import ShapeError
from flora.ops import Linear, Operands, get_backend
from flora.ops.costs import costs_for
from flora.ops.factors import BaseProduct, BatchFactors
from flora.ops.plan import Costs, make_plan


def adapted_linear(
    x: Float[Tensor, "S N I"],
    base: BaseProduct,
    factors: BatchFactors,
    rows: Sequence[int],
    *,
    bias: Float[Tensor, " O"] | None = None,
    weight: Float[Tensor, "O I"] | None = None,
    pure: bool = False,
    backend: str = "auto",
) -> Float[Tensor, "S N O"]:
    """One linear layer, each row with its own adapter (FLoRA, equations 5 and 6, for every kind).

    x:       S rows of N tokens.
    base:    W0's product, without the bias; differentiable in x where a gradient is wanted.
    factors: those of the batch's G groups.
    rows:    the group of each row, S numbers below G.
    bias:    the layer's own, added once, at the end, to the rows whose group brings none.
    weight:  W0 where it can be read: with it many tokens of many pairs take the weight side.
    pure:    whether the base keeps nothing of what it is given, and gives new contiguous memory in
             x's type each time; such memory is written to.
    backend: "auto" or a name in `BACKENDS`.

    Products are taken in x's type, sums in at least fp32; the result has x's type. Differentiable
    in x and the factors, not in W0. Under autocast x and W0 are cast as `F.linear` casts them, and
    all else is as for that type. Kernels go by address, so compiled code calls this through
    `torch.compiler.disable`. Raises ShapeError where sizes do not fit, BackendError.
    """
    linear = prepare(x, base, factors, rows, bias=bias, weight=weight, pure=pure, backend=backend)
    return linear(x)


def prepare(
    x: Float[Tensor, "S N I"],
    base: BaseProduct,
    factors: BatchFactors,
    rows: Sequence[int],
    *,
    bias: Float[Tensor, " O"] | None = None,
    weight: Float[Tensor, "O I"] | None = None,
    pure: bool = False,
    backend: str = "auto",
    costs: Costs | None = None,
) -> Linear:
    """`adapted_linear` as a function of x, good for every x like this one.

    That is of its shape, type and device, with gradients (and autocast) on or off as they are now.
    What can be checked and planned once is not done again at each step of a generation.

    costs: that the plan goes by; those of the layer, measured where need be, if there are none.
    """
    layer = Adapted(base, factors, bias=bias, weight=weight, pure=pure, backend=backend)
    return layer.prepare(x, rows, costs)


class Adapted:
    """A layer with the factors of a batch's groups, to be prepared for rows of them over and over.

    Arguments and errors as `adapted_linear`'s.
    """

    def __init__(
        self,
        base: BaseProduct,
        factors: BatchFactors,
        *,
        bias: Tensor | None = None,
        weight: Tensor | None = None,
        pure: bool = False,
        backend: str = "auto",
    ) -> None:
        if weight is not None and factors.out_features not in (None, weight.shape[0]):
            raise ShapeError(
                f"the factors are for {factors.out_features} outputs, but W0 has {weight.shape[0]}"
            )
        self.base, self.factors, self.bias, self.weight = base, factors, bias, weight
        self.pure, self.backend = pure, backend

    def prepare(self, x: Tensor, rows: Sequence[int], costs: Costs | None = None) -> Linear:
        """The layer for these rows; see `prepare`."""
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            return partial(self._without_autocast, rows=rows)
        return get_backend(self.backend, x.device).prepare(x, self.operands(x, rows, costs))

    def operands(self, x: Tensor, rows: Sequence[int], costs: Costs | None = None) -> Operands:
        """What a backend is given, planned."""
        rows, factors, weight = tuple(rows), self.factors, self.weight
        if x.ndim != 3 or x.shape[0] != len(rows):
            raise ShapeError(f"{len(rows)} rows named, but x has the shape {list(x.shape)}")
        if factors.in_features not in (None, x.shape[2]):
            raise ShapeError(
                f"the factors are for {factors.in_features} inputs, but x has {x.shape[2]}"
            )
        grad = torch.is_grad_enabled() and (
            factors.requires_grad
            or any(t is not None and t.requires_grad for t in (x, weight, self.bias))
        )
        if costs is None:
            costs = costs_for(
                rows,
                factors.pairs,
                tokens=x.shape[1],
                weight=weight,
                backend=self.backend,
                grad=grad,
            )
        plan = make_plan(
            rows,
            factors.pairs,
            factors.ranks,
            factors.biased,
            tokens=x.shape[1],
            has_weight=weight is not None,
            grad=grad,
            costs=costs,
        )
        return Operands(self.base, factors, plan, weight, self.bias, self.pure)

    def _without_autocast(self, x: Tensor, rows: Sequence[int]) -> Tensor:
        """Autocast would take the products of the fp32 factors in its own type, too."""
        kind, base, weight = x.device.type, self.base, self.weight
        dtype = torch.get_autocast_dtype(kind)

        def cast_base(x: Tensor) -> Tensor:
            # Also in the backward, which may run outside of the caller's autocast.
            with torch.autocast(kind, dtype=dtype):
                return base(x)

        with torch.autocast(kind, enabled=False):
            cast = Adapted(
                cast_base,
                self.factors,
                bias=self.bias,
                weight=None if weight is None else weight.to(dtype),
                backend=self.backend,
            )
            x = x.to(dtype)
            return cast.prepare(x, rows)(x)
