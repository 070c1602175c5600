"""Offline generation: batches of prompts, each row by its own adapter."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

ENGINES = {
    "transformers": "flora.hosts.transformers_offline",
    "vllm": "flora.hosts.vllm.offline",
}


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How answers are drawn: the most new tokens; 0 is greedy; what randomness begins with."""

    new_tokens: int
    temperature: float = 0.0
    seed: int = 0


class Engine(Protocol):
    """A loaded model with its adapters.

    tokenizer: the model's, of transformers.
    room:      the most tokens of a prompt and its answer; None where there is no bound.
    """

    tokenizer: Any
    room: int | None

    def generate(self, prompts: Sequence[list[int]], adapters: Sequence[str | None]) -> list[str]:
        """The answer to each prompt's tokens, by the adapter of that name; None is the base."""


def load_engine(
    name: str, model: str, adapters: Mapping[str, Path], sampling: Sampling, *, rows: int
) -> Engine:
    """An engine of `ENGINES` with a model and its adapters' folders, for batches of so many rows.

    Raises UsageError, InvalidAdapterError, OutOfBudgetError.
    """
    load = import_module(ENGINES[name]).load
    return cast("Engine", load(model, adapters, sampling, rows=rows))
