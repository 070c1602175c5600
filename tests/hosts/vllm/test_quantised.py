"""Quantised bases in vLLM: adapters go around each layer's own product."""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

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

TOLERANCE = 4
"""Times what the type alone does to the logits: those of fp32 are to be right."""

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


def pack(whole: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Numbers from 0 to 15, eight neighbours of a row in each int32, those of `order` first."""
    eights = whole.to(torch.int64).unflatten(-1, (-1, 8))[..., list(order)]
    return (eights << 4 * torch.arange(8)).sum(-1).to(torch.int32)


GROUP = 32
"""So many inputs of an output have a scale of their own, where weights take 4 bits."""

AWQ_ORDER = 0, 2, 4, 6, 1, 3, 5, 7


def by_groups(linear: nn.Linear, *, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """A weight as numbers from 0 to 15, with a scale and a zero for each output's groups.

    The layer itself computes with them from then on.
    """
    groups = linear.weight.detach().unflatten(1, (-1, GROUP))
    if symmetric:
        scale = groups.abs().amax(-1, keepdim=True) / 7
        zero = torch.full_like(scale, 8)
    else:
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        scale = (high - low) / 15
        zero = (-low / scale).round().clamp(0, 15)
    whole = ((groups / scale).round() + zero).clamp(0, 15)
    linear.weight = nn.Parameter(((whole - zero) * scale).flatten(1), requires_grad=False)
    return whole.flatten(1), scale[..., 0], zero[..., 0]


def int8(linear: nn.Linear) -> tuple[nn.Module, dict[str, Tensor]]:
    layer = Int8Linear(linear)
    return layer, {"weight": layer.whole.to(torch.int8), "weight_scale": layer.scale}


def int4(linear: nn.Linear) -> tuple[nn.Module, dict[str, Tensor]]:
    whole_OI, scale_OG, _ = by_groups(linear, symmetric=True)
    shape = torch.tensor(whole_OI.shape)
    packed = {"weight_packed": pack(whole_OI), "weight_scale": scale_OG, "weight_shape": shape}
    return linear, packed


def gptq(linear: nn.Linear) -> tuple[nn.Module, dict[str, Tensor]]:
    whole_OI, scale_OG, zero_OG = by_groups(linear, symmetric=True)
    return linear, {
        "qweight": pack(whole_OI).T,
        "scales": scale_OG.T,
        "qzeros": pack(zero_OG.T - 1),
        "g_idx": (torch.arange(linear.in_features) // GROUP).to(torch.int32),
    }


def awq(linear: nn.Linear) -> tuple[nn.Module, dict[str, Tensor]]:
    whole_OI, scale_OG, zero_OG = by_groups(linear, symmetric=False)
    return linear, {
        "qweight": pack(whole_OI.T, AWQ_ORDER),
        "scales": scale_OG.T,
        "qzeros": pack(zero_OG.T, AWQ_ORDER),
    }


BLOCK = 32, 128
"""Outputs and inputs with one scale, where weights are fp8."""


def fp8(linear: nn.Linear) -> tuple[nn.Module, dict[str, Tensor]]:
    blocks = linear.weight.detach().unflatten(1, (-1, BLOCK[1])).unflatten(0, (-1, BLOCK[0]))
    scale = blocks.abs().amax((1, 3), keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
    whole = (blocks / scale).to(torch.float8_e4m3fn)
    weight_OI = (whole.float() * scale).flatten(0, 1).flatten(1)
    linear.weight = nn.Parameter(weight_OI, requires_grad=False)
    return linear, {
        "weight": whole.flatten(0, 1).flatten(1),
        "weight_scale_inv": scale[:, 0, :, 0],
    }


def compressed(form: str, weights: dict[str, Any], inputs: dict[str, Any] | None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "ignore": ["lm_head"],
        "config_groups": {"all": group},
    }


BITS = {"bits": 4, "group_size": GROUP}


class Scheme(NamedTuple):
    """A layer with its quantised tensors, what a model's configuration says of them, and a type and
    sizes that vLLM's kernel takes."""

    quantise: Callable[[nn.Linear], tuple[nn.Module, dict[str, Tensor]]]
    config: dict[str, Any]
    dtype: str = "bfloat16"
    sizes: dict[str, int] = HEADS
    runs_here: Callable[[], bool] = lambda: True


SCHEMES = {
    "int8": Scheme(
        int8,
        compressed(
            "int-quantized",
            {"num_bits": 8, "strategy": "channel"},
            {"num_bits": 8, "strategy": "token", "dynamic": True},
        ),
        "float32",
        WIDTHS,
    ),
    "int4": Scheme(
        int4,
        compressed(
            "pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": GROUP}, None
        ),
        runs_here=torch.cpu._is_avx512_supported,
    ),
    "fp8": Scheme(
        fp8,
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": BLOCK},
        # vLLM's kernel fails by itself where a base's row has a bias that is not of fp32.
        sizes=HEADS | {"intermediate_size": 128, "attention_bias": False},
        runs_here=torch.cpu._is_amx_tile_supported,
    ),
    "gptq": Scheme(
        gptq,
        {"quant_method": "gptq", "desc_act": False, "sym": True, **BITS},
        runs_here=torch.cpu._is_avx512_supported,
    ),
    "awq": Scheme(
        awq,
        {"quant_method": "awq", "zero_point": True, "version": "gemm", **BITS},
        runs_here=torch.cpu._is_avx512_supported,
    ),
}


def quantise(model: Any, scheme: Scheme, folder: Path) -> None:
    """Have a model computed with quantised layers, and write it as those who quantise do."""
    tensors = dict(model.state_dict())
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            layer, own = scheme.quantise(module)
            model.set_submodule(name, layer)
            del tensors[f"{name}.weight"]
            tensors |= {f"{name}.{key}": tensor for key, tensor in own.items()}
    folder.mkdir()
    whole = json.loads(model.config.to_json_string()) | {"quantization_config": scheme.config}
    (folder / "config.json").write_text(json.dumps(whole))
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_a_row_gets_its_own_adapter_around_a_quantised_base(tmp_path, scheme):
    pytest.importorskip("vllm")
    if not scheme.runs_here():
        pytest.skip("vLLM has no kernel for this processor")
    model = zoo.build("Llama", **scheme.sizes)
    for seed, name in enumerate(zoo.CASES):
        zoo.make_adapter(name, model, tmp_path / name, seed=seed)
    quantise(model, scheme, tmp_path / "model")
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, zoo.VOCABULARY, (n,), generator=generator) for n in LENGTHS]
    rows = [(name, prompt) for name in (None, *zoo.CASES) for prompt in prompts]
    asked = [[None if name is None else str(tmp_path / name), p.tolist()] for name, p in rows]
    steps = [{"generate": asked}]
    (found,) = run(tmp_path, tmp_path / "model", steps, dtype=scheme.dtype, **EAGER)

    rounded = deepcopy(model).to(getattr(torch, scheme.dtype))
    noise = max(
        float((model(p[None]).logits - rounded(p[None]).logits.float()).abs().max())
        for p in prompts
    )
    flora.attach(model, {name: tmp_path / name for name in zoo.CASES})
    for (name, prompt), tokens in zip(rows, found, strict=True):
        assert len(tokens) == NEW_TOKENS
        chosen = torch.tensor(tokens)
        logits = model(torch.cat([prompt, chosen])[None], adapter_names=[name]).logits[0]
        logits = logits[len(prompt) - 1 : -1]
        lost = logits.amax(-1) - logits.gather(-1, chosen[:, None])[:, 0]
        assert lost.max() <= TOLERANCE * noise, name
