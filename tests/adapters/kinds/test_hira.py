"""HiRA: ranks and transposed weights as in PEFT."""

import dataclasses

import peft
import pytest

from tests import zoo
from tests.adapters.kinds.as_peft import assert_reads_as_peft, save_by_peft

OPTIONS = {
    "one rank": ("Qwen2", {"r": 1}),
    "three": ("Qwen2", {"r": 3}),
    "a transposed weight": ("GPT2", {"r": 3}),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_each_option_is_pefts(option, tmp_path):
    architecture, settings = OPTIONS[option]
    model = zoo.build(architecture)
    save_by_peft(peft.HiraConfig, model, tmp_path, **settings)
    adapter = assert_reads_as_peft(model, tmp_path)
    assert {factors.pairs - 1 for factors in adapter.layers.values()} == {settings["r"]}


PATTERNS = [("Qwen2", {r"0\..*": 2, "q_proj": 5}), ("GPT2", {"attn.c_proj": 2, "c_fc": 5})]


@pytest.mark.parametrize(("architecture", "pattern"), PATTERNS)
def test_the_rank_pattern_of_a_first_adapter_is_not_followed(architecture, pattern, tmp_path):
    model = zoo.build(architecture)
    save_by_peft(peft.HiraConfig, model, tmp_path, r=3, rank_pattern=pattern)
    adapter = assert_reads_as_peft(model, tmp_path)
    assert {factors.pairs - 1 for factors in adapter.layers.values()} == {3}


@pytest.mark.parametrize(("architecture", "pattern"), PATTERNS)
def test_that_of_a_second_adapter_is(architecture, pattern, tmp_path):
    model = zoo.build(architecture)
    adapted = save_by_peft(peft.HiraConfig, model, tmp_path, r=3)
    config = adapted.peft_config["default"]
    adapted.add_adapter("second", dataclasses.replace(config, rank_pattern=pattern))
    adapted.set_adapter("second")
    zoo.randomise(adapted, seed=1)
    adapted.save_pretrained(tmp_path, selected_adapters=["second"])
    adapter = assert_reads_as_peft(model, tmp_path / "second", adapted)
    assert {factors.pairs - 1 for factors in adapter.layers.values()} == {2, 3, 5}
