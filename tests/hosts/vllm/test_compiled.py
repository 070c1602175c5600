"""Layers in compiled code on a CPU: vLLM's products without Python."""

import json

from flora.machine import has_avx512_bf16
from tests import zoo
from tests.hosts.vllm.script import run_script
from tests.hosts.vllm.test_engine import HEADS

SIZES = [(64, 32), (48, 96), (1536, 576)]
"""Of the last one vLLM's kernel for AMX has no use, if there is one."""

FOUND = """
import json, sys
import torch
import vllm._custom_ops
from torch import nn
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from flora.hosts.vllm.compiled import product_of
from flora.ops.model_layers import CompiledLayer, ModelLayers, Running, Slice
from flora.ops.program import Product

def known(out, in_, dtype):
    dtype = getattr(torch, dtype)
    layer = nn.Module()
    layer.weight = nn.Parameter(torch.randn(out, in_, dtype=dtype), requires_grad=False)
    layer.bias = nn.Parameter(torch.randn(out, dtype=dtype), requires_grad=False)
    dispatch_cpu_unquantized_gemm(layer, remove_weight=False)
    product = product_of(lambda x: layer.cpu_linear(x, layer.weight, None), in_, dtype)
    more = product_of(lambda x: layer.cpu_linear(2 * x, layer.weight, None), in_, dtype)
    biased = product_of(lambda x: layer.cpu_linear(x, layer.weight, layer.bias), in_, dtype)
    if isinstance(more, Product) or isinstance(biased, Product):
        return "what is more than a product is taken for one"
    slices = [Slice("layer", in_, out, None, None, None)]
    compiled = CompiledLayer(Running(), product, slices, dtype, "none", "layer")
    ModelLayers([compiled], "cpu")
    x = torch.randn(5, in_, dtype=dtype)
    for bias in (None, layer.bias):
        y = compiled(x, bias)
        torch.testing.assert_close(y, layer.cpu_linear(x, layer.weight, bias), rtol=0, atol=0)
    return type(product).__name__

print(json.dumps([known(*case) for case in json.loads(sys.argv[1])]))
"""

ASKED = """
import json, os, sys
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
from flora.hosts.vllm.layers import AdaptedLayer
from flora.ops import costs
from flora.ops.model_layers import LaidAdapters
from flora.ops.plan import WEIGHT_SIDE

costs.layer_costs = lambda *_, **__: WEIGHT_SIDE
model, *folders = sys.argv[1:]
llm = LLM(model, dtype="float32", skip_tokenizer_init=True, max_model_len=128, enforce_eager=True,
          enable_lora=True, enable_prefix_caching=False, disable_log_stats=True)
asked, call = [], AdaptedLayer.__call__

def count(self, x, bias):
    asked.append(len(x))
    return call(self, x, bias)

AdaptedLayer.__call__ = count

def step(self, rows, tokens=1, same_input=False):
    laid = make(self, rows, tokens, same_input)
    modulated.append(any(batch.modulated for batch in laid._kept[2]))
    return laid

modulated, make = [], LaidAdapters.step
LaidAdapters.step = step
prompts = [{"prompt_token_ids": [3, 4, 5] * n} for n in (1, 1, 12)]
sampling = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, detokenize=False)
one, lora, many = (LoRARequest(f, n, f) for n, f in enumerate(folders, 1))
found = []
mixes = [None] * 3, [None, one, lora], [lora, None, one], [one, lora, many]
for requests in (*mixes, mixes[-1]):
    asked.clear()
    llm.generate(prompts, sampling, lora_request=requests, use_tqdm=False)
    found.append(list(asked))
print(json.dumps([found, modulated]))
"""


def test_vllms_products_are_known():
    dtypes = ["float32", "bfloat16"] if has_avx512_bf16() else ["float32"]
    cases = [(*size, dtype) for size in SIZES for dtype in dtypes]
    assert run_script(FOUND, json.dumps(cases)) == ["Product"] * len(cases)


def test_python_is_asked_for_no_mix_whether_its_weight_is_modulated_or_not(tmp_path):
    model = zoo.build("Llama", **HEADS)
    model.save_pretrained(tmp_path / "model")
    names = ["flora1", "lora", "flora3"]
    for seed, name in enumerate(names):
        zoo.make_adapter(name, model, tmp_path / name, seed=seed)
    asked, modulated = run_script(ASKED, tmp_path / "model", *(tmp_path / name for name in names))
    assert asked == [[]] * 5
    assert {*modulated} == {True, False}  # by many tokens, and by no step of a token each
