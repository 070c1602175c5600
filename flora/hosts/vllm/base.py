"""vLLM's model as adapters see it: the layers that a checkpoint knows, each a black box."""

from collections.abc import Iterable

from flora.base import LayersBase
from flora.hosts.vllm.layers import AdaptedLayer
from flora.ops.costs import layer_costs


class VllmBase(LayersBase):
    """The layers of `adapt`, as the operator's base and an adapter's measure."""

    def __init__(self, layers: Iterable[AdaptedLayer]) -> None:
        super().__init__()
        parts = [part for layer in layers for part in layer.parts]
        self.layers = {part.name: part for part in parts}
        self.specs = {part.name: part.spec for part in parts}

    @property
    def head(self) -> str | None:
        """None: no adapter reaches the output embedding here."""
        return None

    def measure_costs(self, backend: str) -> None:
        """Have what plans go by measured now, so that no request waits for it."""
        weights = {
            (*part.weight.shape, part.weight.dtype): part.weight
            for part in self.layers.values()
            if part.weight is not None
        }
        for weight in weights.values():
            layer_costs(weight, backend, grad=False)
