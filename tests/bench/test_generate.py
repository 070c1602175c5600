"""`flora bench generate`: its records say what was run, and what was run is what they say."""

import json

import pytest
import torch

import flora
from flora.bench.adapters import parse_specs
from flora.bench.generate import measure
from flora.bench.limit import Load
from flora.bench.turns import base_of
from flora.cli import main
from flora.errors import UsageError
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
        assert record["ratio_to_base"] > 0
        assert record["ratio_to_limit"] > 0
    # 6 rows of two pairs, and of one, two and none: products of 12 and of 8 rows beside those of 6,
    # for the prompt's four tokens and for a step's one.
    products = {f"products of {tokens} tokens" for tokens in (6, 8, 12, 24, 32, 48)}
    of_base = {base_of("flora 0"), base_of("flora 1")}
    assert set(turns) == {"flora 0", "flora 1"} | of_base | products
    assert len(turns) == 3 * 10


def test_what_is_timed_is_a_batch_of_different_adapters(monkeypatch):
    model = zoo.build("Llama")
    outputs, attached = [], []
    generate, attach = type(model).generate, flora.attach

    def watched(self, **kwargs):
        outputs.append(generate(self, **kwargs))
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


def test_peft_generates_what_flora_does(monkeypatch):
    model = zoo.build("Llama")
    model.lm_head.weight.requires_grad_(True)
    flags = {p: p.requires_grad for p in model.parameters()}
    outputs = []
    generate = type(model).generate

    def watched(self, **kwargs):
        outputs.append(generate(self, **kwargs))
        return outputs[-1]

    monkeypatch.setattr(type(model), "generate", watched)
    load = Load(rows=4, distinct=2, prompt_tokens=4, new_tokens=6)
    mixes = [parse_specs(text, 2) for text in ("LORA", "IA3", "FLORA", "LORA+IA3", "LORA/use_dora")]
    records = measure(model, mixes, load, systems=["flora", "peft", "peft-one"], repeats=1)
    assert [(r["kind"], r["system"], r["distinct"]) for r in records] == [
        (None, "base", 2),
        ("LORA", "flora", 2),
        ("LORA", "peft", 2),
        ("LORA", "peft-one", 1),
        ("IA3", "flora", 2),
        ("IA3", "peft-one", 1),
        ("FLORA", "flora", 2),
        ("mixed", "flora", 2),
        ("LORA/use_dora", "flora", 2),
        ("LORA/use_dora", "peft-one", 1),
    ]
    # Each behind one of the base.
    base, lora, _, peft, _, one, *_ = outputs[len(outputs) // 2 :]
    assert torch.equal(lora, peft)
    assert torch.equal(one[0], lora[0])
    assert not torch.equal(base, lora)
    assert {p: p.requires_grad for p in model.parameters()} == flags


def test_nothing_runs_where_no_mix_fits():
    load = Load(rows=2, distinct=1, prompt_tokens=1, new_tokens=1)
    assert measure(zoo.build("Llama"), [parse_specs("LORA+IA3", 2)], load, repeats=1) == []


def test_an_unknown_system_is_refused():
    load = Load(rows=1, distinct=1, prompt_tokens=1, new_tokens=1)
    with pytest.raises(UsageError, match="no such systems: s-lora"):
        measure(zoo.build("Llama"), [], load, systems=["s-lora"], repeats=1)


def test_base_rows_beside_others_and_mixes_that_fit():
    load = Load(rows=4, distinct=2, prompt_tokens=2, new_tokens=2)
    mixes = [parse_specs(text, 1) for text in ("BASE+LORA", "FLORA+IA3+LORA")]
    records = measure(zoo.build("Llama"), mixes, load, repeats=1)
    assert [r.get("mix") for r in records] == [None, "BASE+LORA:1"]
    assert records[1]["ratio_to_limit"] > 0


def test_the_command(tmp_path, capsys):
    model = save_tiny_model(tmp_path / "model")
    arguments = ["--model", str(model), "--rows", "4", "--kinds", "FLORA,IA3+LORA"]
    settings = ["--ranks", "1,2", "--new-tokens", "2", "--repeats", "1", "--dtype", "float16"]
    for wrong, said in (
        (["--distinct", "two"], "--distinct 'two'"),
        (["--distinct", "5"], "not so many rows"),
        (["--kinds", "mixed"], "8 different adapters"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["bench", "generate", *arguments, *wrong])
        assert stopped.value.code == 2
        assert said in capsys.readouterr().err
    file = tmp_path / "out" / "x.json"
    with pytest.raises(SystemExit) as stopped:
        main(
            ["bench", "generate", *arguments, *settings, "--distinct", "2,all", "--json", str(file)]
        )
    assert stopped.value.code == 0
    records = json.loads(file.read_text())
    assert {(r["study"], r["dtype"]) for r in records} == {("generate", "float16")}
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
            ("flora", "mixed", None),
        ]
    ]
