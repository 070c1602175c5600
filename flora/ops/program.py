"""A layer in one batch as a program, which runs without Python.

Python takes tens of microseconds around each product, as the last one has swept it from the caches:
in decoding as long as a layer of a small model itself.
"""

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
        ("rows", c_void_p),
        *((name, c_int64) for name in ("S", "N", "copies")),
        *((name, c_int64) for name in ("scaled", "in_order", "adds", "modulated")),
    ]

    @classmethod
    def of(cls, table: Table, tokens: int) -> "Batch":
        """Rows of so many tokens each; whoever has it keeps the table."""
        return cls(
            rows=table.rows.data_ptr(),
            S=len(table.rows),
            N=tokens,
            copies=len(table.copies) * tokens,
            scaled=table.scaled,
            in_order=table.in_order,
            adds=table.adds,
            modulated=table.segments is not None,
        )


class Part(Structure):
    """`Part` in kernels/program.h."""

    _fields_: ClassVar = [
        ("job", JobFields),
        *((name, c_void_p) for name in ("product", "bias")),
        *((name, c_int64) for name in ("first", "in_neutral", "out_neutral", "batch")),
    ]


class Laid(Structure):
    """`Laid` in kernels/program.h."""

    _fields_: ClassVar = [("batches", c_void_p), ("shared", c_void_p)]


class Layer(Structure):
    """`Layer` in kernels/program.h."""

    _fields_: ClassVar = [
        ("step", c_void_p),
        ("number", c_int64),
        *((name, c_void_p) for name in ("product", "parts")),
        *((name, c_int64) for name in ("count", "out")),
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
    """A layer in one batch without gradients: `[..., in]` to `[..., out]`, of as many tokens."""

    def __init__(self, job: Job, product: Product) -> None:
        in_neutral, out_neutral = job.pools.neutral
        part = Part(
            job=job.fields, bias=job.bias_at, in_neutral=in_neutral, out_neutral=out_neutral
        )
        batch, shared = Batch.of(job.table, job.x_shape[1]), c_bool(True)
        step = Laid(batches=addressof(batch), shared=addressof(shared))
        layer = Layer(product=product.at, parts=addressof(part), count=1, out=job.out_features)
        self._kept = job, product, part, batch, shared, step, layer
        self._layer_at, self._step_at = addressof(layer), addressof(step)

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = _run_program(self._layer_at, self._step_at, x)
        return y


_run_program = torch.ops.flora.run_program.default
