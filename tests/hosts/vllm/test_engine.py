"""A real vLLM engine with the plugin: each row's tokens are those of a model of its own."""

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from flora.adapters.checkpoint import TENSORS_FILE
from tests import zoo
from tests.hosts.vllm.engine import NEW_TOKENS

pytestmark = pytest.mark.filterwarnings("ignore:Specified to not")  # VeRA without its projections

HEADS = {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 96}
"""vLLM's attention on a CPU takes heads of 32 and more."""

PROMPTS = (3, 17, 40)
"""Of the longest, adapters of several pairs take the weight side."""

EAGER: dict[str, Any] = {"enforce_eager": True}
SMALL_STEPS = {"max_num_batched_tokens": 48, "max_num_seqs": 24}
"""Prompts are taken in pieces, beside rows that decode."""


def run(
    folder: Path,
    model: Path,
    steps: list[Any],
    *,
    inductor: bool = False,
    plugins: str = "flora",
    **options: Any,
) -> list[Any]:
    """What an engine answers to each step.

    inductor: whether what is compiled is also run as in production, which takes minutes to make.
    plugins:  of vLLM's, those that are loaded.
    """
    job, result = folder / "job.json", folder / "result.json"
    options = {"enable_lora": True, **SMALL_STEPS, **options}
    job.write_text(json.dumps({"model": str(model), "options": options, "steps": steps}))
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "VLLM_PLUGINS": plugins}
    environment["VLLM_CPU_CI_ENV"] = "0" if inductor else "1"
    if (ranks := options.get("tensor_parallel_size", 1)) > 1:  # a core each
        cores = sorted(os.sched_getaffinity(0))
        bound = "|".join(str(cores[rank % len(cores)]) for rank in range(ranks))
        environment["VLLM_CPU_OMP_THREADS_BIND"] = bound
    command = [sys.executable, "-m", "tests.hosts.vllm.engine", str(job), str(result)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise AssertionError(f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
    return json.loads(result.read_text())


class Zoo:
    """A model, an adapter of each kind, and what a model of each one's own generates."""

    def __init__(self, folder: Path) -> None:
        self.base = zoo.build("Llama", **HEADS)
        self.folder, self.model = folder, folder / "model"
        self.base.save_pretrained(self.model)
        for seed, name in enumerate(zoo.CASES):
            zoo.make_adapter(name, self.base, folder / name, seed=seed)
        generator = torch.Generator().manual_seed(0)
        self.prompts = {
            n: torch.randint(3, zoo.VOCABULARY, (n,), generator=generator).tolist() for n in PROMPTS
        }
        self.own = cache(self._own)
        self.tokens = cache(self._tokens)

    def _own(self, name: str | None) -> nn.Module:
        return self.base if name is None else zoo.own_model(name, self.base, self.folder / name)

    def _tokens(self, name: str | None, length: int) -> list[int]:
        ids = torch.tensor([self.prompts[length]])
        found = self.own(name).generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            eos_token_id=None,
            do_sample=False,
        )
        return found[0, length:].tolist()

    def row(self, name: str | None, length: int) -> list[Any]:
        return [None if name is None else str(self.folder / name), self.prompts[length]]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    pytest.importorskip("vllm")
    return Zoo(tmp_path_factory.mktemp("zoo"))


def batches() -> list[list[tuple[str | None, int]]]:
    """All kinds at once with the base in between, shuffled, and some alone."""
    names = [name for case in zoo.CASES for name in (case, None)]
    mixed = [(name, PROMPTS[i % 3]) for i, name in enumerate(names)]
    order = torch.randperm(len(mixed), generator=torch.Generator().manual_seed(1)).tolist()
    twice = [(name, length) for name in ("flora3", "lora") for length in PROMPTS]
    return [mixed, [mixed[i] for i in order], [("flora3", 40)], [("dora", 3)], twice]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(EAGER, id="eager"),
        pytest.param({}, id="compiled"),
        pytest.param({"inductor": True}, id="inductor", marks=pytest.mark.slow),
        pytest.param({**EAGER, "tensor_parallel_size": 2}, id="sharded", marks=pytest.mark.slow),
    ],
)
def test_a_row_gets_the_tokens_of_a_model_of_its_own(own, tmp_path, options):
    steps = [{"generate": [own.row(*row) for row in rows]} for rows in batches()]
    found = run(tmp_path, own.model, steps, **options)
    assert found == [[own.tokens(*row) for row in rows] for rows in batches()]


@pytest.mark.slow
def test_they_are_also_those_of_vllms_own_lora(own, tmp_path):
    """Where a slot is free, as base rows get another's weights otherwise."""
    rows = [(name, length) for length in PROMPTS for name in ("lora", "rslora", None)]
    step = {"generate": [own.row(*row) for row in rows]}
    found = run(tmp_path, own.model, [step], plugins="", max_loras=4, **EAGER)
    assert found == [[own.tokens(*row) for row in rows]]


def test_an_engines_adapters_come_and_go(own, tmp_path):
    """Two at a time, three resident: they are evicted and come back, beside rows of the base."""
    names = ["flora1", "lora", "ia3", "dora", "hira"]
    rows = [(name, length) for length in PROMPTS for case in names for name in (case, None)]
    changing = tmp_path / "changing"
    changed = [[str(changing), own.prompts[17]]]
    one, other = str(own.folder / "flora3"), str(own.folder / "loha")
    steps = [
        {"generate": [own.row(*row) for row in rows]},
        {"call": "list_loras", "arguments": []},
        # The same name and folder with new weights, and the first ones again.
        {"copy": [one, str(changing)]},
        {"generate": changed},
        {"copy": [other, str(changing)]},
        {"generate": changed},
        {"copy": [one, str(changing)]},
        {"generate": changed},
        # Told to load, to keep and to forget.
        {"call": "add_lora", "arguments": [one]},
        {"call": "pin_lora", "arguments": [7]},
        {"generate": [own.row(*row) for row in rows]},
        {"call": "list_loras", "arguments": []},
        {"call": "remove_lora", "arguments": [7]},
        {"call": "list_loras", "arguments": []},
        {"call": "remove_lora", "arguments": [7]},
        {"generate": [[one, own.prompts[17]]]},
        # Of one that was evicted the copy is gone.
        {"lose": str(own.folder / "flora1")},
        {"generate": [own.row(*row) for row in (("flora1", 17), ("hira", 17), (None, 17))]},
        {"generate": [own.row(*row) for row in rows if row[0] != "flora1"]},
    ]
    found = run(tmp_path, own.model, steps, max_loras=2, max_cpu_loras=3, **EAGER)
    right = [own.tokens(*row) for row in rows]
    assert found[0] == right
    assert len(found[1]) == 3
    of = {name: [own.tokens(name, 17)] for name in ("flora3", "loha")}
    assert found[2:8] == [None, of["flora3"], None, of["loha"], None, of["flora3"]]
    assert found[8:10] == [True, True]
    assert found[10] == right
    assert 7 in found[11]
    assert len(found[11]) == 3
    assert found[12] is True
    assert 7 not in found[13]
    assert found[14] is False
    assert found[15] == of["flora3"]
    assert found[17] == [[], own.tokens("hira", 17), own.tokens(None, 17)]
    assert found[18] == [own.tokens(*row) for row in rows if row[0] != "flora1"]


def test_a_bad_adapter_is_refused_and_nothing_else_is_touched(own, tmp_path):
    def spoil(name: str, change: Any) -> str:
        folder = tmp_path / name
        shutil.copytree(own.folder / "lora", folder)
        tensors = load_file(folder / TENSORS_FILE)
        save_file(change(tensors), folder / TENSORS_FILE)
        return str(folder)

    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    bad = {
        "nan": spoil("nan", lambda t: t | {first: t[first] * float("nan")}),
        # Whole in itself, but for another model: the engine itself refuses it.
        "shape": spoil(
            "shape", lambda t: {n: v[:, :64].clone() if "_A" in n else v for n, v in t.items()}
        ),
        "unknown": spoil(
            "unknown", lambda t: {n.replace("q_proj", "r_proj"): v for n, v in t.items()}
        ),
        "missing": str(tmp_path / "nowhere"),
    }
    rows = [("lora", 17), (None, 17), ("flora3", 40)]
    good = {"generate": [own.row(*row) for row in rows]}
    steps = [good]
    for folder in bad.values():
        steps += [{"generate": [own.row(*rows[0]), [folder, own.prompts[3]]]}, good]
        steps += [{"call": "add_lora", "arguments": [folder]}]
    found = run(tmp_path, own.model, steps, **EAGER)
    right = [own.tokens(*row) for row in rows]
    assert [answer for step, answer in zip(steps, found, strict=True) if step is good] == [
        right
    ] * 5
    refused = [
        answer["error"] for step, answer in zip(steps, found, strict=True) if step is not good
    ]
    kinds = [kind for kind, _ in refused]
    assert kinds == ["InvalidAdapterError"] * 6 + ["UsageError"] * 2
    texts = [text for _, text in refused]
    assert all("NaN" in text and first.rpartition(".lora")[0][22:] in text for text in texts[:2])
    assert all("found shape [4, 64], expected [4, 128]" in text for text in texts[2:4])
    assert all("r_proj" in text and "no such linear layer" in text for text in texts[4:6])
    assert all("\n" not in text for text in texts)
