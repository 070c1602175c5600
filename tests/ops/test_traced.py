"""One adapter in torch that a compiler traces, against the adapted weight itself."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from flora.ops.plan import MODULATION_TOKENS
from flora.ops.traced import hadamard_linear
from tests.helpers import assert_no_worse, random_factors


def dense(x, weight, b, a):
    return x @ (weight * (a.T @ b)).T


def value_and_gradients(linear, dy, *tensors):
    x, weight, b, a = (t.detach().requires_grad_() for t in tensors)
    y = linear(x, weight, b, a)
    return [y, *torch.autograd.grad(y, (x, b, a), dy.to(y.dtype))]


@given(
    pairs=st.integers(1, 9),
    shape=st.lists(st.integers(1, 3), max_size=3),
    many=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_both_sides_equal_the_dense_weight(pairs, shape, many, dtype, seed):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    factors = random_factors(6, 10, pairs=pairs, generator=generator)
    shape = [*shape, MODULATION_TOKENS] if many else shape
    x, weight, dy, bias = normal(*shape, 10), normal(6, 10), normal(*shape, 6), normal(6)
    tensors = x, weight, factors.hadamard_in, factors.hadamard_out
    exact = [t.double() for t in tensors]
    for ours, plain, true, size in zip(
        value_and_gradients(hadamard_linear, dy, *tensors),
        value_and_gradients(dense, dy, *(t.to(dtype) for t in tensors)),
        value_and_gradients(dense, dy, *exact),
        value_and_gradients(dense, dy.abs(), *(t.abs() for t in exact)),
        strict=True,
    ):
        assert_no_worse(ours, plain.to(ours.dtype), true, dtype=dtype, scale=size)
    with_bias = hadamard_linear(*tensors, bias)
    torch.testing.assert_close(with_bias, hadamard_linear(*tensors) + bias, rtol=1e-2, atol=1e-2)
