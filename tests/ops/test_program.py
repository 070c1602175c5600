"""A layer alone as a program, against the operator."""

import gc
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flora.ops import adapted_linear as front_door
from flora.ops.factors import WeightProduct
from flora.ops.program import Product, Program
from tests.ops.test_adapted_linear import (
    Layer,
    assert_right,
    batch_factors,
    make_layer,
    threads_of,
)
from tests.ops.test_merged import GROUPS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LINE = 64
"""Bytes of a cache's line: of numbers that lie across lines AMX takes nearly twice as long."""

_library = torch.library.Library("flora_test", "DEF")
_library.define("product(Tensor(a!) to, Tensor x, Tensor? bias, Tensor weight) -> ()")
_library.define("packed(Tensor(a!) to, Tensor x, Tensor weight, Tensor? bias, bool vnni) -> ()")


@partial(_library.impl, "product", dispatch_key="CompositeExplicitAutograd")
def _product(to: Tensor, x: Tensor, bias: Tensor | None, weight: Tensor) -> None:
    assert x.data_ptr() % LINE == 0
    to.copy_(F.linear(x, weight, bias))


@partial(_library.impl, "packed", dispatch_key="CompositeExplicitAutograd")
def _packed(to: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, vnni: bool) -> None:
    assert vnni
    to.copy_(F.linear(x, weight, bias))


def product_of(weight: Tensor, *, packed: bool = False) -> Product:
    name = "flora_test::packed" if packed else "flora_test::product"
    return Product(partial(F.linear, weight=weight), weight, name, packed=packed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pure", [True, False])
@given(
    group=st.sampled_from([own for groups in GROUPS for own in groups if own]),
    rows=st.lists(st.integers(0, 1), min_size=1, max_size=9),
    tokens=st.sampled_from([1, 5]),
    bias=st.booleans(),
    product=st.sampled_from([WeightProduct, product_of]),
)
def test_a_layer_alone(dtype, pure, group, rows, tokens, bias, product):
    layer = make_layer([None, group], rows, tokens=tokens, dtype=dtype, bias=bias)
    factors, x = batch_factors(layer), layer.x
    with torch.no_grad():
        base = product(layer.weight)
        linear = front_door.prepare(
            x, base, factors, rows, bias=layer.bias, pure=pure, backend="cpu"
        )
        assert isinstance(linear, Program)
        wide = x.repeat(1, 1, 2)  # what it takes need not stand alone
        found = linear(wide[..., : x.shape[2]])
    assert_right(found, layer)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [2, 3])
@given(
    out_features=st.sampled_from([1, 63, 64, 65, 100, 257]),
    rows=st.lists(st.integers(0, 2), min_size=1, max_size=9),
    tokens=st.sampled_from([1, 15]),
    turned=st.booleans(),
)
def test_threads_multiply_by_rows_of_their_own(dtype, threads, out_features, rows, tokens, turned):
    """Fewer rows of W0 than for a thread each, more tokens than few; W0 as it lies in a Conv1D."""
    groups = [None, {"pairs": 1}, {"pairs": 1, "rank": 2}]
    layer = make_layer(
        groups, rows, out_features=out_features, tokens=tokens, dtype=dtype, bias=False
    )
    if turned:
        layer.weight = layer.weight.T.contiguous().T
    with torch.no_grad(), threads_of(threads):
        linear = front_door.prepare(
            layer.x, WeightProduct(layer.weight), batch_factors(layer), rows, backend="cpu"
        )
        found = linear(layer.x)
    assert_right(found, layer)


def test_x_of_another_kind_is_refused(layer):
    factors, base = batch_factors(layer), WeightProduct(layer.weight)
    with torch.no_grad():
        linear = front_door.prepare(layer.x, base, factors, layer.rows, backend="cpu")
        for x in (layer.x[:1], layer.x.double(), layer.x.bfloat16(), layer.x[..., :-1]):
            with pytest.raises(ValueError, match="another shape or type"):
                linear(x)


def test_a_weight_that_changes_in_place_is_read_as_it_is(layer):
    weight = torch.nn.Parameter(layer.weight.clone())
    factors, base = batch_factors(layer), WeightProduct(weight)
    with torch.no_grad():
        linear = front_door.prepare(layer.x, base, factors, layer.rows, backend="cpu")
        weight.data = 2 * weight.data
        twice = linear(layer.x)
        fresh = front_door.prepare(
            layer.x, WeightProduct(2 * layer.weight), factors, layer.rows, backend="cpu"
        )
        assert torch.equal(twice, fresh(layer.x))


@pytest.fixture
def layer() -> Layer:
    return make_layer([{"pairs": 2}, None], [0, 1], tokens=1)


def test_a_product_is_given_back():
    weight = torch.ones(3, 2)
    before = weight._use_count()
    product = product_of(weight)
    assert weight._use_count() > before
    del product
    gc.collect()
    assert weight._use_count() == before
