"""The kernels: in every instruction set, in a wheel, and where none can be built."""

import os
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

from flora.ops.build import FLAGS, instructions, library

ROOT = Path(__file__).parents[2]

SHOW = """
import logging, torch
from flora.ops import get_backend
logging.basicConfig(level=logging.INFO)
print(get_backend("{backend}", torch.device("cpu")).__name__)
"""


def run(*command: str | Path, **env: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | {name: str(value) for name, value in env.items()},
        capture_output=True,
        text=True,
        check=False,
    )


JUDGE = """
import sys, pytest
from flora.ops import build
build.instructions = lambda: "{capability}"
sys.exit(pytest.main(["tests/ops/test_adapted_linear.py", "-k", "any_mix and cpu"]))
"""


@pytest.mark.parametrize("capability", FLAGS)
def test_the_kernels_are_right_in_every_instruction_set(capability):
    order = list(FLAGS)
    if order.index(instructions()) < order.index(capability):
        pytest.skip(f"this processor has no {capability}")
    done = run("-c", JUDGE.format(capability=capability))
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout


def test_without_a_compiler_eager_is_chosen_and_the_log_says_why(tmp_path):
    missing = {"PATH": "/nonexistent", "TORCH_EXTENSIONS_DIR": tmp_path}
    chosen = run("-c", SHOW.format(backend="auto"), **missing)
    assert chosen.stdout.strip() == "flora.ops.eager"
    assert "WARNING:flora.ops:backend for cpu: eager, which is slower; " in chosen.stderr
    asked = run("-c", SHOW.format(backend="cpu"), **missing)
    assert "BackendError: the CPU kernels cannot be built: " in asked.stderr


@pytest.mark.slow
def test_a_wheel_brings_the_kernels(tmp_path):
    tree, site = tmp_path / "tree", tmp_path / "site"
    subprocess.run(["git", "clone", "--quiet", ROOT, tree], check=True)  # noqa: S607
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, tree]
    assert run("-m", "pip", *build).returncode == 0
    (wheel,) = tmp_path.glob("*.whl")
    assert {f"flora/ops/{library(name)}.so" for name in FLAGS} <= set(ZipFile(wheel).namelist())
    assert run("-m", "pip", "install", "--no-deps", "--target", site, wheel).returncode == 0
    # Without a compiler: what runs is what the wheel brought.
    code = f"import sys; sys.path.insert(0, {str(site)!r})" + SHOW.format(backend="cpu")
    found = run("-c", code, PATH="/nonexistent", TORCH_EXTENSIONS_DIR=tmp_path / "none")
    assert found.stdout.strip() == "flora.ops.cpu", found.stderr
