"""The factors of one layer for one batch."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import ParamSpec, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")

BaseProduct = Callable[[Tensor], Tensor]
"""The base layer as a black box: `[..., in]` to `[..., out]`, without its bias."""


class WeightProduct:
    """The product with a W0 that can be read, `[out, in]`.

    known: what a backend made of it.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.known: object = None

    def __call__(self, x: Tensor, /) -> Tensor:
        return F.linear(x, self.weight)


@dataclass(frozen=True, eq=False)
class Pages:
    """Pages of one pool, or of two that belong together, which a batch reads where they lie.

    pools:   each `[capacity, width]`.
    index:   `[P]`, int32: the pages that are taken, in order. None for all; the last Hadamard page
             is then one of ones.
    neutral: for each pool whether all that is taken is known to be ones.
    centers: for each pool `[capacity, 1]`, where its pages lie in bf16 as what they are off these;
             None where they lie as they are. See `centered`.
    """

    pools: tuple[Tensor, ...]
    index: Tensor | None = None
    neutral: tuple[bool, ...] = (False, False)
    centers: tuple[Tensor, ...] | None = None

    def gather(self, ones: int = 0) -> tuple[Tensor, ...]:
        """Copies of the pages, and behind them so many of ones; without an index the pools."""
        if self.index is None:
            return self.pools
        copies, taken = [], len(self.index)
        for number, pool in enumerate(self.pools):
            dtype = pool.dtype if self.centers is None else torch.float32
            copy = pool.new_ones(taken + ones, pool.shape[1], dtype=dtype)
            if self.centers is None:
                torch.index_select(pool, 0, self.index, out=copy[:taken])
            else:
                off, center = pool[self.index], self.centers[number][self.index]
                torch.add(center.float(), off, out=copy[:taken])
            copies.append(copy)
        return tuple(copies)


@dataclass(frozen=True, eq=False, kw_only=True)
class LayersPages:
    """The pages of one pool, or of two that belong together, which a batch's G groups take in L
    layers, layer after layer.

    family:  theirs among the fields of `BatchFactors`.
    numbers: of each layer by its name.
    pools, centers: as in `Pages`.
    index:   `[pages]`, int32: those that are taken in all layers.
    ends:    `[L + 1]`: where those of each layer begin, and behind the last where they end.
    sizes:   `[L, G]`: how many each group has.
    neutral: `[L, sides]`: for each layer's pools whether all that is taken is ones.
    """

    family: str
    numbers: Mapping[str, int]
    pools: tuple[Tensor, ...]
    centers: tuple[Tensor, ...] | None
    index: Tensor
    ends: np.ndarray
    sizes: np.ndarray
    neutral: np.ndarray

    @cached_property
    def _of_layers(self) -> list[tuple[slice, tuple[int, ...], tuple[bool, ...]]]:
        ends = self.ends.tolist()
        rows = zip(ends, ends[1:], self.sizes.tolist(), self.neutral.tolist(), strict=False)
        return [(slice(first, end), tuple(n), tuple(ones)) for first, end, n, ones in rows]

    def of(self, number: int) -> tuple[tuple[int, ...], Pages]:
        """How many pages each group has in a layer, and these."""
        own, sizes, neutral = self._of_layers[number]
        return sizes, Pages(self.pools, self.index[own], neutral, self.centers)


def centered(pages_PX: Tensor) -> tuple[Tensor, Tensor]:
    """Hadamard pages in half of fp32's memory: what they are off their centers, and these.

    A page's numbers lie around one, mostly 1, where the steps of bf16 are wide. What they are off
    their median is small, and so is what rounding that loses: at most 2^-8 of it. Ones stay ones.

    Returns bf16, `[P, X]` and `[P, 1]`.
    """
    center_P1 = pages_PX.median(dim=1, keepdim=True).values.bfloat16()
    return (pages_PX - center_P1.to(pages_PX.dtype)).bfloat16(), center_P1


@dataclass(frozen=True, eq=False, kw_only=True)
class BatchFactors:
    """The factors of a batch's G groups in one layer, page by page, group after group.

    pairs:    h of each group, 0 where its product stays as it is; P = Σ pairs.
    ranks:    l of each group, 0 where nothing is added; R = Σ ranks.
    biased:   whether each group brings a bias in the place of the layer's own.
    hadamard: the P pages of b and a. None where P is 0.
    low_rank: the R pages of V and U. None where R is 0.
    biases:   the Σ biased pages. None where there is none.
    """

    pairs: tuple[int, ...]
    ranks: tuple[int, ...]
    biased: tuple[bool, ...]
    hadamard: Pages | None = None
    low_rank: Pages | None = None
    biases: Pages | None = None
    _kept: dict[Hashable, tuple[Hashable, object]] = field(
        default_factory=dict, init=False, repr=False
    )

    def keep(
        self, use: Hashable, key: Hashable, make: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """What `make` returns, made once: the steps of a generation take the same pages each time.

        Of each use the latest is kept, as a server's mixes are without end. With gradients it is
        made anew, as a graph lives for one backward.
        """
        if torch.is_grad_enabled():
            return make(*args, **kwargs)
        if use not in self._kept or self._kept[use][0] != key:
            self._kept[use] = key, make(*args, **kwargs)
        return self._kept[use][1]  # type: ignore[return-value]

    @cached_property
    def scales(self) -> tuple[Tensor, Tensor] | None:
        """b `[P + 1, in]` and a `[P + 1, out]`, the last page being ones."""
        if self.hadamard is None:
            return None
        in_PI, out_PO = self.hadamard.gather(ones=1)
        return in_PI, out_PO

    @cached_property
    def additive(self) -> tuple[Tensor, Tensor] | None:
        """V `[R, in]` and U `[R, out]`."""
        if self.low_rank is None:
            return None
        down_RI, up_RO = self.low_rank.gather()
        return down_RI, up_RO

    @cached_property
    def bias(self) -> Tensor | None:
        """`[Σ biased, out]`."""
        return None if self.biases is None else self.biases.gather()[0]

    @cached_property
    def in_features(self) -> int | None:
        """The layer's, where some part says."""
        parts = (self.hadamard, self.low_rank)
        return next((p.pools[0].shape[1] for p in parts if p is not None), None)

    @cached_property
    def out_features(self) -> int | None:
        """The layer's, where some part says."""
        parts = (self.hadamard, self.low_rank, self.biases)
        return next((p.pools[-1].shape[1] for p in parts if p is not None), None)

    @property
    def requires_grad(self) -> bool:
        """Whether a gradient is wanted of some part."""
        parts = (self.hadamard, self.low_rank, self.biases)
        return any(t.requires_grad for p in parts if p is not None for t in p.pools)
