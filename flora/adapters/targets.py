"""Which of a model's layers an adapter is for, by PEFT's own matching."""

from collections.abc import Iterable, Mapping
from typing import Any

from flora.adapters.config import AdapterConfig
from flora.adapters.core import Base

ALL_LINEAR = "all-linear"


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
