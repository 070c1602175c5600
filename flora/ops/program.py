"""Layers in one batch as programs, which compiled code runs without Python.

`cpu.py` does the same in Python, which alone takes tens of microseconds a layer: as long as a layer
of a small model itself.
"""

from ctypes import Structure, addressof, c_char_p, c_int64, c_void_p
from functools import partial
from itertools import cycle
from math import prod
from typing import ClassVar
from weakref import finalize

import torch
from torch import Tensor

from flora.ops import Linear
from flora.ops.cpu import MergedLinear, PreparedLinear
from flora.ops.factors import BaseProduct


class _Part(Structure):
    """`Part` in cpu.cpp."""

    _fields_: ClassVar = [
        *((name, c_void_p) for name in ("job", "product", "bias")),
        *((name, c_int64) for name in ("copies", "expands", "first")),
    ]


class _Program(Structure):
    """`Program` in cpu.cpp."""

    _fields_: ClassVar = [
        ("job", c_void_p),
        *((name, c_int64) for name in ("out_features", "copies", "expands", "whole", "in_place")),
        *((name, c_int64) for name in ("untouched", "count")),
        ("parts", c_void_p),
    ]


class _Layer(Structure):
    """`Layer` in cpu.cpp."""

    _fields_: ClassVar = [
        ("programs", c_void_p),
        ("number", c_int64),
        ("product", c_void_p),
        ("python", c_char_p),
    ]


class Product:
    """A layer's product that programs can take; as a function it is `product`.

    name:   of the operator that computes it, which writes to its first argument: (to, x, bias,
            weight), or where W0 is `packed` (to, x, weight, bias, True).
    weight: W0 as that takes it.
    """

    def __init__(self, product: BaseProduct, name: str, weight: Tensor, *, packed: bool) -> None:
        self.product = product
        self.at: int = torch.ops.flora.make_product(name, packed, weight)
        # At the end of the process torch may be gone before.
        finalize(self, torch.ops.flora.drop_product, self.at).atexit = False

    def __call__(self, x: Tensor, /) -> Tensor:
        return self.product(x)


class Program:
    """A layer in one batch; it keeps all that kernels read."""

    def __init__(self, own: _Program, *kept: object) -> None:
        self._own, self._kept = own, kept
        self.at = addressof(own)


_UNTOUCHED = Program(_Program(untouched=True))


def make_program(linear: Linear) -> Program | None:
    """That of a prepared layer, for its tokens as `[tokens, in]` with a `Product`.

    None where only Python can run it: another backend's, one that modulates W0, or another product.
    """
    if isinstance(linear, PreparedLinear):
        layers, whole = [linear], True
        parts = [(linear, linear.job_at, linear.bias_at, 0)] if linear.contracts else []
    elif isinstance(linear, MergedLinear):
        layers, parts, whole = linear.layers, linear.parts, linear.whole
    else:
        return None
    bases = [linear.base] if whole else [layer.base for layer, *_ in parts]
    products = [base.at for base in bases if isinstance(base, Product)]
    if any(layer.segments for layer in layers) or len(products) < len(bases):
        return None
    first = layers[0]
    laid = (_Part * len(parts))(
        *(
            _Part(
                job=job_at,
                product=product,
                bias=bias_at,
                copies=prod(layer.copies_shape[:2]),
                expands=layer.expands,
                first=place,
            )
            for (layer, job_at, bias_at, place), product in zip(parts, cycle(products))
        )
    )
    own = _Program(
        job=first.job_at,
        out_features=linear.y_shape[2],
        copies=prod(first.copies_shape[:2]),
        expands=first.expands,
        whole=whole,
        in_place=linear.in_place,
        count=len(parts),
        parts=addressof(laid),
    )
    return Program(own, laid, linear)


class Programs:
    """Those of a model's layers in one batch, by the layers' numbers; none at first."""

    def __init__(self, count: int) -> None:
        self._laid = (c_void_p * count)()
        self._kept: dict[int, Program | None] = {}
        self.at = addressof(self._laid)

    def put(self, number: int, linear: Linear | None) -> bool:
        """That of a prepared layer, if it has one; None is a layer that no adapter touches."""
        program = _UNTOUCHED if linear is None else make_program(linear)
        self._kept[number], self._laid[number] = program, program.at if program else None
        return program is not None


class Running:
    """The programs that a model's layers run; at first those of a batch without adapters."""

    def __init__(self) -> None:
        self._at = c_void_p()
        self.at = addressof(self._at)

    def set(self, programs: Programs | None) -> None:
        """Whoever sets them keeps them; None is a batch without adapters."""
        self._at.value = None if programs is None else programs.at


class CompiledLayer:
    """A layer as compiled code has it, which finds it by its `handle`.

    running: what is set for each batch.
    number:  the layer's own among its programs.
    python:  the operator (x, bias, name, out_features) that is called where it has none.
    """

    def __init__(
        self,
        running: Running,
        number: int,
        product: Product,
        python: str,
        name: str,
        out_features: int,
    ) -> None:
        self._kept, self.number = (running, product), number
        self._own = _Layer(running.at, number, product.at, python.encode())
        self.handle = torch.tensor(addressof(self._own))
        self.name, self.out_features = name, out_features

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """y; a program has the bias that it was prepared with."""
        y: Tensor = torch.ops.flora.cpu_linear(x, bias, self.handle, self.name, self.out_features)
        return y


@partial(torch.library.register_fake, "flora::cpu_linear")
def _cpu_linear_shape(
    x: Tensor,
    bias: Tensor | None,  # noqa: ARG001
    layer: Tensor,  # noqa: ARG001
    name: str,  # noqa: ARG001
    out_features: int,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)
