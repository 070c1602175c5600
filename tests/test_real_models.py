"""Real models: a batch in which each kind has a row, beside PEFT's own model of each adapter."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, WhisperForConditionalGeneration

import flora
from flora import assets
from flora.base import ModelBase
from tests import zoo
from tests.helpers import assert_no_worse

pytestmark = pytest.mark.slow

FIRST = {case.kind: name for name, case in reversed(zoo.CASES.items())}
CASES = [*FIRST.values(), "dora", "biased"]
NAMES = [None, *CASES]
MODELS: dict[str, tuple[Callable[[], Path], Any, str]] = {
    "SmolLM2": (assets.demo_model, AutoModelForCausalLM, "q_proj|o_proj|down_proj"),
    "QwenCoder": (assets.qwen_coder, AutoModelForCausalLM, "q_proj|o_proj|down_proj"),
    "Gemma": (assets.gemma, AutoModelForCausalLM, "q_proj|o_proj|down_proj"),
    "Whisper": (assets.whisper, WhisperForConditionalGeneration, "q_proj|out_proj|fc2"),
}
"""Where each is from, its class, and which layers of the last blocks its adapters are for."""


def load(name: str) -> Any:
    source, cls, _ = MODELS[name]
    model = cls.from_pretrained(source(), dtype=torch.float32).eval().requires_grad_(False)
    if name == "Whisper":  # hears 6 seconds of the 30, for time
        encoder, model.config.max_source_positions = model.get_encoder(), 300
        encoder.embed_positions = nn.Embedding.from_pretrained(encoder.embed_positions.weight[:300])
    return model


def row_of(inputs: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    return {name: tensor[i : i + 1] for name, tensor in inputs.items()}


def doubled(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}


def answers(model: nn.Module, inputs: dict[str, Tensor], **arguments: Any) -> list[list[int]]:
    """Some tokens of each row, greedily."""
    inputs = {name: tensor for name, tensor in inputs.items() if name != "decoder_input_ids"}
    if "input_features" in inputs:
        arguments |= {"language": "en", "task": "transcribe"}
    tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False, **arguments).tolist()
    pad = model.generation_config.pad_token_id
    return [row[: max(i + 1 for i, token in enumerate(row) if token != pad)] for row in tokens]


@pytest.mark.parametrize("name", MODELS)
def test_each_row_of_a_real_model_has_its_own_adapter(name: str, tmp_path: Path) -> None:
    model, layers = load(name), MODELS[name][2]
    # Before other blocks random adapters make chaos, which lifts any rounding to the logits' size.
    last = model.config.num_hidden_layers - 1
    settings = {"target_modules": rf".*\.layers\.({last - 1}|{last})\..*\b({layers})"}
    inputs = zoo.rows(model, len(NAMES))
    plain, truth, alone = [], [], []
    for i, case in enumerate(NAMES):
        if case in CASES:
            own = zoo.make_adapter(case, model, tmp_path / case, i, **settings)
        else:
            own = copy.deepcopy(model)
        row = row_of(inputs, i)
        plain.append(own(**row).logits)
        alone += answers(own, row)
        truth.append(own.double()(**doubled(row)).logits)
        del own  # a whole model

    count = len(ModelBase(model).shapes)
    flora.attach(model, {case: tmp_path / case for case in CASES})
    found = model(**inputs, adapter_names=NAMES).logits
    for case, row, *others in zip(NAMES, found.split(1), plain, truth, strict=True):
        # An eps for each layer, as each one's rounding goes through those behind it.
        assert_no_worse(row, *others, f"{case}", scale=count * others[-1])
    assert answers(model, inputs, adapter_names=NAMES) == alone
