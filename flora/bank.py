"""Many adapters of one model on one device, paged by rank."""

import mmap
import sys
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor

from flora.adapters.core import Adapter, LayerFactors
from flora.errors import InvalidAdapterError, OutOfBudgetError, UnknownAdapterError
from flora.ops.factors import BatchFactors, Pages

RESERVE = {"cpu": 2.0}
"""A full pool moves to where it has so many times the room that it needs, by the device: a CPU's
memory is only taken as it is written to."""

TIGHT = 1.04
"""The same where memory is taken at once: little of it idle, few moves."""


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


class _Ranks(NamedTuple):
    pairs: int
    rank: int
    biased: bool


NEUTRAL = _Ranks(0, 0, False)


class _Part(NamedTuple):
    """Pages of one family, and for each tensor of scales whether it has ones in all of them."""

    tensors: tuple[Tensor, ...]
    neutral: tuple[bool, ...]


@dataclass(frozen=True, eq=False, kw_only=True)
class PagedAdapter:
    """An adapter as a bank's pools take it: all that can be checked and made ready before."""

    kind: str
    identity: str
    nbytes: int
    ranks: Mapping[str, _Ranks]
    parts: Mapping[str, Mapping[str, _Part]]


@dataclass(kw_only=True)
class _Slot:
    kind: str
    layers: Mapping[str, _Ranks]
    nbytes: int
    pinned: bool
    uses: int = 0


class AdapterBank:
    """Holds adapters by the hash of their content, each at its own ranks.

    A page is one rank of one layer: a row in that layer's pools. So memory is in proportion to each
    adapter's own rank, nothing fragments, and a batch's factors are a list of pages. What a batch
    was lent stays as it is until the batch forgets it, whoever leaves or comes.

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

    def load(self, adapter: Adapter | PagedAdapter, *, pinned: bool = False) -> None:
        """Make an adapter resident; one that is already is only marked as used now.

        Raises InvalidAdapterError where it does not fit the model, OutOfBudgetError where nothing
        more can leave; both change nothing.
        """
        if slot := self._slots.get(adapter.identity):
            slot.pinned |= pinned
            self._slots.move_to_end(adapter.identity)
            return
        paged = self.paged(adapter) if isinstance(adapter, Adapter) else adapter
        self._make_room(paged)
        try:
            for module, parts in paged.parts.items():
                for name, part in parts.items():
                    self._pool(module, name).put(paged.identity, part)
        except BaseException:
            self._free(paged.identity)
            raise
        self._slots[paged.identity] = _Slot(
            kind=paged.kind, layers=paged.ranks, nbytes=paged.nbytes, pinned=pinned
        )

    def paged(self, adapter: Adapter) -> PagedAdapter:
        """An adapter for this bank, which is not looked at: any thread may do it.

        Raises InvalidAdapterError where it does not fit the model.
        """
        parts = {
            module: self._parts_of(module, factors) for module, factors in adapter.layers.items()
        }
        return PagedAdapter(
            kind=adapter.kind,
            identity=adapter.identity,
            nbytes=sum(t.nbytes for own in parts.values() for p in own.values() for t in p.tensors),
            ranks={
                module: _Ranks(factors.pairs, factors.rank, factors.bias is not None)
                for module, factors in adapter.layers.items()
            },
            parts=parts,
        )

    def pin(self, identity: str) -> None:
        """Keep an adapter until it is unloaded. Raises UnknownAdapterError."""
        self._slot(identity).pinned = True

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
        """A layer's factors for a batch's groups, which stay as they are now.

        identities: of each group; None for a group without an adapter.
        None where no group touches the layer. Raises UnknownAdapterError.
        """
        ranks = [
            NEUTRAL if i is None else self._slot(i).layers.get(module, NEUTRAL) for i in identities
        ]
        if all(r == NEUTRAL for r in ranks):
            return None
        named = [identity for identity in identities if identity is not None]
        lent = {name: pool.lend(named) for name, pool in self._pools[module].items()}
        pairs, additive, biased = zip(*ranks, strict=True)
        return BatchFactors(
            pairs=pairs,
            ranks=additive,
            biased=biased,
            **{name: pages for name, pages in lent.items() if pages is not None},
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
                held = [page for span in pool.held.values() for page in span.pages]
                if sorted([*pool.free, *pool.left, *held]) != list(range(pool.capacity)):
                    raise RuntimeError(f"{module} {name}: free and held pages are not the pool")
                expected = {
                    i for i, slot in self._slots.items() if _count(slot.layers.get(module), name)
                }
                if set(pool.held) != expected:
                    raise RuntimeError(f"{module} {name}: pages of adapters that are not resident")
        held_bytes = sum(
            pool.page_bytes * (pool.capacity - len(pool.free) - len(pool.left))
            for pools in self._pools.values()
            for pool in pools.values()
        )
        if held_bytes != self.used_bytes:
            raise RuntimeError(
                f"held pages take {held_bytes} bytes, the residents {self.used_bytes}"
            )

    def _slot(self, identity: str) -> _Slot:
        if identity not in self._slots:
            raise UnknownAdapterError(f"adapter {identity[:12]} is not resident; load it first")
        return self._slots[identity]

    def _pool(self, module: str, name: str) -> "_Pool":
        pools = self._pools.setdefault(module, {})
        if name not in pools:
            spec = self.layers[module]
            pools[name] = _Pool(_widths(spec, name), _dtype(spec, name), spec.device)
        return pools[name]

    def _parts_of(self, module: str, factors: LayerFactors) -> dict[str, _Part]:
        """One layer's. Raises InvalidAdapterError where they do not fit the model."""
        spec = self.layers.get(module)
        if spec is None:
            raise InvalidAdapterError(f"{module}: the model has no such linear layer")
        parts = {}
        for name, tensors in _families(factors).items():
            found, expected = [t.shape[1] for t in tensors], _widths(spec, name)
            if found != expected:
                raise InvalidAdapterError(
                    f"{module} {name}: found widths {found}, expected {expected}"
                )
            dtype = _dtype(spec, name)
            for tensor in tensors:
                if tensor.dtype != dtype and tensor.abs().max() > torch.finfo(dtype).max:
                    kind = str(dtype).removeprefix("torch.")
                    raise InvalidAdapterError(
                        f"{module} {name}: {float(tensor.abs().max()):g} is beyond {kind}"
                    )
            parts[name] = _Part(
                tuple(tensor.detach().to(spec.device, dtype) for tensor in tensors),
                tuple(name == "hadamard" and bool((t == 1).all()) for t in tensors),
            )
        return parts

    def _make_room(self, paged: PagedAdapter) -> None:
        if self.budget is None:
            return
        nbytes = paged.nbytes
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
        growth = sum(
            self._pool(module, name).growth(part)
            for module, parts in paged.parts.items()
            for name, part in parts.items()
        )
        if self.held_bytes + growth > self.budget:
            for pools in self._pools.values():
                for pool in pools.values():
                    pool.compact()

    def _free(self, identity: str) -> None:
        for pools in self._pools.values():
            for pool in pools.values():
                pool.drop(identity)


@dataclass(frozen=True)
class _Span:
    """An adapter's pages in a pool, also as a tensor, and for each of the pool's tensors whether it
    has ones in all of them."""

    pages: list[int]
    index: Tensor
    neutral: tuple[bool, ...]


class _Pool:
    """Pages of one layer: parallel tensors `[room, width]`, and who holds which page.

    Pages that were lent are not written to until they were given back, by being forgotten.

    capacity: the pages that were ever written to, the first ones.
    """

    def __init__(self, widths: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self.tensors = tuple(torch.empty(0, width, dtype=dtype, device=device) for width in widths)
        self.dtype = dtype
        self.page_bytes = sum(widths) * dtype.itemsize
        self.capacity = 0
        self.held: dict[str, _Span] = {}
        self.free: list[int] = []
        self.left: list[int] = []
        self._lent: WeakSet[Pages] = WeakSet()

    @property
    def nbytes(self) -> int:
        return self.capacity * self.page_bytes

    def put(self, identity: str, part: _Part) -> None:
        count = len(part.tensors[0])
        self._take_back()
        if (more := count - len(self.free)) > 0:
            self._extend(more)
        span = self._span([self.free.pop() for _ in range(count)], part.neutral)
        self.held[identity] = span
        for pool, tensor in zip(self.tensors, part.tensors, strict=True):
            pool[span.index] = tensor

    def growth(self, part: _Part) -> int:
        """The bytes that it takes more with these pages."""
        self._take_back()
        return max(0, len(part.tensors[0]) - len(self.free)) * self.page_bytes

    def drop(self, identity: str) -> None:
        if span := self.held.pop(identity, None):
            self.left += span.pages
        if 2 * (len(self.free) + len(self.left)) > self.capacity:
            self.compact()

    def lend(self, identities: Iterable[str]) -> Pages | None:
        """The pages of these adapters, in order; None where they have none."""
        spans = [span for identity in identities if (span := self.held.get(identity))]
        if not spans:
            return None
        index = torch.cat([span.index for span in spans])
        neutral = tuple(map(all, zip(*(span.neutral for span in spans), strict=True)))
        self._lent.add(pages := Pages(self.tensors, index, neutral))
        return pages

    def compact(self) -> None:
        """Move the held pages to new tensors that have room for nothing else."""
        held = [page for span in self.held.values() for page in span.pages]
        self._move(len(held), held)
        moved = iter(range(len(held)))
        self.held = {
            identity: self._span([next(moved) for _ in span.pages], span.neutral)
            for identity, span in self.held.items()
        }
        self.capacity, self.free = len(held), []

    def _extend(self, more: int) -> None:
        """Take so many more pages; none that is held moves within its tensor."""
        old, new = self.capacity, self.capacity + more
        if new > len(self.tensors[0]):
            reserve = RESERVE.get(self.tensors[0].device.type, TIGHT)
            self._move(int(new * reserve), slice(old))
        # From the back, so that pages are given in order.
        self.free[:0] = reversed(range(old, new))
        self.capacity = new

    def _move(self, room: int, pages: list[int] | slice) -> None:
        """Go to new tensors with these pages in front; what was lent lies in the old ones."""
        grown = [_room(room, old) for old in self.tensors]
        for new, old in zip(grown, self.tensors, strict=True):
            kept = old[pages]
            new[: len(kept)] = kept
        self.tensors = tuple(grown)  # all or none: memory may run out on the way
        self._lent = WeakSet()
        self._take_back()

    def _take_back(self) -> None:
        """What left is free, unless somebody still has pages of these tensors."""
        if not self._lent:
            self.free, self.left = self.left + self.free, []

    def _span(self, pages: list[int], neutral: tuple[bool, ...]) -> _Span:
        index = torch.tensor(pages, dtype=torch.int32, device=self.tensors[0].device)
        return _Span(pages, index, neutral)


def _room(pages: int, like: Tensor) -> Tensor:
    """Memory for so many pages: on a CPU the system's own, which PyTorch's does not give back."""
    size = pages, like.shape[1]
    if like.device.type != "cpu" or sys.platform == "win32" or not pages:
        return like.new_empty(size)
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, prod(size) * like.itemsize, flags=private)
    return torch.frombuffer(memory, dtype=like.dtype).view(size)


FAMILIES = {
    "hadamard": ("hadamard_in", "hadamard_out"),
    "low_rank": ("down", "up"),
    "biases": ("bias",),
}
"""The parts whose pages belong together, by their names in `BatchFactors`."""

WIDTHS = {"hadamard": ("in", "out"), "low_rank": ("in", "out"), "biases": ("out",)}


def _widths(spec: LayerSpec, name: str) -> list[int]:
    sizes = {"in": spec.in_features, "out": spec.out_features}
    return [sizes[side] for side in WIDTHS[name]]


def _dtype(spec: LayerSpec, name: str) -> torch.dtype:
    """Hadamard pages are kept in at least fp32."""
    return torch.promote_types(spec.dtype, torch.float32) if name == "hadamard" else spec.dtype


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
    counts = {"hadamard": "pairs", "low_rank": "rank", "biases": "biased"}
    return 0 if ranks is None else int(getattr(ranks, counts[name]))


def join_factors(layers: Sequence[LayerFactors | None], dtype: torch.dtype) -> BatchFactors:
    """The factors of a batch's groups in one layer, from each group's own; differentiable.

    layers: one for each group, None for a group that leaves the layer as it is.
    dtype:  the layer's type; the Hadamard pages are kept in at least fp32.
    """
    groups = [group or LayerFactors() for group in layers]
    exact = torch.promote_types(dtype, torch.float32)
    joined: dict[str, Pages] = {}
    for name in FAMILIES:
        families = [family for group in groups if (family := _families(group).get(name))]
        if not families:
            continue
        pools = []
        for parts in zip(*families, strict=True):
            pages = [part.to(exact if name == "hadamard" else dtype) for part in parts]
            if name == "hadamard":
                pages.append(pages[0].new_ones(1, pages[0].shape[1]))
            pools.append(torch.cat(pages))
        joined[name] = Pages(tuple(pools))
    return BatchFactors(
        pairs=tuple(group.pairs for group in groups),
        ranks=tuple(group.rank for group in groups),
        biased=tuple(group.bias is not None for group in groups),
        **joined,
    )
