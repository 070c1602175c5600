"""Which layers an adapter of any kind is for: those that PEFT adapts."""

import dataclasses
import json

import pytest

from flora.adapters.checkpoint import CONFIG_FILE
from flora.adapters.kinds import KINDS
from flora.errors import InvalidAdapterError
from tests import zoo
from tests.adapters.kinds.as_peft import ONE_OF_EACH, assert_reads_as_peft, read, save_by_peft

LAYERS = {
    "whole names": {"target_modules": ["model.layers.1.mlp.up_proj", "q_proj", "0.mlp.down_proj"]},
    "a pattern": {"target_modules": r".*\.1\.(self_attn\.[qo]|mlp\.down)_proj"},
    "all of them": {"target_modules": "all-linear"},
    "some blocks": {"target_modules": ["k_proj", "down_proj"], "layers_to_transform": [1]},
    "one block": {
        "target_modules": ["k_proj", "down_proj"],
        "layers_to_transform": 0,
        "layers_pattern": "layers",
    },
    "blocks of two names": {
        "target_modules": ["k_proj", "down_proj"],
        "layers_to_transform": [0],
        "layers_pattern": ["h", "layers"],
    },
    "all but some": {
        "target_modules": ["q_proj", "up_proj", "down_proj"],
        "exclude_modules": ["up_proj", "model.layers.1.self_attn.q_proj"],
    },
    "all but a pattern": {"target_modules": "all-linear", "exclude_modules": r".*\.1\..*"},
}


def settings_of(case, settings):
    own = {**case.settings, **settings}
    return {**own, "feedforward_modules": r".*(down|c)_proj"} if case.kind == "IA3" else own


def has(case, settings):
    """Whether the PEFT config of a case has such settings."""
    return settings.keys() <= {field.name for field in dataclasses.fields(case.make)}


@pytest.mark.parametrize(
    ("kind", "layers"),
    [
        (kind, layers)
        for kind, case in ONE_OF_EACH.items()
        for layers, settings in LAYERS.items()
        if has(case, settings)
    ],
)
def test_the_layers_are_those_that_peft_adapts(kind, layers, tmp_path):
    case = ONE_OF_EACH[kind]
    settings = settings_of(case, LAYERS[layers])
    model = zoo.build("Qwen2")
    save_by_peft(case.make, model, tmp_path, **settings)
    found = assert_reads_as_peft(model, tmp_path)
    assert 2 <= len(found.layers) <= 14
    # PEFT writes "all-linear" out; a folder of other hands may hold the words.
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config | LAYERS[layers]))
    assert read(model, tmp_path).layers.keys() == found.layers.keys()


def test_every_kind_is_tried_here():
    assert ONE_OF_EACH.keys() == KINDS.keys()


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - set(zoo.NO_CONV1D)))
def test_so_are_those_of_transposed_weights(kind, tmp_path):
    case = ONE_OF_EACH[kind]
    settings = settings_of(case, {"target_modules": "all-linear"})
    model = zoo.build("GPT2")
    save_by_peft(case.make, model, tmp_path, **settings)
    assert len(assert_reads_as_peft(model, tmp_path).layers) == 8


@pytest.mark.parametrize("kind", ["LORA", "ADALORA", "VERA"])
def test_a_bias_of_no_linear_layer_is_refused_by_its_name(kind, tmp_path):
    case = ONE_OF_EACH[kind]
    settings = settings_of(case, {"bias": "all"})
    model = zoo.build("GPT2")
    save_by_peft(case.make, model, tmp_path, **settings)
    with pytest.raises(InvalidAdapterError) as caught:
        read(model, tmp_path)
    norms = [f"transformer.h.{block}.ln_{i}" for block in range(2) for i in (1, 2)]
    for name in [*norms, "transformer.ln_f"]:
        assert f"{name}: the base model has no such linear layer" in str(caught.value)
    assert "\n" not in str(caught.value)
