"""The operator in plain torch: differentiable, on any device."""

from collections.abc import Callable, Hashable, Iterable, Iterator
from functools import partial
from typing import ParamSpec

import torch
from torch import Tensor

from flora.ops import Linear, Operands
from flora.ops.autograd import ModulatedLinear, RecomputedPasses, add_rows, scaled_product, take
from flora.ops.factors import BatchFactors
from flora.ops.plan import Index, Plan

P = ParamSpec("P")

KEPT_ROWS = 32
"""Up to so many rows, or one of each adapter, keep their pages side by side for the next step."""


def prepare(x_SNI: Tensor, operands: Operands) -> Linear:  # noqa: ARG001
    """See `adapted_linear`. Sums are taken in at least fp32 and rounded once at the end."""
    return partial(linear, operands=operands)


WeightSide = Callable[[Tensor, Operands], Iterable[tuple[Index, Tensor]]]
"""For `[S, N, in]` the rows on the weight side, and their `[C, N, out]`, part by part."""


def weight_side(x_SNI: Tensor, operands: Operands) -> Iterator[tuple[Index, Tensor]]:
    """One group after the other."""
    if not operands.plan.weight_side or operands.factors.scales is None:
        return
    in_PI, out_PO = operands.factors.scales
    for rows, pages in operands.plan.on(x_SNI.device).weight_side:
        yield (
            rows,
            ModulatedLinear.apply(  # type: ignore[no-untyped-call]
                take(x_SNI, rows), operands.weight, take(in_PI, pages), take(out_PO, pages)
            ),
        )


def linear(x_SNI: Tensor, operands: Operands, *, weight_side: WeightSide = weight_side) -> Tensor:
    """The operator, with another way to compute the weight side where a backend has one."""
    y = _hadamard(x_SNI, operands, weight_side)
    if operands.plan.additive:
        y = _add_low_rank(y, x_SNI, operands)
    if operands.plan.bias is not None:
        y = y + _row_bias(y, operands.factors, operands.plan, operands.bias)
    elif operands.bias is not None:
        y = y + operands.bias
    return y.to(x_SNI.dtype)


def _hadamard(x_SNI: Tensor, operands: Operands, weight_side: WeightSide) -> Tensor:
    """In fp32, but in x's type where no row is scaled, or nothing is added to one product."""
    base, factors, plan = operands.base, operands.factors, operands.plan
    count, on = x_SNI.shape[0], plan.on(x_SNI.device)
    if factors.scales is None:
        return base(x_SNI)
    in_PI, out_PO = factors.scales

    def pages_of(index: Index) -> tuple[Tensor, Tensor]:
        return take(in_PI, index).unsqueeze(1), take(out_PO, index).unsqueeze(1)

    y: Tensor | None = None
    if plan.recompute:
        y = RecomputedPasses.apply(  # type: ignore[no-untyped-call]
            base, on.passes, x_SNI, in_PI, out_PO
        )
    else:
        for number, (rows, pages) in enumerate(on.passes):
            x = take(x_SNI, rows)
            if pages is None:
                part = base(x).to(in_PI.dtype)
            else:
                key = plan.passes[number].pages
                b, a = _keep(operands, ("pass", number), key, pages_of, pages)
                part = scaled_product(x, b, a, base)
            y = add_rows(y, part, rows, count)
    added = plan.additive or plan.bias is not None or operands.bias is not None
    for rows, part in weight_side(x_SNI, operands):
        if rows is None and y is None and not added:
            return part
        y = add_rows(y, part.to(in_PI.dtype), rows, count)
    if y is None:
        raise ValueError("a plan without a product")
    return y


def _keep(
    operands: Operands,
    use: Hashable,
    key: Hashable,
    make: Callable[P, tuple[Tensor, Tensor]],
    *args: P.args,
    **kwargs: P.kwargs,
) -> tuple[Tensor, Tensor]:
    """Pages by row; kept for the next step, unless a prompt's tokens are rows, as in serving."""
    if len(operands.plan.rows) > max(KEPT_ROWS, len(operands.factors.pairs)):
        return make(*args, **kwargs)
    return operands.factors.keep(use, key, make, *args, **kwargs)


def _add_low_rank(y_SNO: Tensor, x_SNI: Tensor, operands: Operands) -> Tensor:
    factors, plan = operands.factors, operands.plan
    if factors.additive is None:
        return y_SNO
    down, up = factors.additive

    def pages_of(index: Index, rank: int) -> tuple[Tensor, Tensor]:
        down_SRI = take(down, index).to(x_SNI.dtype).unflatten(0, (-1, rank))
        return down_SRI.transpose(1, 2), take(up, index).to(x_SNI.dtype).unflatten(0, (-1, rank))

    indices = plan.on(x_SNI.device).additive
    for segment, (rank, rows, pages) in zip(plan.additive, indices, strict=True):
        key = segment.pages, x_SNI.dtype
        down_SIR, up_SRO = _keep(operands, ("rank", rank), key, pages_of, pages, rank)
        hidden_SNR = torch.bmm(take(x_SNI, rows), down_SIR)
        if rows is None and y_SNO.dtype == x_SNI.dtype:
            y_SNO = torch.baddbmm(y_SNO, hidden_SNR, up_SRO)
        else:
            part = torch.bmm(hidden_SNR, up_SRO)
            y_SNO = add_rows(y_SNO, part.to(y_SNO.dtype), rows, y_SNO.shape[0])
    return y_SNO


def _row_bias(y_SNO: Tensor, factors: BatchFactors, plan: Plan, bias_O: Tensor | None) -> Tensor:
    """Each row's bias, `[S, 1, O]`."""
    own_O = y_SNO.new_zeros(y_SNO.shape[-1]) if bias_O is None else bias_O.to(y_SNO.dtype)
    pages = own_O.unsqueeze(0)
    if factors.bias is not None:
        pages = torch.cat([factors.bias.to(y_SNO.dtype), pages])
    return take(pages, plan.on(y_SNO.device).bias).unsqueeze(1)
