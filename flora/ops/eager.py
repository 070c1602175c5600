"""The operator in plain torch: differentiable, on any device."""

import torch
from torch import Tensor

from flora.ops.autograd import ModulatedLinear, RecomputedPasses, add_rows, scaled_product, take
from flora.ops.factors import BaseProduct, BatchFactors
from flora.ops.plan import Index, Plan


def apply(
    x_SNI: Tensor,
    base: BaseProduct,
    factors: BatchFactors,
    plan: Plan,
    weight_OI: Tensor | None,
    bias_O: Tensor | None,
) -> Tensor:
    """See `adapted_linear`. Sums are taken in at least fp32 and rounded once at the end."""
    if (deltas := _deltas(x_SNI, factors, plan)) is not None:
        b, a = deltas
        product = base(torch.addcmul(x_SNI, x_SNI, b))
        y = torch.addcmul(product, product, a)
        return y if bias_O is None else (y + bias_O).to(x_SNI.dtype)
    y = _hadamard(x_SNI, base, factors, plan, weight_OI)
    if plan.additive:
        y = _add_low_rank(y, x_SNI, factors, plan)
    if plan.bias is not None:
        y = y + _row_bias(y, factors, plan, bias_O)
    elif bias_O is not None:
        y = y + bias_O
    return y.to(x_SNI.dtype)


def _is_light(x_SNI: Tensor) -> bool:
    """Whether an operation may cost more than its arithmetic: 16 bits, a CPU, no gradients."""
    return x_SNI.dtype.itemsize == 2 and x_SNI.device.type == "cpu" and not torch.is_grad_enabled()


def _deltas(x_SNI: Tensor, factors: BatchFactors, plan: Plan) -> tuple[Tensor, Tensor] | None:
    """b − 1 and a − 1 of each row in x's 16-bit type, for x + x∘(b − 1) as one operation.

    On a CPU mixed types cost several passes, which a decode step feels. For a factor f ≥ 0 rounding
    f − 1 moves the result by no more than rounding x or the result does, as |f − 1| ≤ max(1, f);
    for f < 0 by no more than twice that. None where this is not all there is to do.
    """
    in_PI, out_PO = factors.hadamard_in, factors.hadamard_out
    if not (_is_light(x_SNI) and plan.only_scales) or in_PI is None or out_PO is None:
        return None

    def make() -> tuple[Tensor, Tensor]:
        pages = plan.on(x_SNI.device).passes[0][1]
        b, a = ((take(f, pages) - 1).to(x_SNI.dtype).unsqueeze(1) for f in (in_PI, out_PO))
        return b, a

    return factors.keep(("deltas", plan.passes[0].pages, x_SNI.dtype), make)


def _delta_product(x_CNI: Tensor, delta_C1I: Tensor, a_C1O: Tensor, base: BaseProduct) -> Tensor:
    """a ∘ W0(b ∘ x) with b − 1 as in `_deltas`, in a's type."""
    return base(torch.addcmul(x_CNI, x_CNI, delta_C1I)) * a_C1O


def _hadamard(
    x_SNI: Tensor, base: BaseProduct, factors: BatchFactors, plan: Plan, weight_OI: Tensor | None
) -> Tensor:
    """In fp32, but in x's type where no row is scaled."""
    count, on = x_SNI.shape[0], plan.on(x_SNI.device)
    in_PI, out_PO = factors.hadamard_in, factors.hadamard_out
    if in_PI is None or out_PO is None:
        return base(x_SNI)

    light = _is_light(x_SNI)
    product = _delta_product if light else scaled_product

    def pages_of(index: Index) -> tuple[Tensor, Tensor]:
        b, a = take(in_PI, index).unsqueeze(1), take(out_PO, index).unsqueeze(1)
        return ((b - 1).to(x_SNI.dtype) if light else b), a

    y: Tensor | None = None
    if plan.recompute:
        y = RecomputedPasses.apply(  # type: ignore[no-untyped-call]
            base, on.passes, x_SNI, in_PI, out_PO
        )
    else:
        for number, (rows, pages, again) in enumerate(on.passes):
            x = take(x_SNI, rows)
            if pages is None:
                part = base(x).to(in_PI.dtype)
            else:
                b, a = factors.keep((plan.passes[number].pages, light), pages_of, pages)
                part = product(x, b, a, base)
            if again is not None:
                y, part, rows = part[:count], part[count:], again
            y = add_rows(y, part, rows, count, own=again is not None)
    for rows, pages in on.weight_side:
        part = ModulatedLinear.apply(  # type: ignore[no-untyped-call]
            take(x_SNI, rows), weight_OI, take(in_PI, pages), take(out_PO, pages)
        )
        y = add_rows(y, part.to(in_PI.dtype), rows, count)
    if y is None:
        raise ValueError("a plan without a product")
    return y


def _add_low_rank(y_SNO: Tensor, x_SNI: Tensor, factors: BatchFactors, plan: Plan) -> Tensor:
    down, up = factors.down, factors.up
    if down is None or up is None:
        return y_SNO

    # Of one token a row torch takes such products in fp32 several times faster (measured on Zen 4).
    exact = _is_light(x_SNI) and x_SNI.shape[1] == 1
    if exact:
        x_SNI, y_SNO = x_SNI.float(), y_SNO.float()

    def pages_of(index: Index, rank: int) -> tuple[Tensor, Tensor]:
        down_SRI = take(down, index).to(x_SNI.dtype).unflatten(0, (-1, rank))
        return down_SRI.transpose(1, 2), take(up, index).to(x_SNI.dtype).unflatten(0, (-1, rank))

    indices = plan.on(x_SNI.device).additive
    for segment, (rank, rows, pages) in zip(plan.additive, indices, strict=True):
        key = rank, segment.pages, x_SNI.dtype
        down_SIR, up_SRO = factors.keep(key, pages_of, pages, rank)
        hidden_SNR = torch.bmm(take(x_SNI, rows), down_SIR)
        if rows is None and y_SNO.dtype == x_SNI.dtype:
            y_SNO = torch.baddbmm(y_SNO, hidden_SNR, up_SRO)
        else:
            part = torch.bmm(hidden_SNR, up_SRO)
            y_SNO = add_rows(y_SNO, part.to(y_SNO.dtype), rows, y_SNO.shape[0], own=exact)
    return y_SNO


def _row_bias(y_SNO: Tensor, factors: BatchFactors, plan: Plan, bias_O: Tensor | None) -> Tensor:
    """Each row's bias, `[S, 1, O]`."""
    own_O = y_SNO.new_zeros(y_SNO.shape[-1]) if bias_O is None else bias_O.to(y_SNO.dtype)
    pages = own_O.unsqueeze(0)
    if factors.bias is not None:
        pages = torch.cat([factors.bias.to(y_SNO.dtype), pages])
    return take(pages, plan.on(y_SNO.device).bias).unsqueeze(1)
