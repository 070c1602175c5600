"""What a layer of vLLM's is called in transformers, whose names adapters go by."""

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from functools import cached_property
from typing import Any

import torch
import transformers

WEIGHT = ".weight"
"""A mapper renames tensors, and what it looks for may end behind a layer's name."""


class Names:
    """A model's names of layers, from vLLM's to transformers'.

    vLLM only says the way there: a model may have a mapper that renames what is loaded. Here what
    it may have replaced is put back, and mapped again to see whether it was.
    """

    def __init__(self, model: Any, config: Any) -> None:
        mapper = getattr(model, "hf_to_vllm_mapper", None)
        # Of the renames alone: what is merged keeps the names of its parts.
        self.mapper: Any = None if mapper is None else mapper.get_rename_mapper()
        self.config = config

    def original(self, name: str) -> str:
        """The one name that becomes this one, or that of several which transformers' model has.

        The name itself, where there is none: no adapter fits such a layer.
        """
        if self.mapper is None:
            return name
        key = f"{name}{WEIGHT}"
        found = [
            old.removesuffix(WEIGHT)
            for old in self._undone(key)
            if self.mapper.map_name(old) == key
        ]
        if len(found) > 1:  # older checkpoints have other names, of which one may be vLLM's
            found = [old for old in found if old in self._modules]
        return found[0] if len(found) == 1 else name

    @cached_property
    def _modules(self) -> frozenset[str]:
        """The names in transformers' model of this configuration, of which no weight is made."""
        classes = (getattr(transformers, name, None) for name in self.config.architectures or ())
        cls = next(
            (c for c in classes if isinstance(self.config, getattr(c, "config_class", ()))), None
        )
        if cls is None:
            return frozenset()
        with torch.device("meta"):
            return frozenset(name for name, _ in cls(deepcopy(self.config)).named_modules())

    def _undone(self, key: str) -> set[str]:
        """What may have become a key; of its replacements the last is undone first."""
        keys = {key}
        kinds: tuple[tuple[Mapping[str, str], Callable[..., Iterator[str]]], ...] = (
            (self.mapper.orig_to_new_suffix, _suffixes),
            (self.mapper.orig_to_new_prefix, _prefixes),
            (self.mapper.orig_to_new_substr, _parts),
        )
        for renames, undo in kinds:
            for old, new in reversed([*renames.items()]):
                keys |= {undone for key in keys for undone in undo(key, old, new)}
        return keys


def _suffixes(key: str, old: str, new: str) -> Iterator[str]:
    if key.endswith(new):
        yield f"{key.removesuffix(new)}{old}"


def _prefixes(key: str, old: str, new: str) -> Iterator[str]:
    if key.startswith(new):
        yield f"{old}{key.removeprefix(new)}"


def _parts(key: str, old: str, new: str) -> Iterator[str]:
    for first in range(len(key)):
        if key.startswith(new, first):
            yield f"{key[:first]}{old}{key[first + len(new) :]}"
