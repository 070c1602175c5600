"""The factors of one layer for one batch."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")

BaseProduct = Callable[[Tensor], Tensor]
"""The base layer as a black box: `[..., in]` to `[..., out]`, without its bias."""


@dataclass(frozen=True, eq=False, kw_only=True)
class BatchFactors:
    """The factors of a batch's G groups in one layer, page by page, group after group.

    pairs:        h of each group, 0 where its product stays as it is.
    ranks:        l of each group, 0 where nothing is added.
    biased:       whether each group brings a bias in the place of the layer's own.
    hadamard_in:  `[P + 1, in]`, P = Σ pairs; the last page is ones. None where P is 0.
    hadamard_out: `[P + 1, out]`, likewise.
    down:         `[R, in]`, R = Σ ranks. None where R is 0.
    up:           `[R, out]`, likewise.
    bias:         `[Σ biased, out]`. None where there is none.
    """

    pairs: tuple[int, ...]
    ranks: tuple[int, ...]
    biased: tuple[bool, ...]
    hadamard_in: Tensor | None = None
    hadamard_out: Tensor | None = None
    down: Tensor | None = None
    up: Tensor | None = None
    bias: Tensor | None = None
    _kept: dict[Hashable, object] = field(default_factory=dict, init=False, repr=False)

    def keep(self, key: Hashable, make: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What `make` returns, made once: the steps of a generation take the same pages each time.

        With gradients it is made anew, as a graph lives for one backward.
        """
        if torch.is_grad_enabled():
            return make(*args, **kwargs)
        if key not in self._kept:
            self._kept[key] = make(*args, **kwargs)
        return self._kept[key]  # type: ignore[return-value]

    @property
    def out_features(self) -> int | None:
        """The layer's, where some part says."""
        parts = (self.hadamard_out, self.up, self.bias)
        return next((t.shape[1] for t in parts if t is not None), None)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        parts = (self.hadamard_in, self.hadamard_out, self.down, self.up, self.bias)
        return tuple(t for t in parts if t is not None)
