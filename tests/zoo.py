"""Models of many architectures, and an adapter of each kind as PEFT itself makes and saves it."""

import copy
import inspect
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import flora
from flora.adapters.checkpoint import PREFIX, TENSORS_FILE
from flora.base import ModelBase, sizes_of

VOCABULARY = 97
TINY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOKENS = {name: TINY[name] for name in ("vocab_size", "pad_token_id", "bos_token_id")}
TOKENS["eos_token_id"] = TINY["eos_token_id"]
GROUPED = {"num_key_value_heads": 2}
HEADS = {"head_dim": 8, **GROUPED}
GPT = TOKENS | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 128}
T5 = TOKENS | {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.0,
}
WHISPER = TOKENS | {
    "d_model": 32,
    "num_mel_bins": 8,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_source_positions": 24,
    "max_target_positions": 64,
    "decoder_start_token_id": 3,
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
}
ARCHITECTURES: dict[str, tuple[str, Mapping[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", {**TINY, **GROUPED, "attention_bias": True}),
    "Qwen2": ("Qwen2ForCausalLM", {**TINY, **GROUPED}),
    "Qwen3": ("Qwen3ForCausalLM", {**TINY, **HEADS}),
    "Gemma": ("GemmaForCausalLM", {**TINY, **HEADS}),
    "Gemma3": ("Gemma3ForCausalLM", {**TINY, **HEADS, "sliding_window": 64}),
    "GPT2": ("GPT2LMHeadModel", GPT),
    "GPTBigCode": ("GPTBigCodeForCausalLM", GPT),
    "StarCoder2": ("Starcoder2ForCausalLM", {**TINY, **GROUPED}),
    "Falcon": ("FalconForCausalLM", {**TINY, "bias": True}),
    "T5": ("T5ForConditionalGeneration", T5),
    "Whisper": ("WhisperForConditionalGeneration", WHISPER),
}


def build(architecture: str, **other: Any) -> nn.Module:
    """A tiny random model, the same at each call, in fp32; `other` settings stand over its own.

    Its biases are not zero, and its layers' products as large as what they are added to.
    """
    name, settings = ARCHITECTURES[architecture]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated")  # GPTBigCode's
        cls = getattr(transformers, name)
    torch.manual_seed(0)
    model = cls(cls.config_class(**{**settings, **other})).eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    for layer in linear_layers(model).values():
        nn.init.normal_(layer.weight, std=sizes_of(layer)[1] ** -0.5)
    return model.requires_grad_(False)


@dataclass(frozen=True)
class Case:
    """An adapter as a user of PEFT would make it.

    kind:     its PEFT type.
    make:     the PEFT config, for a list of target modules.
    settings: its arguments beside `target_modules`.
    """

    kind: str
    make: Callable[..., Any]
    settings: Mapping[str, Any] = field(default_factory=dict)


CASES: dict[str, Case] = {
    "flora1": Case("FLORA", flora.FloraConfig, {"r": 1}),
    "flora3": Case("FLORA", flora.FloraConfig, {"r": 3}),
    "lora": Case("LORA", peft.LoraConfig, {"r": 4, "lora_alpha": 6}),
    "rslora": Case("LORA", peft.LoraConfig, {"r": 4, "lora_alpha": 6, "use_rslora": True}),
    "dora": Case("LORA", peft.LoraConfig, {"r": 3, "lora_alpha": 5, "use_dora": True}),
    "biased": Case("LORA", peft.LoraConfig, {"r": 2, "bias": "lora_only"}),
    "ia3": Case("IA3", peft.IA3Config),
    "hira": Case("HIRA", peft.HiraConfig, {"r": 2}),
    "adalora": Case("ADALORA", peft.AdaLoraConfig, {"init_r": 5, "total_step": 10}),
    "vera": Case("VERA", peft.VeraConfig, {"r": 6}),
    "drawn": Case("VERA", peft.VeraConfig, {"r": 5, "save_projection": False}),
    "loha": Case("LOHA", peft.LoHaConfig, {"r": 2}),
    "lokr": Case("LOKR", peft.LoKrConfig, {"r": 2, "alpha": 3}),
    "dense": Case("LOHA", peft.LoHaConfig, {"r": 7, "alpha": 5}),
}
"""One of each kind at least, small; `tests/adapters/kinds` has each option of each kind."""

NEAR_ONE = ("flora_", "ia3_")
LENGTHS = ("magnitude",)
NO_CONV1D = ("LOHA", "LOKR")


def targets(model: nn.Module) -> list[str]:
    """The last parts of the names of all linear layers but the head."""
    return sorted({name.rpartition(".")[2] for name in linear_layers(model)})


def make_adapter(
    case: Case | str, model: nn.Module, folder: Path, seed: int = 0, **settings: Any
) -> nn.Module:
    """Save an adapter of all linear layers, away from its start, and return PEFT's model of it.

    The adapter's numbers are bf16, so that every type sees the same ones. `settings` go into the
    PEFT config over the case's own. For LoHa, whose PEFT takes no Conv1D, it has equal nn.Linear.
    """
    case = CASES[case] if isinstance(case, str) else case
    arguments: dict[str, Any] = {"target_modules": targets(model), **case.settings, **settings}
    if case.kind == "IA3" and "feedforward_modules" not in arguments:
        names = arguments["target_modules"]
        if isinstance(names, str):  # a pattern of whole names
            found = (name for name in ModelBase(model).shapes if re.fullmatch(names, name))
            names = {name.rpartition(".")[2] for name in found}
        arguments["feedforward_modules"] = feedforward(model, names)
    base = copy.deepcopy(model)
    if case.kind in NO_CONV1D:
        replace_layers(base, Conv1D, partial(linear_of, dtype=base.dtype))
    elif "fan_in_fan_out" in inspect.signature(case.make).parameters and any(
        type(layer) is Conv1D for layer in base.modules()
    ):
        arguments.setdefault("fan_in_fan_out", True)
    adapted = peft.get_peft_model(base, case.make(**arguments))
    randomise(adapted, seed)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return adapted.eval().requires_grad_(False)


def own_model(name: str, base: nn.Module, folder: Path) -> nn.Module:
    """A model of one saved adapter without flora's operator, in the base's type.

    For FLoRA its weights are W0 ∘ (Σ_j a_j b_jᵀ) / r; any other is PEFT's own.
    """
    base, dtype = copy.deepcopy(base), base.dtype
    if CASES[name].kind != "FLORA":
        if CASES[name].kind in NO_CONV1D:
            replace_layers(base, Conv1D, partial(linear_of, dtype=base.dtype))
        return peft.PeftModel.from_pretrained(base, folder).to(dtype).eval().requires_grad_(False)
    tensors = load_file(folder / TENSORS_FILE)
    for module, layer in ModelBase(base).layers.items():
        if (a := tensors.get(f"{PREFIX}{module}.flora_A")) is not None:
            b = tensors[f"{PREFIX}{module}.flora_B"]
            scale = a.double().T @ b.double() / len(a)
            weight = layer.module.weight
            scaled = weight * (scale.T if type(layer.module) is Conv1D else scale)
            layer.module.weight = nn.Parameter(scaled.to(dtype), requires_grad=False)  # untied
    return base


def linear_of(layer: nn.Module, dtype: torch.dtype) -> nn.Linear:
    """An nn.Linear for any layer that has a `bias`, from its product with the identity."""
    (out_features, in_features), bias = sizes_of(layer), layer.bias
    linear = nn.Linear(in_features, out_features, bias=bias is not None, dtype=dtype)
    if bias is not None:
        linear.bias.data = bias.detach().clone()
        bias.data.zero_()  # no rounding with it
    linear.weight.data = layer(torch.eye(in_features, dtype=dtype)).detach().T.contiguous()
    if bias is not None:
        bias.data.copy_(linear.bias)
    return linear.requires_grad_(False)


def replace_layers(
    model: nn.Module, kind: type[nn.Module], make: Callable[[Any], nn.Module]
) -> None:
    """Put another layer in the place of each linear layer of a kind, the head excepted."""
    for name, layer in linear_layers(model).items():
        if type(layer) is kind:
            model.set_submodule(name, make(layer))


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """All linear layers but the head, by name."""
    base = ModelBase(model)
    return {name: layer.module for name, layer in base.layers.items() if name != base.head}


def feedforward(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Those of the names whose layers all have another size in than out: the last of a block."""
    shapes = ModelBase(model).shapes
    sizes = {n: {s for m, s in shapes.items() if m.endswith(f".{n}")} for n in names}
    return sorted(n for n, found in sizes.items() if all(out < size for out, size in found))


def randomise(adapted: nn.Module, seed: int) -> None:
    """Give every adapter tensor a random value of the size that trained ones have."""
    generator = torch.Generator().manual_seed(seed)
    prefix = adapted.base_model.prefix
    biased = getattr(adapted.peft_config["default"], "bias", "none") != "none"
    for name, parameter in adapted.named_parameters():
        is_bias = biased and name.endswith("base_layer.bias")
        if not (prefix in name or is_bias) or "ranknum" in name:
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        if any(part in name for part in NEAR_ONE):
            value = 1 + 0.3 * noise
        elif any(part in name for part in LENGTHS):
            value = parameter.data.float() * (1 + 0.3 * noise)
        else:
            value = (0.15 if prefix == "lora_" else 0.3) * noise
        parameter.data = value.bfloat16().to(parameter.dtype)


def rows(model: nn.Module, count: int, columns: int = 9, seed: int = 0) -> dict[str, Tensor]:
    """A batch that the model's forward takes."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (count, columns), generator=generator)
    if not model.config.is_encoder_decoder:
        return {"input_ids": ids}
    if model.config.model_type == "whisper":
        frames = 2 * model.config.max_source_positions
        sound = torch.randn(count, model.config.num_mel_bins, frames, generator=generator)
        return {"input_features": sound, "decoder_input_ids": ids}
    answer = torch.randint(3, VOCABULARY, (count, columns - 2), generator=generator)
    return {"input_ids": ids, "decoder_input_ids": answer}
