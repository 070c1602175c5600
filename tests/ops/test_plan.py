"""The plan is a pure function: no tensor, no device."""

import pytest
import torch

from flora.errors import ShapeError
from flora.ops.plan import (
    ACTIVATION_SIDE,
    MODULATION_TOKENS,
    WEIGHT_SIDE,
    Costs,
    Pass,
    Plan,
    Segment,
    make_plan,
)
from flora.ops.table import make_table


def plan(rows, pairs, ranks=None, biased=None, **settings) -> Plan:
    groups = len(pairs)
    settings = {"tokens": 1, "has_weight": True, "grad": False} | settings
    return make_plan(
        tuple(rows), tuple(pairs), tuple(ranks or [0] * groups), tuple(biased or [False] * groups),
        **settings,
    )  # fmt: skip


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(("pairs", "rows"), [(2, 1), (3, 2), (5, 3)])
def test_the_weight_side_begins_where_the_copies_cost_more_than_a_modulation(pairs, rows, grad):
    most = MODULATION_TOKENS // ((pairs - 1) * rows)
    at = plan([0] * rows, [pairs], tokens=most, grad=grad)
    above = plan([0] * rows, [pairs], tokens=most + 1, grad=grad)
    assert at.weight_side == ()
    assert at.passes
    assert above.weight_side == (Segment(pairs, None, tuple(range(pairs))),)
    assert above.passes == ()
    assert plan([0] * rows, [pairs], tokens=most + 1, has_weight=False).weight_side == ()


def test_one_pair_stays_on_the_activation_side_at_any_size():
    assert plan([0], [1], tokens=10**9).weight_side == ()


def test_each_group_has_its_own_side():
    found = plan([1, 0, 2, 1], [2, 1, 4], tokens=MODULATION_TOKENS)
    assert found.weight_side == (Segment(4, (2,), (3, 4, 5, 6)),)
    assert found.passes == (Pass((0, 1, 3, 1), (2, 0, 2, 1)),)


def test_a_base_row_rides_along_on_the_page_of_ones():
    assert plan([0, 1], [0, 2]).passes == (Pass((0, 1, 1), (2, 0, 1)),)


def test_base_rows_alone_are_not_scaled():
    assert plan([0, 0], [0, 3]).passes == (Pass(None, None),)


def test_with_a_backward_the_copies_come_one_after_the_other():
    found = plan([0, 1], [1, 3], grad=True)
    assert found.recompute
    assert found.passes == (Pass(None, (0, 1)), Pass((1,), (2,)), Pass((1,), (3,)))


@pytest.mark.parametrize(("pairs", "grad"), [([1, 0], True), ([3, 2], False)])
def test_nothing_is_taken_again_without_need(pairs, grad):
    assert not plan([0, 1], pairs, grad=grad).recompute


def test_rows_of_equal_rank_add_together():
    found = plan([0, 1, 2, 3, 1], [0] * 4, [2, 1, 2, 0])
    assert found.additive == (Segment(1, (1, 4), (2, 2)), Segment(2, (0, 2), (0, 1, 3, 4)))


def test_biases_count_only_the_groups_that_bring_one():
    assert plan([0, 1, 2], [0] * 3, biased=[False, True, True]).bias == (2, 0, 1)
    assert plan([0, 0], [0] * 2, biased=[False, True]).bias is None


def test_a_plan_and_its_indices_are_made_once():
    first = plan([0, 1], [2, 1], tokens=7)
    assert plan([0, 1], [2, 1], tokens=7) is first
    assert plan([0, 1], [2, 1], tokens=8) is not first
    assert first.on(torch.device("cpu")) is first.on(torch.device("cpu"))


@pytest.mark.parametrize("rows", [[0, 2], [-1, 0], [5]])
def test_a_row_without_a_group_is_an_error(rows):
    with pytest.raises(ShapeError, match="there are 2"):
        plan(rows, [1, 1])


def test_a_products_cost_is_linear_between_what_was_measured():
    costs = Costs(product=((2, 10.0), (8, 16.0), (32, 64.0)))
    assert [costs.of_product(n) for n in (0, 1, 2, 5, 8, 20, 32, 64)] == [
        0, 10, 10, 13, 16, 40, 64, 128,
    ]  # fmt: skip
    assert Costs(modulation=7, pair=2).of_modulation(4) == 13


def test_a_group_moves_where_that_lowers_the_sum():
    # A product is free up to 8 tokens, so that copies cost nothing there.
    flat = Costs(product=((8, 10.0), (16, 20.0)), modulation=5.0, pair=1.0)
    assert plan([0], [8], tokens=1, costs=flat).weight_side == ()
    # 8 rows of 2 pairs: 16 copies cost 20, a modulation and a product 5 + 1 + 10.
    assert plan([0] * 8, [2], costs=flat).weight_side
    # Four adapters of two rows each: each modulation would save nothing.
    assert plan([0, 0, 1, 1, 2, 2, 3, 3], [2] * 4, costs=flat).weight_side == ()
    # The deepest goes first, and then the other's copies are few enough to stay.
    both = plan([0] * 4 + [1] * 4, [2, 8], costs=flat)
    assert [segment.pages for segment in both.weight_side] == [tuple(range(2, 10))]


def test_groups_move_together_where_that_leaves_no_product_to_make():
    fixed = Costs(product=((1, 7.0), (2, 12.0), (4, 20.0), (5, 24.0)), modulation=2.0)
    # 4 copies cost 20; one adapter moved 12 + 2 + 7, and both 2 (2 + 7).
    assert len(plan([0, 1], [2, 2], costs=fixed).weight_side) == 2
    # A third row, which nothing scales, has a product made all the same: 24, 25 or 25.
    assert plan([0, 1, 2], [2, 2, 0], costs=fixed).weight_side == ()


def test_the_groups_that_save_the_most_copies_move_first():
    # 6 rows of two pairs have more copies than one row of eight, of which fewer are saved.
    costs = Costs(modulation=6.5)
    assert [s.pages for s in plan([0] * 6 + [1], [2, 8], costs=costs).weight_side] == [
        tuple(range(2, 10))
    ]


def test_one_pair_is_never_worth_a_modulation():
    """With a backward a modulation may cost less than what the activation side does in addition."""
    cheap = Costs(product=((8, 10.0), (64, 80.0)), modulation=-5.0)
    assert plan([0], [1], tokens=16, grad=True, costs=cheap).weight_side == ()
    both = plan([0, 1], [1, 2], tokens=16, grad=True, costs=cheap)
    assert [segment.pages for segment in both.weight_side] == [(1, 2)]


def test_segments_are_in_the_order_of_the_rows():
    """So rows whose groups stand together are not moved, whichever number each group has."""
    rows, pairs = [2, 2, 0, 0, 1], [4, 3, 2]
    forced = plan(rows, pairs, costs=WEIGHT_SIDE)
    assert [segment.rows for segment in forced.weight_side] == [(0, 1), (2, 3), (4,)]
    nothing = (0, 0, 0)
    table = make_table(forced, tuple(pairs), nothing, nothing, torch.device("cpu"))
    assert table.in_order


def test_a_side_can_be_forced():
    rows, pairs = [0, 1, 2], [1, 3, 0]
    assert plan(rows, pairs, tokens=10**6, costs=ACTIVATION_SIDE).weight_side == ()
    forced = plan(rows, pairs, costs=WEIGHT_SIDE)
    assert [segment.rows for segment in forced.weight_side] == [(0,), (1,)]
    assert forced.passes == (Pass((2,), None),)
