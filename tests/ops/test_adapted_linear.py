"""The operator: every backend and both sides of it against the definition, forward and backward."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flora.adapters.core import Adapter, LayerFactors
from flora.bank import AdapterBank, LayerSpec, join_factors
from flora.errors import BackendError, ShapeError
from flora.ops import BACKENDS, costs
from flora.ops.adapted_linear import Adapted, adapted_linear, prepare
from flora.ops.factors import BatchFactors, Pages
from flora.ops.plan import ACTIVATION_SIDE, WEIGHT_SIDE, Costs
from tests.helpers import assert_no_worse, random_factors

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
JUDGED = [name for name in BACKENDS if name != "reference"]
TRAINED = ["eager", "cpu"]  # Triton's interpreter is too slow for a backward

MIXED = [
    {"pairs": 1},
    {"rank": 4},
    {"pairs": 3, "rank": 2, "bias": True},
    {"pairs": 5},
    {"rank": 9, "bias": True},
    {"bias": True},
    {"pairs": 2, "rank": 9},
    None,
    {"pairs": 5, "rank": 1},
]
"""Groups of every make, ragged; the last one is named by no row."""
ONE_PAIR = [{"pairs": 1}, None, {"pairs": 1, "bias": True}]
MIXED_ROWS = [3, 0, 7, 1, 2, 3, 6, 4, 7, 5, 1]


@dataclass
class Layer:
    """A layer, its batch, and the gradient that comes back to it."""

    x: Tensor
    weight: Tensor
    groups: Sequence[LayerFactors | None]
    rows: Sequence[int]
    bias: Tensor | None
    grad: Tensor


def make_layer(
    groups: Sequence[dict[str, int] | None],
    rows: Sequence[int],
    *,
    out_features: int = 7,
    in_features: int = 11,
    tokens: int = 3,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    seed: int = 0,
) -> Layer:
    generator = torch.Generator().manual_seed(seed)
    exact = torch.promote_types(dtype, torch.float32)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    def factors(make: dict[str, int]) -> LayerFactors:
        made = random_factors(out_features, in_features, generator=generator, dtype=exact, **make)
        return LayerFactors(
            **{n: t if n.startswith("hadamard") else t.to(dtype) for n, t in made.parts()}
        )

    return Layer(
        x=normal(len(rows), tokens, in_features),
        weight=normal(out_features, in_features) / in_features**0.5,
        groups=[None if make is None else factors(make) for make in groups],
        rows=rows,
        bias=normal(out_features) if bias else None,
        grad=normal(len(rows), tokens, out_features),
    )


Compute = Callable[[Layer], Tensor]


def plain(layer: Layer) -> Tensor:
    """The yardstick: each row through its own dense weight."""
    rows = []
    for x, group in zip(layer.x, layer.rows, strict=True):
        factors = layer.groups[group] or LayerFactors()
        bias = layer.bias if factors.bias is None else factors.bias
        rows.append(F.linear(x, factors.merge(layer.weight), bias))
    return torch.stack(rows)


def definition(layer: Layer) -> Tensor:
    """Section 1's formula, token by token."""
    rows = []
    for tokens, group in zip(layer.x, layer.rows, strict=True):
        f = layer.groups[group] or LayerFactors()
        for x in tokens:
            y = layer.weight @ x
            if f.pairs:
                pairs = zip(f.hadamard_out, f.hadamard_in, strict=True)
                y = sum(a * (layer.weight @ (b * x)) for a, b in pairs)
            if f.rank:
                y = y + sum(u * (v @ x) for u, v in zip(f.up, f.down, strict=True))
            bias = layer.bias if f.bias is None else f.bias
            rows.append(y if bias is None else y + bias)
    return torch.stack(rows).reshape(layer.grad.shape)


def batch_factors(layer: Layer) -> BatchFactors:
    """As training has them, or without gradients as a bank lends them, its pages out of order."""
    if not torch.is_grad_enabled():
        out_features, in_features = layer.weight.shape
        spec = LayerSpec(
            out_features=out_features,
            in_features=in_features,
            dtype=layer.weight.dtype,
            device=layer.weight.device,
        )
        bank = AdapterBank({"layer": spec})
        for number, factors in reversed(list(enumerate(layer.groups))):
            if factors is not None:
                bank.load(Adapter(kind="X", identity=str(number), layers={"layer": factors}))
        names = [factors and str(number) for number, factors in enumerate(layer.groups)]
        if (lent := bank.factors("layer", names)) is not None:
            return lent
    return join_factors(layer.groups, layer.weight.dtype)


def operator(backend: str, *, weight: bool) -> Compute:
    def compute(layer: Layer) -> Tensor:
        return adapted_linear(
            layer.x,
            lambda x: F.linear(x, layer.weight),
            batch_factors(layer),
            layer.rows,
            bias=layer.bias,
            weight=layer.weight if weight else None,
            backend=backend,
        )

    return compute


def evaluate(layer: Layer, compute: Compute, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The result and the gradient of all that can have one; in another type where one is given."""
    leaves: dict[str, Tensor] = {}

    def leaf(name: str, tensor: Tensor) -> Tensor:
        leaves[name] = tensor.to(dtype or tensor.dtype, copy=True).requires_grad_()
        return leaves[name]

    y = compute(
        Layer(
            x=leaf("x", layer.x),
            weight=layer.weight.to(dtype or layer.weight.dtype),
            groups=[
                factors and LayerFactors(**{n: leaf(f"{i}.{n}", t) for n, t in factors.parts()})
                for i, factors in enumerate(layer.groups)
            ],
            rows=layer.rows,
            bias=None if layer.bias is None else leaf("bias", layer.bias),
            grad=layer.grad,
        )
    )
    with torch.no_grad():
        assert y.shape == layer.grad.shape
    y.backward(layer.grad.to(y.dtype))
    grads = {n: torch.zeros_like(t) if t.grad is None else t.grad for n, t in leaves.items()}
    return {"y": y.detach(), **grads}


def check(layer: Layer, *, weight: bool, backend: str = "eager") -> None:
    """Value and gradients are no worse than plain torch's."""
    truth = evaluate(layer, operator("reference", weight=True), torch.float64)
    yardstick = evaluate(layer, plain)
    # In bf16 the two operands of a product are rounded and the sums are not.
    half = layer.x.dtype == torch.bfloat16
    scale = {n: 2 * t for n, t in truth.items()} if half else term_sizes(layer)
    for name, found in evaluate(layer, operator(backend, weight=weight)).items():
        assert_no_worse(
            found,
            yardstick[name],
            truth[name],
            name,
            dtype=layer.x.dtype,
            scale=scale[name],
        )


def term_sizes(layer: Layer) -> dict[str, Tensor]:
    """Σ |term| of all results, which are sums; four times, as a term has four factors to round."""
    sizes = evaluate(absolute(layer), operator("reference", weight=True), torch.float64)
    return {name: 4 * size for name, size in sizes.items()}


def absolute(layer: Layer) -> Layer:
    return Layer(
        x=layer.x.abs(),
        weight=layer.weight.abs(),
        groups=[g and LayerFactors(**{n: t.abs() for n, t in g.parts()}) for g in layer.groups],
        rows=layer.rows,
        bias=None if layer.bias is None else layer.bias.abs(),
        grad=layer.grad.abs(),
    )


def set_side(patch: pytest.MonkeyPatch, side: Costs) -> None:
    """Have all plans go by these costs."""
    patch.setattr(costs, "DEFAULT_COSTS", side)
    patch.setattr(costs, "layer_costs", lambda *_, **__: side)


@pytest.fixture(params=["activation", "weight"])
def side(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Forces a side: of the weight side every group that is scaled, at any size."""
    set_side(monkeypatch, WEIGHT_SIDE if request.param == "weight" else ACTIVATION_SIDE)
    return request.param


@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("compute", [plain, "reference"])
def test_the_yardstick_and_the_reference_are_the_definition(compute, weight):
    layer = make_layer(MIXED, MIXED_ROWS, dtype=torch.float64)
    if compute == "reference":
        compute = operator("reference", weight=weight)
    expected = evaluate(layer, definition)
    for name, found in evaluate(layer, compute).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("backend", TRAINED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "bias"), [(1, True), (3, False), (17, True)])
def test_value_and_gradients(side, backend, dtype, tokens, bias):
    layer = make_layer(MIXED, MIXED_ROWS, dtype=dtype, tokens=tokens, bias=bias)
    check(layer, weight=side == "weight", backend=backend)


@pytest.mark.parametrize("backend", TRAINED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", MIXED, ids=str)
def test_one_adapter_for_all_rows(side, backend, group, dtype):
    check(make_layer([group], [0, 0, 0], dtype=dtype), weight=side == "weight", backend=backend)


@pytest.mark.parametrize("backend", TRAINED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_one_pair_or_none(backend, dtype):
    """Nothing is copied: what is scaled stays in its place, forward and backward."""
    check(make_layer(ONE_PAIR, [2, 0, 1, 0], dtype=dtype, tokens=7), weight=False, backend=backend)


def test_beyond_the_modulation_the_plan_takes_the_weight_side_by_itself():
    layer = make_layer([{"pairs": 4}, {"pairs": 2}], [0, 1, 0], tokens=100)
    check(layer, weight=True)


GROUP = st.none() | st.fixed_dictionaries(
    {"pairs": st.integers(0, 5), "rank": st.integers(0, 20), "bias": st.booleans()}
)


WIDTH = st.integers(1, 9) | st.integers(30, 70)
"""Below a vector's width, and some vectors with and without a rest."""


@st.composite
def layers(
    draw: st.DrawFn, dtypes: Sequence[torch.dtype] = (torch.float64, torch.float32)
) -> Layer:
    groups = draw(st.lists(GROUP, min_size=1, max_size=4))
    return make_layer(
        groups,
        draw(st.lists(st.integers(0, len(groups) - 1), min_size=1, max_size=7)),
        out_features=draw(WIDTH),
        in_features=draw(WIDTH),
        tokens=draw(st.sampled_from([1, 2, 5, 200])),
        dtype=draw(st.sampled_from(dtypes)),
        bias=draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
    )


@pytest.mark.parametrize("backend", TRAINED)
@given(layers(), st.booleans())
def test_any_mix(backend, layer, weight):
    check(layer, weight=weight, backend=backend)


@pytest.mark.parametrize("backend", JUDGED)
@given(layers(dtypes=[*DTYPES, torch.float16]), st.booleans())
def test_any_mix_without_gradients(backend, layer, weight):
    check_without_gradients(layer, backend, weight=weight)


@pytest.mark.parametrize("backend", JUDGED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [5, 70])
def test_neighbours_of_one_adapter(backend, dtype, width):
    rows = [1] * 9 + [4] * 5 + [0] * 6 + [4] * 4 + [2] * 5 + [7] * 4 + [6] * 5 + [1] * 3
    size = {"out_features": width, "in_features": width + 4}
    layer = make_layer(MIXED, rows, tokens=1, dtype=dtype, **size)
    check_without_gradients(layer, backend, weight=True)


def check_without_gradients(layer: Layer, backend: str, *, weight: bool) -> None:
    with torch.no_grad():
        assert_right(operator(backend, weight=weight)(layer), layer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("out_features", "tokens"), [(301, 1), (190, 90), (3, 2)])
def test_a_large_weight_is_modulated_block_by_block(
    out_features, tokens, threads, dtype, monkeypatch
):
    """Several blocks for each of several threads, the last one smaller; more threads than rows."""
    set_side(monkeypatch, WEIGHT_SIDE)
    layer = make_layer(
        [{"pairs": 3}, None, {"pairs": 2, "rank": 2}],
        [0, 1, 2, 0],
        out_features=out_features,
        in_features=1500,
        tokens=tokens,
        dtype=dtype,
    )
    with threads_of(threads):
        check_without_gradients(layer, "cpu", weight=True)
        check(layer, weight=True, backend="cpu")


@contextmanager
def threads_of(count: int) -> Iterator[None]:
    """So many threads for torch's operators."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_right(found: Tensor, layer: Layer) -> None:
    """A value is no worse than plain torch's, to the rounding of its terms."""
    truth = operator("reference", weight=True)(in_double(layer))
    sizes = operator("reference", weight=True)(in_double(absolute(layer)))
    half = layer.x.dtype.itemsize == 2
    assert_no_worse(found, plain(layer), truth, scale=2 * sizes if half else 4 * sizes)


def in_double(layer: Layer) -> Layer:
    return Layer(
        x=layer.x.double(),
        weight=layer.weight.double(),
        groups=[g and LayerFactors(**{n: t.double() for n, t in g.parts()}) for g in layer.groups],
        rows=layer.rows,
        bias=None if layer.bias is None else layer.bias.double(),
        grad=layer.grad.double(),
    )


def test_biases_of_some_groups_of_the_batch():
    check(make_layer([{"bias": True}, {"pairs": 1, "bias": True}], [1, 1]), weight=False)


@given(layers(), st.randoms(use_true_random=False))
def test_a_row_does_not_know_its_neighbours(layer, random):
    """A batch in another order, one row of it alone too, gives the rows of the first."""
    order = [i for i in range(len(layer.rows)) if random.random() < 0.8] or [0]
    random.shuffle(order)
    part = Layer(
        layer.x[order],
        layer.weight,
        layer.groups,
        [layer.rows[i] for i in order],
        layer.bias,
        layer.grad[order],
    )
    check(part, weight=True)
    y = evaluate(layer, operator("eager", weight=False))["y"][order]
    found = evaluate(part, operator("eager", weight=False))["y"]
    allowed = 2 * torch.finfo(y.dtype).eps * term_sizes(part)["y"].max().item()
    torch.testing.assert_close(found, y, rtol=0, atol=allowed)


@pytest.mark.parametrize("weight", [True, False])
def test_hadamard_factors_are_not_rounded_to_the_activations_type(weight):
    """bf16 has steps of 2^-7 above 1: of 1 + 2^-10 nothing would be left."""

    def apply(a: list[float], b: list[float], x: float, w: float) -> Tensor:
        factors = LayerFactors(
            hadamard_in=torch.tensor(b).unsqueeze(1), hadamard_out=torch.tensor(a).unsqueeze(1)
        )
        w_OI = torch.full((1, 1), w, dtype=torch.bfloat16)
        return adapted_linear(
            torch.full((1, 400, 1), x, dtype=torch.bfloat16),
            lambda x: F.linear(x, w_OI),
            join_factors([factors], torch.bfloat16),
            [0],
            weight=w_OI if weight else None,
        )

    assert (apply([1 + 2**-10, -1.0], [1.0, 1.0], 1.0, 1.0) == 2**-10).all()
    x, w = (1.0, 2 - 2**-7) if weight else (2 - 2**-7, 1.0)
    fine = 1 + 2**-8 - 2**-10
    assert (apply([0.5, 0.5], [fine, fine], x, w) == 2).all()


@pytest.mark.parametrize("backend", JUDGED)
@pytest.mark.parametrize("far", [0.0, 0.3, 3.0])
@pytest.mark.parametrize("ones", [None, "hadamard_in", "hadamard_out"])
@pytest.mark.parametrize("bias", [False, True])
def test_one_scaled_product_in_16_bits_without_gradients(backend, far, ones, bias):
    """As a decode step has it, for factors near 1, around 0 and beyond 2; IA3 has one side only."""
    layer = make_layer(
        [{"pairs": 1}] * 4 + [None], [3, 0, 4, 1, 2, 0], dtype=torch.bfloat16, bias=bias
    )
    for group in layer.groups:
        if group is not None:
            for name, part in group.parts():
                part.sub_(1).mul_(0.0 if name == ones else far / 0.3).add_(1)
    truth = evaluate(layer, definition, torch.float64)["y"]
    with torch.no_grad():
        found = operator(backend, weight=True)(layer)
        # Triton's interpreter cuts bf16 off, where a GPU rounds.
        assert_no_worse(found, plain(layer), truth, scale=truth * (1 + (backend == "triton")))
        if bias:
            layer.bias = layer.bias.float()
            assert operator(backend, weight=True)(layer).dtype == torch.bfloat16
        if not (far or bias):
            assert torch.equal(found, F.linear(layer.x, layer.weight))


@pytest.mark.parametrize("dtype", DTYPES)
def test_base_rows_beside_the_weight_side(dtype):
    check(make_layer([None, {"pairs": 4}], [0, 1, 0], tokens=200, dtype=dtype), weight=True)


def test_factors_serve_several_backwards():
    """What is kept from step to step of a generation has no graph."""
    layer = make_layer([{"pairs": 1}, {"rank": 2}], [0, 1, 0])
    factors = join_factors(layer.groups, torch.float32)
    pools = [*factors.hadamard.pools, *factors.low_rank.pools]
    for tensor in pools:
        tensor.requires_grad_()
    for step in range(4):
        with torch.set_grad_enabled(step > 0):
            y = adapted_linear(layer.x, lambda x: F.linear(x, layer.weight), factors, layer.rows)
        if step:
            y.sum().backward()
    assert all(tensor.grad is not None for tensor in pools)


@pytest.mark.parametrize("backend", TRAINED)
@pytest.mark.parametrize("groups", [MIXED, ONE_PAIR], ids=["mixed", "one pair"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_x_through_resident_adapters(side, backend, groups, dtype):
    layer = make_layer(groups, [row % len(groups) for row in MIXED_ROWS], dtype=dtype)
    with torch.no_grad():
        lent = batch_factors(layer)
    joined = replace(batch_factors(layer), hadamard=Pages(lent.scales))  # as a bank rounds them
    assert lent.hadamard.index is not None
    assert joined.hadamard.index is None
    grads = []
    for factors in (lent, joined):
        x = layer.x.clone().requires_grad_()
        y = adapted_linear(
            x,
            lambda x: F.linear(x, layer.weight),
            factors,
            layer.rows,
            weight=layer.weight if side == "weight" else None,
            backend=backend,
        )
        y.backward(layer.grad)
        grads.append(x.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("grad", [False, True])
def test_each_row_costs_its_own_pairs(grad):
    """Σ max(1, h) rows go through the base: a base row once, and nobody pays for a neighbour."""
    seen = []

    def base(x: Tensor) -> Tensor:
        seen.append(x.shape[0])
        return F.linear(x, layer.weight)

    layer = make_layer([None, {"pairs": 1}, {"pairs": 16}, {"rank": 8}], [0, 1, 2, 3, 1, 0])
    factors = join_factors(layer.groups, torch.float32)
    adapted_linear(layer.x.requires_grad_(grad), base, factors, layer.rows)
    assert sum(seen) == 1 + 1 + 16 + 1 + 1 + 1
    # Without gradients W0 is read once; with them no two copies of the batch exist at a time.
    assert len(seen) == (16 if grad else 1)


def test_rows_without_pairs_go_through_the_base_as_they_are():
    seen = []

    def base(x: Tensor) -> Tensor:
        seen.append(x)
        return F.linear(x, layer.weight)

    layer = make_layer([None, {"pairs": 3}], [0, 0], bias=False)
    y = adapted_linear(layer.x, base, join_factors(layer.groups, torch.float32), layer.rows)
    assert len(seen) == 1
    assert seen[0] is layer.x
    assert torch.equal(y, F.linear(layer.x, layer.weight))


@pytest.mark.parametrize("weight", [True, False])
def test_nothing_of_the_size_of_a_product_is_kept_for_the_backward(weight):
    """Beyond one pair only what came in is kept, its selections by row among that; W0 not asked."""
    layer = make_layer([{"pairs": 4}, {"pairs": 6}], [0, 1, 0, 1], out_features=640, tokens=100)
    layer.x.requires_grad_()
    factors = [LayerFactors(**{n: t.requires_grad_() for n, t in f.parts()}) for f in layer.groups]
    joined = join_factors(factors, torch.float32)
    given = {
        t.untyped_storage().data_ptr() for t in (layer.x, layer.weight, *joined.hadamard.pools)
    }
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = adapted_linear(
            layer.x,
            lambda x: F.linear(x, layer.weight),
            joined,
            layer.rows,
            weight=layer.weight if weight else None,
        )
    selections = layer.x.nbytes + sum(t.nbytes for t in joined.hadamard.pools) + 1024
    assert selections < y.nbytes / 5
    assert sum(kept.values()) <= selections


def test_at_one_pair_one_product_is_kept_and_none_taken_again():
    calls = []

    def base(x: Tensor) -> Tensor:
        calls.append(x)
        return F.linear(x, layer.weight)

    layer = make_layer([{"pairs": 1}, {"rank": 2}], [0, 1, 0])
    factors = join_factors(layer.groups, torch.float32)
    y = adapted_linear(layer.x.requires_grad_(), base, factors, layer.rows)
    y.sum().backward()
    assert len(calls) == 1


@pytest.mark.parametrize("weight", [True, False])
def test_w0_gets_no_gradient(weight):
    layer = make_layer([{"pairs": 3}], [0, 0], tokens=200)
    factors = join_factors(layer.groups, torch.float32)
    in_PI, _ = factors.hadamard.pools
    in_PI.requires_grad_()
    own = layer.weight.clone().requires_grad_()
    y = adapted_linear(
        layer.x, lambda x: F.linear(x, own), factors, layer.rows, weight=own if weight else None
    )
    y.sum().backward()
    assert own.grad is None
    assert in_PI.grad is not None


def test_a_plan_made_in_inference_mode_serves_training(side):
    """Index tensors outlive the call that made them."""
    layer = make_layer(MIXED, MIXED_ROWS)
    compute = operator("eager", weight=side == "weight")
    with torch.inference_mode():
        compute(layer)
    evaluate(layer, compute)
    layer.bias.requires_grad_()  # the one leaf that asks for no other plan
    compute(layer).sum().backward()
    assert layer.bias.grad is not None


@pytest.mark.parametrize("backend", BACKENDS)
def test_base_rows_alone_with_every_backend(backend):
    layer = make_layer([None], [0, 0], dtype=torch.float64)
    y = operator(backend, weight=False)(layer)
    torch.testing.assert_close(y, F.linear(layer.x, layer.weight, layer.bias))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"rows": [0]}, ShapeError),
        ({"rows": [0, 1]}, ShapeError),
        ({"rows": [0, -1]}, ShapeError),
        ({"x": torch.zeros(2, 11)}, ShapeError),
        ({"x": torch.zeros(2, 3, 10)}, ShapeError),
        ({"weight": torch.zeros(6, 11)}, ShapeError),
        ({"backend": "nope"}, BackendError),
    ],
)
@pytest.mark.parametrize("group", [{"pairs": 2}, {"rank": 2}])
def test_what_does_not_fit_is_one_line(group, change, error):
    layer = make_layer([group], [0, 0])
    arguments = {
        "x": layer.x,
        "base": lambda x: F.linear(x, layer.weight),
        "factors": join_factors(layer.groups, torch.float32),
        "rows": layer.rows,
    }
    with pytest.raises(error) as caught:  # unwrapped: without the test run's own check of shapes
        inspect.unwrap(prepare)(**{**arguments, **change})
    assert "\n" not in str(caught.value)


def test_shapes_are_checked_in_the_test_run():
    with pytest.raises(TypeError, match="Type-check error"):
        adapted_linear(
            torch.zeros(2, 11), torch.nn.Linear(11, 3), join_factors([None], torch.float32), [0, 0]
        )


def test_of_pages_by_row_the_latest_are_kept_and_none_of_a_prompt():
    """A server's mixes are without end, and each token of its prompts is a row."""
    layer = make_layer([{"pairs": 1}, {"pairs": 1, "rank": 2}], [0, 1, 1])
    factors = batch_factors(layer)
    mixed = Adapted(lambda x: F.linear(x, layer.weight), factors, backend="eager")
    with torch.no_grad():
        for rows in ([0, 1, 1], [1, 0, 1], [1, 1, 0]):
            mixed.prepare(layer.x, rows)(layer.x)
        kept = {use: key for use, (key, _) in factors._kept.items()}
        assert kept == {("pass", 0): (1, 1, 0), ("rank", 2): ((0, 1, 0, 1), torch.float32)}
        long = layer.x.repeat(20, 1, 1)
        mixed.prepare(long, [1, 0, 1] * 20)(long)
    assert {use: key for use, (key, _) in factors._kept.items()} == kept
