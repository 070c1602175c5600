"""LoRA's scalings are PEFT's."""

import peft
import pytest
import torch
from torch import nn

from flora.adapters.checkpoint import read_checkpoint
from flora.base import ModelBase


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(5, 7), "down": nn.Linear(7, 5)}) for _ in range(2)
        )

    def forward(self, x):
        return x


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 6},
        {"r": 4, "lora_alpha": 6, "use_rslora": True},
        {"r": 3, "lora_alpha": -2.5},
        {"r": 4, "rank_pattern": {"up": 2, r"1\.down": 7}},
        {"r": 4, "alpha_pattern": {"down": 3, "blocks.0.up": 1.5}},
        {
            "r": 4,
            "rank_pattern": {"down": 9},
            "alpha_pattern": {"down": 5},
            "use_rslora": True,
        },
    ],
    ids=str,
)
def test_a_saved_adapter_changes_the_weights_as_in_peft(settings, tmp_path):
    torch.manual_seed(0)
    model = peft.get_peft_model(
        Tiny(), peft.LoraConfig(target_modules=["up", "down"], init_lora_weights=False, **settings)
    )
    model.save_pretrained(tmp_path)
    adapter = read_checkpoint(tmp_path).adapter(ModelBase(Tiny()))
    assert len(adapter.layers) == 4
    for name, factors in adapter.layers.items():
        layer = model.base_model.model.get_submodule(name)
        delta = layer.get_delta_weight("default")
        assert factors.rank == layer.r["default"]
        torch.testing.assert_close(factors.merge(torch.zeros_like(delta)), delta.detach())
