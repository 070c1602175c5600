"""What no system can beat, and what memory sets, on this machine."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from flora.base import ModelBase
from flora.bench import limit
from flora.bench.adapters import parse_specs
from flora.bench.limit import Further, Load, sizes_of
from tests import zoo


def test_a_bandwidth_is_that_of_a_copy(monkeypatch):
    monkeypatch.setattr(limit, "BYTES", 1 << 24)
    limit.bandwidth.cache_clear()
    try:
        assert 1e8 < limit.bandwidth(torch.device("cpu")) < 1e13
    finally:
        limit.bandwidth.cache_clear()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells")
def test_the_peak_counts_from_where_it_was_reset():
    device = torch.device("cpu")
    before = limit.memory_peak(device, reset=True)
    size = 1 << 27
    torch.ones(size, dtype=torch.uint8)
    assert size * 0.9 < limit.memory_peak(device) - before < size * 1.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_long_prompt_is_held_against_the_modulated_weights(dtype):
    base = ModelBase(zoo.build("Llama").to(dtype))
    made = [parse_specs("FLORA:4", 1)[0].adapter(base, seed) for seed in range(2)]
    sizes = {str(number): sizes_of(adapter.layers, base) for number, adapter in enumerate(made)}
    rows = ["0", "1", "0"]
    numbers = sum(t.numel() for a in made for f in a.layers.values() for _, t in f.parts())
    factors = numbers * dtype.itemsize
    steps = Load(rows=3, distinct=2, prompt_tokens=4, new_tokens=3)
    more = {48: 1, 12: 2 - 1, 3: -2}  # a step's copies are as many as the prompt's tokens
    found = Further.of(sizes, rows, steps, base)
    assert (found.products, found.nbytes) == (more, 3 * factors)
    prompts = Load(rows=3, distinct=2, prompt_tokens=512, new_tokens=1)
    weights = sum(dtype.itemsize * o * i for m, (o, i) in base.shapes.items() if m != base.head)
    found = Further.of(sizes, rows, prompts, base)
    assert (found.products, found.nbytes) == ({}, factors + 2 * weights)


def test_a_limit_is_the_base_with_what_is_further():
    further = Further(products=Counter({8: 2, 4: -1}), nbytes=0)
    cpu, seconds = torch.device("cpu"), {8: [3.0, 4.0], 4: [1.0, 2.0]}
    assert further.ratio([10.0, 20.0], [5.0, 4.0], seconds, cpu) == (10 / 10 + 10 / 20) / 2
