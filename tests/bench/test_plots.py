"""Pictures of measurements: lines are where their records are, the crossover where it is."""

import json

import pytest

from flora.bench import plots
from flora.bench.plots import CHARTS, crossovers, plot
from flora.cli import main
from flora.errors import UsageError

LAYER = {"study": "op", "layer": "4x4", "rows": 8, "distinct": 8}


def op_records(base: float, one: float, thin: float, ranks=(1, 2, 4, 8)) -> list[dict]:
    """FLoRA that takes `one` a copy, bmm that takes the base's time and `thin` more a rank."""
    found = []
    for rank in ranks:
        own = LAYER | {"rank": rank}
        found.append(own | {"system": "base", "kind": None, "rank": None, "seconds": base})
        for system, kind, seconds in (
            ("flora-activation", "FLORA", one * rank),
            ("bmm", "LORA", base + thin * rank),
        ):
            figures = {"seconds": seconds, "ratio_to_base": base / seconds, "times_limit": 1.25}
            found.append(own | {"system": system, "kind": kind} | figures)
    return found


@pytest.mark.parametrize("thin", [0.25, 0.5, 0.75])
def test_where_the_costs_are_the_papers_the_prediction_is_what_is_measured(thin):
    (found,) = crossovers(op_records(1.0, 1.0, thin))
    assert [found["predicted"], found["measured"]] == pytest.approx([1 / (1 - thin)] * 2)


def test_flora_may_win_at_every_rank_or_at_none():
    (found,) = crossovers(op_records(1.0, 1.0, 1.5))
    assert found["predicted"] == found["measured"] == float("inf")
    (found,) = crossovers(op_records(1.0, 9.0, 0.5))
    assert found["measured"] == 1


def test_a_crossover_needs_rows_of_their_own():
    assert crossovers([record | {"distinct": 1} for record in op_records(1.0, 1.0, 0.5)]) == []


def test_a_line_is_where_its_records_are():
    records = op_records(1.0, 1.0, 0.5)
    records += [r | {"layer": "2x2", "ratio_to_base": 1 / 4} for r in records if r["rank"] == 2]
    figure = plots._draw(CHARTS["op-rank"], [{"ratio_to_base": 1.0} | r for r in records])
    (axes,) = figure.axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    two = (1 / 2 + 1 / 4) / 2
    assert lines["flora-activation FLORA"] == [[1, 1], [2, two], [4, 1 / 4], [8, 1 / 8]]
    assert lines["flora-activation FLORA: limit"][2] == [4, 1.25 / 4]
    assert [height for _, height in lines["base"]] == [1, 1]  # over the whole axis
    assert axes.get_title() == "8 rows"


def test_the_same_records_make_the_same_files(tmp_path):
    records = op_records(1.0, 1.0, 0.5)
    first, second = (plot(records, tmp_path / name) for name in "ab")
    assert [path.name for path in first] == ["op-rank.svg", "op-crossover.svg"]
    for a, b in zip(first, second, strict=True):
        assert a.read_bytes() == b.read_bytes()


def test_records_that_vary_nothing_make_no_picture(tmp_path):
    with pytest.raises(UsageError, match="nothing to show"):
        plot(op_records(1.0, 1.0, 1.5, ranks=(4,)), tmp_path / "plots")
    assert not (tmp_path / "plots").exists()


def test_the_command(tmp_path, capsys):
    for number, part in enumerate((op_records(1.0, 1.0, 0.5), [])):
        (tmp_path / f"{number}.json").write_text(json.dumps(part))
    files = [str(tmp_path / f"{number}.json") for number in range(2)]
    with pytest.raises(SystemExit) as stop:
        main(["plot", *files, "--output", str(tmp_path / "plots")])
    assert stop.value.code == 0
    paths = capsys.readouterr().out.split()
    assert paths == [str(tmp_path / "plots" / f"op-{name}.svg") for name in ("rank", "crossover")]


@pytest.mark.parametrize("text", ["no JSON", "[1]", "7", '[{"study": "op"}]', '{"a": 1}', ""])
def test_what_is_no_result_is_one_line(tmp_path, capsys, text):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(SystemExit) as stop:
        main(["plot", str(path)])
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_pictures_of_different_machines_are_refused(tmp_path):
    records = op_records(1.0, 1.0, 0.5)
    other = [record | {"machine": {"processor": "other"}} for record in records]
    with pytest.raises(UsageError, match="op with different machines"):
        plot([*records, *other], tmp_path / "plots")
    assert not (tmp_path / "plots").exists()


def test_one_adapter_for_all_rows_is_shown_beside_different_ones():
    own = {"study": "generate", "prompt_tokens": 1, "new_tokens": 1, "rows": 4, "kind": "LORA"}
    records = [
        own | {"system": system, "distinct": distinct, "rank": rank, "ratio_to_base": ratio}
        for system, distinct, ratio in (("flora", 4, 0.9), ("flora", 1, 0.95), ("peft-one", 1, 0.5))
        for rank in (1, 2)
    ]
    (axes,) = plots._draw(CHARTS["generate-rank"], records).axes
    lines = {line.get_label(): line.get_ydata().tolist() for line in axes.lines}
    assert lines == {"flora LORA": [0.9, 0.9], "peft-one LORA": [0.5, 0.5]}
