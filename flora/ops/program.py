"""Layers in one batch as programs, which run without Python.

Python takes tens of microseconds around each product, as the last one has swept it from the caches:
in decoding as long as a layer of a small model itself.
"""

from collections.abc import Sequence
from ctypes import Structure, addressof, c_char_p, c_int64, c_void_p
from functools import partial
from typing import ClassVar, cast
from weakref import finalize

import torch
import torch.nn.functional as F
from torch import Tensor

import flora.ops.cpu_kernels  # noqa: F401 (it loads the operators)
from flora.ops import Linear
from flora.ops.factors import BaseProduct, WeightProduct


class Part(Structure):
    """`Part` in kernels/program.h."""

    _fields_: ClassVar = [
        *((name, c_void_p) for name in ("job", "product", "bias")),
        *((name, c_int64) for name in ("copies", "expands", "first")),
    ]


class _Program(Structure):
    """`Program` in kernels/program.h."""

    _fields_: ClassVar = [
        *((name, c_void_p) for name in ("job", "product")),
        *((name, c_int64) for name in ("out_features", "copies", "expands", "in_place")),
        *((name, c_int64) for name in ("untouched", "count")),
        ("parts", c_void_p),
    ]


class _Layer(Structure):
    """`Layer` in kernels/program.h."""

    _fields_: ClassVar = [
        ("programs", c_void_p),
        ("number", c_int64),
        ("product", c_void_p),
        ("python", c_char_p),
        ("name", c_char_p),
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

    kept: all that it reads by address.
    """

    def __init__(self, parts: Sequence[Part], kept: object, **own: int | None) -> None:
        laid = (Part * len(parts))(*parts)
        self._own = _Program(count=len(parts), parts=addressof(laid), **own)
        self._kept = laid, kept
        self.at = addressof(self._own)

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = _run_program(self.at, x)
        return y


_run_program = torch.ops.flora.run_program.default
_UNTOUCHED = Program([], None, untouched=True)


class Programs:
    """Those of a model's layers in one batch, by the layers' numbers; none at first."""

    def __init__(self, count: int) -> None:
        self._laid = (c_void_p * count)()
        self._kept: dict[int, Program | None] = {}
        self.at = addressof(self._laid)

    def put(self, number: int, linear: Linear | None) -> bool:
        """That of a prepared layer, if it has one; None is a layer that no adapter touches."""
        known = _UNTOUCHED if linear is None else linear
        program = known if isinstance(known, Program) else None
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
        self._own = _Layer(running.at, number, product.at, python.encode(), name.encode())
        self.handle = torch.tensor(addressof(self._own))
        self.out_features = out_features

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """y; a program has the bias that it was prepared with."""
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
