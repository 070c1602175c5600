"""What an adapter computes is judged by what PEFT makes of the same folder."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from flora.adapters.checkpoint import read_checkpoint
from flora.adapters.core import Adapter, LayerFactors
from flora.base import ModelBase
from tests import zoo
from tests.helpers import assert_no_worse

PREFIX = "base_model.model."
LOKR = zoo.Case("LOKR", peft.LoKrConfig, {"r": 3})
ONE_OF_EACH = {case.kind: case for case in reversed([*zoo.CASES.values(), LOKR])}
"""The plainest case of each kind, by its PEFT type."""


def save_by_peft(
    make: Callable[..., Any], model: nn.Module, folder: Path, **settings: Any
) -> nn.Module:
    """Save an adapter away from its start, with the biases that its config means, all of them new.

    make: the PEFT config. Returns PEFT's model.
    """
    case = zoo.Case(kind="", make=make, settings={"target_modules": zoo.targets(model)})
    adapted = zoo.make_adapter(case, model, folder, **settings)
    if settings.get("bias") == "all":
        generator = torch.Generator().manual_seed(1)
        for name, parameter in adapted.named_parameters():
            if name.endswith(".bias"):
                parameter.data.normal_(std=0.5, generator=generator)
        adapted.save_pretrained(folder)
    return adapted


def read(model: nn.Module, folder: Path) -> Adapter:
    base = ModelBase(model)
    return read_checkpoint(folder, base).adapter(base)


def weight_of(layer: nn.Module) -> Tensor:
    """`[out, in]`."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight.T if isinstance(layer, Conv1D) else weight


def tensors_of(layer: nn.Module) -> Mapping[str, Tensor | None]:
    return {"weight": weight_of(layer), "bias": layer.bias}  # type: ignore[dict-item]


def terms_of(factors: LayerFactors, weight: Tensor) -> Tensor:
    """Σ |term| of a merged weight, whose terms may cancel."""
    return LayerFactors(**{name: part.double().abs() for name, part in factors.parts()}).merge(
        weight.double().abs()
    )


def assert_reads_as_peft(
    model: nn.Module, folder: Path, loaded: nn.Module | None = None
) -> Adapter:
    """Every layer's weight and bias are those that PEFT merges, and the layers are the same ones.

    loaded: PEFT's model with the folder's adapter alone active; else PEFT loads it.

    The truth is PEFT's merge in fp64; that in fp32 says how near it one has to be.
    """
    adapter = read(model, folder)
    if loaded is None:
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()
    wrapped = {
        name.removeprefix(PREFIX)
        for name, module in loaded.named_modules()
        if isinstance(module, BaseTunerLayer)
    }
    exact = copy.deepcopy(loaded).double().merge_and_unload(safe_merge=True)
    plain = loaded.merge_and_unload(safe_merge=True)
    assert wrapped == {n for n, f in adapter.layers.items() if n in wrapped or f.pairs or f.rank}
    for name in ModelBase(model).shapes:
        layer, factors = model.get_submodule(name), adapter.layers.get(name, LayerFactors())
        found = {
            "weight": factors.merge(weight_of(layer)),
            "bias": layer.bias if factors.bias is None else factors.bias,
        }
        touched = {"weight": factors.pairs or factors.rank, "bias": factors.bias is not None}
        truths = tensors_of(exact.get_submodule(name))
        for part, expected in tensors_of(plain.get_submodule(name)).items():
            what, tensor, truth = f"{name}.{part}", found[part], truths[part]
            if tensor is None or expected is None or truth is None:
                assert tensor is expected is truth, what
                continue
            scale = terms_of(factors, weight_of(layer)) if part == "weight" else None
            assert_no_worse(tensor, expected, truth.detach(), what, scale=scale)
            # Nothing is compared that is as it was before.
            assert bool(touched[part]) != torch.equal(expected, tensors_of(layer)[part]), what
    return adapter
