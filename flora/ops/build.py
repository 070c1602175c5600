"""The C++ kernels: found where the wheel has them, built where a compiler is."""

import logging
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import torch

from flora.errors import BackendError
from flora.machine import has_avx512_bf16

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("cpu.cpp")

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]

FLAGS = {
    "DEFAULT": ["-DCPU_CAPABILITY_DEFAULT"],
    "AVX2": ["-DCPU_CAPABILITY_AVX2", *AVX2],
    "AVX512": ["-DCPU_CAPABILITY_AVX512", *AVX512],
    "AVX512_BF16": ["-DCPU_CAPABILITY_AVX512", *AVX512, "-mavx512bf16"],
}
"""The compiler's flags for each instruction set that the kernels are built for."""


def library(capability: str) -> str:
    """The name of the module that holds the kernels in one of `FLAGS`."""
    return f"_cpu_{capability.lower()}"


def flags(capability: str) -> list[str]:
    """All of the compiler's flags for one of `FLAGS`."""
    return ["-O3", f"-DCPU_CAPABILITY={capability}", *FLAGS[capability]]


def instructions() -> str:
    """Those of `FLAGS` for this machine, no more than ATen allows itself."""
    found = torch.backends.cpu.get_cpu_capability()
    if found == "AVX512" and has_avx512_bf16():
        return "AVX512_BF16"
    return found if found in FLAGS else "DEFAULT"


def load_kernels() -> ModuleType:
    """The functions of `cpu.cpp`, in this machine's instructions.

    Raises BackendError, with the reason, where there are none and none can be built.
    """
    capability = instructions()
    name = library(capability)
    built = SOURCE.with_name(f"{name}.so")
    if built.exists():
        try:
            return _load(name, built)
        except ImportError as error:  # built for another torch
            logger.warning("%s does not load, and is built anew: %s", built.name, error)
    try:
        from torch.utils import cpp_extension

        logger.info("building the CPU kernels for %s", capability)
        return cpp_extension.load(  # type: ignore[no-any-return]
            name=name, sources=[str(SOURCE)], extra_cflags=flags(capability)
        )
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise BackendError(f"the CPU kernels cannot be built: {reason}") from error


def _load(name: str, path: Path) -> ModuleType:
    spec = spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no module")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
