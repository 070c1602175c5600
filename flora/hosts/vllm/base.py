"""vLLM's model as adapters see it: the layers that a checkpoint knows, each a black box."""

from collections.abc import Iterable

from flora.adapters.core import Adapter
from flora.base import LayersBase
from flora.hosts.vllm.layers import AdaptedLayer
from flora.hosts.vllm.shards import WholeLayer
from flora.ops.costs import layer_costs


class VllmBase(LayersBase):
    """The layers of `adapt`, as the operator's base and an adapter's measure.

    specs: of what this rank has of them.
    """

    def __init__(self, layers: Iterable[AdaptedLayer]) -> None:
        super().__init__()
        self.parts = {part.name: part for layer in layers for part in layer.parts}
        self.specs = {name: part.spec for name, part in self.parts.items()}
        self.is_sharded = any(layer.layer.tp_size > 1 for layer in layers)
        self.layers = self.parts
        if self.is_sharded:
            self.layers = {name: WholeLayer(part) for name, part in self.parts.items()}

    @property
    def head(self) -> str | None:
        """None: no adapter reaches the output embedding here."""
        return None

    def shard(self, adapter: Adapter) -> Adapter:
        """This rank's part of an adapter."""
        if not self.is_sharded:
            return adapter
        layers = {name: self.parts[name].shard.take(own) for name, own in adapter.layers.items()}
        return Adapter(kind=adapter.kind, identity=adapter.identity, layers=layers)

    def measure_costs(self, backend: str) -> None:
        """Have what plans go by measured now, so that no request waits for it."""
        weights = {
            (*part.weight.shape, part.weight.dtype): part.weight
            for part in self.parts.values()
            if part.weight is not None
        }
        for weight in weights.values():
            layer_costs(weight, backend, grad=False)
