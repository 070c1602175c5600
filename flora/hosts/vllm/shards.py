"""Tensor parallelism: of a whole layer, a rank has some of W0's rows or some of its columns.

An adapter's b and V go with the columns, a, U and its bias with the rows. What a rank with some
columns computes is a part of a sum that vLLM takes over the ranks; the bias is rank 0's.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.distributed import tensor_model_parallel_all_gather, tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)

from flora.adapters.core import LayerFactors

if TYPE_CHECKING:
    from flora.hosts.vllm.layers import Part


@dataclass(frozen=True, kw_only=True)
class Shard:
    """What a rank has of one of a checkpoint's layers.

    out_features, in_features: the whole layer's.
    rows, columns: of its W0; None for all.
    replicas:      so many ranks, one after the other, have the same rows.
    has_bias:      whether this rank adds the bias.
    """

    out_features: int
    in_features: int
    rows: slice | None = None
    columns: slice | None = None
    replicas: int = 1
    has_bias: bool = True

    @classmethod
    def of(cls, layer: Any, number: int, out_features: int, in_features: int) -> "Shard":
        """Of the layer with that number of those that are merged in one of vLLM's.

        out_features, in_features: what this rank has of it.
        """
        ranks, rank = layer.tp_size, layer.tp_rank
        if ranks > 1 and isinstance(layer, RowParallelLinear):
            return cls(
                out_features=out_features,
                in_features=in_features * ranks,
                columns=slice(in_features * rank, in_features * (rank + 1)),
                has_bias=rank == 0,
            )
        if ranks > 1 and isinstance(layer, ColumnParallelLinear):
            grouped = isinstance(layer, QKVParallelLinear) and number > 0  # k and v
            replicas: int = layer.num_kv_head_replicas if grouped else 1
            first = out_features * (rank // replicas)
            return cls(
                out_features=out_features * ranks // replicas,
                in_features=in_features,
                rows=slice(first, first + out_features),
                replicas=replicas,
            )
        return cls(out_features=out_features, in_features=in_features)

    def take(self, factors: LayerFactors) -> LayerFactors:
        """This rank's part of a whole layer's factors."""
        found = dict(factors.parts())
        if self.rows is not None:
            for name in ("hadamard_out", "up", "bias"):
                if name in found:
                    found[name] = found[name][..., self.rows].contiguous()
        if self.columns is not None:
            for name in ("hadamard_in", "down"):
                if name in found:
                    found[name] = found[name][..., self.columns].contiguous()
        if not self.has_bias:
            found.pop("bias", None)
        return replace(LayerFactors(), **found)

    def whole(self, y: Tensor) -> Tensor:
        """A whole layer's outputs from each rank's, `[..., out]`; all ranks come here together."""
        if self.columns is not None:
            reduced: Tensor = tensor_model_parallel_all_reduce(y)
            return reduced
        if self.rows is None:
            return y
        own = y.shape[-1]
        parts = tensor_model_parallel_all_gather(y, dim=-1).split(own, dim=-1)
        return torch.cat(parts[:: self.replicas], dim=-1)


class WholeLayer:
    """A layer over all ranks, as an adapter's kind may ask of it; they all ask together."""

    weight = None

    def __init__(self, part: "Part") -> None:
        self.part, self.shard = part, part.shard
        self.out_features, self.in_features = self.shard.out_features, self.shard.in_features

    @property
    def bias(self) -> Tensor | None:
        bias = self.part.bias
        return bias if bias is None or self.shard.columns is not None else self.shard.whole(bias)

    def product(self, x: Tensor, /) -> Tensor:
        """W0 x, `[..., out]`, without the bias."""
        if (columns := self.shard.columns) is not None:
            x = x[..., columns].contiguous()  # vLLM's products take it for granted
        return self.shard.whole(self.part.product(x))
