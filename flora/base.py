"""A base model as its adapters see it: linear layers by name, each a black box.

A layer is whatever maps `[..., in]` to `[..., out]` and says its sizes: `nn.Linear`, transformers'
`Conv1D`, a quantised layer with a forward of its own.
"""

from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import chain
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from flora.bank import LayerSpec
from flora.errors import UsageError

TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""The types that products are taken in; a weight of any other is stored only."""

SIZES = (("out_features", "in_features"), ("nf", "nx"), ("outfeatures", "infeatures"))
"""How layers name their sizes: torch's and most others', Conv1D's, older GPTQ layers'."""

COLUMNS = 256
"""Columns of W0 that are looked at together where only its product is known."""

UNIT = 256.0
"""A power of two that columns are taken at the size of, lest a bias swallow their last bits."""


def sizes_of(module: nn.Module) -> tuple[int, int] | None:
    """`(out, in)` of a linear layer; None for any other module."""
    for names in SIZES:
        out_features, in_features = (getattr(module, name, None) for name in names)
        if isinstance(out_features, int) and isinstance(in_features, int):
            return out_features, in_features
    return None


def plain_weight(module: nn.Module) -> Tensor | None:
    """W0, `[out, in]`, of a layer that is its weight's product and no more; None for a black box.

    A quantised weight is a tensor of its own class, whose numbers cannot be read.
    """
    if type(module) not in (nn.Linear, Conv1D) or "forward" in vars(module):
        return None
    weight: Tensor = module.weight  # type: ignore[assignment]
    if type(weight) not in (nn.Parameter, Tensor) or weight.dtype not in TYPES:
        return None
    return weight.T if type(module) is Conv1D else weight


class BaseLayer:
    """A linear layer with the forward that it has now; a host may set another later."""

    def __init__(self, module: nn.Module) -> None:
        sizes = sizes_of(module)
        if sizes is None:
            raise ValueError(f"{type(module).__name__} is no linear layer")
        self.module, self.forward = module, module.forward
        self.out_features, self.in_features = sizes
        self.is_plain = plain_weight(module) is not None
        # torch's own layer leaves its bias out when asked to, whatever its weight is.
        self._is_linear = type(module) is nn.Linear and "forward" not in vars(module)

    @property
    def weight(self) -> Tensor | None:
        """W0, `[out, in]`, where it can be read."""
        if not self.is_plain:
            return None
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        return weight.T if type(self.module) is Conv1D else weight

    @property
    def bias(self) -> Tensor | None:
        bias = getattr(self.module, "bias", None)
        return bias if isinstance(bias, Tensor) else None  # fused layers may say True or False

    def product(self, x: Tensor) -> Tensor:
        """W0 x, `[..., out]`, without the bias, which is subtracted where it cannot be left out."""
        if self._is_linear:
            return F.linear(x, self.module.weight)  # type: ignore[arg-type]
        if self.is_plain:
            return x @ self.module.weight  # type: ignore[operator]
        y: Tensor = self.forward(x)
        if (bias := self.bias) is None:
            return y
        return y.to(torch.promote_types(y.dtype, torch.float32)) - bias

    def spec(self, model: nn.Module) -> LayerSpec:
        """Its sizes, type and device; the model's where its tensors do not say."""
        own = next(self.module.parameters(), None)
        dtype = torch.float32 if own is None else own.dtype
        if own is None or dtype not in TYPES:
            dtype = getattr(model, "dtype", torch.float32)
        tensors = chain(self.module.parameters(), self.module.buffers(), model.parameters())
        device = next((tensor.device for tensor in tensors), torch.device("cpu"))
        return LayerSpec(
            out_features=self.out_features,
            in_features=self.in_features,
            dtype=dtype,
            device=device,
        )


class Layer(Protocol):
    """A linear layer of any library, as adapters see it; `BaseLayer` says what each part is."""

    out_features: int
    in_features: int

    @property
    def weight(self) -> Tensor | None: ...

    @property
    def bias(self) -> Tensor | None: ...

    def product(self, x: Tensor, /) -> Tensor: ...


class LayersBase:
    """Layers by name as `flora.adapters.core.Layers`, and what a bank asks of each."""

    layers: Mapping[str, Layer]
    specs: Mapping[str, LayerSpec]

    def __init__(self) -> None:
        self._norms2: dict[str, Tensor] = {}

    @cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        return {name: (la.out_features, la.in_features) for name, la in self.layers.items()}

    def bias(self, module: str) -> Tensor | None:
        """A layer's bias, `[out]`, in at least fp32."""
        bias = self.layers[module].bias
        return None if bias is None else _exact(bias.detach())

    def product(self, module: str, x: Tensor) -> Tensor:
        """W0 x, `[n, out]` in x's type, for x `[n, in]`.

        Where only products are known, from those with the identity: a layer may quantise x as well.
        """
        weight = self.layers[module].weight
        if weight is not None:
            return F.linear(x.to(weight.device), weight.to(x.dtype))
        parts = x.to(self.specs[module].device).split(COLUMNS, dim=1)
        columns = self._columns(module)
        products = [part @ c.to(x.dtype) for part, c in zip(parts, columns, strict=True)]
        return torch.stack(products).sum(0)

    def row_norm2(self, module: str) -> Tensor:
        """Σ of squares of each row of W0, `[out]`, in at least fp32; looked at once."""
        if module not in self._norms2:
            with torch.no_grad():
                columns = self._columns(module)
                self._norms2[module] = torch.stack([c.square().sum(0) for c in columns]).sum(0)
        return self._norms2[module]

    def _columns(self, module: str) -> Iterator[Tensor]:
        """W0's columns, `[n, out]` in at least fp32, some at a time."""
        layer = self.layers[module]
        if (weight := layer.weight) is not None:
            yield from map(_exact, weight.T.split(COLUMNS))
            return
        spec = self.specs[module]
        for first in range(0, layer.in_features, COLUMNS):
            count = min(COLUMNS, layer.in_features - first)
            units = torch.zeros(count, layer.in_features, dtype=spec.dtype, device=spec.device)
            units[torch.arange(count), torch.arange(first, first + count)] = UNIT
            yield _exact(layer.product(units)) / UNIT


class ModelBase(LayersBase):
    """A model as `flora.adapters.core.Base`, with its layers' forwards as they are now."""

    layers: dict[str, BaseLayer]

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.layers = {
            name: BaseLayer(module)
            for name, module in model.named_modules()
            if sizes_of(module) is not None
        }

    @cached_property
    def specs(self) -> dict[str, LayerSpec]:  # type: ignore[override]
        """What a bank asks. Raises UsageError where a layer's tensors are not loaded."""
        specs = {name: layer.spec(self.model) for name, layer in self.layers.items()}
        for name, spec in specs.items():
            if spec.device.type == "meta":
                raise UsageError(f"{name} is on the meta device; load the model's weights first")
        return specs

    @cached_property
    def head(self) -> str | None:
        find = getattr(self.model, "get_output_embeddings", None)
        head = find() if find else None
        return next((name for name, la in self.layers.items() if la.module is head), None)


def _exact(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
