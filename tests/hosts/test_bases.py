"""Every kind on every architecture in every type: each row of one batch is a model of its own.

A row's own model is PEFT's of the same folder; FLoRA's is the model with the dense weights.
"""

import copy
import random
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import flora
from flora.adapters.kinds import KINDS
from flora.base import ModelBase
from tests import zoo
from tests.helpers import assert_no_worse

pytestmark = pytest.mark.filterwarnings("ignore:Specified to not")  # VeRA without its projections

TYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES: list[str | None] = [*zoo.CASES, None, "__base__", *random.Random(1).sample([*zoo.CASES], 3)]
random.Random(0).shuffle(NAMES)
DECODERS = [name for name in zoo.ARCHITECTURES if name not in ("T5", "Whisper")]


class Family:
    """A model of an architecture and an adapter of each case, in folders."""

    def __init__(self, architecture: str, folder: Path) -> None:
        self.base = zoo.build(architecture)
        self.paths = {name: folder / name for name in zoo.CASES}
        for name, path in self.paths.items():
            zoo.make_adapter(name, self.base, path)

    def attached(self, dtype: torch.dtype) -> nn.Module:
        return flora.attach(copy.deepcopy(self.base).to(dtype), self.paths)

    def alone(self, name: str | None, dtype: torch.dtype, rounded: torch.dtype) -> nn.Module:
        """One adapter's own model in a type; the base's numbers are rounded to another before."""
        base = copy.deepcopy(self.base).to(rounded).to(dtype)
        return zoo.own_model(name, base, self.paths[name]) if name in self.paths else base


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Family]:
    return cache(lambda architecture: Family(architecture, tmp_path_factory.mktemp(architecture)))


def row_of(batch: dict[str, Tensor], row: int, dtype: torch.dtype) -> dict[str, Tensor]:
    own = {name: tensor[row : row + 1] for name, tensor in batch.items()}
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in own.items()}


@torch.no_grad()
def logits_alone(
    family: Family,
    names: Sequence[str | None],
    batch: dict[str, Tensor],
    dtype: torch.dtype,
    rounded: torch.dtype,
) -> list[Tensor]:
    """Of each row; a model is made once for all of its rows."""
    models = {name: family.alone(name, dtype, rounded) for name in dict.fromkeys(names)}
    return [models[n](**row_of(batch, i, dtype)).logits[0] for i, n in enumerate(names)]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("architecture", zoo.ARCHITECTURES)
def test_each_row_of_a_mixed_batch_is_its_own_model(family, architecture, dtype):
    own = family(architecture)
    batch = zoo.rows(own.base, len(NAMES))
    inputs = {n: t.to(dtype) if t.is_floating_point() else t for n, t in batch.items()}
    with torch.no_grad():
        found = own.attached(dtype)(**inputs, adapter_names=NAMES).logits
    plain = logits_alone(own, NAMES, inputs, dtype, dtype)
    truth = logits_alone(own, NAMES, inputs, torch.float64, dtype)
    # An eps for each linear layer, as each one's rounding goes through those behind it.
    layers = len(ModelBase(own.base).shapes)
    for i, name in enumerate(NAMES):
        assert_no_worse(found[i], plain[i], truth[i], f"row {i}, {name}", scale=layers * truth[i])


@pytest.mark.parametrize("architecture", DECODERS)
def test_each_row_of_a_mixed_batch_generates_what_its_own_model_does(family, architecture):
    own = family(architecture)
    batch = zoo.rows(own.base, len(NAMES), seed=1)
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    found = own.attached(torch.float32).generate(**batch, adapter_names=NAMES, **settings)
    for name in dict.fromkeys(NAMES):
        same = [i for i, other in enumerate(NAMES) if other == name]
        ids = batch["input_ids"][same]
        expected = own.alone(name, torch.float32, torch.float32).generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), **settings
        )
        assert torch.equal(found[same], expected), name


def test_every_kind_is_in_the_batch():
    assert {case.kind for case in zoo.CASES.values()} == set(KINDS)


def test_adapters_change_every_row_by_more_than_its_tolerance(family):
    """Else the comparison in a 16-bit type could not fail."""
    own = family("GPT2")
    batch = zoo.rows(own.base, len(NAMES))
    adapted = logits_alone(own, NAMES, batch, torch.float64, torch.bfloat16)
    base = logits_alone(own, [None] * len(NAMES), batch, torch.float64, torch.bfloat16)
    for i, name in enumerate(NAMES):
        if name in own.paths:
            assert (adapted[i] - base[i]).abs().max() > 0.1 * adapted[i].abs().max(), name


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # PEFT's, on merging
@pytest.mark.parametrize("architecture", ["Gemma", "Qwen2", "T5"])
def test_an_adapter_of_a_tied_head_leaves_the_embedding_alone(architecture, tmp_path):
    base = zoo.build(architecture, tie_word_embeddings=True)
    head = base.get_output_embeddings()
    assert head.weight is base.get_input_embeddings().weight
    cases = ["flora3", "lora", "dora", "ia3", "hira"]
    for name in cases:
        settings = {"feedforward_modules": []} if name == "ia3" else {}
        zoo.make_adapter(name, base, tmp_path / name, target_modules=["lm_head"], **settings)
    names = [None, *cases, None]
    batch = zoo.rows(base, len(names))
    expected = [
        zoo.own_model(n, base.double(), tmp_path / n) if n else copy.deepcopy(base.double())
        for n in names
    ]
    before = base.get_input_embeddings().weight.clone()
    flora.attach(base, {name: tmp_path / name for name in cases})
    with torch.no_grad():
        found = base(**batch, adapter_names=names).logits
        for i, (name, own) in enumerate(zip(names, expected, strict=True)):
            logits = own(**row_of(batch, i, torch.float64)).logits[0]
            torch.testing.assert_close(found[i], logits, rtol=1e-6, atol=1e-6, msg=str(name))
    assert torch.equal(base.get_input_embeddings().weight, before)
    assert head.weight is base.get_input_embeddings().weight


def test_a_layers_hooks_see_what_its_rows_get(family):
    own = family("Llama")
    model, seen = own.attached(torch.float32), []
    layer = model.model.layers[0].mlp.up_proj
    layer.register_forward_pre_hook(lambda _, args: (2 * args[0],))
    layer.register_forward_hook(lambda _, args, y: seen.append((args[0], y)))
    with torch.no_grad():
        model(**zoo.rows(own.base, 2), adapter_names=["lora", None])
        [(x, y)] = seen
        module = "model.layers.0.mlp.up_proj"
        adapted = own.alone("lora", torch.float32, torch.float32).get_submodule(
            f"base_model.model.{module}"
        )
        torch.testing.assert_close(y[0], adapted(x[0]), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(y[1], layer.forward(x[1:])[0], rtol=1e-5, atol=1e-5)
