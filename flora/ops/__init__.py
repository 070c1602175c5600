"""The operator y = Σ_j a_j ∘ (W0 (b_j ∘ x)) + U (V x) + bias, each row with its own factors.

Shapes: S rows, N tokens a row, G groups (the distinct adapters of a batch), P Hadamard pages (the
pairs of all groups), R additive pages (the ranks of all groups), I in, O out.
"""

import logging
from functools import cache
from importlib import import_module
from typing import Protocol, cast

import torch
from torch import Tensor

from flora.errors import BackendError
from flora.ops.factors import BaseProduct, BatchFactors
from flora.ops.plan import Plan

logger = logging.getLogger(__name__)

BACKENDS = {
    "reference": "flora.ops.reference",
    "eager": "flora.ops.eager",
    "cpu": "flora.ops.cpu",
}


class Backend(Protocol):
    """What the module of a backend holds: the operator, differentiable in x and the factors."""

    def apply(
        self,
        x_SNI: Tensor,
        base: BaseProduct,
        factors: BatchFactors,
        plan: Plan,
        weight_OI: Tensor | None,
        bias_O: Tensor | None,
    ) -> Tensor: ...


@cache
def get_backend(name: str, device: torch.device) -> Backend:
    """The module of a backend; "auto" chooses for the device, once, and says so in the log.

    Raises BackendError for a name that is not in `BACKENDS`, or for a backend that cannot run.
    """
    if name == "auto":
        return _choose(device)
    if name not in BACKENDS:
        raise BackendError(f"there is no backend {name!r}; these are: auto, {', '.join(BACKENDS)}")
    return cast("Backend", import_module(BACKENDS[name]))


def _choose(device: torch.device) -> Backend:
    name = "cpu" if device.type == "cpu" else "eager"
    try:
        backend = get_backend(name, device)
    except BackendError as error:
        logger.warning("backend for %s: eager, which is slower; %s", device, error)
        return get_backend("eager", device)
    logger.info("backend for %s: %s", device, name)
    return backend
