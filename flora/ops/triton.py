"""The operator in Triton for GPUs: fused without gradients, and the weight side with them too.

For fp32 and 16 bits; in fp64, where W0 has another type than x, and for a segment of very many
pairs the operator is `eager`'s. With TRITON_INTERPRET=1 the kernels run on a CPU, slowly.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flora.errors import BackendError, ShapeError
from flora.ops import Linear, Operands, eager
from flora.ops.plan import Index
from flora.ops.table import Table, make_table

try:
    import triton
except ImportError as error:
    raise BackendError(f"triton cannot be imported: {error}") from error

from flora.ops import triton_kernels as kernels

NEEDS_GPU = not triton.knobs.runtime.interpret

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

MAX_PAIRS = 21
"""Of a segment that is modulated on its way: three lanes each, 64 in all. Beyond them a tile's
modulation costs more than its product, and to write W_i down once costs less than either."""

TILE = 128
"""Of both sides of W0, in its gradients."""

MOST_TOKENS = 256
"""Of a segment, for one tile of W0: the more share its modulation, the less that costs. With 128 a
product of 8 segments of 512 tokens had 0.46 of cuBLAS's speed on an H200, with 256 it has 0.58. In
fp32, where a thread multiplies by itself, half of it: more takes minutes to compile."""

DOT = 16
"""What the tensor cores take at least on each side of a product."""


def prepare(x_SNI: Tensor, operands: Operands) -> Linear:
    """See `adapted_linear`. Sums are taken in fp32 and rounded once at the end."""
    dtype, factors, weight = x_SNI.dtype, operands.factors, operands.weight
    table = make_table(operands.plan, factors.pairs, factors.ranks, factors.biased, x_SNI.device)
    mixed = weight is not None and weight.dtype != dtype
    nothing = factors.out_features is None
    if mixed or nothing or dtype not in DTYPES or table.pairs > MAX_PAIRS:
        return eager.prepare(x_SNI, operands)
    if operands.plan.grad:
        return partial(eager.linear, operands=operands, weight_side=_weight_side(table))
    return PreparedLinear(x_SNI, operands, table)


def _weight_side(table: Table) -> eager.WeightSide:
    def weight_side(x_SNI: Tensor, operands: Operands) -> Iterable[tuple[Index, Tensor]]:
        if table.lengths and operands.factors.scales:
            in_PI, out_PO = operands.factors.scales
            y_SNO = FusedModulation.apply(  # type: ignore[no-untyped-call]
                x_SNI, operands.weight, in_PI.float(), out_PO.float(), table
            )
            yield None, y_SNO

    return weight_side


class PreparedLinear:
    """A layer in one batch, without gradients: at most two kernels before W0's product, one after.

    Nothing waits for the device, and only results are allocated: so a CUDA graph can hold it.
    """

    def __init__(self, x_SNI: Tensor, operands: Operands, table: Table) -> None:
        factors, dtype = operands.factors, x_SNI.dtype
        self.table, self.base, self.weight = table, operands.base, operands.weight

        def cast(part: Tensor | None, dtype: torch.dtype) -> Tensor | None:
            return None if part is None else part.to(dtype).contiguous()

        scales = factors.scales if table.scaled or table.lengths else None
        additive = factors.additive if table.rank else None
        self.in_PI, self.out_PO = (cast(part, torch.float32) for part in scales or (None, None))
        self.down_RI, self.up_RO = (cast(part, dtype) for part in additive or (None, None))
        self.biases = cast(factors.bias, dtype)
        self.bias_O = cast(operands.bias, dtype)
        self.y_shape = *x_SNI.shape[:2], factors.out_features or 0

    def __call__(self, x_SNI: Tensor) -> Tensor:
        """y, `[S, N, out]`."""
        x_SNI, table = x_SNI.contiguous(), self.table
        with torch.cuda.device_of(x_SNI):  # Triton launches on the current device
            hidden_SNR = None if self.down_RI is None else _shrink(x_SNI, self.down_RI, table)
            product_CNO = self._product(x_SNI) if table.active else None
            y_SNO = x_SNI.new_empty(self.y_shape)
            if table.lengths and not (
                self.weight is None or self.in_PI is None or self.out_PO is None
            ):
                _modulated_product(x_SNI, self.weight, self.out_PO, self.in_PI, y_SNO, table)
            added = hidden_SNR, self.up_RO, self.biases, self.bias_O
            if any(part is not None for part in (product_CNO, *added)):
                _contract(y_SNO, product_CNO, self.out_PO, *added, table)
        return y_SNO

    def _product(self, x_SNI: Tensor) -> Tensor:
        """Of the copies that go through W0 as it is, `[C, N, out]`. Raises ShapeError."""
        table, copies_CNI = self.table, x_SNI
        if table.moved and self.in_PI is not None:
            copies_CNI = _expand(x_SNI, self.in_PI, table)
        product_CNO = self.base(copies_CNI)
        if product_CNO.shape != (table.active, *self.y_shape[1:]):
            raise ShapeError(
                f"the base's product has the shape {list(product_CNO.shape)}, but the factors are "
                f"for {self.y_shape[2]} outputs"
            )
        return product_CNO.to(x_SNI.dtype).contiguous()


def _expand(x_SNI: Tensor, in_PI: Tensor, table: Table) -> Tensor:
    _, N, width = x_SNI.shape
    out_CNI = x_SNI.new_empty(table.active, N, width)
    tokens, block = _tile(N)
    grid = table.active * triton.cdiv(N, tokens), triton.cdiv(width, block)
    kernels.expand[grid](x_SNI, in_PI, table.copies, out_CNI, N, width, tokens, block)
    return out_CNI


def _shrink(x_SNI: Tensor, down_RI: Tensor, table: Table) -> Tensor:
    S, N, width = x_SNI.shape
    hidden_SNR = x_SNI.new_empty(S, N, table.rank, dtype=torch.float32)
    tokens, block = _tile(N)
    ranks = 1
    if tokens >= DOT:
        ranks, block = min(64, max(DOT, triton.next_power_of_2(table.rank))), 64
    grid = S * triton.cdiv(N, tokens), triton.cdiv(table.rank, ranks)
    kernels.shrink[grid](
        x_SNI, down_RI, hidden_SNR, table.rows, N, width, table.rank, tokens, ranks, block
    )
    return hidden_SNR


def _contract(
    y_SNO: Tensor,
    product_CNO: Tensor | None,
    out_PO: Tensor | None,
    hidden_SNR: Tensor | None,
    up_RO: Tensor | None,
    bias_pages: Tensor | None,
    bias_O: Tensor | None,
    table: Table,
) -> None:
    S, N, width = y_SNO.shape
    tokens, block = _tile(N)
    grid = S * triton.cdiv(N, tokens), triton.cdiv(width, block)
    kernels.contract[grid](
        y_SNO,
        product_CNO,
        out_PO,
        hidden_SNR,
        up_RO,
        bias_pages,
        bias_O,
        table.rows,
        N,
        width,
        table.active,
        table.rank,
        tokens,
        block,
        _precision(y_SNO),
    )


def _modulated_product(
    x_SNK: Tensor, weight_MK: Tensor, left_PM: Tensor, right_PK: Tensor, y_SNM: Tensor, table: Table
) -> None:
    """Into the rows of y that the segments hold; of their pages the left ones scale y."""
    (M, K), N, segments = weight_MK.shape, x_SNK.shape[1], len(table.lengths)
    lanes = max(DOT, triton.next_power_of_2(3 * table.pairs))
    kind = torch.float32 if weight_MK.dtype == torch.float32 else torch.bfloat16
    split = [
        pages.new_empty(segments * lanes, pages.shape[1], dtype=kind)
        for pages in (left_PM, right_PK)
    ]
    for pages, out, low in zip((left_PM, right_PK), split, (2, 1), strict=True):
        grid = segments * lanes, triton.cdiv(pages.shape[1], 1024)
        kernels.split_pages[grid](pages, out, table.segments, pages.shape[1], lanes, low, 1024)
    most = MOST_TOKENS // (2 if x_SNK.dtype == torch.float32 else 1)
    tokens = min(most, max(DOT, triton.next_power_of_2(max(table.lengths) * N)))
    blocks = sum(triton.cdiv(copies * N, tokens) for copies in table.lengths)
    group = min(16, triton.next_power_of_2(blocks))
    kernels.modulated_product[
        lambda block: (group, triton.cdiv(M, block["BLOCK_M"]), triton.cdiv(blocks, group))
    ](
        x_SNK,
        weight_MK,
        *split,
        y_SNM,
        table.segments,
        table.copies,
        segments,
        N,
        M,
        K,
        *weight_MK.stride(),
        SEGMENTS=max(DOT, triton.next_power_of_2(segments)),
        LANES=lanes,
        GROUP=group,
        BLOCK_T=tokens,
    )


class FusedModulation(torch.autograd.Function):
    """`autograd.ModulatedLinear` for all segments of a batch at once; zeros in its other rows."""

    @staticmethod
    def forward(
        ctx: Any, x_SNI: Tensor, weight_OI: Tensor, in_PI: Tensor, out_PO: Tensor, table: Table
    ) -> Tensor:
        x_SNI, in_PI, out_PO = x_SNI.contiguous(), in_PI.contiguous(), out_PO.contiguous()
        ctx.save_for_backward(x_SNI, weight_OI, in_PI, out_PO)
        ctx.table = table
        y_SNO = _rows(x_SNI, weight_OI.shape[0], table)
        with torch.cuda.device_of(x_SNI):
            _modulated_product(x_SNI, weight_OI, out_PO, in_PI, y_SNO, table)
        return y_SNO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_SNO: Tensor) -> tuple[Tensor | None, ...]:
        x_SNI, weight_OI, in_PI, out_PO = ctx.saved_tensors
        dy_SNO, table = dy_SNO.contiguous(), ctx.table
        dx = din = dout = None
        with torch.cuda.device_of(x_SNI):
            if ctx.needs_input_grad[0]:
                dx = _rows(dy_SNO, weight_OI.shape[1], table)
                _modulated_product(dy_SNO, weight_OI.T, in_PI, out_PO, dx, table)
            if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
                din, dout = _hadamard_gradients(dy_SNO, x_SNI, weight_OI, in_PI, out_PO, table)
        return dx, None, din, dout, None


def _rows(like_SNX: Tensor, width: int, table: Table) -> Tensor:
    """For a modulated product, with zeros where rows are that no segment holds."""
    shape = *like_SNX.shape[:2], width
    return like_SNX.new_zeros(shape) if table.active else like_SNX.new_empty(shape)


def _hadamard_gradients(
    dy_SNO: Tensor, x_SNI: Tensor, weight_OI: Tensor, in_PI: Tensor, out_PO: Tensor, table: Table
) -> tuple[Tensor, Tensor]:
    (O, I), P = weight_OI.shape, in_PI.shape[0]  # noqa: E741
    tiles_O, tiles_I = triton.cdiv(O, TILE), triton.cdiv(I, TILE)
    in_parts, out_parts = in_PI.new_zeros(tiles_O, P, I), out_PO.new_zeros(tiles_I, P, O)
    kernels.hadamard_gradients[tiles_O, tiles_I, len(table.lengths)](
        dy_SNO,
        x_SNI,
        weight_OI,
        in_PI,
        out_PO,
        in_parts,
        out_parts,
        table.segments,
        table.copies,
        x_SNI.shape[1],
        I,
        O,
        *weight_OI.stride(),
        P,
        BLOCK_O=TILE,
        BLOCK_I=TILE,
        PRECISION=_precision(x_SNI),
    )
    return in_parts.sum(0), out_parts.sum(0)


def _tile(tokens: int) -> tuple[int, int]:
    """How many of a row's tokens and of its features a program takes: about 4096 numbers."""
    tokens = min(64, triton.next_power_of_2(tokens))
    return tokens, min(512, 4096 // tokens)


def _precision(x: Tensor) -> str:
    """Of a product in fp32: tf32 keeps 11 bits of each factor, which 16-bit results do not miss."""
    return "ieee" if x.dtype == torch.float32 else "tf32"
