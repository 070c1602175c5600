"""vLLM's linear layers: the product stays each layer's own, the adapters go around it.

Layers keep their class and their place: only the `apply` of their linear method is set, which every
class of them comes through, sharded, merged or quantised.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import LinearBase, RowParallelLinear, UnquantizedLinearMethod

from flora.bank import LayerSpec
from flora.hosts.rows import BatchAdapters, Call, PreparedLayer
from flora.hosts.vllm.compiled import product_of
from flora.hosts.vllm.shards import Shard
from flora.ops import Linear, has_programs
from flora.ops.adapted_linear import Adapted
from flora.ops.factors import BaseProduct
from flora.ops.merged import Merged, Slice

if TYPE_CHECKING:  # the kernels are loaded where they are run
    from flora.ops.model_layers import CompiledLayer, LaidStep, Running

KEPT = "flora_kept"
"""The attribute under which a layer has what `keep` kept of it."""


class Kept(NamedTuple):
    """What vLLM does not leave of a layer on a CPU.

    weight:   W0, `[out, in]`; None where only its products are wanted.
    products: those of each of the layers that are merged in it, which vLLM packs as one.
    """

    weight: Tensor | None
    products: tuple[BaseProduct, ...]


class Step(NamedTuple):
    """What a step of the engine runs.

    call:       the adapter of each token.
    same_input: the merged layers of which each of its adapters scales the input as one.
    laid:       what compiled code runs of it; None where it runs no programs.
    """

    call: Call
    same_input: frozenset[str]
    laid: "LaidStep | None"


class Current:
    """The step that runs; None where none of its tokens uses an adapter."""

    def __init__(self) -> None:
        self.layers: list[AdaptedLayer] = []
        self._step: Step | None = None
        self.running: Running | None = None
        """What compiled code reads of the step; None where it runs no programs."""

    @property
    def step(self) -> Step | None:
        return self._step

    @step.setter
    def step(self, step: Step | None) -> None:
        self._step = step
        if self.running is not None:
            self.running.set(None if step is None else step.laid)

    def split(self, x: Tensor, units: tuple[int, ...]) -> tuple[tuple[int, ...], Tensor]:
        """The group of each unit, and x by units, `[units, columns, in]`: here each is a token."""
        x_SI = x.reshape(-1, 1, x.shape[-1])
        return (*units, *[0] * (len(x_SI) - len(units))), x_SI  # padding has no adapter


class Part:
    """A checkpoint's linear layer: a whole layer of vLLM's, or a slice of a merged one.

    All sizes are of what this rank has.

    name:  its module name, as in transformers.
    first: its first row in the merged layer's W0.
    shard: what it is of the whole layer.
    """

    def __init__(
        self,
        layer: "AdaptedLayer",
        name: str,
        first: int,
        shard: Shard,
        out_features: int,
        product: BaseProduct | None,
    ) -> None:
        self.layer, self.name, self.first, self.shard = layer, name, first, shard
        self.out_features, self.in_features = out_features, layer.in_features
        self.base = self._columns if product is None else product

    @property
    def rows(self) -> slice:
        return slice(self.first, self.first + self.out_features)

    @property
    def weight(self) -> Tensor | None:
        weight = self.layer.weight
        return None if weight is None else weight[self.rows]

    @property
    def bias(self) -> Tensor | None:
        bias = self.layer.bias
        return None if bias is None else bias[self.rows]

    def product(self, x: Tensor, /) -> Tensor:
        """W0 x, `[..., out]`, without the bias."""
        return self.base(x)

    def _columns(self, x: Tensor) -> Tensor:
        """The product where it stands in a merged one, or W0 is there; what else is, is lost."""
        if (weight := self.weight) is not None:
            return F.linear(x, weight)
        return self.layer.product(x)[..., self.rows].contiguous()

    @property
    def spec(self) -> LayerSpec:
        return LayerSpec(
            out_features=self.out_features,
            in_features=self.in_features,
            dtype=self.layer.dtype,
            device=self.layer.device,
        )


class AdaptedLayer:
    """One of vLLM's linear layers: its own product, or the operator where an adapter touches it.

    names: of the checkpoint's layers that are merged in it, in order.
    """

    def __init__(
        self, current: Current, name: str, layer: LinearBase, names: list[str], backend: str
    ) -> None:
        self.current, self.name, self.layer, self.backend = current, name, layer, backend
        self.apply: Callable[..., Tensor] = layer.quant_method.apply
        self.in_features: int = getattr(layer, "input_size_per_partition", layer.input_size)
        sizes: list[int] = list(layer.output_partition_sizes)
        self.out_features = sum(sizes)
        if len(names) == 1:
            sizes = [self.out_features]
        self.dtype: torch.dtype = layer.params_dtype
        tensors = (*layer.parameters(), *layer.buffers())
        self.device = next((t.device for t in tensors), torch.device("cpu"))
        kept: Kept | None = getattr(layer, KEPT, None)
        self.weight = _readable_weight(layer) if kept is None else kept.weight
        firsts = [sum(sizes[:i]) for i in range(len(sizes))]
        self.compiled: CompiledLayer | None = None
        self.merged = self._known(self.product)
        products: Sequence[BaseProduct | None] = [None] * len(sizes)
        if len(sizes) == 1:
            products = [self.merged]
        elif kept is not None:
            products = [self._known(product) for product in kept.products]
        shards = [Shard.of(layer, i, size, self.in_features) for i, size in enumerate(sizes)]
        self.parts = [
            Part(self, *own) for own in zip(names, firsts, shards, sizes, products, strict=True)
        ]
        self.bias: Tensor | None = None if layer.skip_bias_add else layer.bias
        # Of a layer whose parts are summed, one rank adds it.
        summed = isinstance(layer, RowParallelLinear) and layer.tp_rank > 0
        self.passed_bias = None if summed else self.bias

    def product(self, x: Tensor) -> Tensor:
        """W0 x, `[..., out]`, without the bias."""
        return self.apply(self.layer, x, None)

    def _known(self, product: BaseProduct) -> BaseProduct:
        """The same, as compiled code takes it where it can."""
        plain = type(self.layer.quant_method) is UnquantizedLinearMethod
        if not plain or not has_programs(self.backend, self.device):
            return product
        return product_of(product, self.in_features, self.dtype)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        step = self.current.step
        if step is None:
            return self.apply(self.layer, x, bias)
        prepared = step.call.prepared.get(self.name)
        if prepared is None:
            # All at once: each product sweeps what the next layer needs for it out of the caches.
            for layer in self.current.layers:
                if layer is self or layer.compiled is None:
                    layer.prepare(x, step)
        elif prepared.shape != x.shape:
            self.prepare(x, step)
        y: Tensor = step.call.prepared[self.name].linear(x)
        return y

    def prepare(self, x: Tensor, step: Step) -> None:
        """Make ready for a step.

        x: any layer's in that step.
        """
        adapters, units = step.call.adapters, step.call.units
        if self.name not in adapters.kept:
            adapters.kept[self.name] = self._with(adapters)
        layer: Adapted | Merged | None = adapters.kept[self.name]
        x = x.new_empty(*x.shape[:-1], self.in_features)
        linear: Linear | None = None
        units, x_SI = self.current.split(x, units)
        if isinstance(layer, Merged):
            linear = layer.prepare(x_SI, units, same_input=self.name in step.same_input)
        elif layer is not None:
            linear = layer.prepare(x_SI, units)
        run = partial(self._run, linear, x_SI.shape)
        step.call.prepared[self.name] = PreparedLayer(x.shape, x.dtype, run)

    def _run(self, linear: Linear | None, shape: Sequence[int], x: Tensor) -> Tensor:
        if linear is None:
            return self.apply(self.layer, x, self.passed_bias)
        return linear(x.reshape(shape)).reshape(*x.shape[:-1], self.out_features)

    def _with(self, adapters: BatchAdapters) -> Adapted | Merged | None:
        """The layer with these adapters; None where none of them touches it."""
        factors, bias = [adapters.factors(part.name) for part in self.parts], self.passed_bias
        if all(own is None for own in factors):
            return None
        if len(self.parts) == 1 and factors[0] is not None:
            return Adapted(
                self.merged,
                factors[0],
                bias=bias,
                weight=self.weight,
                pure=True,
                backend=self.backend,
            )
        slices = [
            Slice(
                out_features=part.out_features,
                base=part.base,
                factors=own,
                bias=None if bias is None else bias[part.rows],
                weight=part.weight,
            )
            for part, own in zip(self.parts, factors, strict=True)
        ]
        return Merged(self.merged, slices, pure=True, backend=self.backend)


def keep(layer: nn.Module, pack: Callable[[nn.Module], None], *, weight: bool) -> None:
    """Have vLLM pack a layer's W0, and keep what it would throw away.

    weight: whether W0 itself is kept.
    """
    weight_OI: Tensor = layer.weight.data  # type: ignore[assignment]
    sizes: list[int] = getattr(layer, "output_partition_sizes", [])
    pack(layer)
    if weight_OI.ndim == 2 and not weight_OI.is_meta and isinstance(layer, LinearBase):
        products: tuple[BaseProduct, ...] = ()
        if len(sizes) > 1:
            products = tuple(_packed_product(part, pack) for part in weight_OI.split(sizes))
        setattr(layer, KEPT, Kept(weight_OI if weight else None, products))


def _packed_product(weight_OI: Tensor, pack: Callable[[nn.Module], None]) -> BaseProduct:
    alone: Any = nn.Module()
    alone.weight = nn.Parameter(weight_OI.contiguous(), requires_grad=False)
    pack(alone)
    return lambda x: alone.cpu_linear(x, alone.weight, None)


def _readable_weight(layer: LinearBase) -> Tensor | None:
    """W0, `[out, in]`, where it is as it was loaded."""
    if type(layer.quant_method) is not UnquantizedLinearMethod:
        return None
    weight: Tensor = layer.weight.data
    return weight if weight.ndim == 2 and weight.numel() else None


SUFFIX = "flora"
"""What an adapted layer's name ends with among the layers that compiled code finds by name."""

OPERATOR = "flora::vllm_linear"
"""What compiled code has in the place of a layer, where it does not run a program."""


def opaque(layer: AdaptedLayer, *, into: bool) -> Callable[..., Tensor]:
    """A method's `apply`: one operator that compiled code does not look into.

    into: whether its result goes where compiled code has room for it. A CUDA graph behind it reads
          it there again and again.
    """
    name, out_features = f"{layer.name}.{SUFFIX}", layer.out_features

    def apply(_: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y: Tensor = torch.ops.flora.vllm_linear(x, bias, name, out_features)
        return y

    def apply_into(_: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = torch.empty(*x.shape[:-1], out_features, dtype=x.dtype, device=x.device)
        torch.ops.flora.vllm_linear_into(x, bias, name, y)
        return y

    return apply_into if into else apply


_library = torch.library.Library("flora", "FRAGMENT")
_library.define("vllm_linear(Tensor x, Tensor? bias, str layer, int out_features) -> Tensor")
_library.define("vllm_linear_into(Tensor x, Tensor? bias, str layer, Tensor(a!) y) -> ()")


@partial(_library.impl, "vllm_linear", dispatch_key="CompositeExplicitAutograd")
def _vllm_linear(
    x: Tensor,
    bias: Tensor | None,
    layer: str,
    out_features: int,  # noqa: ARG001
) -> Tensor:
    """A layer behind its name: compiled code reads the batch as it runs, not as it is traced."""
    y: Tensor = get_forward_context().no_compile_layers[layer](x, bias)
    return y


@partial(torch.library.register_fake, "flora::vllm_linear")
def _vllm_linear_shape(
    x: Tensor,
    bias: Tensor | None,  # noqa: ARG001
    layer: str,  # noqa: ARG001
    out_features: int,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


@partial(_library.impl, "vllm_linear_into", dispatch_key="CompositeExplicitAutograd")
def _vllm_linear_into(x: Tensor, bias: Tensor | None, layer: str, y: Tensor) -> None:
    y.copy_(get_forward_context().no_compile_layers[layer](x, bias))


@partial(torch.library.register_fake, "flora::vllm_linear_into")
def _vllm_linear_into_shape(
    x: Tensor,  # noqa: ARG001
    bias: Tensor | None,  # noqa: ARG001
    layer: str,  # noqa: ARG001
    y: Tensor,  # noqa: ARG001
) -> None:
    return None
