"""A plan as numbers that kernels read: the same for all layers, made once for a device."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from flora.ops.plan import Plan, starts


class Table(NamedTuple):
    """What the kernels are told of a plan; they trust it. All tensors are int32.

    rows:     `[S, 6]`: of each row its first copy, its copies, its first Hadamard page (-1: it is
              not scaled), its first additive page, its rank, its bias page (-1: the layer's own).
    copies:   `[T, 2]`: of each copy its row and its Hadamard page (-1: it is not scaled); in front
              the `active` ones, then those whose W0 is modulated, segment after segment.
    segments: `[W, 4]`: of each modulated W0 its first copy, its copies, its first Hadamard page,
              its pages; None where W0 is modulated for no group.
    active:   how many copies go through W0 as it is.
    moved:    whether these are anything but the rows themselves.
    scaled:   whether copies are: those on the active side, by their Hadamard pages.
    in_order: whether each row has one copy, in the row's own place.
    adds:     whether a row adds something to its products, or has a bias.
    lengths:  the copies of each segment.
    pairs:    those of the deepest segment.
    rank:     that of the deepest row.
    """

    rows: Tensor
    copies: Tensor
    segments: Tensor | None
    active: int
    moved: bool
    scaled: bool
    in_order: bool
    adds: bool
    lengths: tuple[int, ...]
    pairs: int
    rank: int


@lru_cache(maxsize=512)
def make_table(
    plan: Plan,
    pairs: tuple[int, ...],
    ranks: tuple[int, ...],
    biased: tuple[bool, ...],
    device: torch.device,
) -> Table:
    """A plan's table; the groups' counts are those that the plan was made of."""
    first_page, first_rank, first_bias = starts(pairs), starts(ranks), starts(biased)
    count = len(plan.rows)
    modulated = {
        row: number
        for number, segment in enumerate(plan.weight_side)
        for row in (range(count) if segment.rows is None else segment.rows)
    }
    rows: dict[int, tuple[int, ...]] = {}
    copies: list[tuple[int, int]] = []
    segments: list[list[int]] = []
    for row in sorted(range(count), key=lambda row: modulated.get(row, -1)):
        group = plan.rows[row]
        own, page = pairs[group], first_page[group]
        if row in modulated:
            if len(segments) == modulated[row]:
                segments.append([len(copies), 0, page, own])
            segments[-1][1] += 1
        if row in modulated or not own:
            own, page = 1, -1
        bias = first_bias[group] if biased[group] else -1
        rows[row] = len(copies), own, page, first_rank[group], ranks[group], bias
        copies += [(row, page + j if page >= 0 else -1) for j in range(own)]
    active = segments[0][0] if segments else len(copies)

    def numbers(table: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(table, dtype=torch.int32, device=device)

    with torch.inference_mode(False):  # a table outlives the call
        return Table(
            rows=numbers([rows[row] for row in range(count)]),
            copies=numbers(copies),
            segments=numbers(segments) if segments else None,
            active=active,
            moved=copies[:active] != [(row, -1) for row in range(count)],
            scaled=any(page >= 0 for _, page in copies),
            in_order=[row for row, _ in copies] == list(range(count)),
            adds=any(rank or bias >= 0 for *_, rank, bias in rows.values()),
            lengths=tuple(segment[1] for segment in segments),
            pairs=max((segment[3] for segment in segments), default=0),
            rank=max((ranks[group] for group in plan.rows), default=0),
        )
