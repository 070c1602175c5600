"""Where things are kept, what the processor is called, and pages of memory."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flora.machine import HUGE_PAGES, cache_folder, fast_dtype, processor


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/xdg")
    monkeypatch.setenv("FLORA_CACHE", "~/mine")
    assert cache_folder() == Path("/home/someone/mine")
    monkeypatch.delenv("FLORA_CACHE")
    assert cache_folder() == Path("/var/xdg/flora")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == Path("/home/someone/.cache/flora")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path("/home/someone/.cache/flora")


def test_the_processor_has_a_name():
    assert processor()


@pytest.mark.parametrize(("has", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_16_bits_are_fast_where_there_are_instructions(monkeypatch, has, expected):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has)
    assert fast_dtype() == expected


def test_16_bits_are_fast_where_the_processor_says_so():
    flags = Path("/proc/cpuinfo").read_text().split() if platform.machine() == "x86_64" else []
    if not flags:
        pytest.skip("what other processors have is not told")
    assert fast_dtype() == ("bfloat16" if "avx512_bf16" in flags else "float32")


def test_memory_comes_in_huge_pages_where_asked():
    choice = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not choice.is_file() or "[madvise]" not in choice.read_text():
        pytest.skip("the system does not leave it to who asks")
    if platform.libc_ver() < ("glibc", "2.35"):
        pytest.skip("an older libc knows no such setting")

    def huge_kilobytes(environment: dict[str, str]) -> int:
        code = "held = bytearray(2**26); print(open('/proc/self/smaps_rollup').read())"
        bare = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=bare | environment,
            capture_output=True,
            text=True,
            check=True,
        )
        figures = {line[0]: line[1] for line in map(str.split, done.stdout.splitlines()) if line}
        return int(figures["AnonHugePages:"])

    assert huge_kilobytes({}) == 0
    assert huge_kilobytes(HUGE_PAGES) >= 2**16 - 2 * 2**11
