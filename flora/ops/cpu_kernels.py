"""The C++ kernels for CPUs, and what they are told of a batch."""

from collections.abc import Sequence
from ctypes import Structure, addressof, c_int64, c_void_p
from math import prod
from threading import local
from typing import ClassVar

import torch
from torch import Tensor

from flora.errors import ShapeError
from flora.ops import Operands
from flora.ops.build import load_kernels
from flora.ops.factors import BatchFactors, Pages
from flora.ops.table import Table, make_table

kernels = load_kernels()
expand, contract = kernels.expand, kernels.contract
multiply_modulated, multiply_back = kernels.multiply_modulated, kernels.multiply_back
modulation_gradients, scale_gradients = kernels.modulation_gradients, kernels.scale_gradients

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


POOLS = {"hadamard": ("b", "a"), "low_rank": ("down", "up"), "biases": ("biases",)}
"""What the kernels call the pools of each field of `BatchFactors`."""


class PoolFields(Structure):
    """`Pool` in kernels/job.h."""

    _fields_: ClassVar = [
        ("pages", c_void_p),
        ("index", c_void_p),
        ("count", c_int64),
        ("centers", c_void_p),
    ]


class JobFields(Structure):
    """`Job` in kernels/job.h."""

    _fields_: ClassVar = [
        ("rows", c_void_p),
        *((name, PoolFields) for pools in POOLS.values() for name in pools),
        *((name, c_int64) for name in ("S", "N", "I", "O", "product_stride", "y_stride", "dtype")),
    ]


class Pools:
    """Where a layer's pages lie, and which of them a batch takes: the same at each step.

    neutral: of a layer's inputs and of its outputs, whether no page changes them: an adapter of
             which each layer has one side only, as IA3's, leaves the other as it is.
    """

    def __init__(self, factors: BatchFactors, dtype: torch.dtype) -> None:
        self._kept: list[Tensor] = []
        self._of = {
            name: self._lay(pages, side, torch.float32 if family == "hadamard" else dtype)
            for family, names in POOLS.items()
            if (pages := getattr(factors, family)) is not None
            for side, name in enumerate(names)
        }
        self._dtype = dtype
        self._jobs: dict[tuple[int, ...], JobFields] = {}
        in_neutral, out_neutral = factors.hadamard.neutral if factors.hadamard else (True, True)
        self.neutral = in_neutral, out_neutral

    def job(self, rows: Tensor, S: int, N: int, *sizes: int) -> JobFields:
        """A job of theirs; `sizes` are I, O and the stride of product and y."""
        if sizes not in self._jobs:
            I, O, stride = sizes  # noqa: E741
            own = {"I": I, "O": O, "product_stride": stride, "y_stride": stride}
            self._jobs[sizes] = JobFields(dtype=DTYPES.index(self._dtype), **own, **self._of)
        # A copy, as the rows are another's.
        job = JobFields.from_buffer_copy(self._jobs[sizes])
        job.rows, job.S, job.N = rows.data_ptr(), S, N
        return job

    def _lay(self, pages: Pages, which: int, dtype: torch.dtype) -> PoolFields:
        """Where one pool is, and the index, and how many pages are taken."""
        pool, index, centers = pages.pools[which].detach(), pages.index, None
        if pages.centers is not None:
            centers = pages.centers[which]
        elif index is not None and pool.dtype != dtype:
            pool, index = pool.index_select(0, index).to(dtype), None
        else:
            pool = pool.to(dtype).contiguous()
        self._kept += [tensor for tensor in (pool, index, centers) if tensor is not None]
        return PoolFields(
            pages=pool.data_ptr(),
            index=None if index is None else index.data_ptr(),
            count=len(pool if index is None else index),
            centers=None if centers is None else centers.data_ptr(),
        )


class Job:
    """What the kernels are told of a batch: its table, its factors and its sizes.

    They trust it, so tensors are made contiguous here, and kept as long as it is.

    size:   the layer's outputs, where no factor says.
    stride: from one token's outputs to the next one's, in the product and in y; None where they
            stand alone.
    """

    def __init__(
        self,
        x_SNI: Tensor,
        operands: Operands,
        size: int = 0,
        stride: int | None = None,
    ) -> None:
        factors, self.dtype = operands.factors, x_SNI.dtype
        self.table: Table = make_table(
            operands.plan, factors.pairs, factors.ranks, factors.biased, x_SNI.device
        )
        self.x_shape = S, N, I = x_SNI.shape  # noqa: E741
        self.out_features = O = factors.out_features or size  # noqa: E741
        # The factors too: their pages are lent for as long as these are not forgotten.
        self._factors = factors
        self.pools = factors.keep(Pools, self.dtype, Pools, factors, self.dtype)
        self.fields = self.pools.job(self.table.rows, S, N, I, O, stride or O)
        self.at = addressof(self.fields)
        bias_O = operands.bias
        self.bias = None if bias_O is None else bias_O.detach().to(self.dtype).contiguous()
        self.bias_at = 0 if self.bias is None else self.bias.data_ptr()

    def product_stands_alone(self) -> None:
        """The product is this layer's only, where y is not."""
        self.fields.product_stride = self.out_features

    def check(self, product_TNO: Tensor) -> Tensor:
        """What a black box returned, as the kernels take it. Raises ShapeError."""
        shape = len(self.table.copies), self.x_shape[1], self.out_features
        if product_TNO.shape != shape:
            raise ShapeError(
                f"the base's product has the shape {list(product_TNO.shape)}, but the factors are "
                f"for {list(shape)}"
            )
        return product_TNO.to(self.dtype).contiguous()


_memory = local()


def scratch(use: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory for one use within a layer, which the next layer will use again.

    One a thread and use, as large as the largest layer's: new memory takes longer to get than to
    fill.
    """
    count = prod(shape)
    kept: Tensor | None = getattr(_memory, use, None)
    if kept is None or kept.numel() < count * dtype.itemsize:
        with torch.inference_mode(False):
            kept = torch.empty(count * dtype.itemsize, dtype=torch.uint8)
        setattr(_memory, use, kept)
    return kept[: count * dtype.itemsize].view(dtype).view(shape)
