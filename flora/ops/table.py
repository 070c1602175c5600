"""A plan as the kernels read it: for each row of the batch, where its copies and its pages are."""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from flora.ops.plan import Plan, starts


class Table(NamedTuple):
    """What the kernels are told of a plan; they trust it.

    rows:     `[S, 6]`, the fields of `Row` in cpu.cpp.
    copies:   T, those of all rows; in front the ones that go through W0 as it is.
    segments: `[W, 4]`, the fields of `Segment`; None where W0 is modulated for no group.
    scaled:   whether Hadamard pages are read at all.
    in_order: whether each row has one copy, and copies stand as rows do.
    """

    rows: Tensor
    copies: int
    segments: Tensor | None
    scaled: bool
    in_order: bool


@lru_cache(maxsize=512)
def make_table(
    plan: Plan, pairs: tuple[int, ...], ranks: tuple[int, ...], biased: tuple[bool, ...]
) -> Table:
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
        return Table(
            torch.tensor(table, dtype=torch.int32),
            copies,
            torch.tensor(segments, dtype=torch.int32) if segments else None,
            bool(segments) or any(page >= 0 for _, _, page, *_ in table),
            all(copy == row and count == 1 for row, (copy, count, *_) in enumerate(table)),
        )
