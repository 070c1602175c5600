"""The operator y = Σ_j a_j ∘ (W0 (b_j ∘ x)) + U (V x) + bias, each row with its own factors.

Shapes: S rows, N tokens a row, G groups (the distinct adapters of a batch), P Hadamard pages (the
pairs of all groups), R additive pages (the ranks of all groups), I in, O out.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
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
    "triton": "flora.ops.triton",
}


@dataclass(frozen=True, eq=False)
class Operands:
    """What the operator has beside x; `adapted_linear` says what each is."""

    base: BaseProduct
    factors: BatchFactors
    plan: Plan
    weight: Tensor | None
    bias: Tensor | None
    pure: bool = False


Linear = Callable[[Tensor], Tensor]
"""An adapted layer: `[S, N, in]` to `[S, N, out]`."""


class Backend(Protocol):
    """What the module of a backend holds."""

    def prepare(self, x_SNI: Tensor, operands: Operands) -> Linear:
        """The operator for every x like this one; differentiable in x and the factors."""


@cache
def backend_name(name: str, device: torch.device) -> str:
    """The name itself, or what "auto" stands for on a device: chosen once, and said in the log."""
    if name != "auto":
        return name
    chosen = "cpu" if device.type == "cpu" else "eager"
    try:
        get_backend(chosen, device)
    except BackendError as error:
        logger.warning("backend for %s: eager, which is slower; %s", device, error)
        return "eager"
    logger.info("backend for %s: %s", device, chosen)
    return chosen


def has_programs(name: str, device: torch.device) -> bool:
    """Whether a backend, or what "auto" stands for, runs layers on a device without Python."""
    return device.type == "cpu" and backend_name(name, device) == "cpu"


@cache
def get_backend(name: str, device: torch.device) -> Backend:
    """The module of a backend, for "auto" that of `backend_name`.

    Raises BackendError for a name that is not in `BACKENDS`, or for a backend that cannot run.
    """
    name = backend_name(name, device)
    if name not in BACKENDS:
        raise BackendError(f"there is no backend {name!r}; these are: auto, {', '.join(BACKENDS)}")
    backend = import_module(BACKENDS[name])
    if device.type == "cpu" and getattr(backend, "NEEDS_GPU", False):
        raise BackendError(f"the backend {name!r} needs a GPU, but the tensors are on the CPU")
    return cast("Backend", backend)
