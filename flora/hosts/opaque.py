"""The operators that compiled code has in the place of adapted layers.

They find a layer by its number, and read the batch when they run, not when they are traced. So
another mix of adapters compiles nothing again.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from flora.base import BaseLayer
from flora.errors import FloraError
from flora.hosts.rows import Call


class Layer(Protocol):
    """What runs behind a number.

    base:    the layer as it was.
    trained: what is trained of it, the same tensors each time.
    """

    base: BaseLayer
    trained: list[Tensor]

    def __call__(self, x: Tensor) -> Tensor: ...

    def current_call(self) -> Call | None:
        """That of the batch which runs; None where it has no adapters."""


def register(layer: Layer) -> int:
    """A layer's number, good for as long as the layer lives."""
    number = next(_numbers)
    _layers[number] = layer
    return number


_numbers = count()
_layers: WeakValueDictionary[int, Layer] = WeakValueDictionary()
_calls: WeakValueDictionary[int, Call] = WeakValueDictionary()
_library = torch.library.Library("flora", "DEF")
_library.define("adapted_layer(Tensor x, int layer, int out_features) -> Tensor")


@partial(_library.impl, "adapted_layer", dispatch_key="CompositeExplicitAutograd")
def _adapted_layer(x: Tensor, layer: int, out_features: int) -> Tensor:  # noqa: ARG001
    """A layer without gradients."""
    y = _layers[layer](x)
    return y.clone() if y is x else y


@partial(torch.library.register_fake, "flora::adapted_layer")
def _adapted_layer_shape(x: Tensor, layer: int, out_features: int) -> Tensor:  # noqa: ARG001
    return x.new_empty(*x.shape[:-1], out_features)


BASE_ONLY = -1
"""Of a layer's graph in a batch without adapters, which is made again in the backward."""


@contextmanager
def _autograd() -> Iterator[None]:
    """Gradients within an operator, whose own autograd formula leaves them out."""
    key = torch._C.DispatchKey.AutogradFunctionality
    with torch._C._SetExcludeDispatchKeyGuard(key, False), torch.enable_grad():
        yield


@torch.library.custom_op("flora::trained_layer", mutates_args=())
def _trained_layer(
    x: Tensor,
    trained: list[Tensor],  # noqa: ARG001
    layer: int,
    out_features: int,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    """A layer with gradients, and the number of its graph.

    trained: what the layer says, as compiled code has to know to give it gradients.
    """
    found, number = _layers[layer], BASE_ONLY
    with _autograd():
        x = x.detach().requires_grad_()
        y = found(x)
    if (call := found.current_call()) is not None:
        number = next(_numbers)
        _calls[number] = call
        call.graphs[number] = x, y
    return y.detach().contiguous(), torch.tensor(number)


@_trained_layer.register_fake
def _trained_layer_shape(
    x: Tensor,
    trained: list[Tensor],  # noqa: ARG001
    layer: int,  # noqa: ARG001
    out_features: int,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(*x.shape[:-1], out_features), torch.empty((), dtype=torch.int64)


@torch.library.custom_op("flora::trained_layer_backward", mutates_args=())
def _trained_layer_backward(
    dy: Tensor,
    x: Tensor,
    trained: list[Tensor],  # noqa: ARG001
    number: Tensor,
    layer: int,
) -> list[Tensor]:
    """The gradients of x and of what is trained; zeros for what had no row in the batch.

    Raises FloraError where a graph is gone through twice.
    """
    found = _layers[layer]
    with _autograd():
        if int(number) == BASE_ONLY:
            x = x.detach().requires_grad_()
            y = found.base.forward(x)
        elif (call := _calls.pop(int(number), None)) is not None:
            x, y = call.graphs.pop(int(number))
        else:
            raise FloraError("a compiled model's backward runs once for each forward")
        dx, *dtrained = torch.autograd.grad(
            y, [x, *found.trained], dy, retain_graph=True, allow_unused=True, materialize_grads=True
        )
    # They are parts of what was joined for the batch, but an operator's results stand alone.
    return [
        dx.contiguous(),
        *(grad.clone(memory_format=torch.contiguous_format) for grad in dtrained),
    ]


@_trained_layer_backward.register_fake
def _trained_layer_backward_shapes(
    dy: Tensor,  # noqa: ARG001
    x: Tensor,
    trained: list[Tensor],
    number: Tensor,  # noqa: ARG001
    layer: int,  # noqa: ARG001
) -> list[Tensor]:
    return [like.new_empty(like.shape) for like in (x, *trained)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, trained, ctx.layer, _ = inputs
    ctx.save_for_backward(x, output[1], *trained)


def _backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Any, ...]:
    x, number, *trained = ctx.saved_tensors
    dx, *dtrained = torch.ops.flora.trained_layer_backward(dy, x, trained, number, ctx.layer)
    return dx, dtrained, None, None


_trained_layer.register_autograd(_backward, setup_context=_save)
