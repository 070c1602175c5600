"""A model's layers that run without Python, with adapters that are laid for all of them at once.

Requests come and go at each step of a server. What a batch's adapters are to a layer is then found
without asking layer after layer: where their pages lie is an array over all layers, and rows are
the same for all layers in which the adapters have as many pages.
"""

from collections.abc import Sequence
from ctypes import addressof, c_void_p
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flora.ops import Linear
from flora.ops.costs import costs_for
from flora.ops.cpu_kernels import DTYPES, POOLS
from flora.ops.factors import LayersPages
from flora.ops.plan import make_plan
from flora.ops.program import Batch, Laid, Layer, Part, Product, run_program
from flora.ops.table import Table, make_table


class Slice(NamedTuple):
    """A layer, or one of those that are merged in it, as adapters know it.

    name:    by which pages are laid.
    product: its own, where it is merged and has one.
    bias, weight: its own, contiguous and in the layer's type; W0 where it can be read.
    """

    name: str
    in_features: int
    out_features: int
    product: Product | None
    bias: Tensor | None
    weight: Tensor | None


class ModelLayer:
    """A layer of those that adapters are laid for together.

    product: of the layer as a whole.
    slices:  what it consists of, in the order of their outputs.
    dtype:   of x, W0 and what is added.
    """

    def __init__(self, product: Product, slices: Sequence[Slice], dtype: torch.dtype) -> None:
        self.product, self.slices, self.dtype = product, slices, dtype
        self.out_features = sum(own.out_features for own in slices)
        self.fields = Layer(product=product.at, out=self.out_features)

    def place(self, number: int, first: int, parts: np.ndarray) -> None:
        """Have its number and its own of a model's parts, of which one is the first."""
        ends = accumulate(own.out_features for own in self.slices)
        for part, own, end in zip(parts, self.slices, ends, strict=True):
            job = part["job"]
            job["I"], job["O"] = own.in_features, own.out_features
            job["dtype"] = DTYPES.index(self.dtype)
            part["product"] = 0 if own.product is None else own.product.at
            part["weight"] = 0 if own.weight is None else own.weight.data_ptr()
            part["bias"] = 0 if own.bias is None else own.bias.data_ptr()
            part["offset"] = (end - own.out_features) * self.dtype.itemsize
        self.number = self.fields.number = number
        self.fields.first, self.fields.count = first, len(parts)

    def on(self, step: "LaidStep") -> Linear:
        """The layer on a step's rows: x to y, `[..., out]`, for as long as layer and step live.

        x: `[..., in]`, contiguous or not, in the layer's type; its tokens in the order of the rows.
        It raises ValueError for another type, or for other tokens.
        """
        return partial(run_program, addressof(self.fields), step.at)


class Running:
    """The step that compiled code runs of some layers; at first one without adapters."""

    def __init__(self) -> None:
        self._at = c_void_p()
        self.at = addressof(self._at)

    def set(self, step: "LaidStep | None") -> None:
        """Whoever sets it keeps it; None is one without adapters."""
        self._at.value = None if step is None else step.at


class CompiledLayer(ModelLayer):
    """A layer as compiled code has it, which finds it by its `handle`.

    running: what is set for each step.
    python:  the operator (x, bias, name, out_features) that is called for what no program does.
    """

    def __init__(
        self,
        running: Running,
        product: Product,
        slices: Sequence[Slice],
        dtype: torch.dtype,
        python: str,
        name: str,
    ) -> None:
        super().__init__(product, slices, dtype)
        self._running = running
        self.fields.step = running.at
        self.fields.python, self.fields.name = python.encode(), name.encode()
        self.handle = torch.tensor(addressof(self.fields))

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """y; a step with adapters has the biases of the slices."""
        y: Tensor = torch.ops.flora.cpu_linear(x, bias, self.handle, self.out_features)
        return y


@partial(torch.library.register_fake, "flora::cpu_linear")
def _cpu_linear_shape(
    x: Tensor,
    bias: Tensor | None,  # noqa: ARG001
    layer: Tensor,  # noqa: ARG001
    out_features: int,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


class ModelLayers:
    """Those of a model that adapters are laid for; a layer's number is its place among them.

    backend:   whose costs plans go by.
    slices:    of all layers, one layer's behind the other's.
    places:    of the slices by their names.
    firsts:    of each layer the place of its first slice.
    of_slices: of each slice the number of its layer.
    alone:     of each layer whether it has one slice.
    shapes:    of each slice a number that it has in common with those whose W0 have the same shape.
    parts:     the slices as programs read them, without adapters.
    """

    def __init__(self, layers: Sequence[ModelLayer], backend: str) -> None:
        self.layers, self.backend = layers, backend
        self.slices = [own for layer in layers for own in layer.slices]
        self.places = {own.name: place for place, own in enumerate(self.slices)}
        counts = np.array([len(layer.slices) for layer in layers])
        self.firsts = counts.cumsum() - counts
        self.of_slices = np.repeat(np.arange(len(layers)), counts)
        self.alone = counts == 1
        shapes = [None if own.weight is None else own.weight.shape for own in self.slices]
        self.shapes = np.array([[shapes.index(shape)] for shape in shapes])
        self.parts = np.zeros(len(self.slices), dtype=np.dtype(Part))
        self.parts["in_neutral"] = self.parts["out_neutral"] = True
        own = np.split(self.parts, self.firsts[1:])
        for number, (layer, parts) in enumerate(zip(layers, own, strict=True)):
            layer.place(number, int(self.firsts[number]), parts)

    def lay(self, pages: Sequence[LayersPages], groups: int) -> "LaidAdapters":
        """The adapters of so many groups, by their pages in the model's layers."""
        return LaidAdapters(self, pages, groups)


class LaidAdapters:
    """The adapters of a batch's groups in all of a model's layers.

    layers:  the model's.
    pages:   the groups' in these, kept as long as this is.
    groups:  how many there are.
    touched: of each layer, by its number, whether adapters have pages in it.
    """

    def __init__(self, layers: ModelLayers, pages: Sequence[LayersPages], groups: int) -> None:
        self._layers, self._kept = layers, pages
        self.parts = parts = layers.parts.copy()
        jobs = parts["job"]
        sizes = {family: np.zeros((len(parts), groups), dtype=int) for family in POOLS}
        for own in pages:
            known = [(layers.places[n], k) for n, k in own.numbers.items() if n in layers.places]
            place, number = np.array(known, dtype=int).reshape(-1, 2).T
            sizes[own.family][place] = own.sizes[number]
            starts, ends = own.ends[number], own.ends[number + 1]
            for side, name in enumerate(POOLS[own.family]):
                jobs[name]["pages"][place] = own.pools[side].data_ptr()
                jobs[name]["index"][place] = own.index.data_ptr() + starts * own.index.itemsize
                jobs[name]["count"][place] = ends - starts
                if own.centers is not None:
                    jobs[name]["centers"][place] = own.centers[side].data_ptr()
            if own.family == "hadamard":
                neutral = own.neutral[number]
                parts["in_neutral"][place] = neutral[:, 0]
                parts["out_neutral"][place] = neutral[:, 1]
        all_sizes = np.concatenate([*sizes.values()], axis=1)
        found: dict[bytes, int] = {}
        keys = np.concatenate([all_sizes, layers.shapes], axis=1)
        parts["batch"] = [found.setdefault(key.tobytes(), len(found)) for key in keys]
        _, examples = np.unique(parts["batch"], return_index=True)
        self._sizes = [
            _Sizes(
                **{family: tuple(own[place].tolist()) for family, own in sizes.items()},
                weight=layers.slices[place].weight,
            )
            for place in examples.tolist()
        ]
        pairs = sizes["hadamard"]
        alike = (pairs == pairs[layers.firsts][layers.of_slices]).all(axis=1)
        self._alike = np.logical_and.reduceat(alike, layers.firsts)
        self.touched = np.logical_or.reduceat(all_sizes.any(axis=1), layers.firsts)

    def step(
        self, rows: tuple[int, ...], tokens: int = 1, same_input: Sequence[bool] | bool = False
    ) -> "LaidStep":
        """A step of theirs.

        rows:       the group of each.
        tokens:     of each row.
        same_input: of each layer whether each group of the step has one b for all slices.
        """
        tables = [own.table(rows, tokens, self._layers.backend) for own in self._sizes]
        modulated = np.array([table.segments is not None for table in tables])
        unlike = np.logical_or.reduceat(modulated[self.parts["batch"]], self._layers.firsts)
        shared = self._layers.alone | (self._alike & np.array(same_input) & ~unlike)
        return LaidStep(self, tables, tokens, shared)


class LaidStep:
    """A step's rows in all of a model's layers.

    tables: for each number that parts have in `batch`.
    shared: of each layer whether its slices have the same copies, and none a W0 of its own.
    """

    def __init__(
        self, adapters: LaidAdapters, tables: Sequence[Table], tokens: int, shared: np.ndarray
    ) -> None:
        batches = (Batch * len(tables))(*(Batch.of(table, tokens) for table in tables))
        self._own = Laid(
            parts=adapters.parts.ctypes.data,
            batches=addressof(batches),
            shared=shared.ctypes.data,
        )
        self._kept = adapters, tables, batches, shared
        self.at = addressof(self._own)


class _Sizes(NamedTuple):
    """The pages that each group has in some layers of one shape, and one of their W0."""

    hadamard: tuple[int, ...]
    low_rank: tuple[int, ...]
    biases: tuple[int, ...]
    weight: Tensor | None

    def table(self, rows: tuple[int, ...], tokens: int, backend: str) -> Table:
        pairs, ranks, biased = self.hadamard, self.low_rank, tuple(map(bool, self.biases))
        has_weight, weight = self.weight is not None, self.weight
        costs = costs_for(rows, pairs, tokens=tokens, weight=weight, backend=backend, grad=False)
        plan = make_plan(
            rows,
            pairs,
            ranks,
            biased,
            tokens=tokens,
            has_weight=has_weight,
            grad=False,
            costs=costs,
        )
        return make_table(plan, pairs, ranks, biased, torch.device("cpu"))
