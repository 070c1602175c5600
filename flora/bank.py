"""Many adapters of one model on one device, paged by rank."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flora.adapters.core import Adapter, LayerFactors
from flora.errors import InvalidAdapterError, OutOfBudgetError, UnknownAdapterError
from flora.ops.factors import BatchFactors

GROWTH = 1.04
"""A full pool grows to so much more than it needs: little memory idle, few copies."""


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """One linear layer of the model that a bank is for."""

    out_features: int
    in_features: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, kw_only=True)
class Resident:
    """One adapter in a bank: its size there, how many batches use it, whether it is pinned."""

    identity: str
    kind: str
    nbytes: int
    uses: int
    pinned: bool


@dataclass(kw_only=True)
class _Slot:
    kind: str
    layers: Mapping[str, "_Ranks"]
    nbytes: int
    pinned: bool
    uses: int = 0


@dataclass(frozen=True)
class _Ranks:
    pairs: int
    rank: int
    biased: bool


class AdapterBank:
    """Holds adapters by the hash of their content, each at its own ranks.

    A page is one rank of one layer: a row in that layer's pools. So memory is in proportion to each
    adapter's own rank, nothing fragments, and a batch's factors are one index_select.

    layers: the model's linear layers by name.
    budget: the most bytes that adapters may take; None for no bound. Where it is full, the least
            recently used adapter leaves that is neither pinned nor in use.
    """

    def __init__(self, layers: Mapping[str, LayerSpec], budget: int | None = None) -> None:
        self.layers = layers
        self.budget = budget
        self.evictions = 0
        self._slots: OrderedDict[str, _Slot] = OrderedDict()
        self._pools: dict[str, dict[str, _Pool]] = {}

    def __contains__(self, identity: str) -> bool:
        return identity in self._slots

    def load(self, adapter: Adapter, *, pinned: bool = False) -> None:
        """Make an adapter resident; one that is already is only marked as used now.

        Raises InvalidAdapterError where it does not fit the model, OutOfBudgetError where nothing
        more can leave; both change nothing.
        """
        if slot := self._slots.get(adapter.identity):
            slot.pinned |= pinned
            self._slots.move_to_end(adapter.identity)
            return
        nbytes = self._check(adapter)
        self._make_room(nbytes)
        try:
            for module, factors in adapter.layers.items():
                for name, tensors in _families(factors).items():
                    self._pool(module, name).put(adapter.identity, tensors)
        except BaseException:
            self._free(adapter.identity)
            raise
        ranks = {
            module: _Ranks(factors.pairs, factors.rank, factors.bias is not None)
            for module, factors in adapter.layers.items()
        }
        self._slots[adapter.identity] = _Slot(
            kind=adapter.kind, layers=ranks, nbytes=nbytes, pinned=pinned
        )

    def unload(self, identity: str) -> None:
        """Forget an adapter, pinned or not. Raises UnknownAdapterError, or ValueError if in use."""
        slot = self._slot(identity)
        if slot.uses:
            raise ValueError(f"adapter {identity[:12]} is used by {slot.uses} batches")
        del self._slots[identity]
        self._free(identity)

    def acquire(self, identity: str) -> None:
        """Keep an adapter until as many `release`s. Raises UnknownAdapterError."""
        self._slot(identity).uses += 1
        self._slots.move_to_end(identity)

    def release(self, identity: str) -> None:
        """Take one `acquire` back. Raises UnknownAdapterError, or ValueError if there was none."""
        slot = self._slot(identity)
        if not slot.uses:
            raise ValueError(f"adapter {identity[:12]} is not in use")
        slot.uses -= 1

    def factors(self, module: str, identities: Sequence[str | None]) -> BatchFactors | None:
        """A layer's factors for a batch's groups, copied out of the pools.

        identities: of each group; None for a group without an adapter.
        None where no group touches the layer. Raises UnknownAdapterError.
        """
        neutral = _Ranks(0, 0, False)
        ranks = [
            neutral if i is None else self._slot(i).layers.get(module, neutral) for i in identities
        ]
        if all(r == neutral for r in ranks):
            return None
        parts: dict[str, Tensor] = {}
        for name, fields in FAMILIES.items():
            pool = self._pools.get(module, {}).get(name)
            pages = [p for i in identities if i is not None and pool for p in pool.pages.get(i, ())]
            if pool and pages:
                ones = 1 if name == "hadamard" else 0
                parts |= zip(fields, pool.take(pages, ones), strict=True)
        return BatchFactors(
            pairs=tuple(r.pairs for r in ranks),
            ranks=tuple(r.rank for r in ranks),
            biased=tuple(r.biased for r in ranks),
            **parts,
        )

    @property
    def residents(self) -> list[Resident]:
        """What is resident, the least recently used first."""
        return [
            Resident(
                identity=identity,
                kind=slot.kind,
                nbytes=slot.nbytes,
                uses=slot.uses,
                pinned=slot.pinned,
            )
            for identity, slot in self._slots.items()
        ]

    @property
    def used_bytes(self) -> int:
        """What the resident adapters take."""
        return sum(slot.nbytes for slot in self._slots.values())

    @property
    def held_bytes(self) -> int:
        """What the pools take, free pages with them."""
        return sum(pool.nbytes for pools in self._pools.values() for pool in pools.values())

    def check_integrity(self) -> None:
        """Raise RuntimeError unless free + held = total in every pool, for just the residents."""
        for module, pools in self._pools.items():
            for name, pool in pools.items():
                pages = sorted([*pool.free, *(p for held in pool.pages.values() for p in held)])
                if pages != list(range(pool.capacity)):
                    raise RuntimeError(f"{module} {name}: free and held pages are not the pool")
                expected = {
                    i for i, slot in self._slots.items() if _count(slot.layers.get(module), name)
                }
                if set(pool.pages) != expected:
                    raise RuntimeError(f"{module} {name}: pages of adapters that are not resident")
        held = sum(
            pool.page_bytes * (pool.capacity - len(pool.free))
            for pools in self._pools.values()
            for pool in pools.values()
        )
        if held != self.used_bytes:
            raise RuntimeError(f"held pages take {held} bytes, the residents {self.used_bytes}")

    def _slot(self, identity: str) -> _Slot:
        if identity not in self._slots:
            raise UnknownAdapterError(f"adapter {identity[:12]} is not resident; load it first")
        return self._slots[identity]

    def _pool(self, module: str, name: str) -> "_Pool":
        pools = self._pools.setdefault(module, {})
        if name not in pools:
            spec = self.layers[module]
            sizes = {"in": spec.in_features, "out": spec.out_features}
            dtype = spec.dtype
            if name == "hadamard":
                dtype = torch.promote_types(dtype, torch.float32)
            pools[name] = _Pool([sizes[s] for s in WIDTHS[name]], dtype, spec.device)
        return pools[name]

    def _check(self, adapter: Adapter) -> int:
        """An adapter's bytes here. Raises InvalidAdapterError where it does not fit the model."""
        nbytes = 0
        for module, factors in adapter.layers.items():
            spec = self.layers.get(module)
            if spec is None:
                raise InvalidAdapterError(f"{module}: the model has no such linear layer")
            sizes = {"in": spec.in_features, "out": spec.out_features}
            for name, tensors in _families(factors).items():
                found = [tensor.shape[1] for tensor in tensors]
                expected = [sizes[s] for s in WIDTHS[name]]
                if found != expected:
                    raise InvalidAdapterError(
                        f"{module} {name}: found widths {found}, expected {expected}"
                    )
                pool = self._pool(module, name)
                largest = max(float(tensor.abs().max()) for tensor in tensors)
                if largest > torch.finfo(pool.dtype).max:
                    kind = str(pool.dtype).removeprefix("torch.")
                    raise InvalidAdapterError(f"{module} {name}: {largest:g} is beyond {kind}")
                nbytes += pool.page_bytes * tensors[0].shape[0]
        return nbytes

    def _make_room(self, nbytes: int) -> None:
        if self.budget is None:
            return
        idle = [i for i, slot in self._slots.items() if not (slot.uses or slot.pinned)]
        leaving: list[str] = []
        freed = 0
        while self.used_bytes - freed + nbytes > self.budget:
            if len(leaving) == len(idle):
                raise OutOfBudgetError(
                    f"an adapter of {nbytes} bytes does not fit: {self.used_bytes - freed} of "
                    f"{self.budget} bytes are pinned or in use"
                )
            freed += self._slots[idle[len(leaving)]].nbytes
            leaving.append(idle[len(leaving)])
        for identity in leaving:
            self.unload(identity)
            self.evictions += 1
        if self.held_bytes + nbytes > self.budget:
            for pools in self._pools.values():
                for pool in pools.values():
                    pool.resize(0)

    def _free(self, identity: str) -> None:
        for pools in self._pools.values():
            for pool in pools.values():
                pool.drop(identity)


class _Pool:
    """Pages of one layer: parallel tensors `[capacity, width]`, and who holds which page."""

    def __init__(self, widths: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self.tensors = [torch.empty(0, width, dtype=dtype, device=device) for width in widths]
        self.dtype = dtype
        self.page_bytes = sum(widths) * dtype.itemsize
        self.pages: dict[str, list[int]] = {}
        self.free: list[int] = []

    @property
    def capacity(self) -> int:
        return self.tensors[0].shape[0]

    @property
    def nbytes(self) -> int:
        return self.capacity * self.page_bytes

    def put(self, identity: str, tensors: Sequence[Tensor]) -> None:
        count = tensors[0].shape[0]
        if count > len(self.free):
            self.resize(count)
        pages = [self.free.pop() for _ in range(count)]
        self.pages[identity] = pages
        for pool, tensor in zip(self.tensors, tensors, strict=True):
            pool[pages] = tensor.detach().to(pool.device, pool.dtype)

    def drop(self, identity: str) -> None:
        self.free += self.pages.pop(identity, [])
        if 2 * len(self.free) > self.capacity:
            self.resize(0)

    def take(self, pages: Sequence[int], ones: int) -> list[Tensor]:
        """Copies of some pages, in order, and behind them so many pages of ones."""
        index = torch.tensor(pages, device=self.tensors[0].device)
        copies = []
        for pool in self.tensors:
            copy = pool.new_ones(len(pages) + ones, pool.shape[1])
            torch.index_select(pool, 0, index, out=copy[: len(pages)])
            copies.append(copy)
        return copies

    def resize(self, more: int) -> None:
        """Move the held pages to the front of new tensors with room for so many more."""
        held = [page for pages in self.pages.values() for page in pages]
        capacity = len(held) + more
        if more:
            capacity = max(capacity, int(capacity * GROWTH))
        grown = [old.new_empty(capacity, old.shape[1]) for old in self.tensors]
        for new, old in zip(grown, self.tensors, strict=True):
            new[: len(held)] = old[held]
        self.tensors = grown  # all or none: memory may run out on the way
        moved = iter(range(len(held)))
        self.pages = {i: [next(moved) for _ in pages] for i, pages in self.pages.items()}
        self.free = list(range(len(held), capacity))


FAMILIES = {
    "hadamard": ("hadamard_in", "hadamard_out"),
    "low_rank": ("down", "up"),
    "bias": ("bias",),
}
WIDTHS = {"hadamard": ("in", "out"), "low_rank": ("in", "out"), "bias": ("out",)}


def _families(factors: LayerFactors) -> dict[str, list[Tensor]]:
    """The parts that a layer has, as matrices of pages."""
    found = {
        name: [t for field in fields if (t := getattr(factors, field)) is not None]
        for name, fields in FAMILIES.items()
    }
    return {
        name: [t.unsqueeze(0) if t.ndim == 1 else t for t in parts]
        for name, parts in found.items()
        if parts
    }


def _count(ranks: _Ranks | None, name: str) -> int:
    counts = {"hadamard": "pairs", "low_rank": "rank", "bias": "biased"}
    return 0 if ranks is None else int(getattr(ranks, counts[name]))


def join_factors(layers: Sequence[LayerFactors | None], dtype: torch.dtype) -> BatchFactors:
    """The factors of a batch's groups in one layer, from each group's own; differentiable.

    layers: one for each group, None for a group that leaves the layer as it is.
    dtype:  the layer's type; the Hadamard pages are kept in at least fp32.
    """
    groups = [group or LayerFactors() for group in layers]
    exact = torch.promote_types(dtype, torch.float32)

    def pages(name: str, dtype: torch.dtype) -> list[Tensor]:
        parts = (getattr(group, name) for group in groups)
        return [part.to(dtype) for part in parts if part is not None]

    joined = {}
    for name in ("hadamard_in", "hadamard_out"):
        if parts := pages(name, exact):
            joined[name] = torch.cat([*parts, parts[0].new_ones(1, parts[0].shape[1])])
    for name in ("down", "up"):
        if parts := pages(name, dtype):
            joined[name] = torch.cat(parts)
    if parts := pages("bias", dtype):
        joined["bias"] = torch.stack(parts)
    return BatchFactors(
        pairs=tuple(group.pairs for group in groups),
        ranks=tuple(group.rank for group in groups),
        biased=tuple(group.bias is not None for group in groups),
        **joined,
    )
