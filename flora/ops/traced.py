"""The Hadamard part of one adapter in torch that a compiler traces: no plan, no table, no kernels.

What else there is in a batch runs outside of compiled code.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from flora.ops.autograd import ModulatedLinear
from flora.ops.plan import MODULATION_TOKENS


def hadamard_linear(
    x: Tensor, weight_OI: Tensor, in_HI: Tensor, out_HO: Tensor, bias_O: Tensor | None = None
) -> Tensor:
    """Σ_j a_j ∘ (W0 (b_j ∘ x)) + bias, `[..., out]`, for x, `[..., in]`; as `adapted_linear` does.

    The side goes by the tokens alone: all pairs of few in one product, or else W0 modulated.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        x, weight_OI = x.to(dtype), weight_OI.to(dtype)
    with torch.autocast(device, enabled=False):
        pairs, tokens = len(in_HI), x.numel() // x.shape[-1]
        if (pairs - 1) * tokens > MODULATION_TOKENS:
            y = ModulatedLinear.apply(x, weight_OI, in_HI, out_HO)  # type: ignore[no-untyped-call]
        else:
            copies = (x.unsqueeze(-2) * in_HI).to(x.dtype)
            y = (F.linear(copies, weight_OI) * out_HO).sum(-2)
        if bias_O is not None:
            y = y + bias_O
        return y.to(x.dtype)  # type: ignore[no-any-return]
