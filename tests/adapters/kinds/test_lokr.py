"""LoKr: each factor whole or split, as in PEFT."""

import peft
import pytest
from safetensors.torch import load_file, save_file

from flora.adapters.checkpoint import PREFIX, TENSORS_FILE
from flora.errors import InvalidAdapterError
from tests import zoo
from tests.adapters.kinds.as_peft import assert_reads_as_peft, read, save_by_peft

SPLIT = {"lokr_w1", "lokr_w2_a", "lokr_w2_b"}
BOTH = {"lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"}
WHOLE = {"lokr_w1", "lokr_w2"}
OPTIONS = {
    "the second split": ({"r": 2, "alpha": 3}, SPLIT),
    "both split": ({"r": 1, "alpha": 3, "decompose_both": True}, BOTH),
    "none": ({"r": 30, "decompose_both": True}, WHOLE),
    "a factor of 2": ({"r": 3, "decompose_factor": 2}, SPLIT),
    "a factor that divides nothing": ({"r": 3, "decompose_factor": 5}, SPLIT),
    "more ranks than sides": (
        {"r": 3, "decompose_factor": 2, "target_modules": ["k_proj"], "alpha": -2},
        SPLIT,
    ),
    "rank_pattern": ({"r": 2, "rank_pattern": {r"0\..*": 1, "o_proj": 30}}, SPLIT | WHOLE),
    "alpha_pattern": ({"r": 2, "alpha_pattern": {r"1\..*": 5, "v_proj": 1.5}}, SPLIT),
    "both patterns": (
        {"r": 2, "rank_pattern": {"o_proj": 30}, "alpha_pattern": {"o_proj": 5}},
        SPLIT | WHOLE,
    ),
    "another start": ({"r": 2, "init_weights": "lycoris"}, SPLIT),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_each_option_is_pefts(option, tmp_path):
    settings, names = OPTIONS[option]
    model = zoo.build("Qwen2")
    save_by_peft(peft.LoKrConfig, model, tmp_path, **settings)
    assert_reads_as_peft(model, tmp_path)
    saved = load_file(tmp_path / TENSORS_FILE)
    assert {name.rpartition(".")[2] for name in saved} == names


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["lokr_w1"], ["lokr_w1 is missing"]),
        (["lokr_w2_a"], ["lokr_w2 is missing"]),
        (["lokr_w1", "lokr_w2_b"], ["lokr_w1 is missing"]),
        (["lokr_w1", "lokr_w2_a", "lokr_w2_b"], ["is missing"]),
    ],
    ids=str,
)
def test_a_factor_that_is_not_there_is_named(names, expected, tmp_path):
    model = zoo.build("Qwen2")
    save_by_peft(peft.LoKrConfig, model, tmp_path, r=2)
    layer = "model.layers.0.self_attn.q_proj"
    tensors = load_file(tmp_path / TENSORS_FILE)
    kept = {n: t for n, t in tensors.items() if n not in {f"{PREFIX}{layer}.{x}" for x in names}}
    save_file(kept, tmp_path / TENSORS_FILE)
    with pytest.raises(InvalidAdapterError, match=layer) as caught:
        read(model, tmp_path)
    assert all(text in str(caught.value) for text in expected)


@pytest.mark.parametrize("name", ["lokr_w1", "lokr_w2"])
def test_factors_of_another_size_are_refused(name, tmp_path):
    model = zoo.build("Qwen2")
    save_by_peft(peft.LoKrConfig, model, tmp_path, r=30)
    layer = "model.layers.0.self_attn.k_proj"
    tensors = load_file(tmp_path / TENSORS_FILE)
    tensors[f"{PREFIX}{layer}.{name}"] = tensors[f"{PREFIX}{layer}.{name}"].T.contiguous()[1:]
    save_file(tensors, tmp_path / TENSORS_FILE)
    with pytest.raises(InvalidAdapterError, match=f"{layer}: is of size"):
        read(model, tmp_path)
