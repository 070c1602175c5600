"""The kinds of adapters: one module each, found by its PEFT type. Adding one is a file and a line.

A kind's module holds

    Config                                   its settings, typed; unknown keys are refused
    shapes(config, module) -> {tensor: shape}    sizes are ints, or "in" and "out" of the layer
    fill(config, module, params) -> LayerFactors     pure, differentiable; params by tensor name
    init(config, module, shape, generator) -> params     the start of training, on the CPU in fp32
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from flora.adapters.core import LayerFactors
from flora.errors import InvalidAdapterError

KINDS = {
    "FLORA": "flora.adapters.kinds.flora",
    "LORA": "flora.adapters.kinds.lora",
}


class Kind(Protocol):
    """What the module of a kind holds."""

    Config: type[Any]

    def shapes(self, config: Any, module: str) -> Mapping[str, tuple[int | str, ...]]: ...

    def fill(self, config: Any, module: str, params: Mapping[str, Tensor]) -> LayerFactors: ...

    def init(
        self, config: Any, module: str, shape: tuple[int, int], generator: torch.Generator
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
