"""The demo as a user runs it."""

import json
from pathlib import Path

import pytest

from flora.bench import environment
from flora.cli import main
from flora.commands import demo
from flora.commands.demo import LANGUAGES
from tests import zoo
from tests.tiny import save_tiny_model

SYSTEMS = ["base", "flora", "peft"]
SERVED = ["vllm-base", "vllm-flora"]


def run(file: Path, *arguments: str) -> list[dict]:
    """The records of the command."""
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--json", str(file), *arguments])
    assert stop.value.code == 0
    records = json.loads(file.read_text())
    for record in records:
        assert record["study"] == "demo"
        assert {"machine", "versions", "command", "model", "dtype"} <= set(record)
    return records


def answers_of(records: list[dict], system: str) -> dict[str, dict]:
    """A system's answers by language, of which there is one each."""
    answers = [record for record in records if "text" in record and record["system"] == system]
    assert [record["adapter"] for record in answers] == list(LANGUAGES)
    return {record["language"]: record for record in answers}


def check_speeds(records: list[dict], systems: list[str]) -> None:
    speeds = [record for record in records if "tokens_per_second" in record]
    assert [record["system"] for record in speeds] == systems
    for record in speeds:
        assert record["tokens_per_second"] > 0
        assert record["rows"] == 8
        is_base = record["system"] in ("base", "vllm-base")
        assert record["distinct"] == (0 if is_base else 8)
        assert record["ratio_to_base"] == 1 if is_base else record["ratio_to_base"] > 0


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> list[str]:
    """The arguments for a demo of seconds: a tiny model, a little text, and two steps."""
    monkeypatch.setattr(demo, "STEPS", 2)
    monkeypatch.setattr(demo, "REPORT_STEPS", 1)
    for language in LANGUAGES:
        (tmp_path / "text" / language).mkdir(parents=True)
        lines = [f"{language} says {i} and {i + 1}\n" for i in range(400)]
        (tmp_path / "text" / language / "file").write_text("".join(lines))
    model = save_tiny_model(tmp_path / "model")
    # vLLM's attention on a CPU takes heads of 32 and more.
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 96}
    zoo.build("Llama", vocab_size=259, **sizes).save_pretrained(model)
    return ["--model", str(model), "--text", str(tmp_path / "text")]


def test_without_a_server(tmp_path, tiny, capsys):
    records = run(tmp_path / "demo.json", "--engine", "transformers", *tiny)
    out = capsys.readouterr().out
    assert "4. Speed" in out
    assert "5. " not in out
    answers_of(records, "flora")
    check_speeds(records, SYSTEMS)


@pytest.mark.slow
def test_a_server_answers_as_transformers(tmp_path, tiny, capsys, monkeypatch):
    pytest.importorskip("vllm")
    # In 16 bits the two round differently, and a model of noise has next tokens that are as likely.
    monkeypatch.setattr("flora.machine.fast_dtype", lambda: "float32")
    records = run(tmp_path / "demo.json", *tiny)
    out = capsys.readouterr().out
    check_speeds(records, SYSTEMS + SERVED)
    answers, served = (answers_of(records, system) for system in ("flora", "vllm-flora"))
    texts = [[r["text"].rstrip(demo.CUT) for r in own.values()] for own in (answers, served)]
    assert texts[0] == texts[1]
    assert out.count(" yes ") == 8
    assert out.count("of 8 answers are in their adapter's language") == 2
    for record in records:
        assert ("vllm" in record) == record["system"].startswith("vllm-")


@pytest.mark.slow
def test_eight_adapters_answer_in_their_languages(tmp_path, capsys):
    pytest.importorskip("vllm")
    records = run(tmp_path / "demo.json")
    out = capsys.readouterr().out
    check_speeds(records, SYSTEMS + SERVED)
    for system in ("flora", "vllm-flora"):
        answers = answers_of(records, system)
        assert all(name in out for name in answers)
        assert sum(name == record["language_seen"] for name, record in answers.items()) >= 6


def test_mistakes_are_one_line(tmp_path, capsys, monkeypatch):
    apart = ["--engine", "transformers"]
    for code, arguments, said in (
        (2, ["--text", str(tmp_path / "none"), *apart], "none"),
        (2, ["--text", str(tmp_path), *apart], "ruby"),
        (2, ["--text", str(tmp_path), "--model", "./none", *apart], "ruby"),
        (2, ["--engine", "vlm"], "'vllm', 'transformers'"),
        (1, ["--text", str(tmp_path / "none")], "leave it out with --engine transformers"),
    ):
        if code == 1:
            monkeypatch.setattr(environment, "packages_distributions", dict)
        with pytest.raises(SystemExit) as stop:
            main(["demo", *arguments])
        err = capsys.readouterr().err
        assert stop.value.code == code
        assert err.startswith("flora: ")
        assert len(err.splitlines()) == 1
        assert said in err
