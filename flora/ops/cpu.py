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
from flora.ops.cpu_kernels import DTYPES, Job, contract, expand, multiply_modulated, scratch
from flora.ops.factors import BaseProduct
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
    linear = PreparedLinear(job, operands)
    return linear.program() or linear


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
        own.pure and not own.plan.grad and (own.weight is None or own.weight.dtype == dtype)
        for own in layers
    )
    if not suits:
        return None
    return MergedLinear(x_SNI, base, layers, sizes, same_input=same_input)


class PreparedLinear:
    """A layer in one batch without gradients."""

    def __init__(self, job: Job, operands: Operands) -> None:
        self.job, self.base, weight_OI = job, operands.base, operands.weight
        table, (S, N, I), O = job.table, job.x_shape, job.out_features  # noqa: E741
        self.job_at, self.bias_at = job.at, job.bias_at
        in_neutral, out_neutral = job.pools.neutral
        added = table.adds or job.bias is not None
        self.expands = not (table.in_order and (in_neutral or not table.scaled))
        self.contracts = not (table.in_order and (out_neutral or not table.scaled) and not added)
        self.segments: list[list[int]] = []
        if table.segments is not None:
            self.segments = table.segments.tolist()
        T = len(table.copies)
        self.copies_shape, self.product_shape, self.y_shape = (T, N, I), (T, N, O), (S, N, O)
        self.pure = operands.pure
        self.weight = weight_OI.contiguous() if weight_OI is not None and self.segments else None
        # What a black box returns may be its own.
        self.in_place = table.in_order and (self.pure or bool(self.segments))

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

    def program(self) -> Program | None:
        """The same without Python; None where W0 is modulated, or only Python knows its product."""
        product = known_product(self.base)
        return None if product is None or self.segments else Program(self.job, product)

    def expand(self, x_SNI: Tensor, x_at: int) -> Tensor:
        """The copies, `[T, N, in]`; x lies at that address."""
        if not self.expands:
            return x_SNI
        copies_TNI = self._new_copies()
        expand(self.job_at, x_at, copies_TNI.data_ptr())
        return copies_TNI

    def multiply(self, copies_TNI: Tensor, to_TNO: Tensor | None = None) -> Tensor:
        """Their product with W0, `[T, N, out]`; if W0 is modulated, in memory that is given."""
        if self.weight is not None:
            if to_TNO is None:
                to_TNO = copies_TNI.new_empty(self.product_shape)
            self._multiply_modulated(copies_TNI, self.weight, to_TNO)
            return to_TNO
        product_TNO = self.base(copies_TNI)
        return product_TNO if self.pure else self.job.check(product_TNO)

    def _new_copies(self) -> Tensor:
        # A black box may keep what it is given.
        if not self.pure or prod(self.copies_shape) > SHARED_COPIES:
            return torch.empty(self.copies_shape, dtype=self.job.dtype)
        return scratch("copies", self.copies_shape, self.job.dtype)

    def _multiply_modulated(self, copies_TNI: Tensor, weight_OI: Tensor, to_TNO: Tensor) -> None:
        """Some copies by W0, and each segment's by W0 as its pages modulate it."""
        copies_CI, to_CO = copies_TNI.flatten(0, 1), to_TNO.flatten(0, 1)
        N, size = copies_TNI.shape[1], weight_OI.element_size()
        if plain := self.segments[0][0] * N:
            torch.mm(copies_CI[:plain], weight_OI.T, out=to_CO[:plain])
        (I, _), (O, _) = copies_CI.stride(), to_CO.stride()  # noqa: E741
        weight_at, copies_at, to_at = weight_OI.data_ptr(), copies_CI.data_ptr(), to_CO.data_ptr()
        for first, count, first_page, pages in self.segments:
            multiply_modulated(
                self.job_at,
                first_page,
                pages,
                weight_at,
                copies_at + first * N * I * size,
                count * N,
                to_at + first * N * O * size,
                O,
            )


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
        weighted = any(layer.segments for layer in own)
        shared = same_input and len({operands.factors.pairs for operands in layers}) == 1
        self.whole = not weighted and (shared or not any(layer.expands for layer in own))
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
        # The columns of a layer whose product is its result.
        self.columns = {
            layer: slice(first, first + size)
            for layer, first, size in zip(own, firsts, sizes, strict=True)
            if layer.segments and not layer.contracts
        }

    def __call__(self, x_SNI: Tensor) -> Tensor:
        """y, `[S, N, Σ out]`."""
        x_SNI = x_SNI.contiguous()
        x_at = x_SNI.data_ptr()
        if not self.whole:
            y_SNO = x_SNI.new_empty(self.y_shape)
            y_at = y_SNO.data_ptr()
            for layer, job_at, bias_at, first in self.parts:
                copies_TNI = layer.expand(x_SNI, x_at)
                if columns := self.columns.get(layer):
                    layer.multiply(copies_TNI, y_SNO[..., columns])
                    continue
                product_TNO = layer.multiply(copies_TNI)
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
