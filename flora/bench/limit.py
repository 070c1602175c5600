"""What no system can beat: the base's time with W0's further products and what has to be read.

And what a process holds of a device's memory.
"""

import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from flora.adapters.core import LayerFactors
from flora.base import ModelBase
from flora.bench.turns import speed_ratio
from flora.ops.plan import MODULATION_TOKENS

BYTES = 1 << 28
REPEATS = 5


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is generated: so many new tokens to so many random ones of a prompt.

    rows:     all that is generated at once; of a server the most that it runs at once, or 8 where
              they are fewer.
    distinct: different adapters; the rows of a batch take them in turns.
    """

    rows: int
    distinct: int
    prompt_tokens: int
    new_tokens: int


class Size(NamedTuple):
    """Of an adapter's factors in one layer: how many pairs, and bytes of all in its type."""

    pairs: int
    nbytes: int


def sizes_of(layers: Mapping[str, LayerFactors], base: ModelBase) -> dict[str, Size]:
    """Of an adapter's layers, by name."""
    return {
        name: Size(own.pairs, own.numel * base.specs[name].dtype.itemsize)
        for name, own in layers.items()
    }


@dataclass(frozen=True, eq=False, kw_only=True)
class Further:
    """What a generation with adapters does at least that the base's does not.

    products: of all layers but the head by their tokens, less the base's own.
    nbytes:   to be read.
    """

    products: Counter[int]
    nbytes: int

    @classmethod
    def of(
        cls,
        adapters: Mapping[str, Mapping[str, Size]],
        rows: Sequence[str | None],
        load: Load,
        base: ModelBase,
    ) -> "Further":
        """For each pair a product of its own, or each adapter's modulated W0, whichever is faster.

        A batch reads its factors once a forward.

        adapters: by name, those of all rows.
        rows:     each row's adapter; None for the base.
        """
        layers = [*adapters.values()]
        factors = sum(size.nbytes for own in layers for size in own.values())
        copies = [{} if name is None else adapters[name] for name in rows]
        pairs = max(
            sum(max(1, own[m].pairs) if m in own else 1 for own in copies) for m in layers[0]
        )
        if load.prompt_tokens * (pairs - load.rows) <= MODULATION_TOKENS * load.distinct:
            products: Counter[int] = Counter()
            for tokens, times in ((load.prompt_tokens, 1), (1, load.new_tokens - 1)):
                products[pairs * tokens] += times
                products[load.rows * tokens] -= times
            more = Counter({tokens: times for tokens, times in products.items() if times})
            return cls(products=more, nbytes=load.new_tokens * factors)
        weights = {m: base.specs[m].dtype.itemsize * o * i for m, (o, i) in base.shapes.items()}
        modulated = sum(weights[m] for own in layers for m, size in own.items() if size.pairs > 1)
        return cls(products=Counter(), nbytes=load.new_tokens * (factors + modulated))

    def ratio(
        self,
        own: Sequence[float],
        base: Sequence[float],
        of_products: Mapping[int, Sequence[float]],
        device: torch.device,
    ) -> float:
        """How fast a system is beside the limit, from the seconds of each turn."""
        parts = [base, [self.nbytes / bandwidth(device)] * len(own)]
        parts += [[n * s for s in of_products[tokens]] for tokens, n in self.products.items()]
        return speed_ratio(own, [sum(of_turn) for of_turn in zip(*parts, strict=True)])


def products(base: ModelBase, tokens: int) -> Callable[[], None]:
    """A function that takes once the product of each layer but the head."""
    layers = [layer for name, layer in base.layers.items() if name != base.head]
    spec = next(iter(base.specs.values()))
    inputs = {
        width: torch.randn(tokens, width).to(spec.device, spec.dtype)
        for width in {layer.in_features for layer in layers}
    }

    def run() -> None:
        with torch.inference_mode():
            for layer in layers:
                layer.product(inputs[layer.in_features])
        synchronize(spec.device)

    return run


@cache
def bandwidth(device: torch.device) -> float:
    """Bytes a second that a copy within the device's memory reads and writes, at its best."""
    source = torch.ones(BYTES, dtype=torch.uint8, device=device)
    to = torch.empty_like(source)
    shortest = float("inf")
    for _ in range(REPEATS):
        synchronize(device)
        start = time.perf_counter()
        to.copy_(source)
        synchronize(device)
        shortest = min(shortest, time.perf_counter() - start)
    return 2 * BYTES / shortest


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory_peak(device: torch.device, *, reset: bool = False) -> int:
    """The most bytes held so far: by torch on a GPU, by the process on a CPU, where Linux tells.

    reset: count from now on, and so return what is held now.
    """
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(found[1]) if found else 0
