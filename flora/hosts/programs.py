"""transformers' layers that run without Python: a batch's adapters are laid for all at once."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from flora.base import BaseLayer, ModelBase
from flora.ops import has_programs
from flora.ops.factors import LayersPages, WeightProduct

if TYPE_CHECKING:  # the kernels are loaded where they are run
    from flora.ops.model_layers import LaidAdapters, ModelLayer, ModelLayers


class LaidBatch(NamedTuple):
    """A batch's adapters in those layers of a model that run without Python.

    layers: by name.
    """

    layers: dict[str, "ModelLayer"]
    adapters: "LaidAdapters"


class Programs:
    """Those of a model's layers that run without Python, of the parameters that it has now."""

    def __init__(self, base: ModelBase, backend: str) -> None:
        names = [n for n, spec in base.specs.items() if has_programs(backend, spec.device)]
        made = {name: _program(name, base.layers[name], base.specs[name].dtype) for name in names}
        self.layers = {name: layer for name, layer in made.items() if layer is not None}
        self._together = together([*self.layers.values()], backend)
        self._base = base
        self._parameters = self._find_parameters()

    @property
    def are_current(self) -> bool:
        """Whether these are still the model's parameters: it may be given others, or moved."""
        return all(
            one is other and at == other_at
            for (one, at), (other, other_at) in zip(
                self._find_parameters(), self._parameters, strict=True
            )
        )

    def _find_parameters(self) -> list[tuple[Tensor | None, int]]:
        """What the layers consist of, and where it lies."""
        layers = [self._base.layers[name] for name in self.layers]
        tensors = [tensor for layer in layers for tensor in (layer.weight, layer.bias)]
        return [(tensor, 0 if tensor is None else tensor.data_ptr()) for tensor in tensors]

    def lay(self, pages: Sequence[LayersPages], groups: int) -> LaidBatch | None:
        """The adapters of so many groups, by their pages; None where no layer has a program."""
        if self._together is None:
            return None
        return LaidBatch(self.layers, self._together.lay(pages, groups))


def _program(name: str, layer: BaseLayer, dtype: torch.dtype) -> "ModelLayer | None":
    """A layer whose parameters lie as the kernels read them; None for another."""
    from flora.ops.cpu_kernels import DTYPES
    from flora.ops.model_layers import ModelLayer, Slice
    from flora.ops.program import known_product

    weight, bias = layer.weight, layer.bias
    if weight is None or dtype not in DTYPES:
        return None
    own = [weight] if bias is None else [weight, bias]
    if not all(tensor.dtype == dtype and tensor.is_contiguous() for tensor in own):
        return None
    product = known_product(WeightProduct(weight))
    whole = Slice(name, layer.in_features, layer.out_features, None, bias, weight)
    return None if product is None else ModelLayer(product, [whole], dtype)


def together(layers: Sequence["ModelLayer"], backend: str) -> "ModelLayers | None":
    """A model's layers, for adapters to be laid for all of them; None where there are none."""
    if not layers:
        return None
    from flora.ops.model_layers import ModelLayers

    return ModelLayers(layers, backend)
