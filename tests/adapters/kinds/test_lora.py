"""LoRA and its kin: each option computes what it does in PEFT."""

from functools import partial

import peft
import pytest
import torch

from flora.adapters.checkpoint import read_checkpoint
from flora.adapters.kinds import get_kind
from flora.base import ModelBase
from flora.errors import InvalidAdapterError
from tests import zoo
from tests.adapters.kinds.as_peft import assert_reads_as_peft, read, save_by_peft, weight_of

# PEFT's saving takes the bias of lora_B for a part of a matrix.
pytestmark = pytest.mark.filterwarnings("ignore:Adapter 'default'. [0-9]+ LoRA tensor")
KIND = get_kind("LORA")
OPTIONS = {
    "alpha": {"r": 4, "lora_alpha": 6},
    "an alpha below zero": {"r": 3, "lora_alpha": -2.5},
    "rank_pattern": {"r": 4, "rank_pattern": {r"0\..*": 2, "[a-z]+_proj": 7}},
    "alpha_pattern": {"r": 4, "alpha_pattern": {"k_proj": 3, r"1\.self_attn\..*": 1.5}},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "rslora and patterns": {
        "r": 4,
        "rank_pattern": {"q_proj": 9},
        "alpha_pattern": {r".*\.0\..*": 5},
        "use_rslora": True,
    },
    "biases of the layers": {"r": 2, "bias": "lora_only"},
    "all biases": {"r": 2, "bias": "all", "target_modules": ["q_proj", "down_proj"]},
    "bias of B": {"r": 2, "lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
    "both biases": {
        "r": 2,
        "lora_bias": True,
        "bias": "lora_only",
        "target_modules": ["q_proj", "v_proj"],
    },
    "dora": {"r": 3, "lora_alpha": 5, "use_dora": True},
    "dora and rslora": {
        "r": 3,
        "use_dora": True,
        "use_rslora": True,
        "rank_pattern": {"v_proj": 2},
    },
    "dora and biases": {"r": 3, "use_dora": True, "bias": "lora_only"},
    "dora and all biases": {"r": 3, "use_dora": True, "bias": "all", "target_modules": ["k_proj"]},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_each_option_is_pefts(option, tmp_path):
    model = zoo.build("Qwen2")
    save_by_peft(peft.LoraConfig, model, tmp_path, **OPTIONS[option])
    assert_reads_as_peft(model, tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 2, "lora_bias": True, "bias": "lora_only"},
        {"r": 3, "use_dora": True, "bias": "lora_only"},
        {"r": 3, "use_rslora": True, "alpha_pattern": {"c_fc": 3}},
    ],
    ids=str,
)
def test_of_a_transposed_weight_too(settings, tmp_path):
    model = zoo.build("GPT2")
    save_by_peft(peft.LoraConfig, model, tmp_path, **settings)
    assert_reads_as_peft(model, tmp_path)


@pytest.mark.parametrize("architecture", ["Qwen2", "GPT2"])
def test_dora_needs_the_products_of_its_base_only(architecture, tmp_path):
    """In fp64, so that nothing is left of what a black box rounds."""
    model = zoo.build(architecture).double()
    adapted = save_by_peft(peft.LoraConfig, model, tmp_path, r=3, use_dora=True)
    adapted.double().save_pretrained(tmp_path)
    boxed = zoo.build(architecture).double()
    for name in ModelBase(boxed).shapes:
        layer = boxed.get_submodule(name)
        layer.forward = partial(type(layer).forward, layer)
    base = ModelBase(boxed)
    assert all(layer.weight is None for layer in base.layers.values())
    layers = read_checkpoint(tmp_path, base).adapter(base).layers
    merged = adapted.merge_and_unload(safe_merge=True)
    assert len(layers) > 7
    for name, factors in layers.items():
        expected = weight_of(merged.get_submodule(name))
        found = factors.merge(weight_of(model.get_submodule(name)))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_doras_gradients_are_pefts(tmp_path):
    """Its norm is a constant for gradients, so no derivative by differences holds here."""
    model = zoo.build("Qwen2").double()
    adapted = save_by_peft(
        peft.LoraConfig, model, tmp_path, r=3, lora_alpha=5, use_dora=True
    ).double()
    adapted.save_pretrained(tmp_path)
    found, base = read_checkpoint(tmp_path), ModelBase(model)
    name = "model.layers.1.mlp.down_proj"
    layer = adapted.get_submodule(f"base_model.model.{name}")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 48, dtype=torch.float64, generator=generator)
    grad = torch.randn(5, 32, dtype=torch.float64, generator=generator)
    theirs = [
        layer.lora_A["default"].weight,
        layer.lora_B["default"].weight,
        layer.lora_magnitude_vector["default"].weight,
    ]
    for parameter in theirs:
        parameter.requires_grad_()
    expected = torch.autograd.grad((layer(x) * grad).sum(), theirs)
    params = {n: t.clone().requires_grad_() for n, t in found.params[name].items()}
    ours = [params[n] for n in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")]
    factors = KIND.fill(found.config, name, params, base)
    y = x @ factors.merge(weight_of(model.get_submodule(name))).T
    actual = torch.autograd.grad((y * grad).sum(), ours)
    for one, other in zip(actual, expected, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_dora_cannot_scale_a_row_of_zeros(tmp_path):
    model = zoo.build("Qwen2")
    name = "model.layers.0.self_attn.k_proj"
    adapted = save_by_peft(peft.LoraConfig, model, tmp_path, r=3, use_dora=True)
    row = adapted.get_submodule(f"base_model.model.{name}").lora_B["default"].weight[4]
    row.zero_()
    adapted.save_pretrained(tmp_path)
    assert read(model, tmp_path)
    weight_of(model.get_submodule(name))[4] = 0
    with pytest.raises(InvalidAdapterError, match=name) as caught:
        read(model, tmp_path)
    assert "\n" not in str(caught.value)
    row.fill_(0.5)
    adapted.save_pretrained(tmp_path)
    assert read(model, tmp_path)
