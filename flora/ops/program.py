"""A layer in one batch as a program, which runs without Python.

Python takes tens of microseconds around each product, as the last one has swept it from the caches:
in decoding as long as a layer of a small model itself.
"""

from collections.abc import Callable
from ctypes import Structure, addressof, c_bool, c_char_p, c_int64, c_void_p
from functools import partial
from typing import ClassVar, cast
from weakref import finalize

import torch
import torch.nn.functional as F
from torch import Tensor

from flora.ops.cpu_kernels import Job, JobFields
from flora.ops.factors import BaseProduct, WeightProduct
from flora.ops.table import Table


class Batch(Structure):
    """`Batch` in kernels/program.h."""

    _fields_: ClassVar = [
        *((name, c_void_p) for name in ("rows", "segments")),
        *((name, c_int64) for name in ("S", "N", "copies", "modulated")),
        *((name, c_int64) for name in ("scaled", "in_order", "adds")),
    ]

    @classmethod
    def of(cls, table: Table, tokens: int) -> "Batch":
        """Rows of so many tokens each; whoever has it keeps the table."""
        segments = table.segments
        return cls(
            rows=table.rows.data_ptr(),
            segments=None if segments is None else segments.data_ptr(),
            S=len(table.rows),
            N=tokens,
            copies=len(table.copies),
            modulated=0 if segments is None else len(segments),
            scaled=table.scaled,
            in_order=table.in_order,
            adds=table.adds,
        )


class Part(Structure):
    """`Part` in kernels/program.h."""

    _fields_: ClassVar = [
        ("job", JobFields),
        *((name, c_void_p) for name in ("product", "weight", "bias")),
        *((name, c_int64) for name in ("offset", "in_neutral", "out_neutral", "batch")),
    ]


class Laid(Structure):
    """`Laid` in kernels/program.h."""

    _fields_: ClassVar = [(name, c_void_p) for name in ("parts", "batches", "shared")]


class Layer(Structure):
    """`Layer` in kernels/program.h."""

    _fields_: ClassVar = [
        *((name, c_void_p) for name in ("step", "product")),
        *((name, c_int64) for name in ("number", "first", "count", "out")),
        *((name, c_char_p) for name in ("python", "name")),
    ]


class Product:
    """A layer's product that programs can take; as a function it is `product`.

    weight: W0, `[out, in]`, or what the operator takes.
    name:   of the operator that computes it, which writes to its first argument: (to, x, bias,
            weight), or where W0 is `packed` (to, x, weight, bias, True). Without one torch does.
    """

    def __init__(
        self, product: BaseProduct, weight: Tensor, name: str = "", *, packed: bool = False
    ) -> None:
        self.product = product
        self.at: int = torch.ops.flora.make_product(name, packed, weight)
        # At the end of the process torch may be gone before.
        finalize(self, torch.ops.flora.drop_product, self.at).atexit = False

    def __call__(self, x: Tensor, /) -> Tensor:
        return self.product(x)


def known_product(base: BaseProduct) -> Product | None:
    """A product as programs take it; None for one that only Python can take."""
    if isinstance(base, WeightProduct):
        if base.known is None:
            base.known = Product(partial(F.linear, weight=base.weight), base.weight)
        return cast("Product", base.known)
    return base if isinstance(base, Product) else None


class Program:
    """A layer in one batch without gradients: `[..., in]` to `[..., out]`, of as many tokens.

    product: for the copies that go through W0 as it is.
    weight:  W0, `[out, in]`, where it is modulated for others.
    """

    def __init__(self, job: Job, product: Product, weight: Tensor | None) -> None:
        in_neutral, out_neutral = job.pools.neutral
        part = Part(
            job=job.fields,
            weight=None if weight is None else weight.data_ptr(),
            bias=job.bias_at,
            in_neutral=in_neutral,
            out_neutral=out_neutral,
        )
        batch, shared = Batch.of(job.table, job.x_shape[1]), c_bool(True)
        step = Laid(parts=addressof(part), batches=addressof(batch), shared=addressof(shared))
        layer = Layer(product=product.at, count=1, out=job.out_features)
        self._kept = job, product, weight, part, batch, shared, step, layer
        self._layer_at, self._step_at = addressof(layer), addressof(step)

    def __call__(self, x: Tensor) -> Tensor:
        """Raises ValueError for x of another type, or of other tokens."""
        return run_program(self._layer_at, self._step_at, x)


run_program: Callable[[int, int, Tensor], Tensor] = torch.ops.flora.run_program.default
"""(address of a `Layer`, of a `Laid`, x) -> y. Raises ValueError for x of other types or sizes."""
