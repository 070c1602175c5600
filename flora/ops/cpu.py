"""The operator in C++ for CPUs: what it adds to the base's product, in as few passes as there are.

For fp32 and 16 bits without gradients; with gradients and in fp64 the operator is `eager`'s.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flora.ops import eager
from flora.ops.build import load_kernels
from flora.ops.factors import BaseProduct, BatchFactors
from flora.ops.plan import Plan, starts

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
    table = _table(plan, factors.pairs, factors.ranks, factors.biased)
    pages, *rest = factors.keep((table.scaled, dtype), _pages, factors, table.scaled, dtype)
    if bias_O is not None:
        bias_O = bias_O.to(dtype)
    y: Tensor
    if weight_OI is None:
        copied = x_SNI if pages is None else kernels.expand(x_SNI, pages, table.rows, table.copies)
        y = kernels.contract(base(copied).to(dtype), x_SNI, table.rows, *rest, bias_O)
    else:
        y = kernels.linear(
            x_SNI, weight_OI, table.rows, table.copies, table.segments, pages, *rest, bias_O
        )
    return y


class _Table(NamedTuple):
    """What the kernels are told of a plan; they trust it.

    rows:     `[S, 6]`, the fields of `Row` in cpu.cpp.
    copies:   T, those of all rows; in front the ones that go through W0 as it is.
    segments: `[W, 4]`, the fields of `Segment`; None where W0 is modulated for no group.
    scaled:   whether Hadamard pages are read at all.
    """

    rows: Tensor
    copies: int
    segments: Tensor | None
    scaled: bool


@lru_cache(maxsize=512)
def _table(
    plan: Plan, pairs: tuple[int, ...], ranks: tuple[int, ...], biased: tuple[bool, ...]
) -> _Table:
    """A plan's table, the same for all layers; the groups' counts are those that it was made of."""
    first_page, first_rank, first_bias = starts(pairs), starts(ranks), starts(biased)
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
        count, page = pairs[group], first_page[group]
        if row in modulated:
            if len(segments) == modulated[row]:
                segments.append([copies, 0, page, count])
            segments[-1][1] += 1
        if row in modulated or not count:
            count, page = 1, -1
        bias = first_bias[group] if biased[group] else -1
        rows[row] = copies, count, page, first_rank[group], ranks[group], bias
        copies += count
    table = [rows[row] for row in range(len(plan.rows))]
    with torch.inference_mode(False):  # a table outlives the call
        return _Table(
            torch.tensor(table, dtype=torch.int32),
            copies,
            torch.tensor(segments, dtype=torch.int32) if segments else None,
            bool(segments) or any(page >= 0 for _, _, page, *_ in table),
        )


def _pages(factors: BatchFactors, scaled: bool, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    """A layer's pages as the kernels take them: in, out, down, up, bias; the last three as x is."""

    def cast(part: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        return None if part is None else part.to(dtype)

    return (
        cast(factors.hadamard_in, torch.float32) if scaled else None,
        cast(factors.hadamard_out, torch.float32),
        *(cast(part, dtype) for part in (factors.down, factors.up, factors.bias)),
    )
