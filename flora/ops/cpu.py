"""The operator in C++ for CPUs: what it adds to the base's product, in as few passes as there are.

For fp32 and 16 bits; in fp64, and where W0 has another type than x, the operator is `eager`'s.
"""

from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from math import prod

import torch
from torch import Tensor

from flora.ops import Linear, Operands, cpu_autograd, eager
from flora.ops.cpu_kernels import DTYPES, Job, contract, expand, scratch
from flora.ops.factors import BaseProduct, WeightProduct
from flora.ops.program import Program, known_product

SHARED_COPIES = 1 << 24
"""Up to so many numbers layers share the memory of their copies."""


def prepare(x_SNI: Tensor, operands: Operands) -> Linear:
    """See `adapted_linear`. Sums are taken in fp32 and rounded once at the end."""
    dtype, weight = x_SNI.dtype, operands.weight
    mixed = weight is not None and weight.dtype != dtype
    nothing = operands.factors.out_features is None
    unscaled = operands.factors.hadamard is None
    if mixed or nothing or dtype not in DTYPES or (operands.plan.grad and unscaled):
        return eager.prepare(x_SNI, operands)
    job = Job(x_SNI, operands)
    if operands.plan.grad:
        return partial(cpu_autograd.linear, operands=operands, job=job)
    return _program(job, operands) or PreparedLinear(job, operands)


def merge(
    x_SNI: Tensor,
    base: BaseProduct,
    layers: Sequence[Operands],
    sizes: Sequence[int],
    *,
    same_input: bool,
) -> Linear | None:
    """See `Merged.prepare`; None where the kernels do not suit."""
    dtype = x_SNI.dtype
    suits = dtype in DTYPES and all(
        own.pure
        and not (own.plan.grad or own.plan.weight_side)
        and (own.weight is None or own.weight.dtype == dtype)
        for own in layers
    )
    if not suits:
        return None
    return MergedLinear(x_SNI, base, layers, sizes, same_input=same_input)


def _program(job: Job, operands: Operands) -> Program | None:
    """A layer in one batch without Python; None where only Python knows its product."""
    product, weight_OI = known_product(operands.base), None
    if job.table.segments is not None and operands.weight is not None:
        weight_OI = operands.weight.contiguous()
        product = product or known_product(WeightProduct(weight_OI))
    return None if product is None else Program(job, product, weight_OI)


class PreparedLinear:
    """A layer in one batch without gradients, around a product that only Python knows."""

    def __init__(self, job: Job, operands: Operands) -> None:
        self.job, self.base, self.pure = job, operands.base, operands.pure
        table, (S, N, I), O = job.table, job.x_shape, job.out_features  # noqa: E741
        self.job_at, self.bias_at = job.at, job.bias_at
        in_neutral, out_neutral = job.pools.neutral
        added = table.adds or job.bias is not None
        self.expands = not (table.in_order and (in_neutral or not table.scaled))
        self.contracts = not (table.in_order and (out_neutral or not table.scaled) and not added)
        self.copies_shape, self.y_shape = (len(table.copies), N, I), (S, N, O)
        # What a black box returns may be its own.
        self.in_place = table.in_order and self.pure

    def __call__(self, x_SNI: Tensor) -> Tensor:
        """y, `[S, N, out]`."""
        x_SNI = x_SNI.contiguous()
        x_at = x_SNI.data_ptr()
        y_SNO = product_TNO = self.multiply(self.expand(x_SNI, x_at))
        if not self.contracts:
            return product_TNO
        product_at = y_at = product_TNO.data_ptr()
        if not self.in_place:
            y_SNO = x_SNI.new_empty(self.y_shape)
            y_at = y_SNO.data_ptr()
        contract(self.job_at, product_at, x_at, self.bias_at, y_at)
        return y_SNO

    def expand(self, x_SNI: Tensor, x_at: int) -> Tensor:
        """The copies, `[T, N, in]`; x lies at that address."""
        if not self.expands:
            return x_SNI
        copies_TNI = self._new_copies()
        expand(self.job_at, x_at, copies_TNI.data_ptr())
        return copies_TNI

    def multiply(self, copies_TNI: Tensor) -> Tensor:
        """Their product with W0, `[T, N, out]`."""
        product_TNO = self.base(copies_TNI)
        return product_TNO if self.pure else self.job.check(product_TNO)

    def _new_copies(self) -> Tensor:
        # A black box may keep what it is given.
        if not self.pure or prod(self.copies_shape) > SHARED_COPIES:
            return torch.empty(self.copies_shape, dtype=self.job.dtype)
        return scratch("copies", self.copies_shape, self.job.dtype)


class MergedLinear:
    """Merged layers in one batch, without gradients, whose results are written side by side.

    All copies go through the merged product if the layers' inputs are the same; else each layer's
    go through its own.
    """

    def __init__(
        self,
        x_SNI: Tensor,
        base: BaseProduct,
        layers: Sequence[Operands],
        sizes: Sequence[int],
        *,
        same_input: bool,
    ) -> None:
        (S, N, _), O = x_SNI.shape, sum(sizes)  # noqa: E741
        self.base, self.y_shape = base, (S, N, O)
        own = [
            PreparedLinear(Job(x_SNI, operands, size, stride=O), operands)
            for operands, size in zip(layers, sizes, strict=True)
        ]
        shared = same_input and len({operands.factors.pairs for operands in layers}) == 1
        self.whole = shared or not any(layer.expands for layer in own)
        if not self.whole:
            for layer in own:
                layer.job.product_stands_alone()
        self.layers = own
        self.in_place = all(layer.in_place for layer in own)
        firsts = [end - size for end, size in zip(accumulate(sizes), sizes, strict=True)]
        # What a layer adds to the product, and where it stands.
        self.parts = [
            (layer, layer.job_at, layer.bias_at, first * x_SNI.element_size())
            for layer, first in zip(own, firsts, strict=True)
            if layer.contracts or not (self.whole and self.in_place)
        ]

    def __call__(self, x_SNI: Tensor) -> Tensor:
        """y, `[S, N, Σ out]`."""
        x_SNI = x_SNI.contiguous()
        x_at = x_SNI.data_ptr()
        if not self.whole:
            y_SNO = x_SNI.new_empty(self.y_shape)
            y_at = y_SNO.data_ptr()
            for layer, job_at, bias_at, first in self.parts:
                product_TNO = layer.multiply(layer.expand(x_SNI, x_at))
                contract(job_at, product_TNO.data_ptr(), x_at, bias_at, y_at + first)
            return y_SNO
        y_SNO = product_TNO = self.base(self.layers[0].expand(x_SNI, x_at))
        product_at = y_at = product_TNO.data_ptr()
        if not self.in_place:
            y_SNO = x_SNI.new_empty(self.y_shape)
            y_at = y_SNO.data_ptr()
        for _, job_at, bias_at, first in self.parts:
            contract(job_at, product_at + first, x_at, bias_at, y_at + first)
        return y_SNO
