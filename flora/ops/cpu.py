"""The operator in C++ for CPUs: what it adds to the base's product, in as few passes as there are.

For fp32 and 16 bits without gradients; with gradients and in fp64 the operator is `eager`'s.
"""

from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flora.ops import eager
from flora.ops.build import load_kernels
from flora.ops.factors import BaseProduct, BatchFactors
from flora.ops.plan import Plan

load_kernels()
kernels: Any = torch.ops.flora_cpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def apply(
    x_SNI: Tensor,
    base: BaseProduct,
    factors: BatchFactors,
    plan: Plan,
    weight_OI: Tensor | None,
    bias_O: Tensor | None,
) -> Tensor:
    """See `adapted_linear`. Sums are taken in fp32 and rounded once at the end."""
    dtype = x_SNI.dtype
    mixed = weight_OI is not None and weight_OI.dtype != dtype
    if plan.grad or mixed or dtype not in DTYPES:
        return eager.apply(x_SNI, base, factors, plan, weight_OI, bias_O)
    rows, copies, segments, pages, rest = factors.keep((plan, dtype), _layout, factors, plan, dtype)
    if bias_O is not None:
        bias_O = bias_O.to(dtype)
    y: Tensor
    if weight_OI is None:
        copied = x_SNI if pages is None else kernels.expand(x_SNI, pages, rows, copies)
        y = kernels.contract(base(copied).to(dtype), x_SNI, rows, *rest, bias_O)
    else:
        y = kernels.linear(x_SNI, weight_OI, rows, copies, segments, pages, *rest, bias_O)
    return y


class _Layout(NamedTuple):
    """What the kernels are given beside x and W0; they trust it.

    rows:     `[S, 6]`, the fields of `Row` in cpu.cpp.
    copies:   T, those of all rows; in front the ones that go through W0 as it is.
    segments: `[W, 4]`, the fields of `Segment`; None where W0 is modulated for no group.
    in_pages: `hadamard_in`.
    rest:     `hadamard_out`, `down`, `up` and `bias`, the last three in x's type.
    """

    rows: Tensor
    copies: int
    segments: Tensor | None
    in_pages: Tensor | None
    rest: tuple[Tensor | None, ...]


def _layout(factors: BatchFactors, plan: Plan, dtype: torch.dtype) -> _Layout:
    first_page, first_rank, first_bias = (
        list(accumulate(counts, initial=0))
        for counts in (factors.pairs, factors.ranks, factors.biased)
    )
    modulated = {
        row: number
        for number, segment in enumerate(plan.weight_side)
        for row in (range(len(plan.rows)) if segment.rows is None else segment.rows)
    }
    rows: dict[int, tuple[int, ...]] = {}
    segments: list[list[int]] = []
    copies = 0
    for row in sorted(range(len(plan.rows)), key=lambda row: modulated.get(row, -1)):
        group = plan.rows[row]
        pairs, page = factors.pairs[group], first_page[group]
        if row in modulated:
            if len(segments) == modulated[row]:
                segments.append([copies, 0, page, pairs])
            segments[-1][1] += 1
        if row in modulated or not pairs:
            pairs, page = 1, -1
        bias = first_bias[group] if factors.biased[group] else -1
        rows[row] = copies, pairs, page, first_rank[group], factors.ranks[group], bias
        copies += pairs
    table = [rows[row] for row in range(len(plan.rows))]
    scaled = segments or any(page >= 0 for _, _, page, *_ in table)

    def cast(part: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        return None if part is None else part.to(dtype)

    return _Layout(
        torch.tensor(table, dtype=torch.int32),
        copies,
        torch.tensor(segments, dtype=torch.int32) if segments else None,
        cast(factors.hadamard_in, torch.float32) if scaled else None,
        (
            cast(factors.hadamard_out, torch.float32),
            *(cast(part, dtype) for part in (factors.down, factors.up, factors.bias)),
        ),
    )
