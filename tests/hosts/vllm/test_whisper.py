"""Whisper in a real vLLM engine: encoder and decoder of each row are those of its own adapter."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import zoo
from tests.hosts.vllm.engine import NEW_TOKENS
from tests.hosts.vllm.speech import Listener, save_tiny_whisper, sound
from tests.hosts.vllm.test_engine import EAGER, run

pytestmark = pytest.mark.filterwarnings("ignore:Specified to not")  # VeRA without its projections

PROMPT = [1, 2, 3, 6]
SOUNDS = 3
CLOSE = 1e-3
"""Log-probabilities of one model in two libraries, in fp32, are within this."""

OPTIONS: dict[str, Any] = {
    "skip_tokenizer_init": False,  # its processor asks for one
    "max_num_batched_tokens": 256,  # five encoder's items
    "max_num_seqs": 24,
}
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in zoo.CASES},
    "encoder": ("lora", {"target_modules": r".*\.encoder\..*(_proj|fc1|fc2)"}),
    "cross": ("flora3", {"target_modules": r".*\.encoder_attn\.[kv]_proj"}),
}
"""One of each kind, of all layers, and some of what only the audio comes through."""


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

    def _own(self, name: str | None) -> Listener:
        if name is None:
            return Listener(self.base, self.model)
        case, _ = ADAPTERS[name]
        return Listener(zoo.own_model(case, self.base, self.folder / name), self.model)

    def _answer(self, name: str | None, seed: int) -> tuple[list[int], list[float]]:
        return self.own(name).transcribe(self.sounds[seed], PROMPT, NEW_TOKENS)

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
        pytest.param(EAGER, id="eager"),
        pytest.param({}, id="compiled"),
        pytest.param({**EAGER, "tensor_parallel_size": 2}, id="sharded"),
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


def test_the_yardstick_tells_adapters_and_sounds_apart(own):
    rows = [(name, seed) for name in (None, *ADAPTERS) for seed in range(SOUNDS)]
    scores = np.array([own.answer(*row)[1] for row in rows])
    apart = np.abs(scores[:, None] - scores[None]).max(-1)
    assert apart[~np.eye(len(rows), dtype=bool)].min() > 10 * CLOSE
