"""The demo as a user runs it."""

import json

import pytest

from flora.cli import main
from flora.commands.demo import LANGUAGES

SYSTEMS = {"base", "flora", "peft"}


@pytest.mark.slow
def test_eight_adapters_answer_in_their_languages(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--json", str(tmp_path / "demo.json")])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    records = json.loads((tmp_path / "demo.json").read_text())
    assert {record["study"] for record in records} == {"demo"}
    answers = [record for record in records if "text" in record]
    assert [record["adapter"] for record in answers] == list(LANGUAGES)
    assert all(record["language"] in out for record in answers)
    assert sum(record["language"] == record["language_seen"] for record in answers) >= 6
    speeds = {r["system"]: r["tokens_per_second"] for r in records if "tokens_per_second" in r}
    assert set(speeds) == SYSTEMS
    assert all(speed > 0 for speed in speeds.values())


def test_mistakes_are_one_line(tmp_path, capsys):
    for arguments, said in (
        (["--text", str(tmp_path / "none")], "none"),
        (["--text", str(tmp_path)], "ruby"),
        (["--text", str(tmp_path), "--model", "./none"], "ruby"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["demo", *arguments])
        err = capsys.readouterr().err
        assert stop.value.code == 2
        assert err.startswith("flora: ")
        assert len(err.splitlines()) == 1
        assert said in err
