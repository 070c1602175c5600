"""What a measurement was taken on, for its record."""

import os
import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, version

from flora.machine import processor

PACKAGES = ("flora-llm", "torch", "transformers", "peft")


def environment() -> dict[str, object]:
    """The command, the machine and the versions, as every record carries them."""
    import torch

    return {
        "command": shlex.join(["flora", *sys.argv[1:]]),
        "machine": {
            "processor": processor(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "versions": {"python": platform.python_version()} | {p: _version(p) for p in PACKAGES},
    }


def vllm_version() -> str:
    """Of what is installed, under whatever name. Raises ModuleNotFoundError where it is not."""
    distributions = packages_distributions().get("vllm")
    if not distributions:
        raise ModuleNotFoundError("No module named 'vllm'", name="vllm")
    return version(distributions[0])


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
