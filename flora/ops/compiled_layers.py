"""A model's layers in compiled code, with adapters that are laid for all of them at once.

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

from flora.ops.costs import costs_for
from flora.ops.cpu_kernels import DTYPES, POOLS
from flora.ops.factors import LayersPages
from flora.ops.plan import make_plan
from flora.ops.program import Batch, Laid, Layer, Part, Product
from flora.ops.table import Table, make_table


class Slice(NamedTuple):
    """A compiled layer, or one of those that are merged in it, as adapters know it.

    name:    by which pages are laid.
    product: its own, where it is merged and has one.
    bias, weight: its own; W0 where it can be read.
    """

    name: str
    in_features: int
    out_features: int
    product: Product | None
    bias: Tensor | None
    weight: Tensor | None


class Running:
    """The step that some of a model's layers run; at first one without adapters."""

    def __init__(self) -> None:
        self._at = c_void_p()
        self.at = addressof(self._at)

    def set(self, step: "LaidStep | None") -> None:
        """Whoever sets it keeps it; None is one without adapters."""
        self._at.value = None if step is None else step.at


class CompiledLayer:
    """A layer as compiled code has it, which finds it by its `handle`.

    running: what is set for each step.
    product: of the layer as a whole.
    slices:  what it consists of, in the order of their outputs.
    dtype:   of x, W0 and what is added.
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
        self.slices, self.dtype = slices, dtype
        self.out_features = sum(own.out_features for own in slices)
        self._kept = running, product
        self.fields = Layer(
            step=running.at,
            product=product.at,
            out=self.out_features,
            python=python.encode(),
            name=name.encode(),
        )
        self.handle = torch.tensor(addressof(self.fields))

    def lay(self, number: int, parts: np.ndarray) -> None:
        """Have its own of a model's parts."""
        ends = accumulate(own.out_features for own in self.slices)
        for part, own, end in zip(parts, self.slices, ends, strict=True):
            job = part["job"]
            job["I"], job["O"] = own.in_features, own.out_features
            job["dtype"] = DTYPES.index(self.dtype)
            part["product"] = 0 if own.product is None else own.product.at
            part["bias"] = 0 if own.bias is None else own.bias.data_ptr()
            part["first"] = (end - own.out_features) * self.dtype.itemsize
        self.number = self.fields.number = number
        self.fields.parts, self.fields.count = parts.ctypes.data, len(parts)

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


class LaidStep:
    """A step's rows in all of a model's compiled layers.

    modulated: of each layer, by its number, whether W0 is modulated in it, which Python does.
    """

    def __init__(self, tables: Sequence[Table], shared: np.ndarray, modulated: np.ndarray) -> None:
        batches = (Batch * len(tables))(*(Batch.of(table, 1) for table in tables))
        self._own = Laid(batches=addressof(batches), shared=shared.ctypes.data)
        self._kept, self.modulated = (tables, batches, shared), modulated
        self.at = addressof(self._own)


class _Sizes(NamedTuple):
    """The pages that each group has in some layers of one shape, and one of their W0."""

    hadamard: tuple[int, ...]
    low_rank: tuple[int, ...]
    biases: tuple[int, ...]
    weight: Tensor | None

    def table(self, rows: tuple[int, ...], backend: str) -> Table:
        pairs, ranks, biased = self.hadamard, self.low_rank, tuple(map(bool, self.biases))
        costs = costs_for(rows, pairs, tokens=1, weight=self.weight, backend=backend, grad=False)
        has_weight = self.weight is not None
        plan = make_plan(
            rows, pairs, ranks, biased, tokens=1, has_weight=has_weight, grad=False, costs=costs
        )
        return make_table(plan, pairs, ranks, biased, torch.device("cpu"))


class CompiledLayers:
    """A model's, for which adapters and steps are laid; a layer's number is its place among them.

    backend: whose costs plans go by.
    """

    def __init__(self, layers: Sequence[CompiledLayer], backend: str) -> None:
        self.backend = backend
        self._slices = [own for layer in layers for own in layer.slices]
        self._places = {own.name: place for place, own in enumerate(self._slices)}
        counts = np.array([len(layer.slices) for layer in layers])
        self._layers, self._firsts = (
            np.repeat(np.arange(len(layers)), counts),
            counts.cumsum() - counts,
        )
        self._alone = counts == 1
        shapes = [None if own.weight is None else own.weight.shape for own in self._slices]
        self._shapes = np.array([[shapes.index(shape)] for shape in shapes])
        self._parts = np.zeros(len(self._slices), dtype=np.dtype(Part))
        own = np.split(self._parts, self._firsts[1:])
        for number, (layer, parts) in enumerate(zip(layers, own, strict=True)):
            layer.lay(number, parts)
        self._laid: Sequence[LayersPages] = ()
        self._sizes: list[_Sizes] = []

    def lay(self, laid: Sequence[LayersPages], groups: int) -> None:
        """Take the adapters of so many groups; no step that was laid before may run any more.

        laid: their pages, kept until other ones are laid.
        """
        self._laid, jobs = laid, self._parts["job"]
        for name in (name for pools in POOLS.values() for name in pools):
            jobs[name] = 0
        self._parts["in_neutral"] = self._parts["out_neutral"] = True
        sizes = {family: np.zeros((len(self._slices), groups), dtype=int) for family in POOLS}
        for own in laid:
            known = [(self._places[n], k) for n, k in own.numbers.items() if n in self._places]
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
                self._parts["in_neutral"][place] = neutral[:, 0]
                self._parts["out_neutral"][place] = neutral[:, 1]
        keys = np.concatenate([*sizes.values(), self._shapes], axis=1)
        found: dict[bytes, int] = {}
        self._parts["batch"] = [found.setdefault(key.tobytes(), len(found)) for key in keys]
        _, examples = np.unique(self._parts["batch"], return_index=True)
        self._sizes = [
            _Sizes(
                **{family: tuple(own[place].tolist()) for family, own in sizes.items()},
                weight=self._slices[place].weight,
            )
            for place in examples.tolist()
        ]
        pairs = sizes["hadamard"]
        same = (pairs == pairs[self._firsts][self._layers]).all(axis=1)
        self._alike = np.logical_and.reduceat(same, self._firsts)

    def forget(self) -> None:
        """Give back what was laid: no step of it may run any more."""
        self._laid = ()

    def step(self, rows: tuple[int, ...], same_input: Sequence[bool]) -> LaidStep:
        """A step of one token a row, of the groups that were laid.

        rows:       the group of each.
        same_input: of each layer whether each group of the step has one b for all slices.
        """
        tables = [own.table(rows, self.backend) for own in self._sizes]
        modulated = np.array([table.segments is not None for table in tables])[self._parts["batch"]]
        shared = self._alone | (self._alike & np.array(same_input))
        return LaidStep(tables, shared, np.logical_or.reduceat(modulated, self._firsts))
