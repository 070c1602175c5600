"""Models that share their weights, so that the systems of a study stand in memory at once."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def share_weights(model: Any) -> Any:
    """Another model of the same weights, which nothing is attached to."""
    return copy.deepcopy(model, {id(p): p for p in [*model.parameters(), *model.buffers()]})


@contextmanager
def keep_flags(model: Any) -> Iterator[None]:
    """Give each parameter its `requires_grad` back: PEFT freezes the weights that it shares."""
    flags = {p: p.requires_grad for p in model.parameters()}
    try:
        yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
