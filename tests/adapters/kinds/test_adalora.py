"""AdaLoRA: ranks that PEFT's own training prunes, as in PEFT."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
from torch import nn

from flora.adapters.checkpoint import CONFIG_FILE
from flora.errors import InvalidAdapterError
from tests import zoo
from tests.adapters.kinds.as_peft import assert_reads_as_peft, read, save_by_peft

OPTIONS = {
    "alpha": {"init_r": 5, "lora_alpha": 7},
    "an alpha of zero": {"init_r": 5, "lora_alpha": 0},
    "an alpha below zero": {"init_r": 5, "lora_alpha": -3},
    "what only LoRA reads": {
        "init_r": 3,
        "use_rslora": True,
        "alpha_pattern": {"q_proj": 2},
    },
    "biases of the layers": {"init_r": 2, "bias": "lora_only"},
    "all biases": {"init_r": 2, "bias": "all", "target_modules": ["q_proj", "down_proj"]},
}
# PEFT itself warns of what it saves and loads here: layers of no ranks, and masks for a pattern.
PRUNED = pytest.mark.filterwarnings(
    "ignore:Adapter 'default'. [0-9]+ LoRA tensor",
    "ignore:Initializing zero-element tensors",
    "ignore:The following rank_pattern keys did not match",
)


@pytest.mark.parametrize("option", OPTIONS)
def test_each_option_is_pefts(option, tmp_path):
    model = zoo.build("Qwen2")
    save_by_peft(peft.AdaLoraConfig, model, tmp_path, total_step=10, **OPTIONS[option])
    assert_reads_as_peft(model, tmp_path)


def test_of_a_transposed_weight_too(tmp_path):
    model = zoo.build("GPT2")
    save_by_peft(peft.AdaLoraConfig, model, tmp_path, total_step=10, init_r=3, bias="lora_only")
    assert_reads_as_peft(model, tmp_path)


def prune(model: nn.Module, folder: Path, **settings: Any) -> dict[str, int]:
    """Let PEFT choose the ranks in a training of one layer that hardly matters; the ranks left."""
    adapted = save_by_peft(
        peft.AdaLoraConfig,
        model,
        folder,
        init_r=5,
        target_r=2,
        tinit=0,
        tfinal=1,
        deltaT=1,
        total_step=4,
        **settings,
    )
    least = "base_model.model.model.layers.1.self_attn.q_proj"
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if name.startswith(f"{least}.lora_"):
            parameter.data *= 1e-3
    ids = zoo.rows(model, 2)["input_ids"]
    for step in range(4):
        adapted.zero_grad()
        adapted(input_ids=ids, labels=ids).loss.backward()
        adapted.base_model.update_and_allocate(step)
    adapted.save_pretrained(folder)
    pattern = adapted.peft_config["default"].rank_pattern
    return {name.removesuffix(".lora_E"): sum(mask) for name, mask in pattern.items()}


@PRUNED
@pytest.mark.parametrize(
    "settings", [{"lora_alpha": 7}, {"lora_alpha": 0}, {"bias": "lora_only"}], ids=str
)
def test_the_ranks_that_peft_left(settings, tmp_path):
    model = zoo.build("Qwen2")
    ranks = prune(model, tmp_path, **settings)
    assert len(set(ranks.values())) > 2
    assert ranks["model.layers.1.self_attn.q_proj"] == 0
    layers = assert_reads_as_peft(model, tmp_path).layers
    assert {name: factors.rank for name, factors in layers.items()} == ranks


@PRUNED
def test_a_mask_is_of_all_the_ranks_there_were(tmp_path):
    model = zoo.build("Qwen2")
    prune(model, tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    name = "model.layers.0.self_attn.v_proj.lora_E"
    config["rank_pattern"][name].append(False)
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(InvalidAdapterError, match=f"rank_pattern has masks of .*{name}") as caught:
        read(model, tmp_path)
    assert "\n" not in str(caught.value)
