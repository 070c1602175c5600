"""One form for every kind of adapter.

For a linear layer with frozen weight W0 `[out, in]` and an example x, an adapter gives

    y = Σ_j a_j ∘ (W0 (b_j ∘ x))  +  U (V x)  +  bias          j = 1..h
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from math import inf
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from flora.errors import InvalidAdapterError


class Layers(Protocol):
    """What a kind may ask of the base model's linear layers while it fills, and nothing later."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, int]]:
        """`(out, in)` of every linear layer by its module name."""

    def bias(self, module: str) -> Tensor | None:
        """A layer's own bias, `[out]`, in at least fp32."""

    def row_norm2(self, module: str) -> Tensor:
        """Σ of squares of each row of a layer's W0, `[out]`, in at least fp32."""

    def product(self, module: str, x: Tensor) -> Tensor:
        """W0 x without the bias, `[n, out]` in x's type, for x `[n, in]`."""


class Base(Layers, Protocol):
    """A base model, as an adapter's folder is checked against it."""

    @property
    def head(self) -> str | None:
        """The output embedding's module name, which "all-linear" leaves out."""


@dataclass(frozen=True, eq=False, kw_only=True)
class LayerFactors:
    """One adapter's part in one linear layer; a part that is None is neutral.

    hadamard_in:  b, `[h, in]`; None (with hadamard_out) where the product W0 x stays as it is.
    hadamard_out: a, `[h, out]`.
    down:         V, `[l, in]`; None (with up) where nothing is added.
    up:           U, `[l, out]`.
    bias:         `[out]`, stands for the layer's own bias; None keeps that.

    All scalings are folded in. Raises InvalidAdapterError where the shapes do not fit together.
    """

    hadamard_in: Tensor | None = None
    hadamard_out: Tensor | None = None
    down: Tensor | None = None
    up: Tensor | None = None
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        for first, second in (("hadamard_in", "hadamard_out"), ("down", "up")):
            pair = getattr(self, first), getattr(self, second)
            shapes = [tuple(t.shape) for t in pair if t is not None]
            if not shapes:
                continue
            if [len(shape) for shape in shapes] != [2, 2]:
                raise InvalidAdapterError(f"{first} and {second} are two matrices, got {shapes}")
            if shapes[0][0] != shapes[1][0] or shapes[0][0] == 0:
                raise InvalidAdapterError(f"{first} and {second} differ in rank: {shapes}")
        if self.bias is not None and self.bias.ndim != 1:
            raise InvalidAdapterError(f"bias is a vector, got {tuple(self.bias.shape)}")
        outs, ins = self._sizes()
        if len(ins) > 1 or len(outs) > 1:
            raise InvalidAdapterError(f"parts of one layer differ in size: in {ins}, out {outs}")

    @property
    def size(self) -> tuple[int | None, int | None]:
        """`(out, in)`, None where no part says it."""
        outs, ins = self._sizes()
        return next(iter(outs), None), next(iter(ins), None)

    @property
    def pairs(self) -> int:
        """h, the number of Hadamard pairs; 0 where the product stays as it is."""
        return 0 if self.hadamard_in is None else self.hadamard_in.shape[0]

    @property
    def rank(self) -> int:
        """l, the rank of the additive part."""
        return 0 if self.down is None else self.down.shape[0]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for _, t in self.parts())

    @property
    def numel(self) -> int:
        return sum(t.numel() for _, t in self.parts())

    def _sizes(self) -> tuple[set[int], set[int]]:
        outs = {t.shape[-1] for t in (self.hadamard_out, self.up, self.bias) if t is not None}
        ins = {t.shape[1] for t in (self.hadamard_in, self.down) if t is not None}
        return outs, ins

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        """The parts that are not neutral, by name."""
        for field in fields(self):
            tensor = getattr(self, field.name)
            if tensor is not None:
                yield field.name, tensor

    def merge(self, weight: Tensor) -> Tensor:
        """The adapted weight W0 ∘ (Σ_j a_j b_jᵀ) + UᵀV, `[out, in]`.

        weight: W0, `[out, in]`. Computed in at least fp32, rounded once to the weight's type.
        """
        exact = torch.promote_types(weight.dtype, torch.float32)
        merged = weight.to(exact)
        if self.hadamard_in is not None and self.hadamard_out is not None:
            merged = merged * (self.hadamard_out.to(exact).T @ self.hadamard_in.to(exact))
        if self.down is not None and self.up is not None:
            merged = merged + self.up.to(exact).T @ self.down.to(exact)
        return merged.to(weight.dtype)


@dataclass(frozen=True, eq=False, kw_only=True)
class Adapter:
    """An adapter, ready to use: its kind, and its factors by module name.

    identity: the hash of what it computes, not of its name: see `identity_of`.
    """

    kind: str
    identity: str
    layers: Mapping[str, LayerFactors]

    @cached_property
    def nbytes(self) -> int:
        return sum(factors.nbytes for factors in self.layers.values())


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no NaN and no Inf is in any of these floats: at once, as there are hundreds."""
    filled = [tensor for tensor in tensors if tensor.numel()]
    if not filled or get_total_norm(filled).isfinite():
        return True
    # Squares of what is finite may be beyond the type. The largest one is not, and takes longer.
    return bool(get_total_norm(filled, inf).isfinite())


def identity_of(kind: str, config: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256, in hex, of a kind, its config (as canonical text) and its tensors, in any order."""
    digest = hashlib.sha256(f"{kind}\n{config}\n".encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous().cpu()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
