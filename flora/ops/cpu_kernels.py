"""The C++ kernels for CPUs, and what they are told of a batch."""

from ctypes import Structure, addressof, c_int64, c_void_p
from threading import local
from typing import ClassVar

import torch
from torch import Tensor

from flora.errors import ShapeError
from flora.ops import Operands
from flora.ops.build import load_kernels
from flora.ops.table import Table, make_table

kernels = load_kernels()
expand, contract, modulate = kernels.expand, kernels.contract, kernels.modulate
modulation_gradients, scale_gradients = kernels.modulation_gradients, kernels.scale_gradients

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class _Job(Structure):
    """`Job` in cpu.cpp."""

    _fields_: ClassVar = [
        *((name, c_void_p) for name in ("rows", "in_pages", "out_pages", "down", "up", "biases")),
        *((name, c_int64) for name in ("S", "N", "I", "O", "dtype")),
    ]


class Job:
    """What the kernels are told of a batch: its table, its factors and its sizes.

    They trust it, so tensors are made contiguous here, and kept as long as it is.
    """

    def __init__(self, x_SNI: Tensor, operands: Operands) -> None:
        factors, dtype = operands.factors, x_SNI.dtype
        self.table: Table = make_table(
            operands.plan, factors.pairs, factors.ranks, factors.biased, x_SNI.device
        )
        self.dtype = dtype
        self.x_shape = S, N, I = x_SNI.shape  # noqa: E741
        self.out_features = O = factors.out_features or 0  # noqa: E741
        parts = {
            "in_pages": (factors.hadamard_in, torch.float32),
            "out_pages": (factors.hadamard_out, torch.float32),
            "down": (factors.down, dtype),
            "up": (factors.up, dtype),
            "biases": (factors.bias, dtype),
        }
        self.tensors = {"rows": self.table.rows} | {
            name: part.detach().to(kind).contiguous()
            for name, (part, kind) in parts.items()
            if part is not None
        }
        addresses = {name: tensor.data_ptr() for name, tensor in self.tensors.items()}
        self._job = _Job(**addresses, S=S, N=N, I=I, O=O, dtype=DTYPES.index(dtype))
        self.at = addressof(self._job)
        bias_O = operands.bias
        self.bias = None if bias_O is None else bias_O.detach().to(dtype).contiguous()
        self.bias_at = 0 if self.bias is None else self.bias.data_ptr()

    def is_neutral(self, name: str) -> bool:
        """Whether these Hadamard pages, if there are any, are ones: nothing is scaled by them."""
        pages = self.tensors.get(name)
        return pages is None or bool((pages == 1).all())

    def check(self, product_TNO: Tensor) -> Tensor:
        """What a black box returned, as the kernels take it. Raises ShapeError."""
        shape = len(self.table.copies), self.x_shape[1], self.out_features
        if product_TNO.shape != shape:
            raise ShapeError(
                f"the base's product has the shape {list(product_TNO.shape)}, but the factors are "
                f"for {list(shape)}"
            )
        return product_TNO.to(self.dtype).contiguous()


_scratch = local()


def scratch_like(weight_OI: Tensor) -> Tensor:
    """Memory for one modulated W0, which the next layer will use again.

    One a thread and as large as the largest layer: new memory takes longer to get than to fill.
    """
    kept: Tensor | None = getattr(_scratch, "bytes", None)
    if kept is None or kept.numel() < weight_OI.nbytes:
        with torch.inference_mode(False):
            kept = _scratch.bytes = torch.empty(weight_OI.nbytes, dtype=torch.uint8)
    return kept[: weight_OI.nbytes].view(weight_OI.dtype).view_as(weight_OI)
