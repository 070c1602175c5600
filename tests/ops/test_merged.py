"""Merged layers against the operator on each of them alone."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flora.errors import ShapeError
from flora.ops.merged import Merged, Slice
from flora.ops.plan import ACTIVATION_SIDE, WEIGHT_SIDE
from tests.ops.test_adapted_linear import (
    Layer,
    assert_right,
    batch_factors,
    make_layer,
    set_side,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
BACKENDS = ["eager", "cpu"]
SIZES = (9, 4, 6)
GROUPS: list[Any] = [
    [{"pairs": 1}, None, {"pairs": 3, "rank": 2, "bias": True}],
    [{"rank": 4}, {"rank": 11}, None],
    [{"bias": True}, {"pairs": 2}, {"pairs": 1}],
    [{"pairs": 2, "rank": 1}, None, None],
]
"""Of a layer each: its groups are touched in one way here, in another there."""


def make_layers(
    groups: list[Any], rows: list[int], *, tokens: int, dtype: torch.dtype, bias: bool
) -> list[Layer]:
    """Layers of one input; None for a layer that no group touches."""
    layers = [
        make_layer(
            own or [None, None, None],
            rows,
            out_features=size,
            tokens=tokens,
            dtype=dtype,
            bias=bias,
            seed=seed,
        )
        for seed, (own, size) in enumerate(zip(groups, SIZES, strict=True))
    ]
    return [replace(layer, x=layers[0].x) for layer in layers]


def merged(
    layers: list[Layer], backend: str, *, weight: bool, pure: bool, same_input: bool = False
) -> Tensor:
    """All of them at once, without gradients."""

    def product(weight_OI: Tensor, x: Tensor) -> Tensor:
        y = F.linear(x, weight_OI)
        return y if pure else y.detach()

    with torch.no_grad():
        whole = Merged(
            partial(product, torch.cat([layer.weight for layer in layers])),
            [
                Slice(
                    out_features=len(layer.weight),
                    base=partial(product, layer.weight),
                    factors=batch_factors(layer) if any(layer.groups) else None,
                    bias=layer.bias,
                    weight=layer.weight if weight else None,
                )
                for layer in layers
            ],
            pure=pure,
            backend=backend,
        )
        linear = whole.prepare(layers[0].x, layers[0].rows, same_input=same_input)
        first, second = linear(layers[0].x), linear(layers[0].x)
    if not torch.equal(first, second):
        raise AssertionError("a second step is another")
    return second


def assert_each_right(found: Tensor, layers: list[Layer]) -> None:
    sizes = [len(layer.weight) for layer in layers]
    with torch.no_grad():
        for part, layer in zip(found.split(sizes, dim=-1), layers, strict=True):
            assert_right(part, layer)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@given(
    groups=st.lists(st.sampled_from([*GROUPS, None]), min_size=3, max_size=3).filter(any),
    rows=st.lists(st.integers(0, 2), min_size=1, max_size=9),
    tokens=st.sampled_from([1, 3]),
    bias=st.booleans(),
    weight=st.booleans(),
    pure=st.booleans(),
    side=st.sampled_from([ACTIVATION_SIDE, WEIGHT_SIDE]),
)
def test_merged_layers_are_what_each_is_alone(
    dtype, backend, groups, rows, tokens, bias, weight, pure, side
):
    layers = make_layers(groups, rows, tokens=tokens, dtype=dtype, bias=bias)
    with pytest.MonkeyPatch.context() as patch:
        set_side(patch, side)
        assert_each_right(merged(layers, backend, weight=weight, pure=pure), layers)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@given(
    pairs=st.lists(st.integers(0, 3), min_size=3, max_size=3).filter(any),
    rows=st.lists(st.integers(0, 2), min_size=1, max_size=9),
    bias=st.booleans(),
)
def test_one_b_for_all_layers_takes_the_merged_product(dtype, backend, pairs, rows, bias):
    made = [{"pairs": n, "rank": 2} if n else {"rank": 2} for n in pairs]
    layers = make_layers([made] * 3, rows, tokens=1, dtype=dtype, bias=bias)
    groups = [
        [
            replace(group, hadamard_in=first.hadamard_in)
            for group, first in zip(layer.groups, layers[0].groups, strict=True)
        ]
        for layer in layers
    ]
    layers = [replace(layer, groups=own) for layer, own in zip(layers, groups, strict=True)]
    found = merged(layers, backend, weight=False, pure=True, same_input=True)
    assert_each_right(found, layers)


def test_a_merged_layer_says_what_does_not_fit():
    layers = make_layers(GROUPS[:3], [0, 1], tokens=1, dtype=torch.float32, bias=False)
    wrong = [replace(layers[0], rows=[0]), *layers[1:]]
    with pytest.raises(ShapeError, match="1 rows named"):
        merged(wrong, "cpu", weight=True, pure=True)


NOTHING_SCALED: list[Any] = [[{"rank": 2}, None], None, [{"rank": 3}, None]]
ONE_SCALED: list[Any] = [[{"pairs": 1}, None], None, [{"rank": 3}, None]]
ALL_SCALED: list[Any] = [[{"pairs": 3}, None]] * 3


@pytest.mark.parametrize(
    ("backend", "groups", "same_input", "expected"),
    [
        ("cpu", NOTHING_SCALED, False, {"merged": 2}),
        ("eager", NOTHING_SCALED, False, {"merged": 2}),
        ("cpu", ONE_SCALED, False, {"0": 2, "1": 2, "2": 2}),
        ("eager", ONE_SCALED, False, {"0": 2, "1": 2, "2": 2}),
        ("cpu", ALL_SCALED, True, {"merged": 4}),
    ],
)
def test_which_products_are_taken(backend, groups, same_input, expected):
    """Rows through them, of a batch of two; `same_input` says that all are scaled in one way."""
    layers = make_layers(
        [own or [None, None] for own in groups], [0, 1], tokens=1, dtype=torch.float32, bias=True
    )
    counts: dict[str, int] = {}

    def product(name: str, weight_OI: Tensor, x: Tensor) -> Tensor:
        counts[name] = counts.get(name, 0) + x.shape[0] * x.shape[1]
        return F.linear(x, weight_OI)

    with torch.no_grad():
        slices = [
            Slice(
                out_features=len(layer.weight),
                base=partial(product, str(number), layer.weight),
                factors=batch_factors(layer) if any(layer.groups) else None,
                bias=layer.bias,
            )
            for number, layer in enumerate(layers)
        ]
        weight = torch.cat([layer.weight for layer in layers])
        whole = Merged(partial(product, "merged", weight), slices, pure=True, backend=backend)
        whole.prepare(layers[0].x, [0, 1], same_input=same_input)(layers[0].x)
    assert counts == expected
