"""FLoRA through PEFT's own front doors, on tiny random models."""

import copy

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from flora.adapters.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from flora.adapters.kinds import flora
from flora.base import ModelBase
from flora.errors import InvalidAdapterError, UnknownAdapterError, UsageError
from flora.tuner import FloraConfig, FloraLinear

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
IDS = 1 + torch.arange(15).reshape(3, 5)


def llama(dtype=torch.float32):
    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, attention_bias=True)).to(dtype).eval()


def gpt2(dtype=torch.float32):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=48, n_embd=32, n_layer=2, n_head=2, n_positions=32)
    return GPT2LMHeadModel(config).to(dtype).eval()


def t5(dtype=torch.float32):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 48,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 40,
        "num_layers": 1,
        "num_heads": 4,
    }
    tokens = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    config = T5Config(**sizes, **tokens, feed_forward_proj="gated-gelu")
    return T5ForConditionalGeneration(config).to(dtype).eval()


def config(targets=None, **fields):
    fields = {"r": 3, "init_weights": False, "task_type": "CAUSAL_LM", **fields}
    return FloraConfig(target_modules=targets or ATTENTION + MLP, **fields)


def adapt(model, *args, **fields):
    return get_peft_model(model, config(*args, **fields)).eval()


def layers(model):
    return {n: m for n, m in model.get_base_model().named_modules() if isinstance(m, FloraLinear)}


def dense(make, adapted, *names):
    """The base model in fp64 with the adapted weights themselves in the places of its own."""
    model = make(torch.float64)
    for path, layer in layers(adapted).items():
        weight = model.get_submodule(path).weight
        for name in names:
            a, b = layer.flora_A[name].double(), layer.flora_B[name].double()
            scale = torch.einsum("ro,ri->oi", a, b) / a.shape[0]
            weight.data *= scale.T if make is gpt2 else scale
    return model


def test_the_start_is_the_base_model():
    base = llama(torch.float64)
    expected = base(IDS).logits
    model = adapt(base, init_weights=True)
    assert {layer.flora_A["default"].dtype for layer in layers(model).values()} == {torch.float64}
    torch.testing.assert_close(model(IDS).logits, expected)


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("rank", [1, 3])
def test_logits_equal_those_of_the_dense_weights(make, rank):
    model = adapt(make(torch.float64), "all-linear", r=rank)
    expected = dense(make, model, "default")(IDS).logits
    assert (expected - make(torch.float64)(IDS).logits).abs().max() > 1e-3
    torch.testing.assert_close(model(IDS).logits, expected)
    torch.testing.assert_close(model.merge_and_unload()(IDS).logits, expected)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ({"targets": ["q_proj", "up_proj"]}, "q_proj up_proj"),
        ({"targets": r".*\.(k_proj|down_proj)"}, "k_proj down_proj"),
        ({"targets": "all-linear"}, " ".join(ATTENTION + MLP)),
        ({"targets": "all-linear", "exclude_modules": MLP}, " ".join(ATTENTION)),
        ({"targets": ["lm_head"]}, "lm_head"),
    ],
)
def test_target_modules_in_all_forms(targets, expected):
    found = {path.rpartition(".")[2] for path in layers(adapt(llama(), **targets))}
    assert found == set(expected.split())


def test_no_targets_are_what_peft_takes_for_lora():
    model = get_peft_model(llama(), FloraConfig())
    assert {path.rpartition(".")[2] for path in layers(model)} == {"q_proj", "v_proj"}


def test_layers_to_transform_and_rank_pattern():
    model = adapt(
        llama(), layers_to_transform=[1], rank_pattern={"q_proj": 2, "^model.+up_proj": 5}
    )
    assert {path.split(".")[2] for path in layers(model)} == {"1"}
    ranks = {path.rpartition(".")[2]: layer.r["default"] for path, layer in layers(model).items()}
    assert ranks == dict.fromkeys(ATTENTION + MLP, 3) | {"q_proj": 2, "up_proj": 5}
    assert layers(model)["model.layers.1.mlp.up_proj"].flora_A["default"].shape == (5, 40)
    assert model.peft_config["default"].r == 3


def test_what_is_printed(capsys):
    model = adapt(llama(), ["q_proj"], r=2, layers_to_transform=0)
    assert "FloraLinear" in repr(model)
    assert "(flora_B): ParameterDict" in repr(model)
    model.print_trainable_parameters()
    assert f"trainable params: {2 * (32 + 32)} ||" in capsys.readouterr().out
    assert not model.supports_lora_conversion()


@pytest.mark.parametrize("share_input", [False, True])
@torch.no_grad()
def test_save_and_load_bit_for_bit(tmp_path, share_input):
    model = adapt(llama(), share_input=share_input, rank_pattern={"down_proj": 1})
    expected = model(IDS).logits
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert set(saved) == {
        f"base_model.model.{path}.{name}"
        for path in layers(model)
        for name in ("flora_A", "flora_B")
    }
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(loaded(IDS).logits, expected)
        assert loaded.peft_config["default"].share_input is share_input
        assert len(list(loaded.parameters())) == len(list(model.parameters()))
        assert not any(p.requires_grad for p in loaded.parameters())
    trainable = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    assert all(layer.flora_B["default"].requires_grad for layer in layers(trainable).values())


@torch.no_grad()
def test_auto_model_and_pickled_bf16_base(tmp_path):
    llama(torch.bfloat16).save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    model = adapt(base, init_weights=True)
    assert {p.dtype for n, p in model.named_parameters() if "flora_" in n} == {torch.float32}
    spread = layers(model)["model.layers.0.mlp.up_proj"].flora_B["default"]
    torch.testing.assert_close(spread.mean(0), torch.ones(32))  # bf16 on the way would break it
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.bfloat16)
    assert loaded(IDS).logits.dtype == torch.bfloat16
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_without_autocast_the_factors_have_the_bases_type():
    model = get_peft_model(llama(torch.bfloat16), config(), autocast_adapter_dtype=False)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_our_reader_reads_what_peft_writes(tmp_path):
    model = adapt(llama(), "all-linear", rank_pattern={"q_proj": 1}, share_input=True)
    model.save_pretrained(tmp_path)
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint.kind == "FLORA"
    assert set(checkpoint.params) == set(layers(model))
    adapter = checkpoint.adapter(ModelBase(llama()))
    with torch.no_grad():
        for path, layer in layers(model).items():
            factors, own = adapter.layers[path], layer._factors(["default"])
            assert torch.equal(factors.hadamard_out, own.hadamard_out)
            assert torch.equal(factors.hadamard_in, own.hadamard_in)


@torch.no_grad()
def test_peft_reads_what_our_writer_writes(tmp_path):
    model = adapt(llama())
    params = {
        path: {"flora_A": layer.flora_A["default"], "flora_B": layer.flora_B["default"]}
        for path, layer in layers(model).items()
    }
    settings = flora.Config(r=3, target_modules=ATTENTION + MLP)
    write_checkpoint(tmp_path, Checkpoint(kind="FLORA", config=settings, params=params))
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_modules_to_save(tmp_path):
    model = adapt(llama(), ["q_proj"], modules_to_save=["lm_head"])
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight.mul_(2)
    expected = model(IDS).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(loaded(IDS).logits, expected)
    with loaded.disable_adapter():
        assert torch.equal(loaded(IDS).logits, llama()(IDS).logits)
    with pytest.raises(InvalidAdapterError, match="modules_to_save"):
        read_checkpoint(tmp_path)


def test_share_input_is_one_parameter_for_each_input():
    model = adapt(llama(), "all-linear", share_input=True)
    found = {path: layer.flora_B["default"] for path, layer in layers(model).items()}
    shared = {}
    for path, param in found.items():
        shared.setdefault(id(param), set()).add(path.rpartition(".")[2])
    qkv, gate_up = {"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}
    assert sorted(map(sorted, shared.values())) == sorted(
        [sorted(qkv), sorted(gate_up), ["o_proj"], ["down_proj"]] * 2
    )
    expected = dense(llama, model, "default").float()(IDS).logits
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    assert len({id(p) for p in copy.deepcopy(model).parameters()}) == len(list(model.parameters()))


def test_share_input_without_a_peft_model():
    model = inject_adapter_in_model(config(share_input=True), llama())
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.flora_B["default"] is attention.k_proj.flora_B["default"]


def test_share_input_leaves_different_ranks_and_cross_attention_apart():
    model = adapt(
        llama(), ["q_proj", "k_proj", "v_proj"], share_input=True, rank_pattern={"k_proj": 2}
    )
    q, k, v = (
        layers(model)[f"model.layers.0.self_attn.{name}"].flora_B["default"]
        for name in ("q_proj", "k_proj", "v_proj")
    )
    assert q is v
    assert k is not q
    model = adapt(t5(), ["q", "k", "v"], share_input=True, task_type="SEQ_2_SEQ_LM")
    q, k, v = (
        layers(model)[f"decoder.block.0.layer.1.EncDecAttention.{name}"].flora_B["default"]
        for name in "qkv"
    )
    assert k is v
    assert k is not q


def test_shared_factors_that_differ_in_the_file_are_refused(tmp_path):
    adapt(llama(), share_input=True).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.model.layers.1.self_attn.v_proj.flora_B"][0, 0] += 1
    save_file(tensors, file)
    with pytest.raises(InvalidAdapterError, match=r"layers\.1\.self_attn\.[qkv]_proj\.flora_B"):
        PeftModel.from_pretrained(llama(), tmp_path)


def several(dtype=torch.float64):
    model = get_peft_model(llama(dtype), config(["q_proj", "k_proj"], r=1), adapter_name="sql")
    model.add_adapter("rust", config(["q_proj", "up_proj"], r=3))
    model.add_adapter("perl", config(["o_proj", "up_proj"], r=2, share_input=True))
    return model.eval()


@torch.no_grad()
def test_several_adapters_one_after_the_other(tmp_path):
    model = several(torch.float32)
    logits = {}
    for name in ("sql", "rust", "perl"):
        model.set_adapter(name)
        logits[name] = model(IDS).logits
        trained = {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad}
        assert trained == {name}
    assert not torch.equal(logits["sql"], logits["rust"])
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, llama()(IDS).logits)
    assert torch.equal(model(IDS).logits, logits["perl"])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "rust", adapter_name="rust")
    loaded.load_adapter(tmp_path / "perl", "perl")
    assert torch.equal(loaded(IDS).logits, logits["rust"])
    loaded.set_adapter("perl")
    assert torch.equal(loaded(IDS).logits, logits["perl"])
    model.set_adapter("rust")
    model.delete_adapter("perl")
    assert torch.equal(model(IDS).logits, logits["rust"])


def test_several_active_adapters_add_their_deltas():
    model = several()
    reference = llama(torch.float64)
    for path, layer in layers(model).items():
        weight = reference.get_submodule(path).weight
        base = weight.data.clone()
        for name in set(layer.flora_A) & {"sql", "rust"}:
            a, b = layer.flora_A[name].double(), layer.flora_B[name].double()
            weight.data += base * (torch.einsum("ro,ri->oi", a, b) / a.shape[0] - 1)
    expected = reference(IDS).logits
    model.base_model.set_adapter(["sql", "rust"])
    torch.testing.assert_close(model(IDS).logits, expected)
    model.merge_adapter()
    torch.testing.assert_close(model(IDS).logits, expected)
    model.unmerge_adapter()
    torch.testing.assert_close(model.merge_and_unload()(IDS).logits, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_and_unmerge_restore_every_weight(dtype):
    base = llama(dtype)
    before = {name: param.clone() for name, param in base.named_parameters()}
    model = adapt(base)
    model.merge_adapter(safe_merge=True)
    assert not torch.equal(
        layers(model)["model.layers.0.mlp.up_proj"].weight,
        before["model.layers.0.mlp.up_proj.weight"],
    )
    model.unmerge_adapter()
    restored = dict(model.unload().named_parameters())
    assert set(restored) == set(before)
    assert all(torch.equal(restored[name], before[name]) for name in before)


def test_unload_gives_the_base_model_back():
    model = adapt(llama())
    base = model.unload()
    assert not any(isinstance(module, FloraLinear) for module in base.modules())
    assert torch.equal(base(IDS).logits, llama()(IDS).logits)


NAMES = ["rust", "__base__", "sql"]


def test_a_mixed_batch_equals_each_adapter_alone():
    model = several()
    mixed = model(IDS, adapter_names=NAMES).logits
    generated = model.generate(
        IDS,
        attention_mask=torch.ones_like(IDS),
        adapter_names=NAMES,
        max_new_tokens=4,
        do_sample=False,
    )
    for row, name in enumerate(NAMES):
        ids = IDS[row : row + 1]
        model.set_adapter("sql" if name == "__base__" else name)
        with model.disable_adapter() if name == "__base__" else torch.no_grad():
            torch.testing.assert_close(mixed[row : row + 1], model(ids).logits)
            alone = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False
            )
        assert torch.equal(generated[row], alone[0])
    again = model(IDS, adapter_names=["sql"] * 3).logits
    torch.testing.assert_close(again, model(IDS).logits)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_beams_and_an_encoder_in_a_mixed_batch(options):
    model = get_peft_model(
        t5(torch.float64), config("all-linear", r=1, task_type="SEQ_2_SEQ_LM"), adapter_name="sql"
    ).eval()
    model.add_adapter("rust", config("all-linear", r=3, task_type="SEQ_2_SEQ_LM"))
    options = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False, **options)
    inputs = IDS[:2] + 5
    mask = torch.ones_like(inputs)
    names = ["rust", "sql"]
    mixed = model.generate(input_ids=inputs, attention_mask=mask, adapter_names=names, **options)
    each = options.get("num_return_sequences", 1)
    for row, name in enumerate(names):
        model.set_adapter(name)
        alone = model.generate(input_ids=inputs[row : row + 1], attention_mask=mask[:1], **options)
        assert torch.equal(mixed[row * each : (row + 1) * each], alone)


def test_mixed_batches_that_cannot_be_meant():
    model = several()
    with pytest.raises(UnknownAdapterError, match="no adapter has these names: cobol"):
        model(IDS, adapter_names=["sql", "cobol", "sql"])
    with pytest.raises(UsageError, match="a list with one name"):
        model(IDS, adapter_names="sql")
    with pytest.raises(ValueError, match="2 adapter_names for 3 rows"):
        model(IDS, adapter_names=["sql", "rust"])
    before = model(IDS).logits
    model(IDS, adapter_names=["rust"] * 3)
    assert torch.equal(model(IDS).logits, before)


def test_layers_that_only_lend_their_weight_are_refused():
    model = torch.nn.TransformerEncoderLayer(8, 2, 8)
    with pytest.raises(UsageError, match="reads the weight only"):
        get_peft_model(model, FloraConfig(target_modules=["out_proj"]))
