"""Quantised bases in vLLM: adapters go around each layer's own product."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import flora
from tests import zoo
from tests.hosts.vllm.engine import NEW_TOKENS
from tests.hosts.vllm.test_engine import EAGER, HEADS, run

pytestmark = pytest.mark.filterwarnings("ignore:Specified to not")

LENGTHS = (9, 17)

WIDTHS = HEADS | {"hidden_size": 136, "head_dim": 32, "intermediate_size": 104}
"""No tiles of AMX, for which vLLM has another kernel, that takes 16 bits only."""


class Int8Linear(nn.Module):
    """int8 weights by output, int8 inputs by token, as vLLM's kernel computes a layer.

    The weights stay small: without VNNI, oneDNN's sums of large ones overflow.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight_OI = linear.weight.detach()
        self.scale = weight_OI.abs().amax(1, keepdim=True) / 63
        self.whole = (weight_OI / self.scale).round()
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
        whole = (x / scale).round().double() @ self.whole.double().T
        y = (whole * scale * self.scale.T).float()
        return y if self.bias is None else y + self.bias


SCHEME = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "ignore": ["lm_head"],
    "config_groups": {
        "all": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "strategy": "channel"},
            "input_activations": {"num_bits": 8, "strategy": "token", "dynamic": True},
        }
    },
}


def quantise(model: Any, folder: Path) -> None:
    """Have a model computed with quantised layers, and write it as compressed-tensors does."""
    tensors = dict(model.state_dict())
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            model.set_submodule(name, layer := Int8Linear(module))
            tensors[f"{name}.weight"] = layer.whole.to(torch.int8)
            tensors[f"{name}.weight_scale"] = layer.scale
    folder.mkdir()
    config = json.loads(model.config.to_json_string()) | {"quantization_config": SCHEME}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")


def test_a_row_gets_its_own_adapter_around_a_quantised_base(tmp_path):
    pytest.importorskip("vllm")
    model = zoo.build("Llama", **WIDTHS)
    for seed, name in enumerate(zoo.CASES):
        zoo.make_adapter(name, model, tmp_path / name, seed=seed)
    quantise(model, tmp_path / "model")
    flora.attach(model, {name: tmp_path / name for name in zoo.CASES})
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, zoo.VOCABULARY, (n,), generator=generator) for n in LENGTHS]
    rows = [(name, prompt) for name in (None, *zoo.CASES) for prompt in prompts]
    right = [
        model.generate(
            input_ids=prompt[None],
            attention_mask=torch.ones_like(prompt)[None],
            adapter_names=[name],
            max_new_tokens=NEW_TOKENS,
            eos_token_id=None,
            do_sample=False,
        )[0, len(prompt) :].tolist()
        for name, prompt in rows
    ]
    asked = [[None if name is None else str(tmp_path / name), p.tolist()] for name, p in rows]
    (found,) = run(tmp_path, tmp_path / "model", [{"generate": asked}], **EAGER)
    assert found == right
