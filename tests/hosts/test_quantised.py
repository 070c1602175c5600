"""Quantised base models: each row of a mixed batch is the dense model of its own adapter.

The dense weight W0 of a layer is its product with the identity.
"""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import bitsandbytes as bnb
import peft
import pytest
import torch
from torch import Tensor, nn
from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
from torchao.quantization import (
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerGroup,
    quantize_,
)

import flora
from flora.adapters.checkpoint import read_checkpoint
from flora.base import ModelBase
from flora.errors import UsageError
from flora.hosts.transformers import merge
from tests import zoo
from tests.helpers import assert_no_worse

pytestmark = [
    pytest.mark.filterwarnings("ignore:Specified to not"),  # VeRA without its projections
    pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated without"),  # for merging
]

NAMES: list[str | None] = [*zoo.CASES, None, "__base__", "lora", "flora3", "dora"][::-1]
GROUP = 16


def pack(values: Tensor) -> Tensor:
    """Eight 4-bit numbers of a column in one, `[n / 8, m]`."""
    shifts = torch.arange(0, 32, 4).unsqueeze(1)
    packed = (values.long().unflatten(0, (-1, 8)) << shifts).sum(dim=1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).int()


def unpack(packed: Tensor) -> Tensor:
    shifts = torch.arange(0, 32, 4).unsqueeze(1)
    return ((packed.unsqueeze(1) >> shifts) & 15).flatten(0, 1)


class GPTQ(nn.Module):
    """A layer as AutoGPTQ lays it: all buffers, the weight packed along its inputs."""

    along_inputs = True
    names = "in_features", "out_features"

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        for name, size in zip(self.names, linear.weight.T.shape, strict=True):
            setattr(self, name, size)
        groups_GBO = linear.weight.T.unflatten(0, (-1, GROUP))
        low, high = groups_GBO.amin(1), groups_GBO.amax(1)
        scales = (high - low) / 15
        zeros = (-low / scales).round().clamp(0, 15)
        q_GBO = (groups_GBO / scales.unsqueeze(1) + zeros.unsqueeze(1)).round().clamp(0, 15)
        q_IO = q_GBO.flatten(0, 1)
        self.register_buffer("qweight", pack(q_IO) if self.along_inputs else pack(q_IO.T).T)
        self.register_buffer("qzeros", pack(zeros.T).T)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        q_IO = unpack(self.qweight) if self.along_inputs else unpack(self.qweight.T).T
        q_GBO = q_IO.unflatten(0, (-1, GROUP)) - unpack(self.qzeros.T).T.unsqueeze(1)
        y = x @ (q_GBO * self.scales.unsqueeze(1)).flatten(0, 1)
        return y if self.bias is None else y + self.bias


class OldGPTQ(GPTQ):
    """As older versions name the sizes."""

    names = "infeatures", "outfeatures"


class AWQ(GPTQ):
    """As AutoAWQ lays it: packed along its outputs."""

    along_inputs = False


def bnb_8bit(linear: nn.Linear) -> nn.Module:
    sizes, has_bias = linear.weight.T.shape, linear.bias is not None
    layer = bnb.nn.Linear8bitLt(*sizes, bias=has_bias, has_fp16_weights=False)
    weight = linear.weight.data.clone()
    layer.weight = bnb.nn.Int8Params(weight, has_fp16_weights=False, requires_grad=False)
    return moved(layer, linear)


def bnb_4bit(linear: nn.Linear) -> nn.Module:
    sizes, has_bias = linear.weight.T.shape, linear.bias is not None
    layer = bnb.nn.Linear4bit(*sizes, bias=has_bias, compute_dtype=linear.weight.dtype)
    weight = linear.weight.data.clone()
    layer.weight = bnb.nn.Params4bit(weight, quant_type="nf4", requires_grad=False)
    return moved(layer, linear)


def moved(layer: nn.Module, linear: nn.Linear) -> nn.Module:
    """bitsandbytes quantises a weight as it is moved to its device."""
    layer.bias = linear.bias
    return layer.to("cpu").requires_grad_(False).eval()


def torchao(config: object) -> Callable[[nn.Linear], nn.Module]:
    def make(linear: nn.Linear) -> nn.Module:
        quantize_(linear, config, filter_fn=lambda *_: True)
        return linear

    return make


def in_training(make: Callable[[nn.Linear], nn.Module]) -> Callable[[nn.Linear], nn.Module]:
    return lambda linear: make(linear).train()


FORMATS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "torchao int8": torchao(Int8WeightOnlyConfig(set_inductor_config=False)),
    "torchao int4": torchao(
        IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP))
    ),
    "torchao int4 packed": torchao(
        PrototypeInt4WeightOnlyConfig(group_size=32, set_inductor_config=False)
    ),
    "bitsandbytes 8-bit": bnb_8bit,
    "bitsandbytes 8-bit in training": in_training(bnb_8bit),
    "bitsandbytes nf4": bnb_4bit,
    "bitsandbytes nf4 in training": in_training(bnb_4bit),
    "GPTQ": GPTQ,
    "old GPTQ": OldGPTQ,
    "AWQ": AWQ,
}
COARSE = ("bitsandbytes 8-bit", "bitsandbytes nf4")
"""Products in fewer bits than x has, in evaluation: x in 8 bits, or all in bf16 on some CPUs."""


class Family:
    """A plain model, an adapter of each case in folders, and the model in each format."""

    def __init__(self, folder: Path) -> None:
        self.plain = zoo.build("Llama", hidden_size=64, intermediate_size=128)  # whole blocks
        self.paths = {name: folder / name for name in zoo.CASES}
        for name, path in self.paths.items():
            zoo.make_adapter(name, self.plain, path)
        self.batch = zoo.rows(self.plain, len(NAMES))
        self.layers = len(ModelBase(self.plain).shapes)

    def quantised(self, name: str, dtype: torch.dtype) -> nn.Module:
        model = copy.deepcopy(self.plain).to(dtype)
        zoo.replace_layers(model, nn.Linear, FORMATS[name])
        return model

    def dense(self, name: str, dtype: torch.dtype) -> nn.Module:
        model = self.quantised(name, dtype)
        kind = type(model.model.layers[0].mlp.up_proj)
        zoo.replace_layers(model, kind, partial(zoo.linear_of, dtype=dtype))
        return model

    @torch.no_grad()
    def logits(self, model: nn.Module, name: str | None) -> Tensor:
        """What an adapter's own model gives each of its rows."""
        if name in self.paths:
            model = zoo.own_model(name, model, self.paths[name])
        same = [i for i, other in enumerate(NAMES) if other == name]
        return model(**{k: v[same] for k, v in self.batch.items()}).logits

    def judge(self, found: Tensor, plain: Tensor, truth: Tensor, name: str, what: str) -> None:
        """With an eps for each linear layer, as its rounding goes through those behind it."""
        dtype = torch.bfloat16 if name in COARSE else found.dtype  # whose eps is that of 8 bits
        assert_no_worse(found, plain, truth, what, dtype=dtype, scale=self.layers * truth)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(tmp_path_factory.mktemp("quantised"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_each_row_is_the_dense_model_of_its_adapter(family, name, dtype):
    model = flora.attach(family.quantised(name, dtype), family.paths)
    with torch.no_grad():
        found = model(**family.batch, adapter_names=NAMES).logits
    dense = family.dense(name, dtype)
    exact = copy.deepcopy(dense).double()
    for adapter in dict.fromkeys(NAMES):
        same = [i for i, other in enumerate(NAMES) if other == adapter]
        plain, truth = family.logits(dense, adapter), family.logits(exact, adapter)
        family.judge(found[same], plain, truth, name, str(adapter))


# IA3 and AdaLoRA on 8 bits, and LoHa and VeRA on bitsandbytes, PEFT cannot run here; its DoRA and
# HiRA on nf4 read a weight that bitsandbytes has packed for the CPU as if it had not.
TAKEN_BY_PEFT = {
    "torchao int8": ["lora", "rslora", "dora", "biased", "ia3", "adalora", "loha", "dense"],
    "bitsandbytes 8-bit": ["lora", "rslora", "dora", "biased", "hira"],
    "bitsandbytes nf4": ["lora", "rslora", "biased", "adalora"],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", TAKEN_BY_PEFT)
def test_each_row_is_no_worse_than_in_pefts_own_quantised_model(family, name, dtype):
    model = flora.attach(family.quantised(name, dtype), family.paths)
    exact = family.dense(name, dtype).double()
    for adapter in TAKEN_BY_PEFT[name]:
        rows = {key: value[:4] for key, value in family.batch.items()}
        own = family.quantised(name, dtype)
        own.is_loaded_in_8bit = name == "bitsandbytes 8-bit"
        own.is_loaded_in_4bit = name == "bitsandbytes nf4"
        own = peft.PeftModel.from_pretrained(own, family.paths[adapter])
        truth = zoo.own_model(adapter, exact, family.paths[adapter])
        with torch.no_grad():
            found = model(**rows, adapter_names=[adapter, None, adapter, "flora3"]).logits[::2]
            plain, truth = own(**rows).logits[::2], truth(**rows).logits[::2]
        family.judge(found, plain, truth, name, adapter)


def test_gradients_are_those_of_the_dense_model(family):
    names = ["flora3", "lora", None, "dora"]
    ids = family.batch["input_ids"][:4]

    def gradient(model: nn.Module) -> Tensor:
        flora.attach(model, family.paths)
        x = model.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=x, adapter_names=names).logits.square().sum().backward()
        return x.grad

    dense = family.dense("torchao int8", torch.float32)
    truth = gradient(copy.deepcopy(dense).double())
    found = gradient(family.quantised("torchao int8", torch.float32))
    assert_no_worse(found, gradient(dense), truth, scale=2 * family.layers * truth)


def test_a_quantised_model_generates_what_its_dense_models_do(family):
    names, settings = ["dora", None, "flora3", "ia3"], {"max_new_tokens": 4, "min_new_tokens": 4}
    ids = family.batch["input_ids"][:4]
    model = flora.attach(family.quantised("torchao int8", torch.float32), family.paths)
    found = model.generate(ids, adapter_names=names, do_sample=False, **settings)
    dense = family.dense("torchao int8", torch.float32)
    for i, name in enumerate(names):
        own = zoo.own_model(name, dense, family.paths[name]) if name else dense
        row = ids[i : i + 1]
        mask = torch.ones_like(row)
        expected = own.generate(input_ids=row, attention_mask=mask, do_sample=False, **settings)
        assert torch.equal(found[i], expected[0]), name


def test_a_quantised_layer_is_not_merged_into(family):
    model = family.quantised("torchao int8", torch.float32)
    adapter = read_checkpoint(family.paths["lora"], base := ModelBase(model)).adapter(base)
    before = model(**family.batch).logits
    with pytest.raises(UsageError, match="cannot be merged into: it is no plain linear layer"):
        merge(model, adapter)
    assert torch.equal(model(**family.batch).logits, before)
