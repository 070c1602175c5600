"""What is not supported is refused in one line, which names it and what is."""

import dataclasses
import json
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import PeftType
from torch import nn

from flora.adapters.checkpoint import CONFIG_FILE, parse_config, read_checkpoint
from flora.adapters.kinds import KINDS, get_kind
from flora.base import ModelBase
from flora.errors import InvalidAdapterError
from tests import zoo
from tests.adapters.kinds.as_peft import ONE_OF_EACH


def refusal(raw: dict[str, Any]) -> str:
    with pytest.raises(InvalidAdapterError) as caught:
        parse_config(raw)
    text = str(caught.value)
    assert "\n" not in text
    return text


def refusal_of(model, folder):
    with pytest.raises(InvalidAdapterError) as caught:
        read_checkpoint(folder, ModelBase(model))
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("kind", sorted({kind.value for kind in PeftType} - KINDS.keys()))
def test_another_kind(kind):
    text = refusal({"peft_type": kind, "r": 8})
    assert f"peft_type {kind!r} is not supported" in text
    assert all(supported in text for supported in KINDS)


FEATURES = {
    "modules_to_save": ["lm_head"],
    "alora_invocation_tokens": [1, 2],
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 2},
    "kasa_config": {"beta": 1e-4},
    "monteclora_config": {"num_samples": 2},
    "velora_config": {"num_groups": 2},
    "target_parameters": ["mlp.experts.gate_up_proj"],
    "trainable_token_indices": [5],
    "layer_replication": [[0, 2], [1, 2]],
    "megatron_config": {"a": 1},
    "loftq_config": {"loftq_bits": 4},
    "corda_config": {"rho": 1},
    "lora_ga_config": {"direction": "ArB2r"},
    "use_effective_conv2d": True,
    "block_size": 4,
}


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_feature(kind, feature):
    raw = {"peft_type": kind, feature: FEATURES[feature]}
    text = refusal(raw)
    assert f"{feature!r} = " in text
    supported = text.partition(f"what is supported of {kind}: ")[2].split(", ")
    assert supported == sorted(get_kind(kind).Config.model_fields)
    for empty in (None, False, [], {}, "", 0):
        assert parse_config({**raw, feature: empty})[0] == kind


@pytest.mark.parametrize(
    "start",
    ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "mica", "PiSSA", None],
)
def test_a_start_that_changes_the_weights_or_is_not_known(start):
    text = refusal({"peft_type": "LORA", "init_lora_weights": start})
    assert f"init_lora_weights = {start!r}" in text
    assert all(good in text for good in ("True", "False", "gaussian", "eva", "orthogonal"))


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal"])
def test_a_start_that_does_not(start):
    assert parse_config({"peft_type": "LORA", "init_lora_weights": start})[0] == "LORA"


@pytest.mark.parametrize("kind", KINDS)
def test_pefts_own_config_of_each_kind_is_read(kind):
    """Every key that PEFT writes is known, or empty at first."""
    case = ONE_OF_EACH[kind]
    settings = dict(case.settings)
    if kind == "IA3":
        settings["feedforward_modules"] = []
    raw = json.loads(json.dumps(case.make(**settings).to_dict(), default=list))
    name, config = parse_config(raw)
    assert name == kind
    dumped = config.model_dump()
    assert len(dumped.keys() & raw.keys()) > 2
    assert {key: dumped[key] for key in dumped.keys() & raw.keys()}.items() <= raw.items()


@pytest.mark.parametrize("kind", KINDS)
def test_the_defaults_are_pefts(kind):
    case = ONE_OF_EACH[kind]
    ours = get_kind(kind).Config()
    needed = {"total_step": 10} if kind == "ADALORA" else {}
    theirs = case.make(**needed)
    for name in type(ours).model_fields.keys() & {f.name for f in dataclasses.fields(case.make)}:
        if name != "feedforward_modules":  # PEFT's None is what it has for the architecture
            assert getattr(ours, name) == getattr(theirs, name), name


# --- as PEFT saves it


def test_modules_to_save(tmp_path):
    model = zoo.build("Qwen2")
    zoo.make_adapter("lora", model, tmp_path, modules_to_save=["lm_head"])
    assert "'modules_to_save' = ['lm_head'] is not supported" in refusal_of(model, tmp_path)


def test_a_magnitude_of_a_config_that_does_not_say_so(tmp_path):
    model = zoo.build("Qwen2")
    zoo.make_adapter("dora", model, tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config | {"use_dora": False}))
    text = refusal_of(model, tmp_path)
    assert "model.layers.0.mlp.down_proj.lora_magnitude_vector': not a tensor of LORA" in text


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("kind", ["LORA", "HIRA"])
def test_an_embedding(kind, tmp_path):
    model = zoo.build("Qwen2")
    zoo.make_adapter(
        dataclasses.replace(ONE_OF_EACH[kind], settings={"r": 2}),
        model,
        tmp_path,
        target_modules=["q_proj", "embed_tokens"],
    )
    text = refusal_of(model, tmp_path)
    name = f"base_model.model.model.embed_tokens.{kind.lower()}_embedding_A"
    assert f"{name!r}: not a tensor of {kind}; expected base_model.model.<module>." in text


class Convolving(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 2)
        self.up = nn.Linear(5, 6)

    def forward(self, x):
        return x


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (peft.LoraConfig, {"r": 2}),
        (peft.IA3Config, {"feedforward_modules": []}),
        (peft.AdaLoraConfig, {"init_r": 2, "total_step": 10}),
        (peft.LoHaConfig, {"r": 2}),
    ],
)
def test_a_convolution(make, settings, tmp_path):
    model = Convolving()
    case = zoo.Case(kind="", make=make, settings=settings)
    zoo.make_adapter(case, model, tmp_path, target_modules=["conv", "up"])
    assert "conv: the base model has no such linear layer" in refusal_of(model, tmp_path)


def test_the_weights_of_experts(tmp_path):
    """As PEFT saves them, and where the config does not say so."""
    torch.manual_seed(0)
    settings = {**zoo.TINY, **zoo.GROUPED, "num_local_experts": 2, "num_experts_per_tok": 1}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**settings)).eval()
    zoo.make_adapter(
        "lora", model, tmp_path, target_modules=["q_proj"], target_parameters=["experts.down_proj"]
    )
    text = refusal_of(model, tmp_path)
    assert "'target_parameters' = ['experts.down_proj'] is not supported" in text
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config | {"target_parameters": None}))
    text = refusal_of(model, tmp_path)
    assert "model.layers.0.mlp.experts: the base model has no such linear layer" in text


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_a_copy_of_the_bases_own_weight(tmp_path):
    """PEFT saves that of a head that is adapted, unless it is told not to."""
    model = zoo.build("Llama")
    adapted = zoo.make_adapter("lora", model, tmp_path, target_modules=["lm_head", "q_proj"])
    base = ModelBase(model)
    assert "lm_head" in read_checkpoint(tmp_path, base).adapter(base).layers
    adapted.save_pretrained(tmp_path)
    text = refusal_of(model, tmp_path)
    assert "lm_head.base_layer.weight': the base's own weight; save with" in text
