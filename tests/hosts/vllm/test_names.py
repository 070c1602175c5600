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
    # Bloom's: both names mean the layer, and transformers' is the old one or the new.
    ({"orig_to_new_prefix": {"h.": "transformer.h."}}, "transformer.h.0.up", "transformer.h.0.up"),
    # ChatGLM's: what was cut out may have been anywhere.
    ({"orig_to_new_substr": {".words": ""}}, "model.up", "model.up"),
    ({}, f"{LAYERS}.fc1", f"{LAYERS}.fc1"),
]
MULTIMODAL: list[tuple[dict[str, Any], str, str]] = [
    # Gemma 3's, which has transformers' present name; and Qwen2.5-VL's, which has older ones, too.
    (
        {"orig_to_new_prefix": {"model.language_model.": "language_model.model."}},
        "language_model.model.layers.0.mlp.up_proj",
        "model.language_model.layers.0.mlp.up_proj",
    ),
    (
        {
            "orig_to_new_prefix": {
                "model.language_model.": "language_model.model.",
                "model.": "language_model.model.",
            }
        },
        "language_model.model.layers.0.self_attn.q_proj",
        "model.language_model.layers.0.self_attn.q_proj",
    ),
]
SAID = "original: "
RUN = f"""
import json, sys
from types import SimpleNamespace
from transformers import Gemma3Config
from vllm.model_executor.models.utils import WeightsMapper
from flora.hosts.vllm.names import Names
config = Gemma3Config(architectures=sys.argv[1:])
for renames, name in json.load(sys.stdin):
    model = SimpleNamespace(hf_to_vllm_mapper=WeightsMapper(**renames))
    print("{SAID}" + Names(model, config).original(name))
"""


def originals(cases: list[tuple[dict[str, Any], str, str]], architecture: str) -> list[str]:
    """What the names of these cases are taken for in a model of transformers'."""
    pytest.importorskip("vllm")
    asked = json.dumps([case[:2] for case in cases])
    command = [sys.executable, "-c", RUN, architecture]
    done = subprocess.run(command, input=asked, capture_output=True, text=True, check=True)
    return [line.removeprefix(SAID) for line in done.stdout.splitlines() if line.startswith(SAID)]


def test_a_layer_is_called_as_in_transformers():
    assert originals(CASES, "Unknown") == [name for *_, name in CASES]


def test_of_several_names_it_is_the_one_that_transformers_has():
    own = "Gemma3ForConditionalGeneration"
    assert originals(MULTIMODAL, own) == [name for *_, name in MULTIMODAL]
    unknown = [name for _, name, _ in MULTIMODAL]
    assert originals(MULTIMODAL, "Unknown") == unknown


def test_without_a_mapper_names_stay():
    assert Names(SimpleNamespace(), SimpleNamespace()).original(LAYERS) == LAYERS
