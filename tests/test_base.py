"""What a kind may ask of a layer, against the layer's dense weight."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

import flora
from flora.base import COLUMNS, BaseLayer, ModelBase, plain_weight, sizes_of
from flora.errors import UsageError
from tests.helpers import assert_no_worse

OUT, IN = 24, COLUMNS + 40
"""More columns than are looked at together."""


class Stored(nn.Module):
    """A layer whose only tensors are buffers, with a bias that cannot be left out."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.outfeatures, self.infeatures = weight.shape
        self.register_buffer("qweight", weight.T.contiguous())
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.qweight
        return y if self.bias is None else y + self.bias


class In8Bits(Stored):
    """As LLM.int8: each row of x is rounded to 8 bits first."""

    def forward(self, x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
        return super().forward((x / scale).round() * scale)


class Fused(Stored):
    """A layer whose `bias` says whether there is one, as some fused layers' does."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight, None)
        del self.bias
        self.bias = bias is not None

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.qweight


def linear(weight: Tensor, bias: Tensor | None, kind: type[nn.Linear] = nn.Linear) -> nn.Linear:
    layer = kind(IN, OUT, bias=bias is not None)
    layer.weight = nn.Parameter(weight)
    layer.bias = None if bias is None else nn.Parameter(bias)
    return layer


def conv1d(weight: Tensor, bias: Tensor | None) -> Conv1D:
    layer = Conv1D(OUT, IN)
    layer.weight = nn.Parameter(weight.T.contiguous())
    layer.bias = nn.Parameter(weight.new_zeros(OUT) if bias is None else bias)
    return layer


def falcon(weight: Tensor, bias: Tensor | None) -> FalconLinear:
    return linear(weight, bias, FalconLinear)


def rerouted(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A layer whose forward someone has set before."""
    layer = linear(weight, bias)
    layer.forward = layer.forward
    return layer


def parametrized(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = linear(2 * weight, bias)

    class Half(nn.Module):
        def forward(self, whole: Tensor) -> Tensor:
            return whole / 2

    parametrize.register_parametrization(layer, "weight", Half(), unsafe=True)
    return layer


PLAIN = {"Linear": linear, "Conv1D": conv1d}
BOXES = {
    "FalconLinear": falcon,
    "rerouted": rerouted,
    "parametrized": parametrized,
    "stored": Stored,
    "in 8 bits": In8Bits,
    "fused": Fused,
}
Make = Callable[[Tensor, Tensor | None], nn.Module]
TYPES = [torch.float32, torch.bfloat16, torch.float16]


def parts(dtype: torch.dtype, has_bias: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """W0, a bias that is large beside it, and an x in fp32."""
    generator = torch.Generator().manual_seed(0)
    weight = 0.05 * torch.randn(OUT, IN, generator=generator)
    bias = 5 * torch.randn(OUT, generator=generator) if has_bias else None
    x = torch.randn(3, IN, generator=generator)
    return weight.to(dtype), None if bias is None else bias.to(dtype), x


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("make", [*PLAIN.values(), *BOXES.values()], ids=[*PLAIN, *BOXES])
def test_a_kind_is_told_the_dense_weights_norms_and_products(make: Make, dtype, has_bias):
    weight, bias, x = parts(dtype, has_bias)
    model = nn.Sequential(make(weight, bias))
    model.dtype = dtype
    base = ModelBase(model)
    truth = weight.double().square().sum(1)
    assert_no_worse(base.row_norm2("0"), weight.float().square().sum(1), truth, dtype=dtype)
    truth, sums = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    plain = x @ weight.float().T
    assert_no_worse(base.product("0", x), plain, truth, dtype=dtype, scale=sums)
    if make is Fused or (bias is None and make is not conv1d):
        assert base.bias("0") is None
    else:
        assert torch.equal(base.bias("0"), torch.zeros(OUT) if bias is None else bias.float())


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("make", [*PLAIN.values(), *BOXES.values()], ids=[*PLAIN, *BOXES])
def test_the_product_of_a_batch_is_without_the_bias(make: Make, dtype, has_bias):
    weight, bias, x = parts(dtype, has_bias)
    x = x.to(dtype).unsqueeze(0)
    layer = BaseLayer(make(weight, bias))
    found = layer.product(x)
    plain, truth = x @ weight.T, x.double() @ weight.double().T
    if make is In8Bits:
        truth = (layer.forward(x) - (0 if bias is None else bias)).double()
    # Where the bias cannot be left out, rounding is of the sum with it.
    scale = x.double().abs() @ weight.double().abs().T + (0 if bias is None else bias.abs())
    assert_no_worse(found.to(dtype), plain, truth, scale=scale)


@pytest.mark.parametrize("name", [*PLAIN, *BOXES])
def test_only_plain_layers_show_their_weight(name):
    weight, bias, _ = parts(torch.float32, True)
    layer = BaseLayer((PLAIN | BOXES)[name](weight, bias))
    assert (layer.weight is not None) == (name in PLAIN)
    if layer.weight is not None:
        assert torch.equal(layer.weight, weight)


def test_a_weight_of_another_type_is_none_to_multiply_by():
    layer = nn.Linear(4, 6, bias=False)
    layer.weight = nn.Parameter(layer.weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    assert plain_weight(layer) is None


def test_norms_are_looked_at_once():
    weight, bias, _ = parts(torch.float32, True)
    layer, calls = Stored(weight, bias), []
    layer.forward = lambda x: (calls.append(len(x)), Stored.forward(layer, x))[1]
    base = ModelBase(nn.Sequential(layer))
    assert base.row_norm2("0") is base.row_norm2("0")
    assert calls == [COLUMNS, IN - COLUMNS]


@pytest.mark.parametrize(
    ("names", "sizes"),
    [
        ({"in_features": 3, "out_features": 5}, (5, 3)),
        ({"nx": 3, "nf": 5}, (5, 3)),
        ({"infeatures": 3, "outfeatures": 5}, (5, 3)),
        ({"in_features": 3}, None),
        ({"in_features": 3, "out_features": None}, None),
        ({}, None),
    ],
)
def test_a_layer_is_linear_by_its_sizes(names, sizes):
    assert sizes_of(SimpleNamespace(**names)) == sizes


@pytest.mark.parametrize("weight_type", [torch.uint8, torch.int8, torch.float8_e4m3fn])
def test_a_stored_weights_layer_has_the_models_type(weight_type):
    layer = nn.Linear(4, 6, bias=False)
    layer.weight = nn.Parameter(layer.weight.data.to(weight_type), requires_grad=False)
    model = nn.Sequential(layer)
    model.dtype = torch.bfloat16
    assert ModelBase(model).specs["0"].dtype == torch.bfloat16


def test_a_layer_of_buffers_alone_has_a_type_and_a_device():
    weight, bias, _ = parts(torch.float32, True)
    spec = ModelBase(nn.Sequential(Stored(weight, bias))).specs["0"]
    assert (spec.dtype, spec.device) == (torch.float32, torch.device("cpu"))
    assert (spec.out_features, spec.in_features) == (OUT, IN)


def test_a_layer_on_the_meta_device_is_refused():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 6))
    with pytest.raises(UsageError, match="0 is on the meta device; load the model's weights first"):
        flora.attach(model, {})
