"""The one form of all kinds."""

import pytest
import torch

from flora.adapters.core import LayerFactors, identity_of
from flora.errors import InvalidAdapterError
from tests.helpers import random_factors

ONE = torch.ones


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"hadamard_in": ONE(2, 3)}, "two matrices"),
        ({"up": ONE(2, 3)}, "two matrices"),
        ({"hadamard_in": ONE(3), "hadamard_out": ONE(3)}, "two matrices"),
        ({"down": ONE(2, 3, 1), "up": ONE(2, 3)}, "two matrices"),
        ({"hadamard_in": ONE(2, 3), "hadamard_out": ONE(1, 4)}, "differ in rank"),
        ({"down": ONE(2, 3), "up": ONE(3, 2)}, "differ in rank"),
        ({"down": ONE(0, 3), "up": ONE(0, 2)}, "differ in rank"),
        (
            {
                "hadamard_in": ONE(1, 3),
                "hadamard_out": ONE(1, 4),
                "down": ONE(1, 5),
                "up": ONE(1, 4),
            },
            "differ in size",
        ),
        ({"hadamard_in": ONE(1, 3), "hadamard_out": ONE(1, 4), "bias": ONE(5)}, "differ in size"),
        ({"bias": ONE(1, 4)}, "a vector"),
    ],
)
def test_parts_that_do_not_fit_are_one_line(parts, said):
    with pytest.raises(InvalidAdapterError, match=said) as caught:
        LayerFactors(**parts)
    assert "\n" not in str(caught.value)


def test_sizes_and_bytes():
    generator = torch.Generator().manual_seed(0)
    f = random_factors(5, 3, pairs=2, rank=4, bias=True, generator=generator)
    assert (f.pairs, f.rank) == (2, 4)
    assert f.nbytes == 4 * ((2 + 4) * (5 + 3) + 5)
    assert (LayerFactors().pairs, LayerFactors().rank, LayerFactors().nbytes) == (0, 0, 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [{}, {"pairs": 3}, {"rank": 2}, {"pairs": 2, "rank": 3}], ids=str)
def test_merge_is_the_sum_over_pairs_and_ranks_rounded_once(make, dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 3, generator=generator, dtype=torch.float64).to(dtype)
    f = random_factors(5, 3, generator=generator, dtype=torch.float64, **make)
    expected = weight.double()
    if f.pairs:
        expected = sum(
            a[:, None] * expected * b for a, b in zip(f.hadamard_out, f.hadamard_in, strict=True)
        )
    if f.rank:
        expected = expected + sum(u[:, None] * v for u, v in zip(f.up, f.down, strict=True))
    merged = f.merge(weight)
    assert merged.dtype == dtype
    within_fp32 = 0 if dtype == torch.float64 else 1e-6
    rounding = torch.finfo(dtype).eps / 2 if make else 0
    torch.testing.assert_close(
        merged.double(), expected, rtol=1e-14 + rounding + within_fp32, atol=1e-14 + within_fp32
    )


def test_the_identity_tells_shapes_types_and_names_apart():
    tensor = torch.arange(6.0)
    seen = {
        identity_of("K", "{}", tensors)
        for tensors in (
            {"a": tensor},
            {"b": tensor},
            {"a": tensor.reshape(2, 3)},
            {"a": tensor.reshape(3, 2)},
            {"a": tensor.to(torch.bfloat16)},
            {"a": tensor.view(torch.int32)},
            {"a": tensor, "b": tensor},
            {},
        )
    }
    assert len(seen) == 8
    assert identity_of("K", "{}", {"a": tensor}) != identity_of("L", "{}", {"a": tensor})
    assert identity_of("K", "{}", {"a": tensor}) != identity_of("K", "{1}", {"a": tensor})
    strided = (torch.arange(12.0) / 2)[::2]
    assert identity_of("K", "{}", {"a": strided}) == identity_of("K", "{}", {"a": tensor})
