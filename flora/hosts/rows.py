"""Which adapter each row of a batch uses, and each token where a row changes over."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flora.errors import ShapeError, UnknownAdapterError
from flora.ops import Linear
from flora.ops.factors import BatchFactors

BASE = "__base__"
"""PEFT's name for no adapter; None says the same."""

Span = tuple[str | None, int]
RowAdapter = str | None | Sequence[Span]
"""A row's adapter: a name, or (name, tokens) spans of which the last goes on."""


class PreparedLayer(NamedTuple):
    """A layer without gradients, as a function of inputs of one shape and type."""

    shape: torch.Size
    dtype: torch.dtype
    linear: Linear


@dataclass(frozen=True, eq=False)
class BatchAdapters:
    """The distinct adapters of a batch, one for each group, and what layers have of them.

    names:  None for the base.
    lookup: (module, names) -> that layer's factors; asked once for each layer.
    kept:   what a host made of them, by what it calls its layers.
    """

    names: tuple[str | None, ...]
    lookup: Callable[[str, tuple[str | None, ...]], BatchFactors | None]
    kept: dict[Hashable, Any] = field(default_factory=dict)
    _factors: dict[tuple[str, bool], BatchFactors | None] = field(default_factory=dict)

    def factors(self, module: str) -> BatchFactors | None:
        # Reentrant checkpointing runs a layer without gradients first, and then again with them.
        key = module, torch.is_grad_enabled()
        if key not in self._factors:
            self._factors[key] = self.lookup(module, self.names)
        return self._factors[key]


@dataclass(frozen=True, eq=False)
class Call:
    """One forward of a batch: the group of each unit, a unit being a row or one of its columns.

    rows, columns: the forward's shape; no columns where encoder and decoder have their own.
    units: rows, or rows x columns.
    prepared: layers by what their host calls them, kept for the next forward of the same shape.
    steps: what is laid for layers that run without Python, by units and the tokens of each.
    graphs: x and y of layers that compiled code ran, by number, until their backward.
    """

    adapters: BatchAdapters  # not the batch: what it was lent goes back as soon as it is forgotten
    rows: int
    columns: int
    units: tuple[int, ...]
    prepared: dict[Hashable, PreparedLayer] = field(default_factory=dict)
    steps: dict[Hashable, Any] = field(default_factory=dict)
    graphs: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def by_column(self) -> bool:
        return len(self.units) != self.rows


@dataclass(frozen=True, eq=False)
class Batch:
    """The adapters of a batch's rows, for as many forwards as they stay the same.

    spans:  for each row its (group, tokens) spans, the last one open-ended.
    starts: the first column of each row that is not padding.
    """

    adapters: BatchAdapters
    spans: tuple[tuple[tuple[int, int], ...], ...]
    starts: tuple[int, ...]
    _calls: dict[tuple[int, int], Call] = field(default_factory=dict)

    @cached_property
    def only_base(self) -> bool:
        return self.adapters.names == (None,)

    @cached_property
    def by_column(self) -> bool:
        """Whether a row changes over from one adapter to another."""
        return any(len(row) > 1 for row in self.spans)

    def take(self, rows: Sequence[int]) -> "Batch":
        """The batch of these rows, in this order."""
        spans = tuple(self.spans[row] for row in rows)
        starts = tuple(self.starts[row] for row in rows)
        return Batch(self.adapters, spans, starts)

    def repeat(self, times: int) -> "Batch":
        """The batch with every row `times` times, as beams and returned sequences are laid."""
        if times == 1:
            return self
        return self.take([row for row in range(len(self.spans)) for _ in range(times)])

    def call(self, rows: int, columns: int, first: int) -> Call:
        """The forward of columns `first` to `first + columns` of all rows.

        Raises ShapeError where the rows are not the batch's.
        """
        if rows != len(self.spans):
            raise ShapeError(f"adapter_names has {len(self.spans)} entries, the batch {rows} rows")
        last = all(first - start >= sum(n for _, n in row[:-1]) for row, start in self._positions())
        key = columns, -1 if last else first
        if key not in self._calls:
            if last:
                units = tuple(row[-1][0] for row in self.spans)
            else:
                units = tuple(
                    _group_at(row, column - start)
                    for row, start in self._positions()
                    for column in range(first, first + columns)
                )
            self._calls[key] = Call(self.adapters, rows, columns, units)
        return self._calls[key]

    def _positions(self) -> Iterator[tuple[tuple[tuple[int, int], ...], int]]:
        return zip(self.spans, self.starts, strict=True)


class Generation:
    """The batches of a `generate` that runs.

    encoder: of what `generate` calls itself, as it does with an encoder.
    steps:   of a step of the decoder, where rows are repeated for their beams.
    whole:   of an encoder-decoder model's forward from its input on, which is no step.
    """

    def __init__(self, batch: Batch) -> None:
        self.encoder = self.steps = self.whole = batch


def make_batch(
    adapters: Sequence[RowAdapter],
    known: Callable[[str], bool],
    lookup: Callable[[str, tuple[str | None, ...]], BatchFactors | None],
    attention_mask: Tensor | None = None,
    columns: int | None = None,
) -> Batch:
    """Sort the rows' adapters into groups.

    adapters:       one entry a row.
    known:          whether there is an adapter of a name.
    attention_mask: `[rows, columns]`, from which spans learn where a row's own tokens begin.
    columns:        how many there are, where that is known; spans without a mask may fill them.

    Raises UnknownAdapterError, and ShapeError for spans that hold more tokens than their row.
    """
    groups: dict[str | None, int] = {}
    spans = []
    for entry in adapters:
        named = [(entry, 0)] if entry is None or isinstance(entry, str) else list(entry)
        if not named or any(tokens < 0 for _, tokens in named):
            raise ShapeError(f"a row's spans are (name, tokens), one at least; got {entry!r}")
        for name, _ in named:
            if name not in (None, BASE) and not known(name):
                raise UnknownAdapterError(f"there is no adapter {name!r} on this model")
        spans.append(
            tuple(
                (groups.setdefault(None if name == BASE else name, len(groups)), tokens)
                for name, tokens in named
            )
        )
    starts = [0] * len(spans)
    if any(len(row) > 1 for row in spans):
        lengths = [columns] * len(spans)
        if attention_mask is not None:
            if attention_mask.ndim != 2 or attention_mask.shape[0] != len(spans):
                raise ShapeError(f"spans need an attention_mask of {len(spans)} rows")
            starts = attention_mask.bool().int().argmax(dim=1).tolist()
            lengths = attention_mask.bool().sum(dim=1).tolist()
        for row, length in zip(spans, lengths, strict=True):
            if length is not None and len(row) > 1 and sum(n for _, n in row) > length:
                raise ShapeError(f"a row's spans hold more tokens than its {length}")
    return Batch(BatchAdapters(tuple(groups), lookup), tuple(spans), tuple(starts))


def _group_at(row: tuple[tuple[int, int], ...], position: int) -> int:
    """The group of a row's token; padding in front goes with the first span."""
    for group, tokens in row[:-1]:
        if position < tokens:
            return group
        position -= tokens
    return row[-1][0]
