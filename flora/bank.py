"""Many adapters of one model on one device, paged by rank."""

import mmap
import sys
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import NamedTuple
from weakref import WeakSet

import numpy as np
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


class _Key(NamedTuple):
    """What a pool is for: pages of one family and size, of whichever layers."""

    family: str
    widths: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, spec: LayerSpec, family: str) -> "_Key":
        sizes = {"in": spec.in_features, "out": spec.out_features}
        widths = tuple(sizes[side] for side in WIDTHS[family])
        # Hadamard pages are kept in at least fp32.
        exact = torch.promote_types(spec.dtype, torch.float32)
        return cls(family, widths, exact if family == "hadamard" else spec.dtype, spec.device)


class _Place(NamedTuple):
    """A layer's pages among those that its adapter has in one pool, and for each of the pool's
    tensors whether it has ones in all of them."""

    first: int
    size: int
    neutral: tuple[bool, ...]


_Layer = tuple[_Place, ...]
"""The places of an adapter's pages of one layer, in the order of `FAMILIES`."""

NOTHING: _Layer = (_Place(0, 0, ()),) * 3


@dataclass(frozen=True, eq=False, kw_only=True)
class PagedAdapter:
    """An adapter as a bank's pools take it: all that can be checked and made ready before.

    pages: of all layers, one behind the other, by pool.
    """

    kind: str
    identity: str
    nbytes: int
    layers: Mapping[str, _Layer]
    pages: Mapping[_Key, tuple[Tensor, ...]]


@dataclass(kw_only=True)
class _Slot:
    kind: str
    layers: Mapping[str, _Layer]
    nbytes: int
    pinned: bool
    uses: int = 0


class AdapterBank:
    """Holds adapters by the hash of their content, each at its own ranks.

    A page is one rank of one layer: a row in the pools of all layers of its size. So memory is in
    proportion to each adapter's own rank, nothing fragments, a batch's factors are a list of pages,
    and an adapter comes with a few copies, however many layers there are. What a batch was lent
    stays as it is until the batch forgets it, whoever leaves or comes.

    layers: the model's linear layers by name.
    budget: the most bytes that adapters may take; None for no bound. Where it is full, the least
            recently used adapter leaves that is neither pinned nor in use.
    """

    def __init__(self, layers: Mapping[str, LayerSpec], budget: int | None = None) -> None:
        self.layers = layers
        self.budget = budget
        self.evictions = 0
        self._slots: OrderedDict[str, _Slot] = OrderedDict()
        self._pools: dict[_Key, _Pool] = {}

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
            for key, tensors in paged.pages.items():
                self._pool(key).put(paged.identity, tensors)
        except BaseException:
            self._free(paged.identity)
            raise
        self._slots[paged.identity] = _Slot(
            kind=paged.kind, layers=paged.layers, nbytes=paged.nbytes, pinned=pinned
        )

    def paged(self, adapter: Adapter) -> PagedAdapter:
        """An adapter for this bank, which is not looked at: any thread may do it.

        Raises InvalidAdapterError where it does not fit the model.
        """
        layers = {module: [*NOTHING] for module in adapter.layers}
        pages = {}
        for key, found in self._by_pool(adapter).items():
            pages[key], ones = _join(key, found)
            first = 0
            for module, (tensor, *_) in found.items():
                last = first + len(tensor)
                neutral = tuple(all(own[first:last]) for own in ones)
                layers[module][ORDER[key.family]] = _Place(first, len(tensor), neutral)
                first = last
        return PagedAdapter(
            kind=adapter.kind,
            identity=adapter.identity,
            nbytes=sum(tensor.nbytes for tensors in pages.values() for tensor in tensors),
            layers={module: tuple(places) for module, places in layers.items()},
            pages=pages,
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
        layers = [
            NOTHING if i is None else self._slot(i).layers.get(module, NOTHING) for i in identities
        ]
        sizes, lent = {}, {}
        for family, places in zip(FAMILIES, zip(*layers, strict=True), strict=False):
            sizes[family] = tuple([place.size for place in places])
            if any(sizes[family]):
                pool = self._pools[_Key.of(self.layers[module], family)]
                lent[family] = pool.lend(identities, places)
        if not lent:
            return None
        return BatchFactors(
            pairs=sizes["hadamard"],
            ranks=sizes["low_rank"],
            biased=tuple(map(bool, sizes["biases"])),
            **lent,
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
        return sum(pool.nbytes for pool in self._pools.values())

    def check_integrity(self) -> None:
        """Raise RuntimeError unless free + held = total in every pool, for just the residents."""
        expected: dict[_Key, Counter[str]] = defaultdict(Counter)
        for identity, slot in self._slots.items():
            for module, layer in slot.layers.items():
                for family, place in zip(FAMILIES, layer, strict=True):
                    if place.size:
                        key = _Key.of(self.layers[module], family)
                        expected[key][identity] += place.size
        for key, pool in self._pools.items():
            held = [page for pages in pool.held.values() for page in pages.tolist()]
            if sorted([*pool.free, *pool.left, *held]) != list(range(pool.capacity)):
                raise RuntimeError(f"{key}: free and held pages are not the pool")
            if {i: len(pages) for i, pages in pool.held.items()} != expected[key]:
                raise RuntimeError(f"{key}: pages of adapters that are not resident")
        held_bytes = sum(
            pool.page_bytes * (pool.capacity - len(pool.free) - len(pool.left))
            for pool in self._pools.values()
        )
        if held_bytes != self.used_bytes:
            raise RuntimeError(
                f"held pages take {held_bytes} bytes, the residents {self.used_bytes}"
            )

    def _slot(self, identity: str) -> _Slot:
        if identity not in self._slots:
            raise UnknownAdapterError(f"adapter {identity[:12]} is not resident; load it first")
        return self._slots[identity]

    def _pool(self, key: _Key) -> "_Pool":
        if key not in self._pools:
            self._pools[key] = _Pool(key)
        return self._pools[key]

    def _by_pool(self, adapter: Adapter) -> dict[_Key, dict[str, list[Tensor]]]:
        """An adapter's pages by pool and layer. Raises InvalidAdapterError for other sizes."""
        pools: dict[_Key, dict[str, list[Tensor]]] = defaultdict(dict)
        for module, factors in adapter.layers.items():
            spec = self.layers.get(module)
            if spec is None:
                raise InvalidAdapterError(f"{module}: the model has no such linear layer")
            for family, tensors in _families(factors).items():
                key, found = _Key.of(spec, family), [t.shape[1] for t in tensors]
                if found != [*key.widths]:
                    raise InvalidAdapterError(
                        f"{module} {family}: found widths {found}, expected {[*key.widths]}"
                    )
                pools[key][module] = tensors
        return pools

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
        growth = sum(self._pool(key).growth(len(pages[0])) for key, pages in paged.pages.items())
        if self.held_bytes + growth > self.budget:
            for pool in self._pools.values():
                pool.compact()

    def _free(self, identity: str) -> None:
        for pool in self._pools.values():
            pool.drop(identity)


class _Pool:
    """Pages of one size: parallel tensors `[room, width]`, and who holds which page.

    Pages that were lent are not written to until they were given back, by being forgotten.

    capacity: the pages that were ever written to, the first ones.
    held:     the pages of each adapter, int32, in the order of its layers.
    free, left: the pages that nobody holds: those to be written to, and those that may be lent.
    """

    def __init__(self, key: _Key) -> None:
        self.tensors = tuple(
            torch.empty(0, width, dtype=key.dtype, device=key.device) for width in key.widths
        )
        self.page_bytes = sum(key.widths) * key.dtype.itemsize
        self.capacity = 0
        self.held: dict[str, np.ndarray] = {}
        self.free: list[int] = []
        self.left: list[int] = []
        self._lent: WeakSet[Pages] = WeakSet()

    @property
    def nbytes(self) -> int:
        return self.capacity * self.page_bytes

    def put(self, identity: str, tensors: tuple[Tensor, ...]) -> None:
        count = len(tensors[0])
        self._take_back()
        if (more := count - len(self.free)) > 0:
            self._extend(more)
        pages = np.array([self.free.pop() for _ in range(count)], dtype=np.int32)
        self.held[identity] = pages
        index = self._index(pages)
        for pool, tensor in zip(self.tensors, tensors, strict=True):
            pool[index] = tensor

    def growth(self, count: int) -> int:
        """The bytes that it takes more with so many pages."""
        self._take_back()
        return max(0, count - len(self.free)) * self.page_bytes

    def drop(self, identity: str) -> None:
        if (pages := self.held.pop(identity, None)) is not None:
            self.left += pages.tolist()
        if 2 * (len(self.free) + len(self.left)) > self.capacity:
            self.compact()

    def lend(self, identities: Sequence[str | None], places: Sequence[_Place]) -> Pages:
        """The pages at these places of adapters, in order; there is one at least."""
        # Of thousands of slices torch takes ten times as long.
        index = np.concatenate(
            [
                self.held[identity][first : first + size]
                for identity, (first, size, _) in zip(identities, places, strict=True)
                if identity is not None and size
            ]
        )
        neutral = tuple(map(all, zip(*[own for _, size, own in places if size], strict=True)))
        self._lent.add(pages := Pages(self.tensors, self._index(index), neutral))
        return pages

    def compact(self) -> None:
        """Move the held pages to new tensors that have room for nothing else."""
        held = [page for pages in self.held.values() for page in pages.tolist()]
        self._move(len(held), held)
        ends = accumulate(len(pages) for pages in self.held.values())
        self.held = {
            identity: np.arange(end - len(pages), end, dtype=np.int32)
            for (identity, pages), end in zip(self.held.items(), ends, strict=True)
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

    def _index(self, pages: np.ndarray) -> Tensor:
        return torch.from_numpy(pages).to(self.tensors[0].device)


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

ORDER = {family: number for number, family in enumerate(FAMILIES)}

WIDTHS = {"hadamard": ("in", "out"), "low_rank": ("in", "out"), "biases": ("out",)}


@torch.no_grad()
def _join(
    key: _Key, found: Mapping[str, Sequence[Tensor]]
) -> tuple[tuple[Tensor, ...], list[list[bool]]]:
    """The pages of layers, one behind the other, and for each tensor which of them are ones.

    Raises InvalidAdapterError where a number is beyond the pool's type.
    """
    joined, ones = [], []
    for parts in zip(*found.values(), strict=True):
        pages = torch.cat([part.to(key.device) for part in parts])
        limit = torch.finfo(key.dtype).max
        if pages.dtype != key.dtype and pages.abs().max() > limit:
            module, largest = next(
                (module, largest)
                for module, part in zip(found, parts, strict=True)
                if (largest := float(part.abs().max())) > limit
            )
            kind = str(key.dtype).removeprefix("torch.")
            raise InvalidAdapterError(f"{module} {key.family}: {largest:g} is beyond {kind}")
        joined.append(pages.to(key.dtype))
        is_scale = key.family == "hadamard"
        ones.append((pages == 1).all(dim=1).tolist() if is_scale else [False] * len(pages))
    return tuple(joined), ones


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
