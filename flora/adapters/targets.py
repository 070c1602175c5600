"""Which of a model's layers an adapter is for, in PEFT's terms and by PEFT's own matching."""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

from flora.adapters.core import Base

ALL_LINEAR = "all-linear"

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
    `read_by_fill` the fields that, beside the tensors, do.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

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
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    @field_validator(*PATTERNS, check_fields=False)
    @classmethod
    def _patterns_compile(cls, value: Any, info: ValidationInfo) -> Any:
        patterns = [value] if isinstance(value, str) else value or ()
        if info.field_name in ("target_modules", "exclude_modules") and patterns is value:
            return value  # a list of names
        for pattern in patterns:
            try:
                re.compile(PATTERNS[str(info.field_name)].format(pattern))
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(f"no regular expression: {error}") from None
        return value

    def arithmetic(self) -> str:
        """All that changes what an adapter of given tensors computes, as canonical JSON."""
        fields = self.model_dump(include=set(self.read_by_fill))
        return json.dumps(sorted(fields.items()))  # a pattern's own order counts: the first match


def targeted(config: AdapterConfig, base: Base) -> set[str]:
    """The names of the base's linear layers that a config means.

    "all-linear" (in any case of letters) is all of them but the output embedding.
    """
    if config.target_modules is None:
        return set()
    if isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_LINEAR:
        names = set(base.shapes) - {base.head}
        config = config.model_copy(update={"target_modules": sorted(names)})

    from peft.tuners.tuners_utils import check_target_module_exists

    return {name for name in base.shapes if check_target_module_exists(config, name)}


def shortest_targets(modules: Iterable[str], base: Base) -> list[str]:
    """The last parts of the modules' names where these mean the same layers, else whole names."""
    modules = set(modules)
    endings = sorted({name.rpartition(".")[2] for name in modules})
    if targeted(AdapterConfig(target_modules=endings), base) == modules:
        return endings
    return sorted(modules)


def by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """A module's value in a `rank_pattern` or `alpha_pattern`, by PEFT's rule."""
    if not patterns:
        return default
    from peft.utils.other import get_pattern_key

    return patterns.get(get_pattern_key(list(patterns), module), default)
