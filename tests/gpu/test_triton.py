"""The kernels for GPUs on one: against the reference, forward and backward; in a CUDA graph."""

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flora.adapters.core import LayerFactors
from flora.bank import join_factors
from flora.ops.adapted_linear import adapted_linear, prepare
from tests.helpers import assert_no_worse, random_factors

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

MIXED = [
    {"pairs": 1},
    {"rank": 4},
    {"pairs": 3, "rank": 2, "bias": True},
    {"pairs": 17},
    {"rank": 70, "bias": True},
    None,
    {"pairs": 2},
]
ROWS = [3, 0, 5, 1, 2, 3, 6, 4, 5]
SHAPES = [(7, 11), (130, 257), (576, 1536)]


def make(
    out_features: int, in_features: int, tokens: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, list[LayerFactors | None]]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to("cuda", dtype)

    groups: list[LayerFactors | None] = []
    for parts in MIXED:
        made = parts and random_factors(out_features, in_features, generator=generator, **parts)
        groups.append(
            made
            and LayerFactors(
                **{
                    name: part.to("cuda", torch.float32 if name.startswith("hada") else dtype)
                    for name, part in made.parts()
                }
            )
        )
    x = normal(len(ROWS), tokens, in_features)
    return x, normal(out_features, in_features) / in_features**0.5, normal(out_features), groups


def run(
    backend: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: Sequence[LayerFactors | None],
    *,
    dtype: torch.dtype | None = None,
    grad: bool = False,
    has_weight: bool = True,
) -> dict[str, Tensor]:
    """The result, and with `grad` the gradient of x and of all factors; in fp64 if asked."""
    leaves = {"x": x.to(dtype or x.dtype).clone().requires_grad_(grad)}
    copied: list[LayerFactors | None] = []
    for number, group in enumerate(groups):
        parts = {} if group is None else dict(group.parts())
        made = {n: t.to(dtype or t.dtype).clone().requires_grad_(grad) for n, t in parts.items()}
        leaves |= {f"{number}.{n}": t for n, t in made.items()}
        copied.append(LayerFactors(**made) if made else None)
    weight, bias = weight.to(dtype or weight.dtype), bias.to(dtype or bias.dtype)
    with torch.set_grad_enabled(grad):
        y = adapted_linear(
            leaves["x"],
            lambda x: F.linear(x, weight),
            join_factors(copied, weight.dtype),
            ROWS,
            bias=bias,
            weight=weight if has_weight else None,
            backend=backend,
        )
    found = {"y": y.detach()}
    if grad:
        generator = torch.Generator().manual_seed(1)
        dy = torch.randn(*y.shape, generator=generator).to(y.device, x.dtype)
        y.backward(dy.to(y.dtype))
        found |= {f"grad {n}": t.grad for n, t in leaves.items() if t.grad is not None}
    return found


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("has_weight", [False, True])
@pytest.mark.parametrize("tokens", [1, 3, 17, 300])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_value_and_gradients(dtype, shape, tokens, has_weight, grad):
    batch = make(*shape, tokens, dtype)
    settings = {"grad": grad, "has_weight": has_weight}
    truth = run("reference", *batch, dtype=torch.float64, **settings)
    plain = run("eager", *batch, **settings)
    for name, found in run("triton", *batch, **settings).items():
        assert_no_worse(found, plain[name], truth[name], name)


@pytest.mark.parametrize("tokens", [1, 200])
def test_a_cuda_graph_gives_the_same(tokens):
    x, weight, bias, groups = make(576, 1536, tokens, torch.bfloat16)
    factors = join_factors(groups, weight.dtype)
    with torch.no_grad():
        linear = prepare(
            x,
            lambda x: F.linear(x, weight),
            factors,
            ROWS,
            bias=bias,
            weight=weight,
            backend="triton",
        )
        linear(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = linear(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.testing.assert_close(y, linear(x), rtol=0, atol=0)
