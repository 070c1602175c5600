"""One adapted linear layer in PEFT."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from flora.adapters.core import LayerFactors
from flora.adapters.kinds import flora
from flora.adapters.targets import by_pattern
from flora.bank import join_factors
from flora.base import ModelBase, plain_weight, sizes_of
from flora.errors import ShapeError, UsageError
from flora.ops.adapted_linear import adapted_linear
from flora.ops.traced import hadamard_linear
from flora.tuner.config import FloraConfig

outside_of_graphs = torch.compiler.disable(adapted_linear)

BASE = "__base__"
"""PEFT's name, in `adapter_names`, for a row without an adapter."""

SETTINGS, NO_LAYERS = flora.Config(), ModelBase(nn.Module())
"""What a kind's `fill` asks for: FLoRA's reads the rank off the factors, and nothing else."""

RANDOM_SPREAD = 0.3
"""Standard deviation of a random start around the identity."""


class FloraLinear(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A linear layer with each adapter's `flora_A`, `[r, out]`, and `flora_B`, `[r, in]`."""

    adapter_layer_names = ("flora_A", "flora_B")
    other_param_names = ("r",)

    # PEFT is untyped, and nn.Module has a type of its own for what it does not know.
    base_layer: nn.Module
    get_base_layer: Callable[[], nn.Module]
    _get_base_layer_device_and_dtype: Callable[
        [nn.Module], tuple[torch.device | None, torch.dtype | None]
    ]
    active_adapters: list[str]
    disable_adapters: bool
    merged: bool

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: FloraConfig, module: str
    ) -> None:
        """Wrap a layer, in the model named `module`. Raises UsageError where it is not linear."""
        super().__init__()
        self.base_layer = base_layer
        if (sizes := sizes_of(base := self.get_base_layer())) is None:
            raise UsageError(f"FLoRA adapts linear layers, but {module} is {type(base).__name__}")
        self.out_features, self.in_features = sizes
        self.flora_A = nn.ParameterDict()
        self.flora_B = nn.ParameterDict()
        self.r: dict[str, int] = {}
        self.merged_adapters: list[str] = []
        self._before_merge: Tensor | None = None
        self._disable_adapters = False
        self._active_adapter: str | list[str] = adapter_name
        self.update_layer(adapter_name, config, module)

    def update_layer(self, adapter_name: str, config: FloraConfig, module: str) -> None:
        """Add an adapter at its start, in at least fp32, whatever type the layer has."""
        kind = flora.Config(r=by_pattern(config.rank_pattern or {}, module, config.r))
        layer = ModelBase(self.get_base_layer())  # whose only layer has no name
        params = flora.init(kind, "", layer, torch.default_generator)
        if not config.init_weights:
            params = {n: 1 + RANDOM_SPREAD * torch.randn_like(p) for n, p in params.items()}
        dtype = torch.promote_types(self.base_dtype, torch.float32)
        active = adapter_name in self.active_adapters
        for name, param in params.items():
            getattr(self, name)[adapter_name] = nn.Parameter(param.to(dtype), requires_grad=active)
        self.r[adapter_name] = params["flora_A"].shape[0]
        self._move_adapter_to_device_of_base_layer(adapter_name)

    @property
    def base_dtype(self) -> torch.dtype:
        """The type that the base layer computes in; fp32 where its weight does not say."""
        _, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        return dtype if dtype is not None and dtype.is_floating_point else torch.float32

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """PEFT's own takes the layer's type too, and bf16 loses the start: its steps are 2^-7."""
        if device is None:
            device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        for params in (self.flora_A, self.flora_B):
            if device is not None and params[adapter_name].device.type != "meta":
                # In place, so that a shared flora_B stays one parameter.
                params[adapter_name].data = params[adapter_name].data.to(device)

    def forward(
        self, x: Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> Tensor:
        """The layer's output, `[..., out]`, for x, `[..., in]`.

        adapter_names: one for each of x's first axis; where None, all of x takes the active ones.
        """
        if adapter_names is not None:
            self._check_rows(x, adapter_names)
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self._base(x, *args, **kwargs)

        if adapter_names is None:
            rows: tuple[int, ...] = (0,)
            groups = [self._factors(self.active_adapters)]
        else:
            names = list(dict.fromkeys(adapter_names))
            rows = tuple(names.index(name) for name in adapter_names)
            groups = [self._factors([name]) for name in names]
        if not any(groups):
            return self._base(x, *args, **kwargs)

        return self._adapted(x, rows, groups, *args, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the active adapters, or those named, into W0, which is kept (in the CPU's memory).

        Raises UsageError where the base layer has no weight to write to, or, with `safe_merge`,
        where the result is not finite; the layer is then as it was.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.flora_A]
        factors = self._factors([*self.merged_adapters, *names])
        if not names or factors is None:
            return
        base, shape = self.get_base_layer(), (self.out_features, self.in_features)
        weight, turned = getattr(base, "weight", None), isinstance(base, Conv1D)
        if (
            base is not self.base_layer
            or not isinstance(weight, Tensor)
            or not weight.is_floating_point()
            or weight.shape != (shape[::-1] if turned else shape)
        ):
            raise UsageError(f"cannot merge into {type(self.base_layer).__name__}: no plain weight")
        before = self._before_merge
        if before is None:
            before = weight.detach().to("cpu", copy=True)
        with torch.no_grad():
            merged = before.to(weight.device, weight.dtype)
            merged = factors.merge(merged.T).T.contiguous() if turned else factors.merge(merged)
        if safe_merge and not torch.isfinite(merged).all():
            raise UsageError(
                f"merging {', '.join(names)} gives NaN or Inf in a layer; it is unmerged"
            )
        weight.data.copy_(merged)
        self._before_merge = before
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Give W0 back, bit for bit; nothing where nothing is merged."""
        if self._before_merge is None:
            return
        weight: Any = self.get_base_layer().weight
        weight.data.copy_(self._before_merge)
        self._before_merge = None
        self.merged_adapters.clear()

    def _check_rows(self, x: Tensor, adapter_names: Sequence[str]) -> None:
        if len(x) != len(adapter_names):
            raise ShapeError(f"{len(adapter_names)} adapter_names for {len(x)} rows")
        if self.merged:
            raise UsageError(
                "adapter_names cannot be used while adapters are merged; unmerge first"
            )

    def _factors(self, names: Sequence[str]) -> LayerFactors | None:
        """Those of adapters that act together, W0 + Σ_i (W_i − W0); None where none acts here."""
        parts = [
            flora.fill(
                SETTINGS, "", {"flora_A": self.flora_A[n], "flora_B": self.flora_B[n]}, NO_LAYERS
            )
            for n in names
            if n in self.flora_A
        ]
        if len(parts) < 2:
            return parts[0] if parts else None
        outs = [p.hadamard_out for p in parts if p.hadamard_out is not None]
        ins = [p.hadamard_in for p in parts if p.hadamard_in is not None]
        outs.append(outs[0].new_full((1, self.out_features), 1 - len(parts)))
        ins.append(ins[0].new_ones(1, self.in_features))
        return LayerFactors(hadamard_out=torch.cat(outs), hadamard_in=torch.cat(ins))

    def _adapted(
        self,
        x: Tensor,
        rows: tuple[int, ...],
        groups: Sequence[LayerFactors | None],
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        bias = getattr(self.get_base_layer(), "bias", None)

        def black_box(x: Tensor) -> Tensor:
            y = self._base(x, *args, **kwargs)
            return y if bias is None else y.to(torch.promote_types(y.dtype, torch.float32)) - bias

        weight = _plain_weight(self.base_layer)
        if torch.compiler.is_compiling() and weight is not None and len(rows) == 1:
            factors: Any = groups[0]  # FLoRA's: both sides, and nothing else
            return hadamard_linear(x, weight, factors.hadamard_in, factors.hadamard_out, bias)
        y: Tensor = outside_of_graphs(
            x.reshape(len(rows), -1, self.in_features),
            black_box if weight is None else partial(linear, weight=weight),
            join_factors(groups, x.dtype),
            rows,
            bias=bias,
            weight=weight,
            pure=weight is not None,
        )
        return y.reshape(*x.shape[:-1], self.out_features)

    def _base(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = self.base_layer(x, *args, **kwargs)
        return y


def _plain_weight(layer: nn.Module) -> Tensor | None:
    """W0, `[out, in]`, of a layer that is F.linear and nothing else; None for a black box."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks)
    return None if any(hooks) else plain_weight(layer)
