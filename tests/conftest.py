"""What holds in every test: a bank is whole after it, and hypothesis repeats itself."""

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

from flora.bank import AdapterBank
from flora.ops import costs
from flora.ops.plan import Costs

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read where a kernel is defined

torch.set_num_threads(1)  # at the tests' sizes threads only wait for each other

hypothesis.settings.register_profile(
    "flora", deadline=None, derandomize=True, max_examples=50, database=None
)
hypothesis.settings.load_profile("flora")


@pytest.fixture(autouse=True)
def _plans_go_by_no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every machine takes the same sides; tests/ops/test_costs.py measures."""
    monkeypatch.setattr(costs, "layer_costs", lambda *_, **__: Costs())


@pytest.fixture(autouse=True)
def _banks_are_whole(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Call `check_integrity` on every bank that a test made, after it."""
    banks: list[AdapterBank] = []
    init = AdapterBank.__init__

    def remember(bank: AdapterBank, *args: object, **kwargs: object) -> None:
        init(bank, *args, **kwargs)
        banks.append(bank)

    monkeypatch.setattr(AdapterBank, "__init__", remember)
    yield
    for bank in banks:
        bank.check_integrity()
