"""The truth: every row's W_i as a matrix, in fp64, by loops. Slow on purpose."""

from functools import partial

import torch
from torch import Tensor

from flora.ops import Linear, Operands
from flora.ops.factors import BatchFactors


def prepare(x_SNI: Tensor, operands: Operands) -> Linear:  # noqa: ARG001
    """See `adapted_linear`. W0 is read, or found by its product with the identity matrix."""
    return partial(_linear, operands=operands)


def _linear(x_SNI: Tensor, operands: Operands) -> Tensor:
    factors, bias_O, weight_OI = operands.factors, operands.bias, operands.weight
    if weight_OI is None:
        weight_OI = operands.base(
            torch.eye(x_SNI.shape[-1], dtype=x_SNI.dtype, device=x_SNI.device)
        ).T
    outputs = []
    for x_NI, group in zip(x_SNI, operands.plan.rows, strict=True):
        y_NO = x_NI.double() @ _dense(weight_OI.double(), factors, group).T
        bias = bias_O
        if factors.biased[group] and factors.bias is not None:
            bias = factors.bias[sum(factors.biased[:group])]
        outputs.append(y_NO if bias is None else y_NO + bias.double())
    return torch.stack(outputs).to(x_SNI.dtype)


def _dense(weight_OI: Tensor, factors: BatchFactors, group: int) -> Tensor:
    dense = weight_OI
    if factors.pairs[group] and factors.scales:
        in_PI, out_PO = factors.scales
        first = sum(factors.pairs[:group])
        modulation = torch.zeros_like(weight_OI)
        for page in range(first, first + factors.pairs[group]):
            modulation = modulation + torch.outer(out_PO[page].double(), in_PI[page].double())
        dense = dense * modulation
    if factors.ranks[group] and factors.additive:
        down_RI, up_RO = factors.additive
        first = sum(factors.ranks[:group])
        for page in range(first, first + factors.ranks[group]):
            dense = dense + torch.outer(up_RO[page].double(), down_RI[page].double())
    return dense
