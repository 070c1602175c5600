"""IA3: either side of a layer, as in PEFT."""

import peft
import pytest

from flora.adapters.kinds import get_kind
from tests import zoo
from tests.adapters.kinds.as_peft import assert_reads_as_peft, save_by_peft

Config = get_kind("IA3").Config
OPTIONS = {
    "outputs alone": ("Qwen2", {"feedforward_modules": []}),
    "a name": ("Qwen2", {"feedforward_modules": ["down_proj"]}),
    "names, of layers with a bias too": ("Qwen2", {"feedforward_modules": ["down_proj", "q_proj"]}),
    "inputs alone": (
        "Qwen2",
        {"target_modules": ["o_proj", "v_proj"], "feedforward_modules": ["o_proj", "v_proj"]},
    ),
    "the end of a name": (
        "Qwen2",
        {"target_modules": r".*_proj", "feedforward_modules": ["n_proj", "0.self_attn.q_proj"]},
    ),
    "a pattern": ("Qwen2", {"feedforward_modules": r".*\.[01]\.(mlp\.down|self_attn\.k)_proj"}),
    "a transposed weight": ("GPT2", {"feedforward_modules": ["mlp.c_proj"]}),
    "a transposed weight, by a pattern": ("GPT2", {"feedforward_modules": r".*\.0\.attn\..*"}),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_each_option_is_pefts(option, tmp_path):
    architecture, settings = OPTIONS[option]
    model = zoo.build(architecture)
    if architecture == "GPT2":
        settings = {"target_modules": ["c_attn", "c_fc", "mlp.c_proj"], **settings}
    save_by_peft(peft.IA3Config, model, tmp_path, **settings)
    adapter = assert_reads_as_peft(model, tmp_path)
    sides = {bool((factors.hadamard_out == 1).all()) for factors in adapter.layers.values()}
    assert sides == {"outputs alone": {False}, "inputs alone": {True}}.get(option, {True, False})


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["up", "down"], ["down"]),
        (["m.0.up", "m.0.down"], r".*(?:down)"),
        ([], r".*(?:down)"),
    ],
)
def test_with_targets_peft_takes_the_feedforward_modules(names, expected):
    """PEFT refuses a list whose names are not among those of the targets."""
    config = Config(feedforward_modules=["down"]).with_targets(names)
    assert (config.target_modules, config.feedforward_modules) == (names, expected)
    layers = ["m.0.up", "m.0.down", "down", "m.x_down", "m.down.up"]
    before = Config(feedforward_modules=["down"])
    assert [config.scales_input(n) for n in layers] == [before.scales_input(n) for n in layers]
    peft.IA3Config(**config.model_dump(include={"target_modules", "feedforward_modules"}))


def test_with_targets_a_pattern_and_the_special_letters_of_a_name_stay():
    pattern = Config(feedforward_modules=r".*\.down")
    assert pattern.with_targets(["up"]).feedforward_modules == r".*\.down"
    special = Config(feedforward_modules=["0.down"]).with_targets(["up", "down"])
    assert special.scales_input("m.0.down")
    assert not special.scales_input("m.0_down")
