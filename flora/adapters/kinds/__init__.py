"""The kinds of adapters: one module each, found by its PEFT type. Adding one is a file and a line.

A kind's module holds

    Config                                   its settings, typed; unknown keys are refused
    shapes(config, module) -> {tensor: shape}    sizes are ints, or "in" and "out" of the layer
    fill(config, module, params, base) -> LayerFactors    pure, differentiable in params
    init(config, module, base, generator) -> params    the start of training, on the CPU in fp32

params are tensors by name, those of `AdapterConfig.shared` and `derived` among them.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from flora.adapters.config import Shape
from flora.adapters.core import LayerFactors, Layers
from flora.errors import InvalidAdapterError

KINDS = {
    "FLORA": "flora.adapters.kinds.flora",
    "LORA": "flora.adapters.kinds.lora",
    "IA3": "flora.adapters.kinds.ia3",
    "HIRA": "flora.adapters.kinds.hira",
    "ADALORA": "flora.adapters.kinds.adalora",
    "VERA": "flora.adapters.kinds.vera",
    "LOHA": "flora.adapters.kinds.loha",
    "LOKR": "flora.adapters.kinds.lokr",
}


class Kind(Protocol):
    """What the module of a kind holds."""

    Config: type[Any]

    def shapes(self, config: Any, module: str) -> Mapping[str, Shape]: ...

    def fill(
        self, config: Any, module: str, params: Mapping[str, Tensor], base: Layers
    ) -> LayerFactors: ...

    def init(
        self, config: Any, module: str, base: Layers, generator: torch.Generator
    ) -> dict[str, Tensor]: ...


def get_kind(name: object) -> Kind:
    """The module of a kind by its PEFT type, in any case of letters.

    Raises InvalidAdapterError for a kind that is not in `KINDS`.
    """
    module = KINDS.get(name.upper()) if isinstance(name, str) else None
    if module is None:
        raise InvalidAdapterError(
            f"peft_type {name!r} is not supported; these are: {', '.join(KINDS)}"
        )
    return cast("Kind", import_module(module))
