"""`flora bench train`: the systems train, on the same rows, and the records say what ran."""

import json

import pytest
import torch

from flora.bench import train
from flora.bench.adapters import parse_specs
from flora.bench.train import Load, measure, peak_bytes
from flora.cli import main
from flora.errors import UsageError
from tests import zoo
from tests.tiny import save_tiny_model

LOAD = Load(adapters=3, tokens=8)


def test_the_records():
    model = zoo.build("Llama")
    model.lm_head.weight.requires_grad_(True)
    before = {name: p.clone() for name, p in model.named_parameters()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    specs = parse_specs("FLORA:2+LORA:4", 1)
    records = measure(model, specs, LOAD, repeats=2)
    assert [(r["system"], r["kind"], r["rank"], r["distinct"]) for r in records] == [
        ("base", None, None, 3),
        ("flora", "FLORA", 2, 3),
        ("flora", "LORA", 4, 3),
        ("peft", "LORA", 4, 3),
        ("peft-one", "LORA", 4, 1),
    ]
    assert records[0]["ratio_to_base"] == 1
    for record in records:
        assert (record["rows"], record["tokens"]) == (3, 8)
        assert record["tokens_per_second"] == pytest.approx(24 / record["seconds"])
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.requires_grad == flags[name]


@pytest.mark.parametrize("system", train.SYSTEMS)
def test_a_step_trains_on_the_rows(system, monkeypatch):
    model = zoo.build("Llama")
    seen: list[torch.Tensor] = []
    stepped: list[int] = []
    forward = type(model).forward
    step = torch.optim.AdamW.step

    def watched(self, input_ids=None, **kwargs):
        seen.append(input_ids)
        return forward(self, input_ids=input_ids, **kwargs)

    def steps(self, *args):
        own = [p for group in self.param_groups for p in group["params"]]
        moved = [p for p in own if p.grad is not None and p.grad.any()]
        stepped.append(len(moved) / len(own))
        return step(self, *args)

    monkeypatch.setattr(type(model), "forward", watched)
    monkeypatch.setattr(torch.optim.AdamW, "step", steps)
    measure(model, parse_specs("LORA:2", 1), LOAD, systems=[system], repeats=1)
    rows = train._tokens(model, LOAD)
    assert torch.equal(torch.cat([r for r in seen if r is not None])[:3], rows)
    assert len(stepped) == (2 * 3 if system == "peft" else 2)
    assert min(stepped) >= 0.5  # of LoRA one half has no gradient at the start


def test_an_unknown_system_is_refused():
    with pytest.raises(UsageError, match="no such systems: axolotl"):
        measure(zoo.build("Llama"), parse_specs("LORA", 1), LOAD, systems=["axolotl"], repeats=1)


def test_a_process_of_its_own_tells_its_memory(tmp_path):
    model = str(save_tiny_model(tmp_path / "model"))
    (spec,) = parse_specs("FLORA", 1)
    found = peak_bytes(model, spec, "flora", LOAD)
    assert 0 <= found["added_bytes"] < found["peak_bytes"] < 1 << 34


def test_the_command(tmp_path):
    model, file = save_tiny_model(tmp_path / "model"), tmp_path / "train.json"
    settings = ["--adapters", "2", "--tokens", "4,8", "--ranks", "1,2", "--kinds", "FLORA"]
    settings += ["--repeats", "1", "--dtype", "bfloat16", "--no-memory", "--json", str(file)]
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "train", "--model", str(model), *settings])
    assert stopped.value.code == 0
    records = json.loads(file.read_text())
    assert {(r["study"], r["dtype"]) for r in records} == {("train", "bfloat16")}
    assert [(r["system"], r["rank"], r["tokens"]) for r in records] == [
        (system, rank, tokens)
        for tokens in (4, 8)
        for system, rank in [("base", None), ("flora", 1), ("flora", 2)]
    ]
