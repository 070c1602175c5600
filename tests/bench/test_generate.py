"""`flora bench generate`: its records say what was run, and what was run is what they say."""

import json

import pytest
import torch

import flora
from flora.bench.adapters import parse_specs
from flora.bench.generate import Load, measure
from flora.cli import main
from flora.hosts.transformers import HOST
from tests import zoo
from tests.tiny import save_tiny_model


def test_the_records():
    model = zoo.build("Llama")
    before = dict(vars(model))
    load = Load(rows=6, distinct=3, prompt_tokens=4, new_tokens=2)
    mixes = [parse_specs("FLORA:2", 1), parse_specs("IA3+HIRA:1+LORA", 4)]
    turns = []
    records = measure(model, mixes, load, repeats=2, after_turn=turns.append)
    assert dict(vars(model)) == before
    assert not hasattr(model, HOST)
    base, flora2, mixed = records
    assert base["system"] == "base"
    assert base["kind"] is base["rank"] is None
    assert base["ratio_to_base"] == base["ratio_to_limit"] == 1
    assert (flora2["system"], flora2["kind"], flora2["rank"]) == ("flora", "FLORA", 2)
    assert (mixed["kind"], mixed["rank"]) == ("mixed", None)
    assert mixed["mix"] == "IA3+HIRA:1+LORA:4"
    for record in records:
        assert record["rows"] == 6
        assert record["distinct"] == 3
        assert record["tokens_per_second"] > 0
        speed = record["ratio_to_base"] * base["tokens_per_second"]
        assert record["tokens_per_second"] == pytest.approx(speed)
    # 6 rows of two pairs, and of one, two and none: the base with 12, and with 8 rows.
    assert set(turns) == {
        "base of 6 rows",
        "flora 1",
        "base of 12 rows",
        "flora 3",
        "base of 8 rows",
    }
    assert len(turns) == 3 * 5


def test_what_is_timed_is_a_batch_of_different_adapters(monkeypatch):
    model = zoo.build("Llama")
    outputs, attached = [], []
    generate, attach = type(model).generate, flora.attach

    def watched(self, inputs, **kwargs):
        outputs.append(generate(self, inputs, **kwargs))
        return outputs[-1]

    def attaches(model, adapters):
        attached.append({adapter.identity for adapter in adapters.values()})
        return attach(model, adapters)

    monkeypatch.setattr(type(model), "generate", watched)
    monkeypatch.setattr(flora, "attach", attaches)
    load = Load(rows=4, distinct=4, prompt_tokens=4, new_tokens=8)
    measure(model, [parse_specs("LORA", 8)], load, repeats=1)
    base, mixed, base_again, mixed_again = outputs
    assert [len(identities) for identities in attached] == [4]
    assert torch.equal(base, base_again)
    assert torch.equal(mixed, mixed_again)
    assert (base[:, 4:] != mixed[:, 4:]).any(dim=1).all()


def test_the_command(tmp_path, capsys):
    model = save_tiny_model(tmp_path / "model")
    arguments = ["--model", str(model), "--rows", "4", "--kinds", "FLORA,mixed"]
    settings = ["--ranks", "1,2", "--new-tokens", "2", "--repeats", "1"]
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "generate", *arguments, "--distinct", "two"])
    assert stopped.value.code == 2
    assert "--distinct 'two'" in capsys.readouterr().err
    file = tmp_path / "out" / "x.json"
    with pytest.raises(SystemExit) as stopped:
        main(
            ["bench", "generate", *arguments, *settings, "--distinct", "2,all", "--json", str(file)]
        )
    assert stopped.value.code == 0
    records = json.loads(file.read_text())
    assert {r["study"] for r in records} == {"generate"}
    assert {"machine", "versions", "command", "model"} <= set(records[0])
    kinds = [(r["system"], r["kind"], r["rank"], r["distinct"]) for r in records]
    assert kinds == [
        (system, kind, rank, distinct)
        for distinct in (2, 4)
        for system, kind, rank in [
            ("base", None, None),
            ("flora", "FLORA", 1),
            ("flora", "FLORA", 2),
            ("flora", "mixed", None),
        ]
    ]
