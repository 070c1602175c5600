"""What many tests need: the one way to compare tensors, and small things to compare."""

import torch
from torch import Tensor

from flora.adapters.core import LayerFactors


def assert_no_worse(
    actual: Tensor,
    plain: Tensor,
    truth: Tensor,
    what: str = "result",
    *,
    dtype: torch.dtype | None = None,
    scale: Tensor | None = None,
) -> None:
    """The error against the truth is at most that of plain torch in the same type, plus eps.

    actual: what is judged. plain: the plain torch expression, in the same type.
    truth:  the reference, in fp64. All of one shape.
    dtype:  the type that the eps is of: the result's, unless its products are taken in another.
    scale:  the size that the eps is of: the truth's, unless terms cancel in it; then Σ |term|.
    """
    if not actual.shape == plain.shape == truth.shape:
        raise AssertionError(f"{what}: shapes {actual.shape}, {plain.shape}, {truth.shape}")
    if actual.dtype != plain.dtype or truth.dtype != torch.float64:
        raise AssertionError(f"{what}: types {actual.dtype}, {plain.dtype}, {truth.dtype}")
    if not torch.isfinite(actual).all():
        raise AssertionError(f"{what}: not finite")
    if not truth.numel():
        return
    error = (actual.double() - truth).abs().max().item()
    allowed = (plain.double() - truth).abs().max().item()
    eps = torch.finfo(dtype or actual.dtype).eps
    allowed += eps * (truth if scale is None else scale).abs().max().item()
    if error > allowed:
        raise AssertionError(f"{what}: error {error:.3e} over the allowed {allowed:.3e}")


def random_factors(
    out_features: int,
    in_features: int,
    *,
    pairs: int = 0,
    rank: int = 0,
    bias: bool = False,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
) -> LayerFactors:
    """Factors away from the identity, of the size that trained ones have."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return LayerFactors(
        hadamard_in=1 + 0.3 * normal(pairs, in_features) if pairs else None,
        hadamard_out=(1 + 0.3 * normal(pairs, out_features)) / pairs if pairs else None,
        down=normal(rank, in_features) / in_features**0.5 if rank else None,
        up=normal(rank, out_features) / max(rank, 1) if rank else None,
        bias=normal(out_features) if bias else None,
    )
