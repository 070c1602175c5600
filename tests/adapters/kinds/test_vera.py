"""VeRA: projections that are saved and such that are drawn, as in PEFT."""

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from flora.adapters.checkpoint import TENSORS_FILE
from tests import zoo
from tests.adapters.kinds.as_peft import assert_reads_as_peft, read, save_by_peft

OPTIONS = {
    "saved": {"r": 6},
    "saved, drawn by another key": {"r": 6, "projection_prng_key": 7},
    "drawn": {"r": 5, "save_projection": False},
    "drawn by another key": {"r": 5, "save_projection": False, "projection_prng_key": 2**40 + 1},
    "layers of one size": {"r": 5, "save_projection": False, "target_modules": ["k_proj"]},
    "the largest sizes of two layers": {
        "r": 5,
        "save_projection": False,
        "target_modules": ["down_proj", "up_proj"],
    },
    "biases of the layers": {"r": 6, "bias": "vera_only"},
    "biases of the layers, drawn": {"r": 6, "bias": "vera_only", "save_projection": False},
    "all biases": {"r": 6, "bias": "all", "target_modules": ["q_proj", "down_proj"]},
    # Layers that have a bias alone do not count for the sizes.
    "all biases, drawn": {
        "r": 6,
        "bias": "all",
        "save_projection": False,
        "target_modules": ["k_proj"],
    },
}


CONV1D = {"k_proj": "c_attn", "down_proj": "c_proj", "up_proj": "c_fc"}
"""GPT-2's layers for Qwen2's."""

# PEFT's own warning that it draws them.
drawn = pytest.mark.filterwarnings("ignore:Specified to not (save|load) vera_A")


@drawn
@pytest.mark.parametrize("option", OPTIONS)
def test_each_option_is_pefts(option, tmp_path):
    model = zoo.build("Qwen2")
    save_by_peft(peft.VeraConfig, model, tmp_path, **OPTIONS[option])
    assert_reads_as_peft(model, tmp_path)
    saved = OPTIONS[option].get("save_projection", True)
    assert ("base_model.vera_A" in load_file(tmp_path / TENSORS_FILE)) == saved


@drawn
@pytest.mark.parametrize(
    "option", [name for name, settings in OPTIONS.items() if settings.get("bias") != "all"]
)
def test_of_a_transposed_weight_too(option, tmp_path):
    settings = OPTIONS[option]
    targets = [CONV1D[name] for name in settings.get("target_modules", CONV1D)]
    model = zoo.build("GPT2")
    save_by_peft(peft.VeraConfig, model, tmp_path, **{**settings, "target_modules": targets})
    assert_reads_as_peft(model, tmp_path)


def test_saved_projections_need_not_be_those_that_the_key_draws(tmp_path):
    model = zoo.build("Qwen2")
    save_by_peft(peft.VeraConfig, model, tmp_path, r=6)
    before = read(model, tmp_path).layers
    tensors = load_file(tmp_path / TENSORS_FILE)
    generator = torch.Generator().manual_seed(0)
    for name in ("base_model.vera_A", "base_model.vera_B"):
        tensors[name] = torch.randn(tensors[name].shape, generator=generator)
    save_file(tensors, tmp_path / TENSORS_FILE)
    after = assert_reads_as_peft(model, tmp_path).layers
    assert all(not torch.equal(after[n].down, f.down) for n, f in before.items())
