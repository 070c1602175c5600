"""What the settings of all kinds share, in the terms of PEFT's `adapter_config.json`."""

import json
import re
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator
from torch import Tensor

Shape = tuple[int | str, ...]
"""A tensor's sizes: numbers, "in" and "out" of its layer, or names that its layer's tensors share,
"rank" being one that is no larger than a rank may be."""

PATTERNS = {
    "target_modules": "{}",
    "exclude_modules": "{}",
    "layers_pattern": r"(?:^|.*?\.){}\.(?P<idx>\d+)\.",
    "rank_pattern": r"(.*\.)?({})$",
    "alpha_pattern": r"(.*\.)?({})$",
}
"""The regular expressions that PEFT makes of a config's values."""


class AdapterConfig(BaseModel):
    """What the configs of all kinds share: the layers that are meant.

    `inert` names the keys of a kind's `adapter_config.json` that do not change what it computes,
    `read_by_fill` the fields that, beside the tensors, do. `rank_field` is the one for the rank,
    and `trainable` says whether the kind's own way of training is ours. `optional` names tensors of
    `shapes` that a layer may lack, as `fill` knows; `extras`, `shared` and `derived` are for kinds
    that have more tensors than `shapes` names.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    rank_field: ClassVar[str | None] = "r"
    trainable: ClassVar[bool] = True
    optional: ClassVar[frozenset[str]] = frozenset()
    read_by_fill: ClassVar[frozenset[str]] = frozenset()
    inert: ClassVar[frozenset[str]] = frozenset(
        {
            "auto_mapping",
            "base_model_name_or_path",
            "inference_mode",
            "peft_type",
            "peft_version",
            "revision",
            "task_type",
        }
    )

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None

    @field_validator(*PATTERNS, check_fields=False)
    @classmethod
    def _patterns_compile(cls, value: Any, info: ValidationInfo) -> Any:
        patterns = [value] if isinstance(value, str) else value or ()
        if info.field_name in ("target_modules", "exclude_modules") and patterns is value:
            return value  # a list of names
        for pattern in patterns:
            check_pattern(PATTERNS[str(info.field_name)].format(pattern))
        return value

    def extras(self) -> Mapping[str, Shape]:
        """Tensors that a layer may have besides, or alone where it is not meant: biases."""
        return {}

    def shared(self) -> Mapping[str, Shape]:
        """Tensors of all layers together; "in" and "out" are the largest of those meant."""
        return {}

    def derived(self, out_features: int, in_features: int) -> Mapping[str, Tensor]:  # noqa: ARG002
        """Those of all layers together as they start, or where no file holds them."""
        return {}

    def with_targets(self, names: list[str]) -> Self:
        """The same for layers of these names."""
        return self.model_copy(update={"target_modules": names})

    def arithmetic(self) -> str:
        """All that changes what an adapter of given tensors computes, as canonical JSON."""
        fields = self.model_dump(include=set(self.read_by_fill))
        return json.dumps(sorted(fields.items()))  # a pattern's own order counts: the first match


class BlockConfig(AdapterConfig):
    """What kinds share that may be for some of a model's blocks only."""

    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None


class BiasedConfig(BlockConfig):
    """What kinds share whose folders may hold the biases of layers.

    bias: "none"; "all" for those of all layers; else for those of the layers meant.
    """

    bias: str = "none"

    def extras(self) -> Mapping[str, Shape]:
        # PEFT wraps the layers that it adapts.
        names = {"none": (), "all": ("base_layer.bias", "bias")}
        return dict.fromkeys(names.get(self.bias, ("base_layer.bias",)), ("out",))


def saved_bias(params: Mapping[str, Tensor]) -> Tensor | None:
    """The layer's own bias that a folder holds, `[out]`."""
    return params.get("base_layer.bias", params.get("bias"))


def check_pattern(pattern: str) -> None:
    """Raise ValueError for what is no regular expression."""
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"no regular expression: {error}") from None
