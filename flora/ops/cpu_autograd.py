"""The C++ kernels with gradients: as in `autograd`, in fewer passes.

What is fused is what training spends its time in: rows that are scaled once, and modulated W0s. The
rest is `eager`'s.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flora.ops import Operands, eager
from flora.ops.autograd import take
from flora.ops.cpu_kernels import (
    Job,
    contract,
    expand,
    modulation_gradients,
    multiply_back,
    multiply_modulated,
    scale_gradients,
)
from flora.ops.plan import Index


def linear(x_SNI: Tensor, operands: Operands, job: Job) -> Tensor:
    """The operator; see `adapted_linear`."""
    factors, plan, table = operands.factors, operands.plan, job.table
    frozen = operands.bias is None or not operands.bias.requires_grad
    fused = table.in_order and frozen and not (plan.weight_side or plan.additive)
    if table.scaled and fused and factors.scales:
        x_SNI, (in_PI, out_PO) = x_SNI.contiguous(), factors.scales
        copies_SNI = Expanded.apply(x_SNI, in_PI, job)  # type: ignore[no-untyped-call]
        product_SNO = job.check(operands.base(copies_SNI))
        return Contracted.apply(  # type: ignore[no-untyped-call, no-any-return]
            product_SNO, out_PO, factors.bias, job
        )
    return eager.linear(x_SNI, operands, weight_side=partial(_weight_side, job=job))


def _weight_side(x_SNI: Tensor, operands: Operands, job: Job) -> Iterator[tuple[Index, Tensor]]:
    if operands.plan.weight_side and operands.factors.scales:
        in_PI, out_PO = operands.factors.scales
        y_SNO = ModulatedRows.apply(  # type: ignore[no-untyped-call]
            x_SNI, operands.weight, in_PI, out_PO, operands, job
        )
        yield None, y_SNO


class Expanded(torch.autograd.Function):
    """b ∘ x where each row has one copy, in its own place."""

    @staticmethod
    def forward(ctx: Any, x_SNI: Tensor, in_PI: Tensor, job: Job) -> Tensor:
        ctx.save_for_backward(x_SNI)
        ctx.job, ctx.like = job, in_PI
        copies_SNI = torch.empty_like(x_SNI)
        expand(job.at, x_SNI.data_ptr(), copies_SNI.data_ptr())
        return copies_SNI

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dcopies_SNI: Tensor) -> tuple[Tensor | None, ...]:
        (x_SNI,) = ctx.saved_tensors
        return *_scale_gradients(dcopies_SNI, x_SNI, ctx.like, ctx.job, of_out=False), None


class Contracted(torch.autograd.Function):
    """a ∘ product + bias, rounded once, where each row has one copy, in its own place."""

    @staticmethod
    def forward(
        ctx: Any, product_SNO: Tensor, out_PO: Tensor, bias_pages: Tensor | None, job: Job
    ) -> Tensor:
        ctx.save_for_backward(product_SNO)
        ctx.job, ctx.like, ctx.bias = job, out_PO, bias_pages
        y_SNO = torch.empty_like(product_SNO)
        contract(job.at, product_SNO.data_ptr(), 0, job.bias_at, y_SNO.data_ptr())
        return y_SNO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_SNO: Tensor) -> tuple[Tensor | None, ...]:
        (product_SNO,) = ctx.saved_tensors
        job: Job = ctx.job
        dbias = None
        if ctx.needs_input_grad[2]:
            of_row = job.table.rows[:, 5]
            own = (of_row >= 0).nonzero().squeeze(1)
            dbias_SO = dy_SNO.sum(1, dtype=torch.float32)[own]
            dbias = torch.zeros(ctx.bias.shape).index_add_(0, of_row[own], dbias_SO)
            dbias = dbias.to(ctx.bias.dtype)
        scaled = _scale_gradients(dy_SNO, product_SNO, ctx.like, job, of_out=True)
        return *scaled, dbias, None


def _scale_gradients(
    dy_SNX: Tensor, v_SNX: Tensor, pages_PX: Tensor, job: Job, *, of_out: bool
) -> tuple[Tensor, Tensor]:
    """Of v ∘ page: that of v, and that of all pages."""
    dy_SNX = dy_SNX.contiguous()
    dv_SNX = torch.empty_like(dy_SNX)
    sums_SX = dy_SNX.new_empty(dy_SNX.shape[0], dy_SNX.shape[2], dtype=torch.float32)
    scale_gradients(
        job.at, of_out, dy_SNX.data_ptr(), v_SNX.data_ptr(), dv_SNX.data_ptr(), sums_SX.data_ptr()
    )
    # Base rows have no page, and sums of zeros; the last page is that of ones.
    of_row = job.table.rows[:, 2] % len(pages_PX)
    dpages_PX = torch.zeros(pages_PX.shape).index_add_(0, of_row, sums_SX)
    return dv_SNX, dpages_PX.to(pages_PX.dtype)


class ModulatedRows(torch.autograd.Function):
    """`autograd.ModulatedLinear` for all segments of a batch; zeros in its other rows."""

    @staticmethod
    def forward(
        ctx: Any,
        x_SNI: Tensor,
        weight_OI: Tensor,
        in_PI: Tensor,
        out_PO: Tensor,
        operands: Operands,
        job: Job,
    ) -> Tensor:
        x_SNI, weight_OI = x_SNI.contiguous(), weight_OI.contiguous()
        ctx.save_for_backward(x_SNI, weight_OI)
        ctx.operands, ctx.job, ctx.like = operands, job, (in_PI, out_PO)
        y_SNO = _rows_like(x_SNI, len(weight_OI), job)
        for rows, *pages in _segments(operands, x_SNI):
            own, y = take(x_SNI, rows), _memory_of(y_SNO, rows)
            sizes = own.shape[0] * own.shape[1], y.data_ptr(), len(weight_OI)
            multiply_modulated(job.at, *pages, weight_OI.data_ptr(), own.data_ptr(), *sizes)
            _put(y_SNO, rows, y)
        return y_SNO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_SNO: Tensor) -> tuple[Tensor | None, ...]:
        x_SNI, weight_OI = ctx.saved_tensors
        operands, job, (in_PI, out_PO) = ctx.operands, ctx.job, ctx.like
        dy_SNO = dy_SNO.contiguous()
        dx = din = dout = None
        if ctx.needs_input_grad[0]:
            dx = _rows_like(dy_SNO, weight_OI.shape[1], job)
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
            din, dout = torch.zeros(in_PI.shape), torch.zeros(out_PO.shape)
        for rows, first_page, count in _segments(operands, x_SNI):
            dy = take(dy_SNO, rows)
            of = job.at, first_page, count, weight_OI.data_ptr(), dy.data_ptr()
            tokens = dy.shape[0] * dy.shape[1]
            if dx is not None:
                own = _memory_of(dx, rows)
                multiply_back(*of, tokens, own.data_ptr())
                _put(dx, rows, own)
            if din is not None and dout is not None:
                x, pages = take(x_SNI, rows), slice(first_page, first_page + count)
                parts = torch.zeros(torch.get_num_threads(), count, in_PI.shape[1])
                to = parts.data_ptr(), dout[pages].data_ptr()
                modulation_gradients(*of, x.data_ptr(), tokens, *to)
                torch.sum(parts, 0, out=din[pages])
        return dx, None, din, dout, None, None


def _segments(operands: Operands, x_SNI: Tensor) -> Iterator[tuple[Index, int, int]]:
    """Each one's rows, first page and pages, which stand together."""
    on = operands.plan.on(x_SNI.device)
    for (rows, _), segment in zip(on.weight_side, operands.plan.weight_side, strict=True):
        pages = segment.pages or ()
        yield rows, pages[0], len(pages)


def _memory_of(y_SNX: Tensor, rows: Index) -> Tensor:
    """Where a kernel writes some rows of y: in place, or where `_put` takes them from."""
    if isinstance(rows, Tensor):
        return y_SNX.new_empty(len(rows), *y_SNX.shape[1:])
    return take(y_SNX, rows)


def _put(y_SNX: Tensor, rows: Index, own: Tensor) -> None:
    if isinstance(rows, Tensor):
        y_SNX[rows] = own


def _rows_like(x_SNX: Tensor, width: int, job: Job) -> Tensor:
    """For rows that the segments fill; zeros where some are not theirs."""
    shape = *x_SNX.shape[:2], width
    return x_SNX.new_zeros(shape) if job.table.active else x_SNX.new_empty(shape)
