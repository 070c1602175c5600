"""Many adapters of one model on one device, paged by rank."""

import mmap
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple, TypeVar
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor

from flora.adapters.core import Adapter, LayerFactors
from flora.errors import InvalidAdapterError, OutOfBudgetError, UnknownAdapterError
from flora.ops.factors import BatchFactors, LayersPages, Pages, centered

Lent = TypeVar("Lent", Pages, LayersPages)

RESERVE = {"cpu": 2.0}
"""A full pool moves to where it has so many times the room that it needs, by the device: a CPU's
memory is only taken as it is written to."""

TIGHT = 1.04
"""The same where memory is taken at once: little of it idle, few moves."""

SPARSE = 0.75
"""A pool of which more is free moves to less memory. Not soon: where adapters of many kinds come
and go, those of one kind are now more, now fewer, and a step waits for each move."""


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
        dtype = spec.dtype
        if family == "hadamard" and dtype != torch.bfloat16:
            dtype = torch.promote_types(dtype, torch.float32)
        return cls(family, widths, dtype, spec.device)

    @property
    def centered(self) -> bool:
        """Whether pages lie as what they are off their centers, which are further tensors."""
        return self.family == "hadamard" and self.dtype == torch.bfloat16


class _Part(NamedTuple):
    """An adapter's pages in one pool, layer by layer.

    layers: the number of each page's layer among the pool's, `[pages]`.
    ones:   whether each page is ones, for each of the pool's tensors `[tensors, pages]`.
    """

    tensors: tuple[Tensor, ...]
    layers: np.ndarray
    ones: np.ndarray


@dataclass(frozen=True, eq=False, kw_only=True)
class PagedAdapter:
    """An adapter as a bank's pools take it: all that can be checked and made ready before."""

    kind: str
    identity: str
    nbytes: int
    parts: Mapping[_Key, _Part]


@dataclass(kw_only=True)
class _Slot:
    kind: str
    pages: Mapping[_Key, int]
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
        self._numbers: dict[_Key, dict[str, int]] = defaultdict(dict)
        # Where each layer's pages are: family, pool, the layer's number in it.
        self._places: dict[str, list[tuple[str, _Key, int]]] = {module: [] for module in layers}
        for module, spec in layers.items():
            for family in FAMILIES:
                key = _Key.of(spec, family)
                own = self._numbers[key]
                own[module] = len(own)
                self._places[module].append((family, key, own[module]))
        self._last: tuple[tuple[str | None, ...], dict[_Key, LayersPages]] | None = None

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
            for key, part in paged.parts.items():
                self._pool(key).put(paged.identity, part)
        except BaseException:
            self._free(paged.identity)
            raise
        self._last = None
        self._slots[paged.identity] = _Slot(
            kind=paged.kind,
            pages={key: len(part.layers) for key, part in paged.parts.items()},
            nbytes=paged.nbytes,
            pinned=pinned,
        )

    def paged(self, adapter: Adapter) -> PagedAdapter:
        """An adapter for this bank, which is not looked at: any thread may do it.

        Raises InvalidAdapterError where it does not fit the model.
        """
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
        parts = {key: self._part(key, layers) for key, layers in pools.items()}
        return PagedAdapter(
            kind=adapter.kind,
            identity=adapter.identity,
            nbytes=sum(tensor.nbytes for part in parts.values() for tensor in part.tensors),
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
        laid = self._lay(tuple(identities))
        sizes, lent = dict.fromkeys(FAMILIES, (0,) * len(identities)), {}
        for family, key, number in self._places[module]:
            if key not in laid:
                continue
            sizes[family], pages = laid[key].of(number)
            if any(sizes[family]):
                lent[family] = self._pools[key].lend(pages)
        if not lent:
            return None
        return BatchFactors(
            pairs=sizes["hadamard"],
            ranks=sizes["low_rank"],
            biased=tuple(map(bool, sizes["biases"])),
            **lent,
        )

    def lay(self, identities: Sequence[str | None]) -> list[LayersPages]:
        """The pages of a batch's groups in all layers, which stay as they are while these are kept.

        identities: of each group; None for a group without an adapter.
        Raises UnknownAdapterError.
        """
        laid = self._lay(tuple(identities))
        return [self._pools[key].lend(replace(pages)) for key, pages in laid.items()]

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
        for key, pool in self._pools.items():
            held = [page for span in pool.held.values() for page in span.pages.tolist()]
            if sorted([*pool.free, *pool.left, *held]) != list(range(pool.capacity)):
                raise RuntimeError(f"{key}: free and held pages are not the pool")
            expected = {i: slot.pages[key] for i, slot in self._slots.items() if key in slot.pages}
            if {i: len(span.pages) for i, span in pool.held.items()} != expected:
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

    @torch.no_grad()
    def _part(self, key: _Key, layers: Mapping[str, Sequence[Tensor]]) -> _Part:
        """The pages of these layers. Raises InvalidAdapterError where one is beyond their type."""
        sides = [
            torch.cat([tensor.to(key.device) for tensor in tensors])
            for tensors in zip(*layers.values(), strict=True)
        ]
        kept = [centered(side) if key.centered else (side.to(key.dtype),) for side in sides]
        counts = [len(own[0]) for own in layers.values()]
        for side, (pages, *_) in zip(sides, kept, strict=True):
            if pages.dtype != side.dtype and not (fits := pages.isfinite().all(dim=1)).all():
                page = int(fits.int().argmin())
                module = np.repeat([*layers], counts)[page]
                kind = str(key.dtype).removeprefix("torch.")
                largest = float(side[page].abs().max())
                raise InvalidAdapterError(f"{module} {key.family}: {largest:g} is beyond {kind}")
        numbers = [self._numbers[key][module] for module in layers]
        ones = np.zeros((len(sides), sum(counts)), dtype=bool)
        if key.family == "hadamard":
            ones[:] = [(side == 1).all(dim=1).cpu().numpy() for side in sides]
        return _Part(
            tensors=tuple(tensor for parts in zip(*kept, strict=True) for tensor in parts),
            layers=np.repeat(numbers, counts),
            ones=ones,
        )

    def _lay(self, identities: tuple[str | None, ...]) -> dict[_Key, LayersPages]:
        """The batch's pages in each pool that it has some in. Raises UnknownAdapterError."""
        # The layers of a batch are asked for one after the other.
        if self._last is not None and self._last[0] == identities:
            return self._last[1]
        for identity in identities:
            if identity is not None:
                self._slot(identity)
        laid = {}
        for key, pool in self._pools.items():
            if groups := [(g, i) for g, i in enumerate(identities) if i and i in pool.held]:
                laid[key] = pool.lay(groups, len(identities), self._numbers[key])
        self._last = identities, laid
        return laid

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
        growth = sum(self._pool(key).growth(len(p.layers)) for key, p in paged.parts.items())
        if self.held_bytes + growth > self.budget:
            for pool in self._pools.values():
                pool.compact()

    def _free(self, identity: str) -> None:
        self._last = None
        for pool in self._pools.values():
            pool.drop(identity)


class _Span(NamedTuple):
    """An adapter's pages in a pool, int32, and what `_Part` says of them."""

    pages: np.ndarray
    layers: np.ndarray
    ones: np.ndarray


class _Pool:
    """Pages of one size: parallel tensors `[room, width]`, and who holds which page.

    Behind the tensors of both sides are those of their centers, where pages are centered.

    Pages that were lent are not written to until they were given back, by being forgotten.

    capacity: the pages that were ever written to, the first ones.
    held:     the pages of each adapter.
    free, left: the pages that nobody holds: those to be written to, and those that may be lent.
    """

    def __init__(self, key: _Key) -> None:
        widths = key.widths + (1,) * len(key.widths) * key.centered
        self.tensors = tuple(
            torch.empty(0, width, dtype=key.dtype, device=key.device) for width in widths
        )
        self.family, self.sides = key.family, len(key.widths)
        self.page_bytes = sum(widths) * key.dtype.itemsize
        self.capacity = 0
        self.held: dict[str, _Span] = {}
        self.free: list[int] = []
        self.left: list[int] = []
        self._lent: WeakSet[Pages | LayersPages] = WeakSet()

    @property
    def nbytes(self) -> int:
        return self.capacity * self.page_bytes

    def put(self, identity: str, part: _Part) -> None:
        count = len(part.layers)
        self._take_back()
        if (more := count - len(self.free)) > 0:
            self._extend(more)
        pages = np.array([self.free.pop() for _ in range(count)], dtype=np.int32)
        self.held[identity] = _Span(pages, part.layers, part.ones)
        index = self._index(pages)
        for pool, tensor in zip(self.tensors, part.tensors, strict=True):
            pool[index] = tensor

    def growth(self, count: int) -> int:
        """The bytes that it takes more with so many pages."""
        self._take_back()
        return max(0, count - len(self.free)) * self.page_bytes

    def drop(self, identity: str) -> None:
        if span := self.held.pop(identity, None):
            self.left += span.pages.tolist()
        if len(self.free) + len(self.left) > SPARSE * self.capacity:
            self.compact()

    def lay(
        self, groups: Sequence[tuple[int, str]], count: int, numbers: Mapping[str, int]
    ) -> LayersPages:
        """The pages of these groups' adapters.

        groups:  the number of each, and its adapter, which has pages here.
        count:   of all groups.
        numbers: of the layers by name.
        """
        # At once for all layers: these are thousands of pages, of which a step waits.
        spans = [self.held[identity] for _, identity in groups]
        pages, layers = (np.concatenate([span[i] for span in spans]) for i in (0, 1))
        ones = np.concatenate([span.ones for span in spans], axis=1)
        group = np.repeat([number for number, _ in groups], [len(span.pages) for span in spans])
        sizes = len(numbers), count
        found = np.bincount(layers * count + group, minlength=prod(sizes)).reshape(sizes)
        others = [np.bincount(layers[~own], minlength=len(numbers)) for own in ones]
        return LayersPages(
            family=self.family,
            numbers=numbers,
            pools=self.tensors[: self.sides],
            centers=self.tensors[self.sides :] or None,
            index=self._index(pages[np.argsort(layers, kind="stable")]),
            ends=np.concatenate([[0], found.sum(axis=1).cumsum()]),
            sizes=found,
            neutral=np.stack(others, axis=1) == 0,
        )

    def lend(self, pages: Lent) -> Lent:
        """What somebody reads until it is forgotten."""
        self._lent.add(pages)
        return pages

    def compact(self) -> None:
        """Move the held pages to new tensors, with the room that growing ones have."""
        held = [page for span in self.held.values() for page in span.pages.tolist()]
        self._move(self._room_for(len(held)), held)
        first = 0
        for identity, span in self.held.items():
            last = first + len(span.pages)
            self.held[identity] = span._replace(pages=np.arange(first, last, dtype=np.int32))
            first = last
        self.capacity, self.free = len(held), []

    def _room_for(self, pages: int) -> int:
        """The room of new tensors for so many pages that are held."""
        return int(pages * RESERVE.get(self.tensors[0].device.type, TIGHT))

    def _extend(self, more: int) -> None:
        """Take so many more pages; none that is held moves within its tensor."""
        old, new = self.capacity, self.capacity + more
        if new > len(self.tensors[0]):
            self._move(self._room_for(new), slice(old))
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
    if advice := getattr(mmap, "MADV_HUGEPAGE", None):
        # A batch reads pages far apart, and the processor's table of small ones holds few.
        with suppress(OSError):  # the system may have none
            memory.madvise(advice)
    return torch.frombuffer(memory, dtype=like.dtype).view(size)


FAMILIES = {
    "hadamard": ("hadamard_in", "hadamard_out"),
    "low_rank": ("down", "up"),
    "biases": ("bias",),
}
"""The parts whose pages belong together, by their names in `BatchFactors`."""

WIDTHS = {"hadamard": ("in", "out"), "low_rank": ("in", "out"), "biases": ("out",)}


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
