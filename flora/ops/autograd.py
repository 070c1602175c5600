"""Gradients that keep nothing of size [h, T, out] and ask none of W0.

At one pair a row plain autograd is right already: it keeps x and W0(b ∘ x). Beyond that the weight
side needs three products at any rank, and the activation side takes its products again.
Derivation: docs/operator.md.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from flora.ops.factors import BaseProduct
from flora.ops.plan import Index


def take(tensor: Tensor, index: Index) -> Tensor:
    """Rows of a tensor by a plan's index; a run of them without a copy."""
    if isinstance(index, Tensor):
        return tensor.index_select(0, index)
    # The backward of a slice fills zeros around it, even where there is nothing around.
    if index is None or (index.start == 0 and index.stop == len(tensor)):
        return tensor
    return tensor[index]


def add_rows(y: Tensor | None, part: Tensor, rows: Index, count: int) -> Tensor:
    """Add a part to its rows of y, `[count, N, O]`; a row may stand in the part several times.

    y None stands for zeros.
    """
    if rows is None:
        return part if y is None else y + part
    if y is None:
        y = part.new_zeros(count, *part.shape[1:])
    if isinstance(rows, slice):
        rows = torch.arange(rows.start, rows.stop, device=part.device)
    added: Tensor = AddedRows.apply(y, part, rows)  # type: ignore[no-untyped-call]
    return added


class AddedRows(torch.autograd.Function):
    """`index_add` that keeps the index alone for the backward, where torch's keeps the part too."""

    @staticmethod
    def forward(ctx: FunctionCtx, y_SNO: Tensor, part_CNO: Tensor, rows_C: Tensor) -> Tensor:
        ctx.save_for_backward(rows_C)
        return y_SNO.index_add(0, rows_C, part_CNO)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_SNO: Tensor) -> tuple[Tensor | None, ...]:
        (rows_C,) = ctx.saved_tensors
        return dy_SNO, dy_SNO.index_select(0, rows_C), None


def scaled_product(x_CNI: Tensor, b_C1I: Tensor, a_C1O: Tensor, base: BaseProduct) -> Tensor:
    """a ∘ W0(b ∘ x) for copies of rows, `[C, N, out]`, in the factors' type (at least fp32)."""
    product = base((x_CNI * b_C1I).to(x_CNI.dtype))
    return product * a_C1O


class RecomputedPasses(torch.autograd.Function):
    """Σ_j a_j ∘ W0(b_j ∘ x), one j after the other, forward and (again) backward."""

    @staticmethod
    def forward(
        ctx: Any,
        base: BaseProduct,
        passes: tuple[tuple[Index, Index], ...],
        x_SNI: Tensor,
        in_PI: Tensor,
        out_PO: Tensor,
    ) -> Tensor:
        ctx.base, ctx.passes = base, passes
        ctx.save_for_backward(x_SNI, in_PI, out_PO)
        y: Tensor | None = None
        for rows, pages in passes:
            part = _pass(base, rows, pages, x_SNI, in_PI, out_PO)
            y = add_rows(y, part, rows, x_SNI.shape[0])
        if y is None:
            raise ValueError("no passes")
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_SNO: Tensor) -> tuple[Tensor | None, ...]:
        wanted = [i for i in range(3) if ctx.needs_input_grad[2 + i]]
        inputs = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(ctx.saved_tensors)]
        grads: list[Tensor | None] = [None, None, None]
        for rows, pages in ctx.passes:
            with torch.enable_grad():
                part = _pass(ctx.base, rows, pages, *inputs)
            found = torch.autograd.grad(part, [inputs[i] for i in wanted], take(dy_SNO, rows))
            for i, grad in zip(wanted, found, strict=True):
                grads[i] = grad if (so_far := grads[i]) is None else so_far + grad
        return None, None, *grads


def _pass(
    base: BaseProduct, rows: Index, pages: Index, x_SNI: Tensor, in_PI: Tensor, out_PO: Tensor
) -> Tensor:
    b, a = take(in_PI, pages).unsqueeze(1), take(out_PO, pages).unsqueeze(1)
    return scaled_product(take(x_SNI, rows), b, a, base)


class ModulatedLinear(torch.autograd.Function):
    """x W_iᵀ with W_i = W0 ∘ (Σ_j a_j b_jᵀ): about one product's cost at any number of pairs.

    With G = dYᵀ X: dX = dY W_i, da_j = (G ∘ W0) b_j, db_j = (G ∘ W0)ᵀ a_j.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, x_SNI: Tensor, weight_OI: Tensor, in_HI: Tensor, out_HO: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x_SNI, weight_OI, in_HI, out_HO)
        return F.linear(x_SNI, modulate(weight_OI, in_HI, out_HO))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_SNO: Tensor) -> tuple[Tensor | None, ...]:
        x_SNI, weight_OI, in_HI, out_HO = ctx.saved_tensors
        dx = din = dout = None
        if ctx.needs_input_grad[0]:
            dx = dy_SNO @ modulate(weight_OI, in_HI, out_HO)
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
            g_OI = dy_SNO.flatten(0, -2).T @ x_SNI.flatten(0, -2)
            g_OI = g_OI.to(in_HI.dtype) * weight_OI
            din, dout = out_HO @ g_OI, in_HI @ g_OI.T
        return dx, None, din, dout


def modulate(weight_OI: Tensor, in_HI: Tensor, out_HO: Tensor) -> Tensor:
    """W0 ∘ (Σ_j a_j b_jᵀ), `[out, in]`, rounded once to W0's type."""
    return ((out_HO.T @ in_HI) * weight_OI).to(weight_OI.dtype)
