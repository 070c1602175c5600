"""One layer against its dense weight: forward, gradients, merge, autocast, black boxes."""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from flora.errors import ShapeError, UsageError
from flora.tuner.config import FloraConfig
from flora.tuner.layer import BASE, FloraLinear
from tests.helpers import assert_no_worse

OUT, IN = 24, 40


class BlackBox(nn.Module):
    """A layer that shows its sizes and its bias, and no weight."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.inner, self.bias = [linear], linear.bias

    def forward(self, x):
        return self.inner[0](x)


def build(*ranks, base="linear", bias=True, dtype=torch.float32, names=("one", "two", "three")):
    """A layer with an adapter at random of each rank, the first one active."""
    torch.manual_seed(0)
    linear = nn.Linear(IN, OUT, bias=bias, dtype=dtype).requires_grad_(False)
    if base == "conv":
        layer = Conv1D(OUT, IN).to(dtype).requires_grad_(False)
        layer.weight.copy_(linear.weight.T)
        layer.bias.copy_(linear.bias)
    else:
        layer = {"linear": linear, "black box": BlackBox(linear)}[base]
    adapted = FloraLinear(layer, "one", FloraConfig(r=ranks[0], init_weights=False), "q_proj")
    for name, rank in zip(names[1:], ranks[1:], strict=False):
        adapted.update_layer(name, FloraConfig(r=rank, init_weights=False), "q_proj")
    return adapted, linear


def scales(adapted, linear, names, dtype):
    """The dense factor Σ_j a_j b_jᵀ / r of each adapter, added as deltas, `[out, in]`."""
    total = torch.ones_like(linear.weight, dtype=dtype)
    for name in names:
        a, b = adapted.flora_A[name].to(dtype), adapted.flora_B[name].to(dtype)
        total = total + torch.einsum("ro,ri->oi", a, b) / a.shape[0] - 1
    return total


def dense(adapted, linear, x, names, dtype):
    """y of the adapted weight itself, all of it in one type."""
    weight = linear.weight.to(dtype) * scales(adapted, linear, names, dtype)
    return x.to(dtype) @ weight.T + (0 if linear.bias is None else linear.bias.to(dtype))


def plain(adapted, linear, x, name):
    """Equation 6 in plain torch, in the input's type, with the base's own product and fp32 sums."""
    y = 0
    for a, b in zip(adapted.flora_A[name], adapted.flora_B[name], strict=True):
        scaled = (x * b).to(x.dtype)
        if isinstance(adapted.base_layer, BlackBox):
            product = linear(scaled).float() - linear.bias
        else:
            product = (scaled @ linear.weight.T).float()
        y = y + a / adapted.r[name] * product
    return (y if linear.bias is None else y + linear.bias).to(x.dtype)


@pytest.mark.parametrize("base", ["linear", "conv", "black box"])
@pytest.mark.parametrize("tokens", [5, 300])
@pytest.mark.parametrize("name", ["one", "two"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_equals_the_dense_weight(base, tokens, name, dtype):
    adapted, linear = build(1, 3, base=base, dtype=dtype)
    adapted.set_adapter(name)
    x = torch.randn(2, tokens, IN).to(dtype)
    y = adapted(x)
    assert adapted.flora_A["one"].dtype == torch.float32
    truth = dense(adapted, linear, x, [name], torch.float64)
    assert_no_worse(y, plain(adapted, linear, x, name), truth)


@pytest.mark.parametrize("base", ["linear", "conv", "black box"])
@pytest.mark.parametrize("tokens", [5, 300])
@pytest.mark.parametrize("active", [["one"], ["two"], ["one", "two", "three"]])
def test_gradients_equal_those_of_the_dense_weight(base, tokens, active):
    adapted, linear = build(1, 3, 2, base=base, dtype=torch.float64)
    adapted.set_adapter(active)
    x = torch.randn(2, tokens, IN, dtype=torch.float64, requires_grad=True)
    leaves = [x, *(p[name] for name in active for p in (adapted.flora_A, adapted.flora_B))]
    dy = torch.randn(2, tokens, OUT, dtype=torch.float64)
    y, truth = adapted(x), dense(adapted, linear, x, active, torch.float64)
    torch.testing.assert_close(y, truth)
    torch.testing.assert_close(
        torch.autograd.grad(y, leaves, dy), torch.autograd.grad(truth, leaves, dy)
    )


def test_rank_one_is_a_scale_before_and_one_after():
    adapted, linear = build(1, bias=False)
    x = torch.randn(7, IN)
    by_hand = adapted.flora_A["one"][0] * linear(x * adapted.flora_B["one"][0])
    assert torch.equal(adapted(x), by_hand)


@pytest.mark.parametrize("shape", [(IN,), (0, IN), (3, IN), (2, 3, IN), (2, 3, 4, IN)])
def test_any_number_of_axes(shape):
    adapted, linear = build(2, dtype=torch.float64)
    x = torch.randn(*shape, dtype=torch.float64)
    torch.testing.assert_close(adapted(x), dense(adapted, linear, x, ["one"], torch.float64))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_start_is_the_identity_with_ranks_that_differ(rank):
    torch.manual_seed(0)
    linear = nn.Linear(IN, OUT)
    adapted = FloraLinear(linear, "one", FloraConfig(r=rank), "q_proj")
    a, b = adapted.flora_A["one"], adapted.flora_B["one"]
    assert torch.equal(a, torch.ones(rank, OUT))
    torch.testing.assert_close(b.mean(0), torch.ones(IN))
    assert len(b.unique(dim=0)) == rank
    x = torch.randn(9, IN)
    assert_no_worse(adapted(x), linear(x), dense(adapted, linear, x, [], torch.float64), "identity")


@pytest.mark.parametrize("base", ["linear", "conv", "black box"])
@pytest.mark.parametrize("tokens", [1, 300])
def test_a_mixed_batch_is_each_row_on_its_own(base, tokens):
    adapted, linear = build(1, 3, base=base, dtype=torch.float64)
    names = ["two", BASE, "one", "two", "elsewhere"]
    x = torch.randn(5, tokens, IN, dtype=torch.float64)
    mixed = adapted(x, adapter_names=names)
    for row, name in enumerate(names):
        own = [name] if name in adapted.flora_A else []
        torch.testing.assert_close(
            mixed[row], dense(adapted, linear, x[row], own, torch.float64), msg=name
        )


def test_rows_without_an_adapter_run_the_base_itself():
    adapted, linear = build(3)
    x = torch.randn(2, 5, IN)
    assert torch.equal(adapted(x, adapter_names=[BASE, BASE]), linear(x))
    adapted.enable_adapters(False)
    assert torch.equal(adapted(x), linear(x))
    adapted.enable_adapters(True)
    adapted.set_adapter(["elsewhere"])
    assert torch.equal(adapted(x), linear(x))


def test_a_mixed_batch_that_does_not_fit_is_refused():
    adapted, _ = build(1)
    with pytest.raises(ShapeError, match="1 adapter_names for 2 rows"):
        adapted(torch.randn(2, 3, IN), adapter_names=["one"])
    adapted.merge()
    with pytest.raises(UsageError, match="merged"):
        adapted(torch.randn(1, 3, IN), adapter_names=["one"])


@pytest.mark.parametrize("base", ["linear", "conv", "black box"])
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("tokens", [5, 300])
def test_autocast_gives_its_type_and_keeps_the_factors_in_fp32(base, rank, tokens):
    over_half, rounded = build(rank, base=base, dtype=torch.bfloat16)
    adapted, linear = copy.deepcopy((over_half, rounded))
    linear.float()
    adapted.base_layer.float()
    x = torch.randn(1, tokens, IN, requires_grad=True)
    half = x.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = adapted(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, over_half(half))
    leaves = [x, adapted.flora_A["one"], adapted.flora_B["one"]]
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, leaves, dy)
    truth = torch.autograd.grad(
        dense(adapted, linear, x, ["one"], torch.float64), leaves, dy.double()
    )
    same = torch.autograd.grad(plain(adapted, rounded, half, "one"), leaves, dy)
    for ours, theirs, true in zip(found, same, truth, strict=True):
        assert ours.dtype == torch.float32
        # The truth's leaves are fp32, so its gradients are rounded to that, far below bf16's eps.
        assert_no_worse(ours.bfloat16(), theirs.bfloat16(), true.double(), "gradient")


@pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated")  # dynamo's
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method")  # inductor's
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("tokens", [5, 300])
@pytest.mark.parametrize("active", [["two"], ["one", "two"]])
@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_code_is_one_graph(backend, tokens, active, autocast):
    torch.compiler.reset()
    adapted, linear = build(1, 3, base="linear")
    adapted.set_adapter(active)
    x = torch.randn(2, tokens, IN, requires_grad=True)
    leaves = [x, *(p[name] for p in (adapted.flora_A, adapted.flora_B) for name in active)]
    compiled = torch.compile(adapted, backend=backend, fullgraph=True)
    dtype = torch.bfloat16 if autocast else torch.float32
    dy = torch.randn(2, tokens, OUT).to(dtype)
    results = []
    for layer in (compiled, adapted):
        with torch.autocast("cpu", dtype=dtype, enabled=autocast):
            y = layer(x)
        results.append([y, *torch.autograd.grad(y, leaves, dy)])
    y = dense(adapted, linear, x, active, torch.float64)
    truth = [y, *(g.double() for g in torch.autograd.grad(y, leaves, dy.double()))]
    for ours, eager, true in zip(*results, truth, strict=True):
        assert_no_worse(ours, eager, true, dtype=dtype)
    with torch.no_grad():
        assert_no_worse(compiled(x), adapted(x), y)


@pytest.mark.parametrize("base", ["linear", "black box"])
def test_compiled_code_takes_mixed_batches_and_black_boxes(base):
    torch.compiler.reset()
    adapted, _ = build(1, 3, base=base)
    compiled = torch.compile(adapted, backend="aot_eager")
    x = torch.randn(3, 7, IN)
    with torch.no_grad():
        for names in (["two", BASE, "one"], ["one", "one", "two"], None):
            torch.testing.assert_close(
                compiled(x, adapter_names=names), adapted(x, adapter_names=names)
            )


@pytest.mark.parametrize("base", ["linear", "conv"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("names", [["one"], ["two", "three"]])
def test_merge_rounds_once_and_unmerge_is_bit_for_bit(base, dtype, names):
    adapted, linear = build(1, 3, 2, base=base, dtype=dtype)
    weight = adapted.get_base_layer().weight
    before, place = weight.clone(), weight.data_ptr()
    adapted.merge(safe_merge=True, adapter_names=names)
    assert adapted.merged_adapters == names
    original, merged = (before, weight) if base == "linear" else (before.T, weight.T)
    truth = original.double() * scales(adapted, linear, names, torch.float64)
    rounded = (original.float() * scales(adapted, linear, names, torch.float32)).to(dtype)
    assert not torch.equal(weight, before)
    assert_no_worse(merged.detach(), rounded.detach(), truth.detach())
    x = torch.randn(4, IN).to(dtype)
    assert torch.equal(adapted(x), adapted.base_layer(x))
    adapted.unmerge()
    assert torch.equal(weight, before)
    assert weight.data_ptr() == place
    assert not adapted.merged


def test_merging_in_steps_is_merging_at_once():
    adapted, _ = build(1, 3)
    weight = adapted.base_layer.weight
    before = weight.clone()
    adapted.merge(adapter_names=["one", "two"])
    at_once = weight.clone()
    adapted.unmerge()
    adapted.merge()
    with pytest.warns(UserWarning, match="additionally merging two"):
        adapted.merge(adapter_names=["one", "two"])
    assert torch.equal(weight, at_once)
    adapted.unmerge()
    assert torch.equal(weight, before)
    adapted.unmerge()
    assert torch.equal(weight, before)


def test_disabling_unmerges_in_the_forward():
    adapted, _ = build(2)
    x = torch.randn(3, IN)
    base = adapted.base_layer(x)
    adapted.merge()
    adapted.enable_adapters(False)
    assert torch.equal(adapted(x), base)
    assert not adapted.merged


def test_a_merge_that_cannot_be_is_refused_and_changes_nothing():
    adapted, linear = build(1)
    before = linear.weight.clone()
    with torch.no_grad():
        adapted.flora_A["one"][0, 3] = torch.nan
    with pytest.raises(UsageError, match="NaN"):
        adapted.merge(safe_merge=True)
    assert torch.equal(linear.weight, before)
    assert not adapted.merged
    with pytest.raises(UsageError, match="no plain weight"):
        build(1, base="black box")[0].merge()


def test_hooks_of_the_base_layer_are_run():
    adapted, linear = build(2, dtype=torch.float64)
    x = torch.randn(3, IN, dtype=torch.float64)
    y = adapted(x)
    calls = []
    linear.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(adapted(x), y)
    assert calls


def test_only_linear_layers():
    with pytest.raises(UsageError, match=r"embed is Embedding"):
        FloraLinear(nn.Embedding(3, 4), "one", FloraConfig(), "embed")


def test_adapters_come_and_go():
    adapted, _ = build(1, 3)
    assert adapted.r == {"one": 1, "two": 3}
    assert "flora_A" in repr(adapted)
    assert not adapted.flora_A["two"].requires_grad
    assert adapted.flora_A["one"].requires_grad
    adapted.delete_adapter("two")
    assert adapted.r == {"one": 1}
    assert list(adapted.flora_B) == ["one"]
    assert not adapted.supports_lora_conversion()
