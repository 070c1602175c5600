"""A model's layers together against the operator on each, and what is asked of Python."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flora.adapters.core import Adapter, LayerFactors
from flora.bank import AdapterBank, LayerSpec
from flora.ops.factors import WeightProduct
from flora.ops.model_layers import CompiledLayer, ModelLayers, Running, Slice
from flora.ops.plan import ACTIVATION_SIDE, WEIGHT_SIDE, Costs
from flora.ops.program import Product, known_product
from tests.ops.test_adapted_linear import Layer, assert_right, make_layer, set_side
from tests.ops.test_merged import GROUPS, SIZES, make_layers
from tests.ops.test_program import DTYPES, product_of

DEEP_ONLY = Costs(modulation=0.0)
"""By which W0 is modulated for groups of several pairs."""

ASKED = 7.0
"""What Python answers where it is asked."""

_library = torch.library.Library("flora_test", "FRAGMENT")
_library.define("python(Tensor x, Tensor? bias, str name, int out_features) -> Tensor")


@partial(_library.impl, "python", dispatch_key="CompositeExplicitAutograd")
def _python(x: Tensor, bias: Tensor | None, name: str, out_features: int) -> Tensor:
    assert name == "layer"
    y = x.new_full((*x.shape[:-1], out_features), ASKED)
    return y if bias is None else y + bias


class Model:
    """Layers of one input, merged in one and each alone, and a bank of their adapters."""

    def __init__(
        self,
        layers: list[Layer],
        product: Any = product_of,
        *,
        of_slices: bool = True,
        weight: bool = False,
    ) -> None:
        self.layers, self.running = layers, Running()
        dtype = layers[0].weight.dtype
        of_each = [known_product(product(layer.weight)) for layer in layers]
        of_all = known_product(product(torch.cat([layer.weight for layer in layers])))

        def slices(prefix: str) -> list[Slice]:
            return [
                Slice(
                    name=f"{prefix}.{number}",
                    in_features=layer.weight.shape[1],
                    out_features=len(layer.weight),
                    product=own if of_slices else None,
                    bias=layer.bias,
                    weight=layer.weight if weight else None,
                )
                for number, (layer, own) in enumerate(zip(layers, of_each, strict=True))
            ]

        def compiled(product: Product | None, slices: list[Slice]) -> CompiledLayer:
            assert product is not None
            return CompiledLayer(
                self.running, product, slices, dtype, "flora_test::python", "layer"
            )

        self.merged = compiled(of_all, slices("merged"))
        self.alone = [
            compiled(own, [part]) for own, part in zip(of_each, slices("alone"), strict=True)
        ]
        self.model_layers = ModelLayers([self.merged, *self.alone], "cpu")
        self.bank = AdapterBank(
            {
                f"{prefix}.{number}": LayerSpec(
                    out_features=len(layer.weight),
                    in_features=layer.weight.shape[1],
                    dtype=dtype,
                    device=torch.device("cpu"),
                )
                for prefix in ("merged", "alone")
                for number, layer in enumerate(layers)
            }
        )
        self.names: list[str | None] = []
        for group, factors in enumerate(zip(*(layer.groups for layer in layers), strict=True)):
            touched = {
                f"{prefix}.{number}": own
                for prefix in ("merged", "alone")
                for number, own in enumerate(factors)
                if own is not None
            }
            self.names.append(str(group) if touched else None)
            self.bank.load(Adapter(kind="X", identity=str(group), layers=touched))
        self.lay(self.names)

    def lay(self, names: list[str | None]) -> None:
        self.laid = self.model_layers.lay(self.bank.lay(names), len(names))

    def run(self, rows: list[int], *, tokens: int = 1, same_input: bool = False) -> None:
        self.step = self.laid.step(tuple(rows), tokens, [same_input] * (1 + len(self.alone)))
        self.running.set(self.step)

    def forget(self) -> None:
        self.running.set(None)
        del self.laid, self.step

    def assert_right(self) -> None:
        x_SNI, bias = self.layers[0].x, None
        x, units = x_SNI.flatten(0, 1), x_SNI.shape[:2]
        if self.layers[0].bias is not None:
            bias = torch.cat([layer.bias for layer in self.layers])
        whole = self.merged(x, bias)
        assert torch.equal(whole, self.merged(x, bias))
        found = whole.unflatten(0, units).split([len(layer.weight) for layer in self.layers], -1)
        for merged, compiled, layer in zip(found, self.alone, self.layers, strict=True):
            assert_right(merged, layer)
            assert_right(compiled(x, layer.bias).unflatten(0, units), layer)
            assert_right(compiled.on(self.step)(x_SNI), layer)


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    groups=st.lists(st.sampled_from([*GROUPS, None]), min_size=3, max_size=3).filter(any),
    rows=st.lists(st.integers(0, 2), min_size=1, max_size=9),
    tokens=st.sampled_from([1, 5]),
    bias=st.booleans(),
    product=st.sampled_from([WeightProduct, product_of, partial(product_of, packed=True)]),
    side=st.sampled_from([None, ACTIVATION_SIDE, WEIGHT_SIDE, DEEP_ONLY]),
)
def test_each_layer_is_what_it_is_alone(dtype, groups, rows, tokens, bias, product, side):
    layers = make_layers(groups, rows, tokens=tokens, dtype=dtype, bias=bias)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        if side is not None:
            set_side(patch, side)
        model = Model(layers, product, weight=side is not None)
        model.run(rows, tokens=tokens)
        model.assert_right()


@given(
    rows=st.lists(st.integers(0, 2), min_size=1, max_size=9),
    order=st.permutations(range(3)),
)
def test_other_groups_are_laid_over_those_before(rows, order):
    layers = make_layers(GROUPS[:3], rows, tokens=1, dtype=torch.float32, bias=True)
    with torch.no_grad():
        model = Model(layers)
        model.lay(["0"])
        model.run([0, 0])
        model.lay([model.names[group] for group in order])
        model.run([order.index(row) for row in rows])
        model.assert_right()


@pytest.fixture
def layers() -> list[Layer]:
    return make_layers(GROUPS[:3], [0, 1, 2, 0], tokens=1, dtype=torch.float32, bias=True)


def test_pages_are_lent_until_others_are_laid(layers):
    own = layers[0].groups[0]
    with torch.no_grad():
        model = Model(layers)
        bank, sizes = model.bank, [model.bank.held_bytes]

        def load(identity: str) -> None:
            bank.load(Adapter(kind="X", identity=identity, layers={"alone.0": own}))
            sizes.append(bank.held_bytes)

        bank.unload("0")
        load("1 in its place")
        assert sizes[1] > sizes[0]
        model.run(layers[0].rows)
        model.assert_right()
        model.forget()
        load("2 in its place")
        assert sizes[2] == sizes[1]


def test_one_b_for_all_slices_takes_the_merged_product(layers):
    shared = layers[0].groups[0].hadamard_in
    layers = [
        replace(
            layer,
            groups=[
                LayerFactors(hadamard_in=shared, hadamard_out=torch.randn(1, size)),
                None,
                LayerFactors(down=layer.x[0], up=torch.randn(1, size)),
            ],
        )
        for layer, size in zip(layers, SIZES, strict=True)
    ]
    with torch.no_grad():
        model = Model(layers, of_slices=False)
        model.run(layers[0].rows)
        x = layers[0].x[:, 0]
        assert (model.merged(x) == ASKED).all()  # as no slice has a product of its own
        model.run(layers[0].rows, same_input=True)
        model.assert_right()
        model.lay([None, None, "2"])
        model.run([2, 1, 0, 2])
        assert not (model.merged(x) == ASKED).any()  # where nothing scales the input


def test_as_many_pages_is_part_of_one_b_for_all(layers):
    """Of unlike ones the merged product has no copies, whatever it is told."""
    with torch.no_grad():
        model = Model(layers)
        model.run(layers[0].rows, same_input=True)
        model.assert_right()


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("product", [product_of, WeightProduct])
def test_without_adapters_it_is_the_base(layers, product, with_bias):
    x, model = layers[0].x[:, 0], Model(layers, product)
    weight = torch.cat([layer.weight for layer in layers])
    bias = torch.randn(len(weight)) if with_bias else None
    assert torch.equal(model.merged(x, bias), F.linear(x, weight, bias))
    model.lay([None, None])
    for rows in ([0, 1], [0] * 4):  # or of none of the rows that run
        model.run(rows)
        assert torch.equal(model.merged(x, bias), F.linear(x, weight, bias))


def test_python_is_asked_for_what_has_no_program(layers):
    x, rows = layers[0].x[:, 0], layers[0].rows
    with torch.no_grad():
        model = Model(layers)
        model.run(rows)
        merged = model.merged
        assert not (merged(x) == ASKED).any()
        assert (merged(x[:1]) == ASKED).all()  # for other rows
        assert (merged(layers[0].x) == ASKED).all()  # for other shapes
        assert (merged(x.bfloat16()) == ASKED).all()  # for another type
        bias = torch.randn(sum(SIZES))
        assert torch.equal(merged(x[:1], bias), ASKED + bias.expand(1, -1))


@pytest.mark.parametrize("last", [{"pairs": 2}, {"rank": 2}])
def test_a_slice_needs_a_product_for_what_is_not_modulated(last, monkeypatch):
    set_side(monkeypatch, WEIGHT_SIDE)
    groups = [[{"pairs": 1}], [{"pairs": 3, "rank": 2}], [last]]
    layers = make_layers(groups, [0, 0], tokens=1, dtype=torch.float32, bias=True)
    with torch.no_grad():
        model = Model(layers, of_slices=False, weight=True)
        model.run([0, 0])
        if last == {"pairs": 2}:
            model.assert_right()
        else:
            assert (model.merged(layers[0].x[:, 0]) == ASKED).all()


def test_compiled_code_asks_as_it_runs(layers):
    x, model = layers[0].x[:, 0], Model(layers)
    weight = torch.cat([layer.weight for layer in layers])
    with torch.no_grad():
        code = torch.compile(lambda x: model.merged(2 * x) + 1, backend="aot_eager", fullgraph=True)
        assert torch.equal(code(x), F.linear(2 * x, weight) + 1)
        model.run(layers[0].rows)
        assert torch.equal(code(x), model.merged(2 * x) + 1)


def test_a_layer_of_many_ranks_is_not_one_of_few():
    """What is the same for layers is so only where they have as many pages."""
    few = make_layer([{"rank": 1}, {"pairs": 1}], [0, 1, 0], tokens=1)
    many = replace(make_layer([{"rank": 9}, {"pairs": 2}], [0, 1, 0], tokens=1, seed=1), x=few.x)
    with torch.no_grad():
        model = Model([few, many])
        model.run(few.rows)
        model.assert_right()
