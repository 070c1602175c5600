"""The C++ kernels: found where the wheel has them, built where a compiler is."""

import logging
from pathlib import Path

import torch

from flora.errors import BackendError

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("cpu.cpp")

FLAGS = {
    "DEFAULT": [],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"],
}
"""The compiler's flags for each of ATen's instruction sets that the kernels are built for."""


def library(capability: str) -> str:
    """The name of the library that holds the kernels in one of `FLAGS`."""
    return f"_cpu_{capability.lower()}"


def flags(capability: str) -> list[str]:
    """All of the compiler's flags for one of `FLAGS`."""
    macros = [f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}"]
    return ["-O3", *macros, *FLAGS[capability]]


def load_kernels() -> None:
    """Register the operators of `cpu.cpp` as `torch.ops.flora_cpu`, in this machine's instructions.

    Raises BackendError, with the reason, where there are none and none can be built.
    """
    found = torch.backends.cpu.get_cpu_capability()
    capability = found if found in FLAGS else "DEFAULT"
    built = SOURCE.with_name(f"{library(capability)}.so")
    if built.exists():
        try:
            torch.ops.load_library(built)
        except OSError as error:  # built for another torch
            logger.warning("%s does not load, and is built anew: %s", built.name, error)
        else:
            return
    try:
        from torch.utils import cpp_extension

        logger.info("building the CPU kernels for %s", capability)
        cpp_extension.load(
            name=f"flora{library(capability)}",
            sources=[str(SOURCE)],
            extra_cflags=flags(capability),
            is_python_module=False,
        )
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise BackendError(f"the CPU kernels cannot be built: {reason}") from error
