"""`flora bench churn`: a wrong answer is counted; a real server in the slow test."""

import asyncio
import json
from pathlib import Path

import httpx
import pytest

from flora.bench.adapters import parse_specs
from flora.bench.answers import Checked, certain_tokens
from flora.bench.churn import Load, check_told_apart, measure
from flora.cli import main
from flora.errors import FloraError, UsageError
from tests import zoo
from tests.tiny import save_tiny_model

TOKENS = {"a": [1, 2, 3], "b": [4, 5, 6], "even": [7, 8, 9], "odd": [7, 0, 0]}
WEIGHTS = {"even": Path("/even"), "odd": Path("/odd")}


class Stub:
    """A server that answers by name; of a name that was loaded, by what it was loaded from.

    wrong: names that get the answer of another.
    """

    url = "http://stub"

    def __init__(self, wrong: dict[str, str]) -> None:
        self.wrong, self.loaded = wrong, "odd"
        self.seen: list[dict] = []

    def memory_bytes(self) -> int:
        return len(self.seen)

    def failure(self, reason: str) -> FloraError:
        return FloraError(f"the stub {reason}")

    async def answer(self, request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(0)
        body = json.loads(request.content)
        self.seen.append(body)
        if request.url.path == "/v1/load_lora_adapter":
            assert body["load_inplace"] is True
            asked = Path(body["lora_path"]).name
            self.loaded = self.wrong.get(asked, asked)
            return httpx.Response(200, text="Success")
        name = self.loaded if body["model"] == "reloaded" else body["model"]
        if name == "unknown":
            return httpx.Response(404, text="no such model")
        tokens = TOKENS[self.wrong.get(name, name)]
        choice = {"token_ids": tokens}
        if "logprobs" in body:
            best = [{"x": -0.1, "y": -0.1 - 0.2 * token} for token in tokens]
            choice["logprobs"] = {"top_logprobs": best}
        return httpx.Response(200, json={"choices": [choice]})


def checked(monkeypatch, **wrong: str) -> Checked:
    stub = Stub(wrong)
    found = Checked(stub, [1, 2], {n: list(t) for n, t in TOKENS.items()}, rows=3, new_tokens=3)

    def connect() -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.MockTransport(stub.answer), base_url=stub.url)

    monkeypatch.setattr(found, "_connect", connect)
    return found


def test_answers_are_held_against_what_is_right(monkeypatch):
    names = ["a", "b", "a", "a", "b"]
    for wrong, count in (({}, 0), ({"b": "a"}, 2), ({"a": "b", "b": "a"}, 5)):
        found = checked(monkeypatch, **wrong)
        asyncio.run(found.work(names))
        assert sorted(body["model"] for body in found.server.seen) == sorted(names)
        assert found.figures() == {
            "answers": 5,
            "wrong_answers": count,
            "halfway_memory_bytes": 5,
            "memory_bytes": 5,
        }


def test_what_is_right_ends_where_rounding_may_decide(monkeypatch):
    found = checked(monkeypatch)
    asyncio.run(found.expect(["a", "odd"], margin=0.3))
    assert found.expected["a"] == []
    assert found.expected["odd"] == [7]
    best = [{"x": -1.0, "y": -0.1}, {"x": -0.1, "y": -0.2}]
    assert certain_tokens([5, 6], best, 0.05) == [5, 6]
    assert certain_tokens([5, 6], best, 0.5) == [5]


@pytest.mark.parametrize(("wrong", "count"), [({}, 0), ({"even": "odd"}, 3)])
def test_a_reload_is_right_where_its_weights_answer(monkeypatch, wrong, count):
    found = checked(monkeypatch, **wrong)
    found.expected["even"] = found.expected["even"][:2]
    seconds = asyncio.run(found.reload("reloaded", WEIGHTS, 5, ["a", "b"]))
    assert len(seconds) == len(found.memory) == 5
    asked = [body["lora_path"] for body in found.server.seen if "lora_path" in body]
    assert asked == ["/even", "/odd", "/even", "/odd", "/even"]
    assert {body.get("model") for body in found.server.seen} == {"a", "b", "reloaded", None}
    assert found.wrong == count
    assert found.answers >= 5


def test_a_refusal_ends_the_measurement(monkeypatch):
    for work in (
        lambda found: found.work(["a", "unknown"]),
        lambda found: found.reload("reloaded", WEIGHTS, 10**9, ["a", "unknown"]),
    ):
        found = checked(monkeypatch)
        found.expected["unknown"] = []
        with pytest.raises(FloraError, match=r"the stub answered 404 to \S+ \(no such model\)"):
            asyncio.run(work(found))


def test_weights_that_answer_alike_tell_nothing():
    check_told_apart([1, 2], [1, 3])
    for one, other in (([1, 2], [1, 2]), ([1, 2], [1]), ([], [1])):
        with pytest.raises(FloraError, match="--new-tokens"):
            check_told_apart(one, other)


LOAD = {"adapters": 8, "resident": 3, "rows": 4, "requests": 24, "reloads": 6, "new_tokens": 8}


def test_some_adapters_have_to_go():
    load = Load(**LOAD | {"resident": 8}, zipf=1.0, prompt_tokens=4)
    with pytest.raises(UsageError, match="--resident 8: fewer than the 8 adapters"):
        measure("model", parse_specs("FLORA", 1), load, repeats=1)


@pytest.mark.slow
def test_a_servers_adapters_come_and_go(tmp_path):
    pytest.importorskip("vllm")
    model = save_tiny_model(tmp_path / "model")
    # vLLM's attention on a CPU takes heads of 32 and more.
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 96}
    sizes["max_position_embeddings"] = 256
    zoo.build("Llama", vocab_size=259, **sizes).save_pretrained(model)
    file = tmp_path / "x.json"
    arguments = ["--model", str(model), "--dtype", "float32", "--eager", "--json", str(file)]
    # The prompt is longer than a block of the prefix cache.
    arguments += ["--kinds", "LORA:4+FLORA:2+IA3", "--prompt-tokens", "140", "--repeats", "1"]
    for name, value in LOAD.items():
        arguments += [f"--{name.replace('_', '-')}", str(value)]
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "churn", *arguments])
    assert stopped.value.code == 0
    whole, fewer, reloads = json.loads(file.read_text())
    assert {r["study"] for r in (whole, fewer, reloads)} == {"churn"}
    assert [(r["resident"], r["reloads"]) for r in (whole, fewer, reloads)] == [
        (8, 0),
        (3, 0),
        (3, 6),
    ]
    assert whole["ratio_to_resident"] == 1
    assert fewer["ratio_to_resident"] > 0
    assert (whole["answers"], fewer["answers"]) == (48, 48)
    assert reloads["answers"] >= 6
    assert reloads["p99_load_seconds"] >= reloads["median_load_seconds"] > 0
    for record in (whole, fewer, reloads):
        assert record["wrong_answers"] == 0
        assert record["distinct_answers"] > 4
        assert min(record["halfway_memory_bytes"], record["memory_bytes"]) > 1 << 28
