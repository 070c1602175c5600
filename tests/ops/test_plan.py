"""The plan is a pure function: no tensor, no device."""

import pytest
import torch

from flora.errors import ShapeError
from flora.ops.plan import MODULATION_TOKENS, Pass, Plan, Segment, make_plan


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
