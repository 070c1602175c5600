"""How a batch is computed: a pure function of rows, ranks and sizes that never touches a tensor."""

from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch

from flora.errors import ShapeError

MODULATION_TOKENS = 384
"""One modulation of W0 costs about what the base's product costs for so many tokens.

Measured on two Zen 4 cores with plain torch, 576×1536, forward and backward: at 128 tokens a
segment the weight side overtakes the activation side at four pairs, which is 3·128 tokens more.
Where a layer's own costs were not measured, this stands for them.
"""


@dataclass(frozen=True)
class Costs:
    """What a layer's two sides cost on a device, in one unit: only sums are compared.

    product:    (tokens, cost) of the product with W0, tokens ascending; linear between two points,
                and in proportion beyond the last.
    modulation: of W0 by one pair. Below zero where the rest of the weight side costs less than the
                activation side's product over as many tokens, as with a backward, for which the
                latter is taken again.
    pair:       of each further pair.
    """

    product: tuple[tuple[int, float], ...] = ((1, 1.0),)
    modulation: float = float(MODULATION_TOKENS)
    pair: float = 0.0

    def of_product(self, tokens: int) -> float:
        """Of a product over so many tokens."""
        if not tokens:
            return 0.0
        last, cost = self.product[-1]
        if tokens >= last:
            return cost * tokens / last
        above = bisect(self.product, (tokens, 0.0))
        right, right_cost = self.product[above]
        if not above:
            return right_cost  # a product reads W0 for one token as for a few
        left, left_cost = self.product[above - 1]
        return left_cost + (right_cost - left_cost) * (tokens - left) / (right - left)

    def of_modulation(self, pairs: int) -> float:
        """Of W0 modulated by so many pairs."""
        return self.modulation + self.pair * (pairs - 1)


ACTIVATION_SIDE = Costs(modulation=float("inf"))
"""Costs that keep every group on the activation side."""

WEIGHT_SIDE = Costs(modulation=float("-inf"))
"""Costs that put every group on the weight side, if it is scaled at all."""

Index = slice | torch.Tensor | None
"""Rows or pages to take: all of them, a run of them, or a list."""

Numbers = tuple[int, ...] | None
"""The same, before it is on a device."""


@dataclass(frozen=True)
class Pass:
    """One product with W0 on the activation side.

    rows:  the rows that go through it, a row once for each copy; None for all, in order.
    pages: each one's Hadamard page; None where the rows go through unscaled.
    """

    rows: Numbers
    pages: Numbers


@dataclass(frozen=True)
class Segment:
    """Rows with their pages: a group on the weight side, or all rows of one rank that add UV.

    rank: how many pages belong to each row (additive) or to the group (weight side).
    """

    rank: int
    rows: Numbers
    pages: Numbers


class OnDevice(NamedTuple):
    """A plan's indices as a device wants them; fields as in `Plan`."""

    passes: tuple[tuple[Index, Index], ...]
    weight_side: tuple[tuple[Index, Index], ...]
    additive: tuple[tuple[int, Index, Index], ...]
    bias: Index


@dataclass(frozen=True, eq=False)
class Plan:
    """What `make_plan` found.

    rows:        the group of each row.
    grad:        whether a backward may follow.
    passes:      the activation side; several of them add up.
    recompute:   whether the backward takes the passes again, and so nothing of their size is kept.
    weight_side: groups whose W0 is modulated, in the order of their first rows.
    additive:    rows of equal rank together.
    bias:        each row's page in the batch's biases, the page behind the last being the layer's
                 own; None where all rows keep that.
    """

    rows: tuple[int, ...]
    grad: bool
    passes: tuple[Pass, ...]
    recompute: bool
    weight_side: tuple[Segment, ...]
    additive: tuple[Segment, ...]
    bias: Numbers
    _on: dict[torch.device, OnDevice] = field(default_factory=dict, repr=False)

    def on(self, device: torch.device) -> OnDevice:
        """The indices on a device, made once."""
        if device not in self._on:
            self._on[device] = OnDevice(
                tuple((_index(p.rows, device), _index(p.pages, device)) for p in self.passes),
                tuple((_index(s.rows, device), _index(s.pages, device)) for s in self.weight_side),
                tuple(
                    (s.rank, _index(s.rows, device), _index(s.pages, device)) for s in self.additive
                ),
                _index(self.bias, device),
            )
        return self._on[device]


@lru_cache(maxsize=512)
def make_plan(
    rows: tuple[int, ...],
    pairs: tuple[int, ...],
    ranks: tuple[int, ...],
    biased: tuple[bool, ...],
    *,
    tokens: int,
    has_weight: bool,
    grad: bool,
    costs: Costs = Costs(),
) -> Plan:
    """Choose a side for each group of rows.

    rows:       the group of each row.
    pairs, ranks, biased: of each group, as in `BatchFactors`.
    tokens:     N, the tokens of each row.
    has_weight: whether W0 can be read, which the weight side needs.
    grad:       whether a backward may follow.
    costs:      of the layer; groups of several pairs are moved to the weight side where that lowers
                their sum.

    Raises ShapeError where a row names no group.
    """
    if rows and not 0 <= min(rows) <= max(rows) < len(pairs):
        raise ShapeError(f"rows name groups {min(rows)} to {max(rows)}, but there are {len(pairs)}")
    rows_of: dict[int, list[int]] = {}
    for row, group in enumerate(rows):
        rows_of.setdefault(group, []).append(row)

    modulated = _modulated(rows_of, pairs, tokens, costs) if has_weight else set()
    first_page = starts(pairs)
    active = [row for row, group in enumerate(rows) if group not in modulated]
    deepest = max((pairs[rows[row]] for row in active), default=0)
    recompute = grad and deepest > 1
    return Plan(
        rows=rows,
        grad=grad,
        passes=_passes(rows, active, pairs, one_by_one=recompute),
        recompute=recompute,
        weight_side=tuple(
            Segment(
                pairs[group],
                _all_or(tuple(rows_of[group]), len(rows)),
                tuple(range(first_page[group], first_page[group] + pairs[group])),
            )
            for group in rows_of  # whose rows need not be moved then, if each has its own
            if group in modulated
        ),
        additive=_additive(rows, ranks),
        bias=_bias(rows, biased),
    )


def _modulated(
    rows_of: dict[int, list[int]], pairs: Sequence[int], tokens: int, costs: Costs
) -> set[int]:
    """The groups whose W0 is modulated: as many, of those that save the most copies, as cost least.

    All of them are tried, as a product's fixed part is only saved where none is left to make it.
    """
    scaled = [group for group in rows_of if pairs[group]]
    if costs == WEIGHT_SIDE:
        return set(scaled)
    own = {group: len(members) * tokens for group, members in rows_of.items()}
    saved = {group: own[group] * (pairs[group] - 1) for group in scaled}
    most = sorted((group for group in scaled if saved[group]), key=lambda group: -saved[group])
    active = sum(own.values()) + sum(saved.values())
    lowest, count, moved = costs.of_product(active), 0, 0.0
    for number, group in enumerate(most, 1):
        active -= own[group] + saved[group]
        moved += costs.of_modulation(pairs[group]) + costs.of_product(own[group])
        if (cost := moved + costs.of_product(active)) < lowest:
            lowest, count = cost, number
    return set(most[:count])


def _passes(
    rows: tuple[int, ...], active: Sequence[int], pairs: Sequence[int], *, one_by_one: bool
) -> tuple[Pass, ...]:
    """All copies through one product; or, `one_by_one`, the j-th copies of all rows through a j-th.

    One product reads W0 once, which is what a decode step pays for; with a backward in sight the
    products come one by one, so that no more than one copy of the batch exists at a time.
    """
    if not active:
        return ()
    depth = max(pairs[rows[row]] for row in active)
    if depth == 0:
        return (Pass(_all_or(tuple(active), len(rows)), None),)
    first_page, ones = starts(pairs), sum(pairs)
    copies = [
        [(row, first_page[rows[row]] + j) for row in active if j < pairs[rows[row]]]
        for j in range(depth)
    ]
    copies[0] = [(row, first_page[rows[row]] if pairs[rows[row]] else ones) for row in active]
    if not one_by_one:
        copies = [[copy for level in copies for copy in level]]
    return tuple(
        Pass(
            _all_or(tuple(row for row, _ in level), len(rows)),
            tuple(page for _, page in level),
        )
        for level in copies
    )


def _additive(rows: tuple[int, ...], ranks: Sequence[int]) -> tuple[Segment, ...]:
    first_page = starts(ranks)
    by_rank: dict[int, list[int]] = {}
    for row, group in enumerate(rows):
        if ranks[group]:
            by_rank.setdefault(ranks[group], []).append(row)
    return tuple(
        Segment(
            rank,
            _all_or(tuple(members), len(rows)),
            tuple(first_page[rows[row]] + k for row in members for k in range(rank)),
        )
        for rank, members in sorted(by_rank.items())
    )


def _bias(rows: tuple[int, ...], biased: Sequence[bool]) -> Numbers:
    if not any(biased[group] for group in rows):
        return None
    page, own = starts(biased), sum(biased)
    return tuple(page[group] if biased[group] else own for group in rows)


def starts(counts: Sequence[int]) -> list[int]:
    """Where each group's pages begin, and behind them the end."""
    return list(accumulate(counts, initial=0))


def _all_or(members: tuple[int, ...], count: int) -> Numbers:
    return None if members == tuple(range(count)) else members


def _index(numbers: Numbers, device: torch.device) -> Index:
    if numbers is None:
        return None
    if numbers == tuple(range(numbers[0], numbers[0] + len(numbers))):
        return slice(numbers[0], numbers[0] + len(numbers))
    with torch.inference_mode(False):  # a plan outlives the call, and may serve a training
        return torch.tensor(numbers, device=device)
