"""Programs against the operator on each layer, and what is asked of Python."""

import gc
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flora.ops import adapted_linear as front_door
from flora.ops.factors import WeightProduct
from flora.ops.merged import Merged, Slice
from flora.ops.plan import ACTIVATION_SIDE, WEIGHT_SIDE
from flora.ops.program import (
    CompiledLayer,
    Product,
    Program,
    Programs,
    Running,
    known_product,
)
from tests.ops.test_adapted_linear import (
    Layer,
    assert_right,
    batch_factors,
    make_layer,
    set_side,
)
from tests.ops.test_merged import GROUPS, SIZES, assert_each_right, make_layers

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ASKED = 7.0
"""What Python answers where it is asked."""

_library = torch.library.Library("flora_test", "DEF")
_library.define("product(Tensor(a!) to, Tensor x, Tensor? bias, Tensor weight) -> ()")
_library.define("packed(Tensor(a!) to, Tensor x, Tensor weight, Tensor? bias, bool vnni) -> ()")
_library.define("python(Tensor x, Tensor? bias, str name, int out_features) -> Tensor")


@partial(_library.impl, "product", dispatch_key="CompositeExplicitAutograd")
def _product(to: Tensor, x: Tensor, bias: Tensor | None, weight: Tensor) -> None:
    to.copy_(F.linear(x, weight, bias))


@partial(_library.impl, "packed", dispatch_key="CompositeExplicitAutograd")
def _packed(to: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, vnni: bool) -> None:
    assert vnni
    to.copy_(F.linear(x, weight, bias))


@partial(_library.impl, "python", dispatch_key="CompositeExplicitAutograd")
def _python(x: Tensor, bias: Tensor | None, name: str, out_features: int) -> Tensor:
    assert name == "layer"
    y = x.new_full((*x.shape[:-1], out_features), ASKED)
    return y if bias is None else y + bias


def product_of(weight: Tensor, *, packed: bool = False) -> Product:
    name = "flora_test::packed" if packed else "flora_test::product"
    return Product(partial(F.linear, weight=weight), weight, name, packed=packed)


class Compiled:
    """A layer in compiled code, and the batch that runs on it."""

    def __init__(self, product: Product, out_features: int) -> None:
        self.running, self.programs = Running(), Programs(3)
        self.layer = CompiledLayer(
            self.running, 1, product, "flora_test::python", "layer", out_features
        )
        self.running.set(self.programs)

    def prepare(self, linear: Any) -> bool:
        return self.programs.put(1, linear)

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.layer(x, bias)


def merged(layers: list[Layer], *, packed: bool) -> Merged:
    return Merged(
        product_of(torch.cat([layer.weight for layer in layers]), packed=packed),
        [
            Slice(
                out_features=len(layer.weight),
                base=product_of(layer.weight, packed=packed),
                factors=batch_factors(layer) if any(layer.groups) else None,
                bias=layer.bias,
                weight=layer.weight,
            )
            for layer in layers
        ],
        pure=True,
        backend="cpu",
    )


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    groups=st.lists(st.sampled_from([*GROUPS, None]), min_size=3, max_size=3).filter(any),
    rows=st.lists(st.integers(0, 2), min_size=1, max_size=9),
    tokens=st.sampled_from([1, 3]),
    bias=st.booleans(),
    packed=st.booleans(),
)
def test_merged_layers_are_what_each_is_alone(dtype, groups, rows, tokens, bias, packed):
    layers = make_layers(groups, rows, tokens=tokens, dtype=dtype, bias=bias)
    x = layers[0].x
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        set_side(patch, ACTIVATION_SIDE)
        whole = merged(layers, packed=packed)
        compiled = Compiled(whole.base, sum(SIZES))
        assert compiled.prepare(whole.prepare(x, rows))
        found = [compiled(x.flatten(0, 1)) for _ in range(2)]
    assert torch.equal(*found)
    assert_each_right(found[0].unflatten(0, x.shape[:2]), layers)


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
        compiled = Compiled(known_product(base), len(layer.weight))
        assert compiled.prepare(linear)
        assert torch.equal(compiled(x.flatten(0, 1)).view_as(found), found)
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


@pytest.fixture
def compiled(layer) -> Compiled:
    return Compiled(product_of(layer.weight), len(layer.weight))


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("make", [product_of, WeightProduct])
def test_without_adapters_it_is_the_base(layer, make, with_bias):
    x, bias = layer.x[:, 0], layer.bias if with_bias else None
    compiled = Compiled(known_product(make(layer.weight)), len(layer.weight))
    compiled.running.set(None)
    assert torch.equal(compiled(x, bias), F.linear(x, layer.weight, bias))
    compiled.running.set(compiled.programs)
    assert compiled.prepare(None)
    assert torch.equal(compiled(x, bias), F.linear(x, layer.weight, bias))


def prepared(layer: Layer, product: Any) -> Any:
    factors = batch_factors(layer)
    return front_door.prepare(
        layer.x, product, factors, layer.rows, weight=layer.weight, pure=True, backend="cpu"
    )


def test_python_is_asked_for_what_has_no_program(layer, compiled, monkeypatch):
    x, product = layer.x[:, 0], product_of(layer.weight)
    with torch.no_grad():
        assert (compiled(x) == ASKED).all()  # as nobody has made it ready
        assert torch.equal(compiled(x, layer.bias), ASKED + layer.bias.expand(2, -1))
        assert compiled.prepare(prepared(layer, product))
        assert not (compiled(x) == ASKED).any()
        assert (compiled(x[:1]) == ASKED).all()  # for other rows
        assert (compiled(layer.x) == ASKED).all()  # for other shapes
        assert not compiled.prepare(prepared(layer, partial(F.linear, weight=layer.weight)))
        assert (compiled(x) == ASKED).all()  # for a product that Python alone can take
        set_side(monkeypatch, WEIGHT_SIDE)
        assert not compiled.prepare(prepared(layer, product))
        assert (compiled(x) == ASKED).all()  # for a W0 that is modulated


def test_compiled_code_asks_as_it_runs(layer, compiled):
    x = layer.x[:, 0]
    with torch.no_grad():
        compiled.running.set(None)
        code = torch.compile(lambda x: compiled(2 * x) + 1, backend="aot_eager", fullgraph=True)
        assert torch.equal(code(x), F.linear(2 * x, layer.weight) + 1)
        compiled.running.set(compiled.programs)
        compiled.prepare(prepared(layer, product_of(layer.weight)))
        assert torch.equal(code(x), compiled(2 * x) + 1)


def test_a_product_is_given_back():
    weight = torch.ones(3, 2)
    before = weight._use_count()
    product = product_of(weight)
    assert weight._use_count() > before
    del product
    gc.collect()
    assert weight._use_count() == before
