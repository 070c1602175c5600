"""A layer's costs: measured once for a machine, kept, and measured again when that is asked for."""

import logging

import pytest
import torch

from flora.ops import backend_name, costs
from flora.ops.costs import costs_for, forget_costs, layer_costs
from flora.ops.plan import Costs


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(costs, "_known", {})


@pytest.fixture
def measured(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes that were measured."""
    shapes: list[tuple[int, ...]] = []
    measure = costs._measure

    def watched(weight, backend, *, grad):
        shapes.append(tuple(weight.shape))
        return measure(weight, backend, grad=grad)

    monkeypatch.setattr(costs, "_measure", watched)
    return shapes


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_costs_more(dtype, grad):
    found = layer_costs(torch.randn(96, 160).to(dtype), "auto", grad=grad)
    copies, seconds = zip(*found.product, strict=True)
    assert list(copies) == sorted(copies)
    assert len(copies) > 1
    assert all(second > 0 for second in seconds)
    assert seconds[-1] > seconds[0]
    assert found.of_modulation(1) + found.of_product(16) > 0
    assert found.of_modulation(200) >= found.of_modulation(1)


@pytest.mark.parametrize(
    ("rows", "pairs", "tokens", "asked"),
    [
        ((0,), (8,), 1, False),
        ((0,), (9,), 1, True),
        ((0,) * 8, (2,), 1, True),
        ((0,) * 8, (1,), 64, False),
        ((0, 0, 1), (0, 3), 4, True),
        ((0, 0, 1), (3, 0), 1, False),
        (tuple(range(32)), (8,) * 32, 1, False),  # copies of all groups together do not count
        ((), (16,), 64, False),
        ((0,), (16,), 0, False),
    ],
)
def test_costs_are_asked_for_where_a_group_may_be_worth_it(monkeypatch, rows, pairs, tokens, asked):
    own = Costs(pair=1.0)
    monkeypatch.setattr(costs, "layer_costs", lambda *_, **__: own)
    weight = torch.randn(32, 48)
    found = costs_for(rows, pairs, tokens=tokens, weight=weight, backend="auto", grad=False)
    assert (found is own) == asked


def test_costs_are_measured_once_and_kept(measured):
    weight = torch.randn(32, 48)
    first = layer_costs(weight, "auto", grad=False)
    assert layer_costs(torch.zeros(32, 48), "auto", grad=False) is first
    costs._known.clear()  # as in the next process
    assert layer_costs(weight, "auto", grad=False) == first
    assert measured == [(32, 48)]
    assert layer_costs(weight, backend_name("auto", weight.device), grad=False) == first
    layer_costs(weight, "reference", grad=False)
    layer_costs(weight, "auto", grad=True)
    layer_costs(weight.bfloat16(), "auto", grad=False)
    assert len(measured) == 4
    forget_costs()
    layer_costs(weight, "auto", grad=False)
    assert len(measured) == 5


def test_what_another_version_kept_is_measured_again(measured, monkeypatch):
    for code in ("one", "one", "another"):
        costs._known.clear()
        monkeypatch.setattr(costs, "_code", lambda code=code: code)
        layer_costs(torch.zeros(32, 48), "auto", grad=False)
    assert len(measured) == 2


def test_a_broken_file_is_measured_anew(measured, tmp_path):
    weight = torch.randn(32, 48)
    layer_costs(weight, "auto", grad=False)
    (file,) = (tmp_path / "cache" / "costs").iterdir()
    file.write_text('{"product": "much"}')
    costs._known.clear()
    layer_costs(weight, "auto", grad=False)
    assert len(measured) == 2


def test_a_cache_that_cannot_be_written_is_said(measured, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FLORA_CACHE", str(tmp_path / "file" / "cache"))
    with caplog.at_level(logging.WARNING):
        layer_costs(torch.randn(8, 8), "auto", grad=False)
    assert "cannot be kept" in caplog.text
    layer_costs(torch.randn(8, 8), "auto", grad=False)
    assert len(measured) == 1
