"""Which of the layers of vLLM's model adapters reach, and what they are called."""

from collections.abc import Callable
from copy import copy
from typing import Any

from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.models import supports_multimodal
from vllm.model_executor.utils import get_packed_modules_mapping

from flora.hosts.vllm.compiled import compiled_layer, without_python
from flora.hosts.vllm.encoder import Items, in_encoder, map_items, reads_encoder
from flora.hosts.vllm.graphs import split_at_layers
from flora.hosts.vllm.layers import OPERATOR, SUFFIX, AdaptedLayer, Current, opaque
from flora.hosts.vllm.names import Names
from flora.hosts.vllm.settings import Settings

FORWARDS = tuple(cls.forward for cls in (ColumnParallelLinear, RowParallelLinear, ReplicatedLinear))
"""What comes through the linear method; a class with a forward of its own may not."""


def adapt(
    model: Any, current: Current, items: Items, vllm_config: VllmConfig
) -> list[AdaptedLayer]:
    """Put the operator around the linear layers of vLLM's model, and return them.

    Some are left as they are, and no adapter fits them: whose class computes them in a way of its
    own, whose bias is added elsewhere, whose tokens are neither the language model's nor an
    encoder's, or which a checkpoint has whole where a rank has some of each part. Raises UsageError
    where vLLM would capture adapters in a CUDA graph.

    current: of the tokens of a step.
    items:   of an encoder-decoder model's encoder.
    """
    cut = split_at_layers(vllm_config.compilation_config)
    backend = Settings.of(vllm_config).backend
    packed = get_packed_modules_mapping(model)
    names = Names(model, vllm_config.model_config.hf_config)
    context = vllm_config.compilation_config.static_forward_context
    prefixes: tuple[str, ...] = ("",)
    if supports_multimodal(model) and hasattr(model, "get_mm_mapping"):
        prefixes = tuple(model.get_mm_mapping().language_model)
    has_encoder = vllm_config.model_config.is_encoder_decoder
    if has_encoder:
        map_items(model)
    layers: list[AdaptedLayer] = []
    for name, module in model.named_modules():
        if (
            not isinstance(module, LinearBase)
            or type(module).forward not in FORWARDS
            or (module.skip_bias_add and module.bias is not None)
            or not name.startswith(prefixes)
        ):
            continue
        parent, _, own = name.rpartition(".")
        parts = [f"{parent}.{part}".lstrip(".") for part in packed.get(own, [own])]
        if module.tp_size > 1 and len(parts) < len(module.output_partition_sizes):
            continue  # a checkpoint has as one what each rank has some of, part by part
        encodes = has_encoder and in_encoder(name)
        takes_items = encodes or (has_encoder and reads_encoder(model, name))
        layer = AdaptedLayer(
            items if takes_items else current,
            name,
            module,
            [names.original(part) for part in parts],
            backend,
        )
        layer.current.layers.append(layer)
        # A copy, as layers may have one method between them.
        method: Any = copy(module.quant_method)
        if encodes:  # before the forward that compiled code and its layers' names belong to
            method.apply = _direct(layer)
        else:
            context[f"{name}.{SUFFIX}"] = layer
            layer.compiled = compiled_layer(layer, f"{name}.{SUFFIX}", OPERATOR)
            if layer.compiled is not None:
                method.apply = without_python(layer.compiled)
            else:
                method.apply = opaque(layer, into=cut)
        module.quant_method = method
        layers.append(layer)
    return layers


def _direct(layer: AdaptedLayer) -> Callable[..., Tensor]:
    """A method's `apply` that is never compiled."""

    def apply(_: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return layer(x, bias)

    return apply
