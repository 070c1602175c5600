"""Whisper in a real vLLM engine: encoder and decoder of each row are those of its own adapter."""

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import WhisperTokenizer

from flora.adapters.checkpoint import TENSORS_FILE
from flora.bench.processes import BASE_MODEL
from tests import zoo
from tests.hosts.vllm.engine import NEW_TOKENS
from tests.hosts.vllm.server import Server
from tests.hosts.vllm.speech import Listener, as_wav, save_tiny_whisper, sound
from tests.hosts.vllm.test_engine import EAGER, run

pytestmark = pytest.mark.filterwarnings("ignore:Specified to not")  # VeRA without its projections

PROMPT = [1, 2, 3, 6]
SOUNDS = 3
CLOSE = 1e-3
"""Log-probabilities of one model in two libraries, in fp32, are within this."""

TOKENS = 256
"""Of a step: five encoder's items."""

OPTIONS: dict[str, Any] = {
    "skip_tokenizer_init": False,  # its processor asks for one
    "max_num_batched_tokens": TOKENS,
    "max_num_seqs": 24,
}
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in zoo.CASES},
    "encoder": ("lora", {"target_modules": r".*\.encoder\..*(_proj|fc1|fc2)"}),
    "cross": ("flora3", {"target_modules": r".*\.encoder_attn\.[kv]_proj"}),
}
"""One of each kind, of all layers, and some of what only the audio comes through."""

SERVED = ("flora3", "lora", "ia3", "dora", "encoder", "cross")


class Zoo:
    """A Whisper, an adapter of each kind, and what a model of each one's own transcribes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.model = folder, folder / "model"
        self.base = save_tiny_whisper(self.model)
        for seed, (name, (case, settings)) in enumerate(ADAPTERS.items()):
            zoo.make_adapter(case, self.base, folder / name, seed=seed, **settings)
        self.sounds = [sound(seed) for seed in range(SOUNDS)]
        for seed, audio in enumerate(self.sounds):
            np.save(folder / f"{seed}.npy", audio.numpy())
        self.own = cache(self._own)
        self.answer = cache(self._answer)
        self.tokenizer = WhisperTokenizer.from_pretrained(self.model)

    def _own(self, name: str | None) -> Listener:
        if name is None:
            return Listener(self.base, self.model)
        case, _ = ADAPTERS[name]
        return Listener(zoo.own_model(case, self.base, self.folder / name), self.model)

    def _answer(self, name: str | None, seed: int) -> tuple[list[int], list[float]]:
        return self.own(name).transcribe(self.sounds[seed], PROMPT, NEW_TOKENS)

    def text(self, name: str | None, seed: int) -> str:
        """What a server answers: it ends at the end, and has no special tokens."""
        end = self.base.config.eos_token_id
        tokens, _ = self.own(name).transcribe(self.sounds[seed], PROMPT, NEW_TOKENS, end)
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def row(self, name: str | None, seed: int) -> list[Any]:
        prompt = {"audio": str(self.folder / f"{seed}.npy"), "tokens": PROMPT}
        return [None if name is None else str(self.folder / name), prompt]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    pytest.importorskip("vllm")
    return Zoo(tmp_path_factory.mktemp("whisper"))


def batches() -> list[list[tuple[str | None, int]]]:
    """All kinds at once with the base in between, shuffled; one sound by all; and some alone."""
    names = [name for own in ADAPTERS for name in (own, None)]
    mixed = [(name, i % SOUNDS) for i, name in enumerate(names)]
    order = torch.randperm(len(mixed), generator=torch.Generator().manual_seed(1)).tolist()
    return [mixed, [mixed[i] for i in order], [(name, 1) for name in names], [("flora3", 0)]]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(EAGER, id="eager", marks=pytest.mark.slow),
        pytest.param({}, id="compiled"),
        pytest.param({**EAGER, "max_loras": 2, "max_cpu_loras": 3}, id="evicted"),
        pytest.param({**EAGER, "tensor_parallel_size": 2}, id="sharded", marks=pytest.mark.slow),
    ],
)
def test_a_row_is_transcribed_as_by_a_model_of_its_own(own, tmp_path, options):
    steps = [{"generate": [own.row(*row) for row in rows]} for rows in batches()]
    found = run(tmp_path, own.model, steps, **OPTIONS, **options)
    for rows, answers in zip(batches(), found, strict=True):
        for row, (tokens, scores) in zip(rows, answers, strict=True):
            right, expected = own.answer(*row)
            assert tokens == right, row
            assert np.allclose(scores, expected, atol=CLOSE), row


def test_a_runner_with_another_order_is_refused_at_the_start(own, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(AssertionError, match=r"flora does not .* set VLLM_USE_V2_MODEL_RUNNER=0"):
        run(tmp_path, own.model, [], **OPTIONS, **EAGER)


@pytest.fixture(scope="module")
def server(own: Zoo) -> Iterator[Server]:
    pytest.importorskip("soundfile")
    served = {name: own.folder / name for name in SERVED}
    with Server(own.model, served, max_num_batched_tokens=TOKENS) as found:
        found.wait()
        yield found


def test_a_request_is_transcribed_by_its_own_adapter(own, server):
    rows = [(name, seed) for seed in range(SOUNDS) for name in (*SERVED, None)]

    def transcribe(row: tuple[str | None, int]) -> str:
        name, seed = row
        with server.client() as client:
            return client.audio.transcriptions.create(
                model=name or BASE_MODEL,
                file=("speech.wav", as_wav(own.sounds[seed])),
                language="en",
                temperature=0,
                extra_body={"max_completion_tokens": NEW_TOKENS},
            ).text

    with ThreadPoolExecutor(len(rows)) as pool:
        assert list(pool.map(transcribe, rows)) == [own.text(*row) for row in rows]


def test_an_adapter_of_what_is_not_served_is_refused(own, server, tmp_path):
    shutil.copytree(own.folder / "lora", tmp_path / "conv")
    tensors = load_file(tmp_path / "conv" / TENSORS_FILE)
    renamed = {name.replace("layers.0.fc1", "conv1"): t for name, t in tensors.items()}
    save_file(renamed, tmp_path / "conv" / TENSORS_FILE)
    answer = server.load("conv", tmp_path / "conv")
    assert answer.status_code == 400
    assert "encoder.conv1: the base model has no such linear layer" in answer.text


def test_the_yardstick_tells_adapters_and_sounds_apart(own):
    rows = [(name, seed) for name in (None, *ADAPTERS) for seed in range(SOUNDS)]
    scores = np.array([own.answer(*row)[1] for row in rows])
    apart = np.abs(scores[:, None] - scores[None]).max(-1)
    assert apart[~np.eye(len(rows), dtype=bool)].min() > 10 * CLOSE
