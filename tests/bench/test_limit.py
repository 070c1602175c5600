"""What memory sets, on this machine."""

from pathlib import Path

import pytest
import torch

from flora.bench import limit


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
