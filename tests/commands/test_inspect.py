"""`flora inspect` of every kind, without the model: ranks by layer, and what the base must be."""

import json

import pytest

from flora.adapters.checkpoint import read_checkpoint
from flora.base import ModelBase
from flora.cli import main
from flora.commands.inspect import describe
from tests import zoo

MADE_WITH = {"dora": ["weights"], "ia3": ["biases"]}


@pytest.fixture(scope="module")
def model():
    return zoo.build("Qwen2")


@pytest.mark.filterwarnings("ignore:Specified to not save vera_A")
@pytest.mark.parametrize("case", zoo.CASES)
def test_what_it_shows_is_what_a_model_gets(case, model, tmp_path):
    zoo.make_adapter(case, model, tmp_path)
    base = ModelBase(model)
    found = describe(read_checkpoint(tmp_path))
    adapter = read_checkpoint(tmp_path, base).adapter(base)
    assert found["kind"] == zoo.CASES[case].kind == adapter.kind
    assert found["identity"] == adapter.identity
    assert found["made_with"] == MADE_WITH.get(case, [])
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert 0.3 * size < found["bytes"] < size
    assert {layer["module"] for layer in found["modules"]} == set(adapter.layers)
    for layer in found["modules"]:
        factors = adapter.layers[layer["module"]]
        assert (layer["pairs"], layer["rank"]) == (factors.pairs, factors.rank)
        for known, size in zip(
            (layer["out"], layer["in"]), base.shapes[layer["module"]], strict=True
        ):
            assert known in (None, size)
        if factors.bias is not None:
            assert layer["bias"]
    if case not in ("ia3", "vera", "drawn"):  # the others say all sizes
        assert all(layer["out"] and layer["in"] for layer in found["modules"])


def test_the_table_and_the_file(model, tmp_path, capsys):
    zoo.make_adapter("lora", model, tmp_path / "a", r=1)
    with pytest.raises(SystemExit) as stopped:
        main(["inspect", str(tmp_path / "a"), "--json", str(tmp_path / "b" / "x.json")])
    assert stopped.value.code == 0
    (record,) = json.loads((tmp_path / "b" / "x.json").read_text())
    assert record == {"path": str(tmp_path / "a")} | describe(read_checkpoint(tmp_path / "a"))
    (line,) = [
        line for line in capsys.readouterr().out.splitlines() if "k_proj" in line and "│" in line
    ]
    cells = [cell.strip() for cell in line.strip("│").split("│")]
    assert cells == ["k_proj", "2", "16", "32", "0", "1", "no"]
