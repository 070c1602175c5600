"""A real server with the plugin, asked by the openai client as its users ask it."""

import json
import random
import shutil
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from flora import assets
from flora.adapters.checkpoint import TENSORS_FILE
from flora.bench.processes import BASE_MODEL
from tests import zoo
from tests.hosts.vllm.server import Server
from tests.tiny import save_tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:Specified to not")  # VeRA without its projections

NAMES = tuple(zoo.CASES)
CASES = {name: name for name in NAMES} | {"changed hira": "hira", "changed loha": "loha"}
"""What each adapter is of; those that have a name to themselves are loaded later."""

PROMPTS = [f"Question {i}: ab" for i in range(3)]
NEW_TOKENS = 8

REAL_PROMPTS = ["Once upon a time there was", "Rain fell on the tin roofs. " * 12 + "Then", "A red"]
LAST_LAYERS = {"target_modules": r".*\.layers\.2[6-9]\..*\b(q_proj|o_proj|down_proj)"}
"""Before other blocks random adapters make chaos, which lifts any rounding to the logits' size."""
ADAPTER_BYTES = 1_600_000


class ZooServer(Server):
    """A server of a model with an adapter of each case, and what models of their own answer.

    settings: of the adapters.
    """

    def __init__(
        self, folder: Path, model: Path, settings: Mapping[str, Any] = {}, **options: Any
    ) -> None:
        self.folder = folder
        self.base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        for seed, (name, case) in enumerate(CASES.items()):
            zoo.make_adapter(case, self.base, folder / name, seed, **settings)
        self.text = cache(self._text)
        super().__init__(model, {name: folder / name for name in NAMES}, **options)

    def _text(self, name: str | None, prompt: str) -> str:
        model = self.base
        if name is not None:
            model = zoo.own_model(CASES[name], self.base, self.folder / name)
        batch = self.tokenizer(prompt, return_tensors="pt")
        found = model.generate(
            **batch, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None
        )
        return self.tokenizer.decode(found[0, batch["input_ids"].shape[1] :])

    def complete(self, name: str, prompt: str) -> str:
        with self.client() as client:
            answer = client.completions.create(
                model=name,
                prompt=prompt,
                max_tokens=NEW_TOKENS,
                temperature=0,
                extra_body={"ignore_eos": True, "return_token_ids": True},
            )
        return self.tokenizer.decode(answer.choices[0].token_ids)

    def resident(self) -> int:
        """How many adapters the worker has."""
        (numbers,) = self.post("collective_rpc", method="list_loras").json()["results"]
        return len(numbers)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ZooServer]:
    pytest.importorskip("vllm")
    folder = tmp_path_factory.mktemp("server")
    settings = json.dumps({"flora": {"adapter_bytes": ADAPTER_BYTES}})
    model = save_tiny_model(folder / "model", 128)
    with ZooServer(folder, model, additional_config=settings) as server:
        server.wait()
        yield server


def test_each_request_is_answered_by_its_own_adapter(server):
    asked = [(name, prompt) for prompt in PROMPTS for name in (*NAMES, None)]
    with ThreadPoolExecutor(len(asked)) as pool:
        found = list(pool.map(lambda row: server.complete(row[0] or BASE_MODEL, row[1]), asked))
    assert found == [server.text(*row) for row in asked]


def test_an_unknown_name_is_no_ones(server):
    import openai

    with pytest.raises(openai.NotFoundError):
        server.complete("nobody", "ab")


def test_a_bad_adapter_is_a_4xx_and_the_server_goes_on(server, tmp_path):
    bad = tmp_path / "bad"
    shutil.copytree(server.folder / "lora", bad)
    tensors = load_file(bad / TENSORS_FILE)
    first = next(iter(tensors))
    save_file(tensors | {first: tensors[first] * float("nan")}, bad / TENSORS_FILE)
    answer = server.load("bad", bad)
    assert answer.status_code == 400
    assert "holds NaN or Inf" in answer.json()["error"]["message"]
    narrow = tmp_path / "narrow"
    shutil.copytree(server.folder / "lora", narrow)
    cut = {n: t[:, :64].clone() if "lora_A" in n else t for n, t in tensors.items()}
    save_file(cut, narrow / TENSORS_FILE)
    answer = server.load("bad", narrow)
    assert answer.status_code == 400
    assert "expected [4, 128]" in answer.json()["error"]["message"]
    assert server.load("bad", tmp_path / "nowhere").status_code == 404
    assert server.complete("lora", "ab") == server.text("lora", "ab")


def test_an_adapter_with_which_a_batch_would_not_fit_is_a_503(server, tmp_path):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=512, target_modules=["up_proj", "down_proj"])
    get_peft_model(deepcopy(server.base), config).save_pretrained(tmp_path)
    answer = server.load("large", tmp_path)
    assert answer.status_code == 503
    assert f"adapter_bytes is {ADAPTER_BYTES}" in answer.json()["error"]["message"]
    assert server.complete("lora", "ab") == server.text("lora", "ab")


def test_a_name_with_new_weights_never_meets_old_state(server, tmp_path):
    """Loaded anew while others ask: each answer is that of weights that had the name then."""
    prompt = "A prompt that is long enough to be kept in the cache of prefixes: ab"
    server.complete("flora3", prompt)
    folder, before = tmp_path / "changing", server.resident()

    def change(name: str) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(server.folder / name, folder)
        assert server.load("changing", folder, load_inplace=True).status_code == 200

    one, other = (name for name in CASES if name not in NAMES)
    change(one)
    with ThreadPoolExecutor(2) as pool:
        others = [pool.submit(server.complete, "flora3", prompt) for _ in range(24)]
        for turn in range(6):
            name = (other, one)[turn % 2]
            change(name)
            assert server.complete("changing", prompt) == server.text(name, prompt)
        assert {other.result() for other in others} == {server.text("flora3", prompt)}
    shutil.rmtree(folder)
    assert server.complete("changing", prompt) == server.text(one, prompt)
    assert server.post("v1/unload_lora_adapter", lora_name="changing").status_code == 200
    deadline = time.monotonic() + 20
    while server.resident() > before and time.monotonic() < deadline:
        time.sleep(0.2)
    assert server.resident() == before


def test_the_yardstick_tells_adapters_apart(server):
    assert_each_has_its_own(server, PROMPTS, CASES)


@pytest.mark.slow
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
def test_a_real_model_is_served_in_any_mix(tmp_path, eager):
    """Alone, beside others in any order, and with prompts that are taken in pieces."""
    pytest.importorskip("vllm")
    options = {"enforce_eager": eager, "max_num_batched_tokens": 48}
    with ZooServer(tmp_path, assets.demo_model(), LAST_LAYERS, **options) as server:
        asked = [(name, prompt) for prompt in REAL_PROMPTS for name in (*NAMES, None)]
        expected = {row: server.text(*row) for row in asked}
        told_apart = set(CASES) - {"vera"}  # which is small here; `drawn` is of its kind, too
        assert_each_has_its_own(server, REAL_PROMPTS, told_apart)
        server.wait(600)
        for count in (1, 8, len(asked)):
            random.Random(count).shuffle(asked)
            with ThreadPoolExecutor(count) as pool:
                found = pool.map(lambda row: server.complete(row[0] or BASE_MODEL, row[1]), asked)
                assert dict(zip(asked, found, strict=True)) == expected


def assert_each_has_its_own(
    server: ZooServer, prompts: Sequence[str], cases: Collection[str]
) -> None:
    names = (*cases, None)
    answers = {tuple(server.text(name, prompt) for prompt in prompts) for name in names}
    assert len(answers) == len(names)
