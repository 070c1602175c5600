"""Rows that name their adapter."""

import hashlib
import json
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from flora.errors import UsageError, faults

IGNORED = -100
"""The label of a token that is not learned: the prompt's, and padding."""


class Example(BaseModel):
    """One line of a data file: a text of which all is learned, or a prompt with its completion."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    adapter: str
    text: str | None = None
    prompt: str | None = None
    completion: str | None = None

    def model_post_init(self, _: Any) -> None:
        if (self.text is None) == (self.prompt is None or self.completion is None):
            raise ValueError("either text, or prompt and completion")


@dataclass(frozen=True, eq=False, kw_only=True)
class Row:
    """One example's tokens, or a piece of it. labels: the tokens, or IGNORED."""

    adapter: str
    tokens: Sequence[int]
    labels: Sequence[int]


@dataclass(frozen=True, eq=False, kw_only=True)
class RowBatch:
    """Rows side by side: `[rows, tokens]` each, padded on the right."""

    adapters: list[str]
    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


def read_examples(path: str | os.PathLike[str]) -> list[Example]:
    """Read a JSONL file of examples. Raises UsageError for the first line that does not hold."""
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"there is no data file {str(path)!r}")
    examples = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            examples.append(Example(**json.loads(line)))
        except ValidationError as error:
            raise UsageError(f"{path}, line {number}: {faults(error)}") from None
        except (ValueError, TypeError, RecursionError) as error:
            raise UsageError(f"{path}, line {number}: {error}") from None
    if not examples:
        raise UsageError(f"{path} holds no example")
    return examples


def tokenize(example: Example, tokenizer: Any, max_tokens: int) -> Iterator[Row]:
    """The rows of an example, of at most `max_tokens`: a long text in pieces, a long pair cut off.

    The end-of-sequence token closes a completion, as the adapter must learn to stop.
    """
    if example.text is not None:
        tokens = tokenizer(example.text)["input_ids"]
        for start in range(0, len(tokens), max_tokens):
            piece = tokens[start : start + max_tokens]
            if len(piece) > 1:
                yield Row(adapter=example.adapter, tokens=piece, labels=piece)
        return
    prompt = tokenizer(example.prompt)["input_ids"]
    completion = tokenizer(example.completion, add_special_tokens=False)["input_ids"]
    completion = [*completion, tokenizer.eos_token_id]
    tokens = [*prompt, *completion][:max_tokens]
    labels = [*[IGNORED] * len(prompt), *completion][:max_tokens]
    if any(label != IGNORED for label in labels[1:]):
        yield Row(adapter=example.adapter, tokens=tokens, labels=labels)


class RowStream:
    """Batches for ever: of each adapter so many rows, drawn from its own, shuffled each time round.

    What an adapter is given depends on the seed and its name, not on who trains beside it.
    """

    def __init__(self, rows: Mapping[str, Sequence[Row]], per_adapter: int, seed: int) -> None:
        if empty := [name for name, own in rows.items() if not own]:
            raise UsageError(f"no rows to train on for: {', '.join(empty)}")
        self.per_adapter = per_adapter
        self._draws = [_draw(own, derive_seed(seed, name)) for name, own in rows.items()]

    def __iter__(self) -> Iterator[list[Row]]:
        while True:
            yield [row for draw in self._draws for row in islice(draw, self.per_adapter)]


def collate(rows: Sequence[Row], pad: int) -> RowBatch:
    """Lay rows side by side, with the padding token's id on the right."""
    width = max(len(row.tokens) for row in rows)

    def padded(parts: Iterator[Sequence[int]], filler: int) -> Tensor:
        return torch.tensor([[*part, *[filler] * (width - len(part))] for part in parts])

    return RowBatch(
        adapters=[row.adapter for row in rows],
        input_ids=padded((row.tokens for row in rows), pad),
        attention_mask=padded(([1] * len(row.tokens) for row in rows), 0),
        labels=padded((row.labels for row in rows), IGNORED),
    )


def derive_seed(seed: int, name: str) -> int:
    """A seed of an adapter's own."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:6], "big")


def _draw(rows: Sequence[Row], seed: int) -> Iterator[Row]:
    order = list(rows)
    shuffle = random.Random(seed).shuffle  # noqa: S311
    while True:
        shuffle(order)
        yield from order
