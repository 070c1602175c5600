"""What pyproject.toml cannot say: a wheel holds the CPU kernels, once for each instruction set.

A source checkout has none: it builds those of its own machine when they are first needed.
"""

import platform
import sys
import warnings
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).parent))

settings = {}
if "bdist_wheel" in sys.argv:
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        warnings.warn(
            "without torch (see pip's --no-build-isolation) the wheel has no kernels", stacklevel=1
        )
    else:
        from flora.ops.build import FLAGS, flags, library

        x86 = platform.machine() in ("x86_64", "AMD64")
        settings = {
            "ext_modules": [
                CppExtension(
                    f"flora.ops.{library(capability)}",
                    ["flora/ops/cpu.cpp"],
                    extra_compile_args=flags(capability),
                    py_limited_api=True,
                )
                for capability in (FLAGS if x86 else ["DEFAULT"])
            ],
            "cmdclass": {"build_ext": BuildExtension.with_options(no_python_abi_suffix=True)},
            "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
        }

setup(**settings)
