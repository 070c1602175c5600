"""What a device's memory sets: the speed of what reads it, and what a process holds of it."""

import re
import time
from functools import cache
from pathlib import Path

import torch

BYTES = 1 << 28
REPEATS = 5


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
