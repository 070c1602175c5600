"""`flora generate --engine vllm` answers as transformers does."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from tests import zoo
from tests.tiny import save_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("vllm")
    folder = tmp_path_factory.mktemp("offline")
    model = AutoModelForCausalLM.from_pretrained(save_tiny_model(folder / "model", 128))
    for name in ("flora3", "ia3", "lora"):
        zoo.make_adapter(name, model, folder / "adapters" / name)
    return folder


def generate(folder: Path, lines: list[Any], *more: str) -> tuple[int, list[Any], str]:
    command = [str(Path(sys.executable).with_name("flora")), "generate", str(folder / "model")]
    command += ["--adapters", str(folder / "adapters"), "--input", "-", "--new-tokens", "8", *more]
    done = subprocess.run(
        command,
        input="\n".join(map(json.dumps, lines)),
        env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_CI_ENV": "1"},
        capture_output=True,
        text=True,
    )
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def test_the_answers_are_those_of_transformers(folder):
    names = ["flora3", None, "ia3", "lora", "flora3", None, "nobody"]
    lines = [{"adapter": name, "prompt": f"Row {i}: ab"} for i, name in enumerate(names)]
    code, found, _ = generate(folder, lines, "--engine", "vllm", "--rows", "4")
    assert (code, found) == generate(folder, lines, "--rows", "4")[:2]
    assert code == 1
    assert [bool(line.get("text")) for line in found] == [True] * 6 + [False]


def test_a_wrong_call_is_one_line(folder):
    for name, more, said in (
        ("model", ["--engine", "vlm"], "these are: transformers, vllm"),
        ("none", ["--engine", "vllm"], "no model folder"),
    ):
        command = [str(Path(sys.executable).with_name("flora")), "generate", str(folder / name)]
        command += ["--adapters", str(folder / "adapters"), "--input", "-", *more]
        done = subprocess.run(command, input="{}", capture_output=True, text=True)
        assert done.returncode == 2
        assert said in done.stderr.splitlines()[-1]
