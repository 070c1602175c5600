"""Batched low-rank adaptation: one batch, each row with its own adapter."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flora.adapters.core import Adapter as Adapter
    from flora.adapters.core import LayerFactors as LayerFactors
    from flora.bank import AdapterBank as AdapterBank
    from flora.errors import FloraError as FloraError
    from flora.hosts.transformers import attach as attach
    from flora.hosts.transformers import detach as detach
    from flora.tuner import FloraConfig as FloraConfig

_HOMES = {
    "Adapter": "flora.adapters.core",
    "AdapterBank": "flora.bank",
    "FloraConfig": "flora.tuner",
    "FloraError": "flora.errors",
    "LayerFactors": "flora.adapters.core",
    "attach": "flora.hosts.transformers",
    "detach": "flora.hosts.transformers",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'flora' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
