"""The operator in C++ for CPUs: what it adds to the base's product, in as few passes as there are.

For fp32 and 16 bits without gradients; with gradients and in fp64 the operator is `eager`'s.
"""

from ctypes import Structure, addressof, c_int64, c_void_p
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from flora.errors import ShapeError
from flora.ops import Linear, Operands, eager
from flora.ops.build import load_kernels
from flora.ops.table import make_table

_kernels = load_kernels()
expand, contract, modulate = _kernels.expand, _kernels.contract, _kernels.modulate

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

KEPT_COPIES = 65536
"""Up to so many numbers, as a step of decoding has, a layer keeps the memory of its copies."""


def prepare(x_SNI: Tensor, operands: Operands) -> Linear:
    """See `adapted_linear`. Sums are taken in fp32 and rounded once at the end."""
    dtype, weight = x_SNI.dtype, operands.weight
    mixed = weight is not None and weight.dtype != dtype
    nothing = operands.factors.out_features is None
    if operands.plan.grad or mixed or nothing or dtype not in DTYPES:
        return eager.prepare(x_SNI, operands)
    return PreparedLinear(x_SNI, operands)


class _Job(Structure):
    """`Job` in cpu.cpp."""

    _fields_: ClassVar = [
        *((name, c_void_p) for name in ("rows", "in_pages", "out_pages", "down", "up", "biases")),
        *((name, c_int64) for name in ("S", "N", "I", "O", "dtype")),
    ]


class PreparedLinear:
    """A layer in one batch, and the memory that the kernels are given the addresses of.

    The kernels trust what they are told: sizes are checked, and tensors made contiguous, here.
    """

    def __init__(self, x_SNI: Tensor, operands: Operands) -> None:
        factors, weight_OI, bias_O = operands.factors, operands.weight, operands.bias
        dtype, (S, N, I), O = x_SNI.dtype, x_SNI.shape, factors.out_features or 0  # noqa: E741
        table = make_table(
            operands.plan, factors.pairs, factors.ranks, factors.biased, x_SNI.device
        )
        T = len(table.copies)
        parts = {
            "in_pages": (factors.hadamard_in, torch.float32),
            "out_pages": (factors.hadamard_out, torch.float32),
            "down": (factors.down, dtype),
            "up": (factors.up, dtype),
            "biases": (factors.bias, dtype),
        }
        self.tensors = {"rows": table.rows} | {
            name: part.to(kind).contiguous()
            for name, (part, kind) in parts.items()
            if part is not None
        }
        addresses = {name: tensor.data_ptr() for name, tensor in self.tensors.items()}
        self.job = _Job(**addresses, S=S, N=N, I=I, O=O, dtype=DTYPES.index(dtype))
        self.job_at = addressof(self.job)
        self.bias = None if bias_O is None else bias_O.to(dtype).contiguous()
        self.bias_at = 0 if self.bias is None else self.bias.data_ptr()
        self.segments: list[list[int]] = []
        if table.segments is not None:
            self.segments = table.segments.tolist()
        self.scaled = table.scaled
        self.copies_shape, self.product_shape = (T, N, I), (T, N, O)
        self.y_shape = S, N, O
        self.kept: tuple[Tensor, int] | None = None
        if T * N * I <= KEPT_COPIES:
            kept = x_SNI.new_empty(self.copies_shape)
            self.kept = kept, kept.data_ptr()
        self.base = operands.base
        self.weight = (
            weight_OI.contiguous() if weight_OI is not None and self.segments else weight_OI
        )
        # What a black box returns may be its own.
        self.in_place = table.in_order and weight_OI is not None

    def __call__(self, x_SNI: Tensor) -> Tensor:
        """y, `[S, N, out]`.

        A step of decoding comes here some hundred times, and feels each call that is made here.
        """
        x_SNI = copies_TNI = x_SNI.contiguous()
        x_at = x_SNI.data_ptr()
        if self.scaled:
            if self.kept is not None:
                copies_TNI, copies_at = self.kept
            else:
                copies_TNI = x_SNI.new_empty(self.copies_shape)
                copies_at = copies_TNI.data_ptr()
            expand(self.job_at, x_at, copies_at)
        if self.weight is not None and not self.segments:
            y_SNO = product_TNO = F.linear(copies_TNI, self.weight)
        else:
            y_SNO = product_TNO = self._product(copies_TNI)
        product_at = y_at = product_TNO.data_ptr()
        if not self.in_place:
            y_SNO = x_SNI.new_empty(self.y_shape)
            y_at = y_SNO.data_ptr()
        contract(self.job_at, product_at, x_at, self.bias_at, y_at)
        return y_SNO

    def _product(self, copies_TNI: Tensor) -> Tensor:
        if self.weight is not None:
            return self._modulated_product(copies_TNI, self.weight)
        product_TNO = self.base(copies_TNI)
        if product_TNO.shape != self.product_shape:
            raise ShapeError(
                f"the base's product has the shape {list(product_TNO.shape)}, but the factors are "
                f"for {list(self.product_shape)}"
            )
        return product_TNO.to(copies_TNI.dtype).contiguous()

    def _modulated_product(self, copies_TNI: Tensor, weight_OI: Tensor) -> Tensor:
        """Some copies by W0, and each segment's by W0 as its pages modulate it."""
        product_TNO = copies_TNI.new_empty(self.product_shape)
        scratch_OI = torch.empty_like(weight_OI)

        def multiply(first: int, count: int, by_OI: Tensor) -> None:
            part = slice(first, first + count)
            copies, product = copies_TNI[part].flatten(0, 1), product_TNO[part].flatten(0, 1)
            torch.mm(copies, by_OI.T, out=product)

        if plain := self.segments[0][0]:
            multiply(0, plain, weight_OI)
        weight_at, scratch_at = weight_OI.data_ptr(), scratch_OI.data_ptr()
        for first, count, first_page, pages in self.segments:
            modulate(self.job_at, first_page, pages, weight_at, scratch_at)
            multiply(first, count, scratch_OI)
        return product_TNO
