"""`flora bench serve`: what is started and drawn; real engines and servers in the slow tests."""

import json
from collections import Counter

import pytest

from flora.bench import environment
from flora.bench.adapters import parse_specs
from flora.bench.limit import Load
from flora.bench.processes import Worker
from flora.bench.serve import LATENCIES, measure, summary, zipf
from flora.bench.systems import SYSTEMS, engine_options, engines_of, max_lora_rank
from flora.cli import main
from flora.errors import UsageError
from tests import zoo
from tests.tiny import save_tiny_model

LOAD = Load(rows=4, distinct=3, prompt_tokens=6, new_tokens=8)


def test_a_draw_follows_zipfs_law():
    assert zipf(50, 8, 1.0) == zipf(50, 8, 1.0) != zipf(50, 8, 1.0, seed=1)
    found = Counter(zipf(60_000, 3, 1.0))  # 1 : 1/2 : 1/3 are 6 : 3 : 2
    for adapter, share in enumerate((6 / 11, 3 / 11, 2 / 11)):
        assert found[adapter] / 60_000 == pytest.approx(share, abs=0.01)
    even = Counter(zipf(60_000, 3, 0.0))
    assert all(even[adapter] / 60_000 == pytest.approx(1 / 3, abs=0.01) for adapter in range(3))
    assert set(zipf(100, 50, 1e3)) == {0}


def test_an_engine_a_system_and_of_vllms_lora_one_a_mix():
    texts = ("FLORA:2", "LORA:9", "BASE+IA3", "LORA:64+LORA:8", "FLORA+IA3+HIRA+LOHA")
    mixes = [parse_specs(text, 1) for text in texts]
    base, flora, bmm, *loras = engines_of(mixes, SYSTEMS, LOAD)
    assert (base.system, base.options, base.mixes) == ("base", {}, {None: [None]})
    assert flora.options == {"enable_lora": True, "max_loras": 3, "max_cpu_loras": 12}
    assert flora.mixes == {
        None: [None],
        0: ["0-0", "0-1", "0-2"],
        1: ["1-0", "1-1", "1-2"],
        2: [None, "2-1", None],
        3: ["3-0", "3-1", "3-2"],
    }
    assert bmm.options == flora.options | {"additional_config": {"flora": {"backend": "eager"}}}
    assert bmm.mixes == {number: flora.mixes[number] for number in (1, 3)}
    for engine, number, rank in zip(loras, (1, 3), (16, 64), strict=True):
        assert engine.system == "vllm-lora"
        assert engine.options == {"enable_lora": True, "max_loras": 3, "max_lora_rank": rank}
        assert engine.mixes == {number: flora.mixes[number]}
    assert [engine.system for engine in engines_of(mixes[-1:], ["flora"], LOAD)] == ["base"]


def test_what_vllms_lora_runs():
    ranks = {"LORA:1": 1, "LORA:2": 8, "LORA:257+LORA/use_rslora:3": 320, "LORA:513": None}
    ranks |= {"LORA/use_dora:8": None, "BASE+LORA:8": None, "IA3": None, "LORA:8+FLORA:8": None}
    assert {text: max_lora_rank(parse_specs(text, 1)) for text in ranks} == ranks


def test_an_engine_has_room_for_its_rows():
    options = engine_options("model", "float32", rows=3, tokens=10, eager=True)
    assert (options["max_num_seqs"], options["max_model_len"]) == (8, 10)
    assert engine_options("m", "float32", rows=9, tokens=10, eager=True)["max_num_seqs"] == 9


def test_a_records_figures_are_medians_and_its_ratio_one_of_neighbours():
    # The machine is three times slower in its second half; the system is twice as slow as the base.
    speeds = (30.0, 30.0, 10.0, 10.0, 10.0)
    base = [{"tokens_per_second": speed} for speed in speeds]
    own = [{"tokens_per_second": speed / 2, "median_ttft_seconds": 1 / speed} for speed in speeds]
    assert summary(own, base) == {
        "tokens_per_second": 5.0,
        "median_ttft_seconds": 0.1,
        "ratio_to_base": 0.5,
    }


def test_an_unknown_system_is_refused():
    with pytest.raises(UsageError, match="no such systems: peft"):
        measure("model", [parse_specs("LORA", 1)], LOAD, systems=["peft"], repeats=1)


def test_mistakes_are_one_line(tmp_path, capsys, monkeypatch):
    model = str(save_tiny_model(tmp_path / "model"))
    capsys.readouterr()
    for arguments, code, said in (
        (["--rows", "4", "--distinct", "5"], 2, "not so many rows"),
        (["--rows", "4"], 2, "8 different adapters"),
        (["--systems", "s-lora"], 2, "no such systems: s-lora"),
        (["--model", "./none"], 2, "there is no model folder"),
        ([], 1, "this needs vllm: pip install 'flora-llm[vllm]'"),
    ):
        if code == 1:
            monkeypatch.setattr(environment, "packages_distributions", dict)
        with pytest.raises(SystemExit) as stopped:
            main(["bench", "serve", "--model", model, *arguments])
        assert stopped.value.code == code
        error = capsys.readouterr().err
        assert said in error
        assert error.startswith("flora: ")
        assert error.count("\n") == 1


def run(tmp_path, *arguments: str) -> list[dict]:
    """The records of the command, of a tiny model in fp32, eager."""
    pytest.importorskip("vllm")
    model = save_tiny_model(tmp_path / "model")
    # vLLM's attention on a CPU takes heads of 32 and more.
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 96}
    zoo.build("Llama", vocab_size=259, **sizes).save_pretrained(model)
    file = tmp_path / "x.json"
    settings = ["--model", str(model), "--dtype", "float32", "--eager", "--json", str(file)]
    settings += ["--rows", "4", "--prompt-tokens", "6", "--new-tokens", "8", "--repeats", "1"]
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "serve", *settings, *arguments])
    assert stopped.value.code == 0
    records = json.loads(file.read_text())
    for record in records:
        assert record["study"] == "serve"
        assert record["eager"] is True
        assert {"machine", "versions", "command", "model", "vllm", "dtype"} <= set(record)
        assert record["tokens_per_second"] > 0
        assert record["ratio_to_base"] > 0
    assert records[0]["ratio_to_base"] == 1
    return records


@pytest.mark.slow
def test_engines_in_turns(tmp_path, monkeypatch):
    ask, answers = Worker.ask, []

    def watched(self, task):
        answers.append(ask(self, task))
        return answers[-1]

    monkeypatch.setattr(Worker, "ask", watched)
    records = run(tmp_path, "--kinds", "FLORA:2,BASE+IA3,LORA:4", "--systems", ",".join(SYSTEMS))
    assert [(r["system"], r["kind"], r["rank"], r["rows"], r["distinct"]) for r in records] == [
        ("base", None, None, 4, 4),
        ("flora", None, None, 4, 4),
        ("flora", "FLORA", 2, 4, 4),
        ("flora", "mixed", None, 4, 4),
        ("flora", "LORA", 4, 4, 4),
        ("bmm", "LORA", 4, 4, 4),
        ("vllm-lora", "LORA", 4, 4, 4),
    ]
    assert {r["load"] for r in records} == {"offline"}
    assert all("ratio_to_limit" in r for r in records if r["kind"])
    assert {*answers[:4]} == {"cpu"}
    answers = [answer for answer in answers[4:] if answer]  # and none of W0's products alone
    assert answers[12:] == answers[:12]
    # Each run of a system with one of the base in front.
    (base, *others), (unused, flora, mixed, *loras) = answers[0:12:2], answers[1:12:2]
    assert others == [base] * 5
    assert {len(tokens) for rows in answers for tokens in rows} == {8}
    assert unused == base
    assert loras == [loras[0]] * 3
    assert mixed[0::2] == base[0::2]
    for rows in (flora, loras[0]):
        assert all(row != of_base for row, of_base in zip(rows, base, strict=True))
    assert mixed[1::2] != base[1::2]


@pytest.mark.slow
def test_servers_in_turns(tmp_path):
    records = run(
        tmp_path,
        *["--kinds", "FLORA:2", "--distinct", "6", "--rate", "20", "--requests", "12"],
    )
    assert [(r["system"], r["kind"], r["rank"], r["distinct"]) for r in records] == [
        ("base", None, None, 6),
        ("flora", None, None, 6),
        ("flora", "FLORA", 2, 6),
    ]
    for record in records:
        assert (record["load"], record["rate"], record["requests"]) == ("online", 20, 12)
        for name in LATENCIES:
            assert 0 < record[f"median_{name}_seconds"] <= record[f"p99_{name}_seconds"]
