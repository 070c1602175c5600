"""The machine that flora runs on: its name for records, its memory, and where things are kept."""

import os
import platform
from pathlib import Path
from typing import Literal

HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""The environment of a process that is to have its memory by 2 MB where Linux leaves that to who
asks. By 4 kB it comes from all over what is free, and of equal engines of vLLM on a CPU the one
that started first was slower by up to a third."""


def cache_folder() -> Path:
    """`$FLORA_CACHE`, or else `flora` in the user's cache folder; it need not exist yet."""
    if own := os.environ.get("FLORA_CACHE"):
        return Path(own).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification has relative paths ignored.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "flora"


def processor() -> str:
    """The processor's name."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def has_avx512_bf16() -> bool:
    """Whether this processor has AVX-512's instructions for bf16."""
    import torch

    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())


def fast_dtype() -> Literal["bfloat16", "float32"]:
    """The smallest type in which this processor multiplies matrices by instructions of its own."""
    import torch

    fast = has_avx512_bf16()
    if platform.machine() in ("aarch64", "arm64") and torch.backends.mkldnn.is_available():
        fast = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "bfloat16" if fast else "float32"
