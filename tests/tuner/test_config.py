"""FloraConfig, its registration with PEFT, and which layers read the same input."""

import importlib
import json
import pickle
import subprocess
import sys

import pytest
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

import flora.tuner
from flora.errors import UsageError
from flora.tuner.config import FloraConfig, input_of


@pytest.mark.parametrize(
    "wrong",
    [
        {"r": 0},
        {"r": -1},
        {"r": 1.5},
        {"r": True},
        {"rank_pattern": {"q_proj": 0}},
        {"init_weights": "gaussian"},
        {"target_modules": ".*q_proj", "layers_to_transform": [0]},
        {"target_modules": ".*q_proj", "layers_pattern": "layers"},
    ],
)
def test_what_cannot_be_meant_is_one_line(wrong):
    with pytest.raises(UsageError) as caught:
        FloraConfig(**wrong)
    assert "\n" not in str(caught.value)


def test_save_and_load(tmp_path):
    config = FloraConfig(
        r=3,
        target_modules=["q_proj", "v_proj"],
        exclude_modules=["v_proj"],
        layers_to_transform=[1],
        rank_pattern={"q_proj": 2},
        share_input=True,
        task_type="CAUSAL_LM",
    )
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "FLORA"
    assert PeftConfig.from_pretrained(tmp_path) == config
    assert pickle.loads(pickle.dumps(config)) == config


def test_registration_is_idempotent_and_survives_a_reload():
    members = list(PeftType)
    flora.tuner.register()
    importlib.reload(flora.tuner)
    assert list(PeftType) == members
    assert members.count("FLORA") == 1
    assert PeftType("FLORA") is PeftType.FLORA is PeftType["FLORA"] is FloraConfig().peft_type
    assert pickle.loads(pickle.dumps(PeftType.FLORA)) is PeftType.FLORA
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.FLORA] is FloraConfig


def test_the_method_of_another_is_not_replaced(monkeypatch):
    class Foreign(PeftConfig):
        pass

    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, PeftType.FLORA, Foreign)
    with pytest.raises(UsageError, match="another method named FLORA"):
        flora.tuner.register()
    assert PEFT_TYPE_TO_CONFIG_MAPPING["FLORA"] is Foreign


SECOND_IMPORT = """
import sys, flora, peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as configs
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING as tuners
first = flora.FloraConfig
assert configs[peft.PeftType.FLORA] is first
for name in [name for name in sys.modules if name.startswith("flora")]:
    del sys.modules[name]
import flora.tuner
assert flora.FloraConfig is not first
assert configs["FLORA"] is flora.FloraConfig and tuners["FLORA"] is flora.tuner.FloraModel
assert flora.FloraConfig().peft_type is peft.PeftType.FLORA
assert list(peft.PeftType).count("FLORA") == 1
"""


def test_touching_the_public_name_registers_and_a_second_import_takes_over():
    subprocess.run([sys.executable, "-c", SECOND_IMPORT], check=True)


@pytest.mark.parametrize(
    ("modules", "inputs"),
    [
        ("layers.0.self_attn: q_proj k_proj v_proj o_proj", ["q_proj k_proj v_proj", "o_proj"]),
        ("layers.0.mlp: gate_proj up_proj down_proj", ["gate_proj up_proj", "down_proj"]),
        ("decoder.layers.0.encoder_attn: q_proj k_proj v_proj", ["q_proj", "k_proj v_proj"]),
        ("decoder.block.0.layer.1.EncDecAttention: q k v o", ["q", "k v", "o"]),
        ("encoder.block.0.layer.0.SelfAttention: q k v o", ["q k v", "o"]),
        ("encoder.block.0.layer.1.DenseReluDense: wi_0 wi_1 wo", ["wi_0 wi_1", "wo"]),
        ("layer.0.crossattention.self: query key value", ["query", "key value"]),
        ("h.0.attn: c_attn c_proj", ["c_attn", "c_proj"]),
    ],
)
def test_input_of(modules, inputs):
    parent, _, names = modules.partition(": ")
    found: dict[str, list[str]] = {}
    for name in names.split():
        found.setdefault(input_of(f"{parent}.{name}"), []).append(name)
    assert sorted(map(sorted, found.values())) == sorted(sorted(i.split()) for i in inputs)
    assert input_of("layers.0.self_attn.q_proj") != input_of("layers.1.self_attn.q_proj")
