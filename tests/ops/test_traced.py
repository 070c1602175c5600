"""One adapter in torch that a compiler traces, against the adapted weight itself."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from flora.ops.plan import MODULATION_TOKENS
from flora.ops.traced import hadamard_linear
from tests.helpers import assert_no_worse, random_factors


@given(
    pairs=st.integers(1, 9),
    shape=st.lists(st.integers(1, 3), max_size=2),
    many=st.booleans(),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_both_sides_equal_the_dense_weight(pairs, shape, many, bias, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    factors = random_factors(6, 10, pairs=pairs, generator=generator)
    a, b = factors.hadamard_out, factors.hadamard_in
    weight = torch.randn(6, 10, generator=generator).to(dtype)
    own = torch.randn(6, generator=generator).to(dtype) if bias else None
    tokens = [MODULATION_TOKENS] if many else []
    x = torch.randn(*shape, *tokens, 10, generator=generator).to(dtype)

    def dense(kind):
        y = x.to(kind) @ (weight.to(kind) * (a.to(kind).T @ b.to(kind))).T
        return y if own is None else y + own.to(kind)

    scale = x.double().abs() @ (weight.double().abs() * (a.abs().double().T @ b.abs().double())).T
    assert_no_worse(
        hadamard_linear(x, weight, b, a, own), dense(dtype), dense(torch.float64), scale=scale
    )
