"""vLLM's layers in compiled code on a CPU, without Python in between: see `ops/program.py`."""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from flora.ops import has_programs
from flora.ops.factors import BaseProduct

logger = logging.getLogger(__name__)

if TYPE_CHECKING:  # the kernels are loaded where they are run
    from flora.ops.model_layers import CompiledLayer

OPERATORS = {
    "_C::onednn_mm": ("c", "a", "bias", "handler_tensor"),
    "_C::weight_packed_linear": ("out", "mat1", "mat2", "bias", "is_vnni"),
}
"""Those that vLLM computes a packed layer by, and their arguments: as programs call them."""

ASIDE = {"aten::empty.memory_format", "aten::view", "aten::_unsafe_view", "aten::reshape"}
"""What else a layer's product may ask of torch: memory, and other shapes for it."""


class _Calls(TorchDispatchMode):
    """What a function asks of torch."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.seen.append((func, args))
        return func(*args, **(kwargs or {}))


def product_of(product: BaseProduct, in_features: int, dtype: torch.dtype) -> BaseProduct:
    """The same as a program takes it, where it is one of vLLM's operators and nothing else."""
    from flora.ops.program import Product

    x = torch.zeros(2, in_features, dtype=dtype)
    with torch.no_grad(), _Calls() as calls:
        y = product(x)
    own = [(func, args) for func, args in calls.seen if func.name() not in ASIDE]
    if len(own) != 1 or len(own[0][1]) != len(OPERATORS.get(own[0][0].name(), ())):
        return product
    ((func, args),) = own
    names = tuple(argument.name for argument in func._schema.arguments)
    to, given, *others = args
    match others:
        case [None, weight] if names == OPERATORS["_C::onednn_mm"]:
            packed = False
        case [weight, None, True] if names == OPERATORS["_C::weight_packed_linear"]:
            packed = True
        case _:
            return product
    if (to.data_ptr(), given.data_ptr()) != (y.data_ptr(), x.data_ptr()):
        return product
    return Product(product, weight, func.name(), packed=packed)


def compiled_layer(layer: Any, name: str, python: str) -> "CompiledLayer | None":
    """A layer of vLLM's for compiled code; None where Python has to compute its product.

    name:   that compiled code knows it by.
    python: the operator for what no program does.
    """
    if not has_programs(layer.backend, layer.device):
        return None
    from flora.ops.cpu_kernels import DTYPES
    from flora.ops.model_layers import CompiledLayer, Running, Slice
    from flora.ops.program import Product

    known = isinstance(layer.merged, Product)
    if not known or layer.dtype not in DTYPES:
        reason = "kernels have no such type" if known else "its product is unknown"
        logger.info("%s goes through Python, which is slower: %s", layer.name, reason)
        return None
    if layer.current.running is None:
        layer.current.running = Running()
    bias = layer.passed_bias
    slices = [
        Slice(
            name=part.name,
            in_features=part.in_features,
            out_features=part.out_features,
            product=part.base if isinstance(part.base, Product) else None,
            bias=None if bias is None else bias[part.rows].to(layer.dtype),
            weight=part.weight,
        )
        for part in layer.parts
    ]
    return CompiledLayer(layer.current.running, layer.merged, slices, layer.dtype, python, name)


def without_python(layer: "CompiledLayer") -> Callable[..., Tensor]:
    """A method's `apply`: the layer in compiled code."""
    # Its own handle is an argument, as code that was compiled in another process is read from disk.
    handle, out_features = layer.handle, layer.out_features

    def apply(_: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y: Tensor = torch.ops.flora.cpu_linear(x, bias, handle, out_features)
        return y

    return apply
