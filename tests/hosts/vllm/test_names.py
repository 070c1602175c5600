"""What vLLM's own mappers rename is called again as transformers calls it.

vLLM is imported in another process, as it changes much of what others in one would see.
"""

import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from flora.hosts.vllm.names import Names

LAYERS = "model.decoder.layers.0"
CASES: list[tuple[dict[str, Any], str, str]] = [
    # Whisper's: a part of a name.
    (
        {
            "orig_to_new_substr": {".fc1.": ".mlp.fc1.", ".fc2.": ".mlp.fc2."},
            "orig_to_new_stacked": {".q_proj": [".qkv_proj", "q"]},
            "orig_to_new_prefix": {"proj_out.": None},
        },
        f"{LAYERS}.mlp.fc2",
        f"{LAYERS}.fc2",
    ),
    (
        {
            "orig_to_new_substr": {".fc1.": ".mlp.fc1."},
            "orig_to_new_stacked": {".q_proj": [".qkv_proj", "q"]},
        },
        f"{LAYERS}.self_attn.q_proj",
        f"{LAYERS}.self_attn.q_proj",
    ),
    # Falcon-H1's: a part that is in what it becomes.
    ({"orig_to_new_substr": {"mamba": "mamba.mamba"}}, "m.0.mamba.mamba.up", "m.0.mamba.up"),
    # A beginning and an end, whose old forms are in the new ones.
    ({"orig_to_new_prefix": {"": "model."}}, "model.layers.0.up", "layers.0.up"),
    ({"orig_to_new_suffix": {".weight": ".linear.weight"}}, "layers.0.up.linear", "layers.0.up"),
    # Gemma 3's and Bloom's: both names mean the layer, and transformers' is the old one or the new.
    (
        {"orig_to_new_prefix": {"model.language_model.": "language_model.model."}},
        "language_model.model.layers.0.mlp.up_proj",
        "language_model.model.layers.0.mlp.up_proj",
    ),
    ({"orig_to_new_prefix": {"h.": "transformer.h."}}, "transformer.h.0.up", "transformer.h.0.up"),
    # ChatGLM's: what was cut out may have been anywhere.
    ({"orig_to_new_substr": {".words": ""}}, "model.up", "model.up"),
    ({}, f"{LAYERS}.fc1", f"{LAYERS}.fc1"),
]
RUN = """
import json, sys
from types import SimpleNamespace
from vllm.model_executor.models.utils import WeightsMapper
from flora.hosts.vllm.names import Names
for renames, name in json.load(sys.stdin):
    model = SimpleNamespace(hf_to_vllm_mapper=WeightsMapper(**renames))
    print("original:", Names(model).original(name))
"""


def test_a_layer_is_called_as_in_transformers():
    pytest.importorskip("vllm")
    asked = json.dumps([case[:2] for case in CASES])
    command = [sys.executable, "-c", RUN]
    done = subprocess.run(command, input=asked, capture_output=True, text=True, check=True)
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("original:")]
    assert [name for _, name in lines] == [name for *_, name in CASES]


def test_without_a_mapper_names_stay():
    assert Names(SimpleNamespace()).original(LAYERS) == LAYERS
