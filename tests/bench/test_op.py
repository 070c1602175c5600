"""`flora bench op`: the systems compute what they say, and the limits are what they say."""

import json

import pytest
import torch
import torch.nn.functional as F

from flora.bench import op
from flora.bench.op import SYSTEMS, Load, explain, measure
from flora.cli import main
from flora.errors import UsageError
from flora.ops import BACKENDS, backend_name

CPU = {"dtype": torch.float32, "device": torch.device("cpu")}


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(op, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(op, "bandwidth", lambda _: 1e9)


def load(**changes) -> Load:
    return Load(
        **{"out_features": 12, "in_features": 8, "rows": 6, "distinct": 3, "rank": 2} | changes
    )


def test_each_system_runs_the_kinds_that_it_can():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 8, generator=generator)
    found = {
        (system, kind): run()
        for system, kind, run in op._systems(load(), weight, SYSTEMS, "auto", generator)
    }
    assert set(found) == {
        ("flora", "FLORA"),
        ("flora", "LORA"),
        ("flora-activation", "FLORA"),
        ("flora-weight", "FLORA"),
        ("bmm", "LORA"),
        ("peft", "LORA"),
    }


def test_one_kind_has_one_result_whatever_computes_it():
    weight = torch.randn(12, 8, generator=torch.Generator().manual_seed(1))
    results: dict[str, list[torch.Tensor]] = {}
    with torch.no_grad():
        for system in SYSTEMS:
            generator = torch.Generator().manual_seed(2)  # the same adapters for each
            for _, kind, run in op._systems(load(), weight, [system], "auto", generator):
                results.setdefault(kind, []).append(run())
    assert {kind: len(found) for kind, found in results.items()} == {"FLORA": 3, "LORA": 3}
    for first, *others in results.values():
        for other in others:
            torch.testing.assert_close(other, first)
    x = torch.randn(6, 1, 8, generator=torch.Generator().manual_seed(2))
    base = F.linear(x, weight)
    assert all((found[0] - base).abs().max() > 0.01 for found in results.values())


def test_the_help_names_each_backend(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "op", "--help"])
    shown = capsys.readouterr().out
    assert [name for name in BACKENDS if name not in shown] == []


def test_the_records():
    records = measure(load(), repeats=2, **CPU)
    base, *others = records
    assert base["system"] == "base"
    assert base["seconds"] > 0
    assert [(r["system"], r["kind"]) for r in others][:2] == [("flora", "FLORA"), ("flora", "LORA")]
    for record in others:
        assert (record["rows"], record["distinct"], record["rank"]) == (6, 3, 2)
        assert record["layer"] == "12x8"
        assert record["dtype"] == "float32"
        assert record["backend"] == backend_name("auto", CPU["device"])
        assert record["times_limit"] == pytest.approx(record["seconds"] / record["limit_seconds"])


def test_the_limit_is_the_lesser_side_and_what_is_read():
    weight = torch.zeros(12, 8)
    seconds = {"base": 2.0, "wide base": 5.0, "busy base": 512 * 12 * 8 * 1.0}
    of = op._limits(load(), weight, seconds)
    pages = 3 * 2 * (12 + 8)
    # One pass over three modulated weights of 12 x 8 numbers of 4 bytes, at 1e9 bytes a second.
    assert of["FLORA"] == pytest.approx(2.0 + 3 * 12 * 8 * 4 / 1e9 + 4 * pages / 1e9)
    assert of["LORA"] == pytest.approx(2.0 + 4 * pages / 1e9 + 6 * 2 * (12 + 8))
    cheap = op._limits(load(), weight, seconds | {"wide base": 2.0})
    assert cheap["FLORA"] == pytest.approx(2.0 + 4 * pages / 1e9)


def test_what_would_take_for_ever_is_left_out(monkeypatch):
    monkeypatch.setattr(op, "MOST_PRODUCT", 1)
    systems = {r["system"] for r in measure(load(), repeats=1, **CPU)}
    assert systems == {"base", "flora", "bmm", "peft"}


def test_an_unknown_system_is_refused():
    with pytest.raises(UsageError, match="no such systems: s-lora"):
        measure(load(), systems=["s-lora"], repeats=1, **CPU)


def test_the_plan_is_explained(tmp_path, monkeypatch):
    monkeypatch.setenv("FLORA_CACHE", str(tmp_path))
    text = explain(load(out_features=64, in_features=64, rows=512, distinct=1, rank=16), **CPU)
    assert text.startswith("64x64, 512 rows, 1 adapters of rank 16: the weight side; ")
    assert "8192 copies" in text


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FLORA_CACHE", str(tmp_path))
    file = tmp_path / "out" / "op.json"
    shape = ["--shapes", "16x8", "--rows", "1,4", "--ranks", "1", "--repeats", "1"]
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "op", *shape, "--systems", "flora,bmm", "--explain", "--json", str(file)])
    assert stopped.value.code == 0
    records = json.loads(file.read_text())
    assert [(r["system"], r["kind"], r["rows"], r["distinct"]) for r in records] == [
        (system, kind, rows, distinct)
        for rows, distinct in [(1, 1), (4, 1), (4, 4)]
        for system, kind in [("base", None), ("flora", "FLORA"), ("flora", "LORA"), ("bmm", "LORA")]
    ]
    assert "16x8, 4 rows, 4 adapters of rank 1: " in capsys.readouterr().out
    for wrong in (["--shapes", "big"], ["--shapes", "8x8x8"], ["--dtype", "int8"]):
        with pytest.raises(SystemExit) as stopped:
            main(["bench", "op", *wrong])
        assert stopped.value.code == 2
