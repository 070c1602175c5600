"""Rows to groups, and columns to groups where a row changes over."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flora.errors import ShapeError, UnknownAdapterError
from flora.hosts.rows import Batch, make_batch


def batch(adapters, mask=None, asked=None) -> Batch:
    def lookup(module, names):
        if asked is not None:
            asked.append((module, names))

    mask = None if mask is None else torch.tensor(mask)
    return make_batch(adapters, {"a", "b", "c"}.__contains__, lookup, mask)


def named(adapters, columns: int, first: int = 0, mask=None) -> list[str | None]:
    """The adapter of each unit of a forward."""
    made = batch(adapters, mask)
    return [made.adapters.names[group] for group in made.call(len(adapters), columns, first).units]


def test_rows_of_one_adapter_are_one_group():
    made = batch(["a", None, "b", "a", "__base__"])
    assert made.adapters.names == ("a", None, "b")
    assert made.call(5, 7, 0).units == (0, 1, 2, 0, 1)
    assert not made.only_base
    assert batch([None, "__base__"]).only_base


def test_a_name_with_a_span_in_the_base_is_not_only_base():
    assert not batch([[("a", 1), (None, 0)]]).only_base
    assert batch([[("__base__", 1), (None, 0)]]).only_base


@given(
    st.lists(st.tuples(st.sampled_from(["a", "b", "c", None]), st.integers(0, 4)), min_size=1),
    st.integers(0, 3),
    st.integers(0, 12),
    st.integers(1, 6),
)
def test_each_column_has_the_span_that_holds_it(spans, padding, first, columns):
    own = sum(count for _, count in spans) + 1
    mask = [[0] * padding + [1] * own]
    whole = [name for name, count in spans for _ in range(count)]
    whole += [spans[-1][0]] * (first + columns)
    whole = whole[:1] * padding + whole  # padding in front goes with the first token
    found = named([spans], columns, first, mask)
    if len(found) == 1:
        found *= columns  # one unit, the row
    assert found == whole[first : first + columns]


def test_behind_the_last_change_a_row_is_one_unit_and_its_call_is_kept():
    made = batch([[("a", 3), ("b", 2)], "c"])
    assert made.call(2, 1, 2).units == (0, 2)
    assert made.call(2, 1, 3).units == (1, 2)
    assert made.call(2, 1, 4) is made.call(2, 1, 3)


def test_repeated_rows_keep_their_spans_and_their_start():
    made = batch([[("a", 1), ("b", 1)], "c"], [[0, 1, 1], [1, 1, 1]]).repeat(2)
    expected = ["a", "a", "b"] * 2 + ["c"] * 6
    assert [made.adapters.names[g] for g in made.call(4, 3, 0).units] == expected


def test_rows_that_are_taken_keep_their_spans_and_their_start():
    made = batch(["c", [("a", 1), ("b", 1)], "b"], [[1, 1, 1], [0, 1, 1], [1, 1, 1]]).take(
        [2, 1, 2]
    )
    assert [made.adapters.names[g] for g in made.call(3, 3, 0).units] == [*"bbb", *"aab", *"bbb"]


def test_a_layers_factors_are_asked_for_once():
    asked: list[object] = []
    made = batch(["a", "b"], asked=asked)
    repeated, taken = made.repeat(3), made.take([1])
    for _ in range(2):
        made.adapters.factors("up")
        repeated.adapters.factors("up")
        taken.adapters.factors("up")
        made.adapters.factors("down")
    assert asked == [("up", ("a", "b")), ("down", ("a", "b"))]


@pytest.mark.parametrize(
    ("adapters", "mask", "error"),
    [
        (["nobody"], None, UnknownAdapterError),
        ([[("a", 1), ("nobody", 1)]], None, UnknownAdapterError),
        ([[]], None, ShapeError),
        ([[("a", -1)]], None, ShapeError),
        ([[("a", 2), ("b", 2)]], [[0, 1, 1, 1]], ShapeError),
        ([[("a", 2), ("b", 2)]], [[1] * 4] * 2, ShapeError),
        ([[("a", 2), ("b", 2)]], [[[1] * 4]], ShapeError),
    ],
)
def test_what_does_not_fit_is_one_line(adapters, mask, error):
    with pytest.raises(error) as caught:
        batch(adapters, mask)
    assert "\n" not in str(caught.value)


def test_a_call_of_other_rows_is_an_error():
    with pytest.raises(ShapeError, match="2 entries, the batch 3 rows"):
        batch(["a", "b"]).call(3, 1, 0)
