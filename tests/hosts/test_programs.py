"""Layers that run without Python give what the same layers give one by one."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import flora
from flora.hosts.transformers import HOST, AdaptedLayer, Host
from flora.ops import Linear, costs
from flora.ops.model_layers import LaidStep, ModelLayer
from flora.ops.plan import ACTIVATION_SIDE, WEIGHT_SIDE
from tests import zoo

pytestmark = pytest.mark.filterwarnings("ignore:Specified to not")  # VeRA without its projections

DTYPES = [torch.float32, torch.bfloat16]
SOME = {"target_modules": ["q_proj", "down_proj"]}
"""Of an adapter that touches some layers only."""

Attached = Callable[[str, torch.dtype], nn.Module]


@pytest.fixture(scope="module")
def attached(tmp_path_factory: pytest.TempPathFactory) -> Attached:
    @cache
    def attached(architecture: str, dtype: torch.dtype) -> nn.Module:
        model, folder = zoo.build(architecture), tmp_path_factory.mktemp(architecture)
        for name in zoo.CASES:
            zoo.make_adapter(name, model, folder / name)
        paths = {name: folder / name for name in zoo.CASES}
        if architecture == "Llama":
            zoo.make_adapter("lora", model, folder / "some", seed=1, **SOME)
            paths["some"] = folder / "some"
        return flora.attach(model.to(dtype), paths)

    return attached


@contextmanager
def one_by_one() -> Iterator[None]:
    """As if no layer ran without Python."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Host, "_lay", lambda *_: None)
        yield


@contextmanager
def asked() -> Iterator[list[str]]:
    """The layers that are prepared by themselves."""
    names: list[str] = []
    prepare = AdaptedLayer._prepare

    def count(layer: AdaptedLayer, *args: Any) -> Any:
        names.append(layer.name)
        return prepare(layer, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdaptedLayer, "_prepare", count)
        yield names


spans = st.lists(
    st.tuples(st.sampled_from([*zoo.CASES, None]), st.integers(0, 2)), min_size=1, max_size=3
)
names = st.sampled_from([*zoo.CASES, "some", None, "__base__"])


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    rows=st.lists(names | spans, min_size=1, max_size=8),
    length=st.sampled_from([6, 17]),
    side=st.sampled_from([ACTIVATION_SIDE, WEIGHT_SIDE, None]),
    seed=st.integers(0, 9),
)
def test_they_give_the_same_bit_for_bit(attached, dtype, rows, length, side, seed):
    model = attached("Llama", dtype)
    batch = zoo.rows(model, len(rows), length, seed=seed)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        if side is not None:
            patch.setattr(costs, "DEFAULT_COSTS", side)
            patch.setattr(costs, "layer_costs", lambda *_, **__: side)
        with asked() as layers:
            found = model(**batch, adapter_names=rows).logits
        with one_by_one():
            expected = model(**batch, adapter_names=rows).logits
    assert layers == []
    assert torch.equal(found, expected)


@pytest.mark.parametrize("architecture", ["Llama", "StarCoder2", "Whisper"])
@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}])
def test_so_they_do_step_by_step(attached, architecture, settings):
    model, rows = attached(architecture, torch.float32), [*zoo.CASES, None]
    batch = zoo.rows(model, len(rows))
    batch.pop("decoder_input_ids", None)
    more = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, **settings}
    with asked() as layers:
        found = model.generate(**batch, adapter_names=rows, **more)
    with one_by_one():
        expected = model.generate(**batch, adapter_names=rows, **more)
    assert layers == []
    assert torch.equal(found, expected)


def new_parameter(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(2 * layer.weight, requires_grad=False)


def new_memory(layer: nn.Linear) -> None:
    layer.weight.data = 2 * layer.weight.data


def in_place(layer: nn.Linear) -> None:
    layer.weight.data *= 2


def new_bias(layer: nn.Linear) -> None:
    layer.bias = nn.Parameter(layer.bias + 1, requires_grad=False)


@pytest.mark.parametrize("change", [new_parameter, new_memory, in_place, new_bias])
def test_they_have_the_parameters_that_the_model_has_now(tmp_path, change):
    base = zoo.build("Llama")
    zoo.make_adapter("flora1", base, tmp_path)
    model, batch = flora.attach(copy.deepcopy(base), {"own": tmp_path}), zoo.rows(base, 2)

    @torch.no_grad()
    def logits(model: nn.Module) -> Tensor:
        return model(**batch, adapter_names=["own", None]).logits

    before = logits(model)
    for layers in (model.model.layers, base.model.layers):
        change(layers[0].self_attn.q_proj)
    with asked() as asked_for:
        after = logits(model)
    assert asked_for == []
    assert not torch.equal(after, before)
    assert torch.equal(after, logits(flora.attach(base, {"own": tmp_path})))


def test_a_model_in_another_type_is_taken_layer_by_layer(tmp_path):
    base = zoo.build("Llama")
    zoo.make_adapter("lora", base, tmp_path)
    model, batch = flora.attach(base, {"own": tmp_path}), zoo.rows(base, 2)
    with torch.no_grad(), asked() as layers:
        model(**batch, adapter_names=["own", None])
        assert layers == []
        model.bfloat16()
        found = model(**batch, adapter_names=["own", None]).logits
    assert set(layers) == set(getattr(model, HOST).layers)
    assert found.dtype is torch.bfloat16


def test_layers_that_no_adapter_touches_are_their_own(tmp_path, monkeypatch):
    base = zoo.build("Llama")
    zoo.make_adapter("lora", base, tmp_path, **SOME)
    model, batch = flora.attach(base, {"own": tmp_path}), zoo.rows(base, 2)
    ran: list[str] = []
    on = ModelLayer.on

    def note(layer: ModelLayer, step: LaidStep) -> Linear:
        ran.append(layer.slices[0].name.rpartition(".")[2])
        return on(layer, step)

    monkeypatch.setattr(ModelLayer, "on", note)
    with torch.no_grad():
        model(**batch, adapter_names=["own", None])
    assert ran == ["q_proj", "down_proj"] * base.config.num_hidden_layers
