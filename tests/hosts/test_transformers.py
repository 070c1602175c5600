"""The transformers host against a model of its own for each row.

The truth for a FLoRA row is the model whose weights are W0 ∘ (Σ_j a_j b_jᵀ) / r; for a LoRA row it
is PEFT's own model of the adapter that PEFT saved.
"""

import copy
import gc
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import flora
from flora.adapters.checkpoint import Checkpoint, write_checkpoint
from flora.adapters.kinds.flora import Config
from flora.base import ModelBase
from flora.errors import (
    BackendError,
    FloraError,
    InvalidAdapterError,
    OutOfBudgetError,
    ShapeError,
    UnknownAdapterError,
    UsageError,
)
from flora.hosts.transformers import HOST, patch
from tests.helpers import assert_no_worse, random_factors

VOCABULARY = 97
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": {"num_key_value_heads": 2, "attention_bias": True},
    "Qwen2": {"num_key_value_heads": 2},
    "GPTNeoX": {},
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
}
NAMES = ["flora3", "flora1", None, "lora4", "__base__", "flora3", "lora4", "flora1"]
SHUFFLES = [NAMES, NAMES[::-1], ["lora4"] * 8, [*NAMES[3:], *NAMES[:3]]]


@cache
def base_model(architecture: str) -> nn.Module:
    config = getattr(transformers, f"{architecture}Config")(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **ARCHITECTURES[architecture],
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model.requires_grad_(False)


class Zoo:
    """A model, its adapters' folders, and for each adapter a model that has it in its weights.

    The adapters' numbers are bf16, so that every type sees the same ones.
    """

    def __init__(self, architecture: str, folder: Path) -> None:
        self.base = base_model(architecture)
        self.paths: dict[str, Path] = {}
        self.own: dict[str | None, nn.Module] = {None: self.base, "__base__": self.base}
        generator = torch.Generator().manual_seed(1)
        for r in (1, 3):
            self._flora(f"flora{r}", r, folder, generator)
        self._lora("lora4", folder, generator)
        self._own: dict[tuple[str | None, torch.dtype], nn.Module] = {}

    def _flora(self, name: str, r: int, folder: Path, generator: torch.Generator) -> None:
        def near_one(*shape: int) -> Tensor:
            return (1 + 0.3 * torch.randn(*shape, generator=generator)).bfloat16().float()

        base = ModelBase(self.base)
        params = {
            module: {"flora_A": near_one(r, out), "flora_B": near_one(r, n)}
            for module, (out, n) in base.shapes.items()
            if module != base.head
        }
        checkpoint = Checkpoint(
            kind="FLORA", config=Config(r=r, target_modules="all-linear"), params=params
        )
        self.paths[name] = folder / name
        write_checkpoint(self.paths[name], checkpoint)
        self.own[name] = copy.deepcopy(self.base).double()
        for module, p in params.items():
            weight = self.own[name].get_submodule(module).weight
            weight.data *= p["flora_A"].double().T @ p["flora_B"].double() / r

    def _lora(self, name: str, folder: Path, generator: torch.Generator) -> None:
        config = peft.LoraConfig(r=4, lora_alpha=6, target_modules="all-linear")
        model = peft.get_peft_model(copy.deepcopy(self.base), config)
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                value = torch.randn(parameter.shape, generator=generator) / 4
                parameter.data = value.bfloat16().float()
        self.paths[name] = folder / name
        model.save_pretrained(self.paths[name])
        self.own[name] = model.eval().requires_grad_(False)

    def fresh(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        return copy.deepcopy(self.base).to(dtype)

    def attached(self, dtype: torch.dtype = torch.float32, **settings: Any) -> nn.Module:
        return flora.attach(self.fresh(dtype), self.paths, **settings)

    def alone(self, name: str | None, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The model of one adapter; its weights are made in fp64 and rounded once."""
        if (name, dtype) not in self._own:
            self._own[name, dtype] = copy.deepcopy(self.own[name]).to(dtype)
        return self._own[name, dtype]


@pytest.fixture(scope="module")
def zoos(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Zoo]:
    return cache(lambda architecture: Zoo(architecture, tmp_path_factory.mktemp(architecture)))


@pytest.fixture(scope="module")
def zoo(zoos: Callable[[str], Zoo]) -> Zoo:
    return zoos("Llama")


def tokens(rows: int = 8, columns: int = 9, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, columns), generator=generator)


def logits_alone(
    zoo: Zoo, names: Sequence[str | None], dtype: torch.dtype, **inputs: Any
) -> Tensor:
    return torch.cat(
        [
            zoo.alone(name, dtype)(**{k: v[i : i + 1] for k, v in inputs.items()}).logits
            for i, name in enumerate(names)
        ]
    )


def no_worse_through_layers(
    actual: Tensor, plain: Tensor, truth: Tensor, what: str, passes: int = 1
) -> None:
    """With an eps for each linear layer, as each one's rounding goes through those behind it."""
    layers = len(ModelBase(base_model("Llama")).shapes)
    assert_no_worse(actual, plain, truth, what, scale=passes * layers * truth)


# --- forward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_row_has_its_own_adapter(zoos, architecture, dtype):
    """Logits, and gradients at the input, row by row."""
    zoo = zoos(architecture)
    model = zoo.attached(dtype)
    embeddings = model.get_input_embeddings()(tokens())
    grad = torch.randn(8, 9, VOCABULARY, generator=torch.Generator().manual_seed(2)).to(dtype)
    for names in SHUFFLES:

        def run(compute: Callable[..., Tensor], kind: torch.dtype) -> tuple[Tensor, Tensor]:
            x = embeddings.to(kind, copy=True).requires_grad_()
            y = compute(inputs_embeds=x, attention_mask=torch.ones(8, 9, dtype=torch.long))
            y.backward(grad.to(kind))
            return y.detach(), x.grad

        found = run(lambda **i: model(adapter_names=names, **i).logits, dtype)  # noqa: B023
        plain = run(lambda **i: logits_alone(zoo, names, dtype, **i), dtype)  # noqa: B023
        truth = run(lambda **i: logits_alone(zoo, names, torch.float64, **i), torch.float64)  # noqa: B023
        no_worse_through_layers(found[0], plain[0], truth[0], f"logits of {names}")
        no_worse_through_layers(found[1], plain[1], truth[1], f"gradients of {names}", passes=2)


@pytest.mark.parametrize("names", [None, [None] * 8, ["__base__", None] * 4])
def test_base_rows_alone_are_the_base_bit_for_bit(zoo, names):
    expected = zoo.base(tokens()).logits
    arguments = {} if names is None else {"adapter_names": names}
    assert torch.equal(zoo.attached()(tokens(), **arguments).logits, expected)


def test_the_reference_backend_serves_the_host(zoo):
    y = zoo.attached(torch.float64, backend="reference")(tokens(), adapter_names=NAMES).logits
    expected = logits_alone(zoo, NAMES, torch.float64, input_ids=tokens())
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-7)  # a/r is rounded to fp32


class Packed(nn.Module):
    """A linear layer that holds its weight in a way of its own."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("packed", linear.weight.T.contiguous().view(torch.uint8))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.packed.view(torch.float32)
        return y if self.bias is None else y + self.bias


def test_a_layer_may_be_a_black_box(zoo):
    model = zoo.fresh()
    for layer in model.model.layers:
        layer.self_attn.q_proj = Packed(layer.self_attn.q_proj)
        layer.mlp.up_proj = Packed(layer.mlp.up_proj)
    flora.attach(model, zoo.paths)
    found = model(tokens(), adapter_names=NAMES).logits
    expected = zoo.attached()(tokens(), adapter_names=NAMES).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# --- generate

GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("Llama", {}),
        ("Qwen2", {}),
        ("GPTNeoX", {}),
        ("OPT", {}),
        ("Llama", {"num_beams": 3}),
        ("OPT", {"num_beams": 3}),
        ("GPTNeoX", {"num_beams": 3, "num_return_sequences": 2}),
        ("Llama", {"num_beams": 2, "num_return_sequences": 2}),
        ("Llama", {"cache_implementation": "static"}),
        ("Llama", {"use_cache": False}),
        ("Qwen2", {"cache_implementation": "static", "num_beams": 2}),
    ],
)
@pytest.mark.parametrize("padded", [False, True])
def test_generate_gives_each_row_its_own_tokens(zoos, architecture, settings, padded):
    zoo, ids = zoos(architecture), tokens()
    mask = torch.ones_like(ids)
    for row in range(8) if padded else ():
        mask[row, : row % 4] = 0
    ids[mask == 0] = 0
    found = zoo.attached().generate(
        ids, attention_mask=mask, adapter_names=NAMES, **GREEDY, **settings
    )
    copies = settings.get("num_return_sequences", 1)
    for i, name in enumerate(NAMES):
        expected = zoo.alone(name).generate(
            input_ids=ids[i : i + 1], attention_mask=mask[i : i + 1], **GREEDY, **settings
        )
        assert torch.equal(found[i * copies : (i + 1) * copies], expected), name


def test_a_rows_tokens_do_not_depend_on_its_neighbours(zoo):
    model, ids = zoo.attached(), tokens()
    alone = model.generate(ids[:1], adapter_names=["flora3"], **GREEDY)
    for names in (
        ["flora3"] * 8,
        ["flora3", *[None] * 7],
        ["flora3", *["lora4", "flora1"] * 3, None],
    ):
        found = model.generate(ids, adapter_names=names, **GREEDY)
        assert torch.equal(found[:1], alone)


@pytest.mark.parametrize("copies", [1, 2])
def test_sampling_is_that_of_each_rows_own_model(zoo, copies):
    """The same seed draws the same tokens from the models one by one."""
    ids, settings = tokens(), {**GREEDY, "do_sample": True, "top_k": 0}
    torch.manual_seed(3)
    found = zoo.attached().generate(
        ids, adapter_names=NAMES, num_return_sequences=copies, **settings
    )
    torch.manual_seed(3)
    names = [name for name in NAMES for _ in range(copies)]
    drawn = ids.repeat_interleave(copies, dim=0)
    for _ in range(GREEDY["max_new_tokens"]):
        logits = logits_alone(zoo, names, torch.float32, input_ids=drawn)[:, -1]
        logits[:, 2] = -torch.inf  # what min_new_tokens does to the end of text
        drawn = torch.cat([drawn, torch.multinomial(logits.softmax(-1), 1)], dim=1)
    assert torch.equal(found, drawn)


# --- spans


def spans_alone(
    zoo: Zoo, row: Sequence[tuple[str | None, int]], ids: Tensor, dtype: torch.dtype
) -> Tensor:
    """The logits of one row whose spans go through one model each, over a common cache."""
    past, logits = None, []
    for number, (name, count) in enumerate(row):
        chunk, ids = (ids, ids[:0]) if number == len(row) - 1 else (ids[:count], ids[count:])
        if len(chunk):
            output = zoo.alone(name, dtype)(
                input_ids=chunk.unsqueeze(0), past_key_values=past, use_cache=True
            )
            past = output.past_key_values
            logits.append(output.logits[0])
    return torch.cat(logits)


SPANS: list[Any] = [
    [("flora3", 4), ("lora4", 5)],
    "flora1",
    [(None, 2), ("flora1", 3), ("flora3", 1)],
    [("lora4", 1), ("__base__", 0)],
    None,
    [("flora1", 0), ("flora3", 2)],
]


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("architecture", ["Llama", "OPT"])
def test_spans_of_a_row_go_through_their_own_adapters(zoos, architecture, side):
    zoo, ids = zoos(architecture), tokens(len(SPANS), 9)
    mask = torch.ones_like(ids)
    for row in range(len(SPANS)) if side != "none" else ():
        mask[row, slice(row % 3) if side == "left" else slice(9 - row % 3, 9)] = 0
    arguments = {} if side == "none" else {"attention_mask": mask}
    logits = zoo.attached()(ids, adapter_names=SPANS, **arguments).logits
    for i, entry in enumerate(SPANS):
        row = [(entry, 0)] if entry is None or isinstance(entry, str) else entry
        own = mask[i].bool()
        plain, truth = (
            spans_alone(zoo, row, ids[i][own], dtype) for dtype in (torch.float32, torch.float64)
        )
        no_worse_through_layers(logits[i][own], plain, truth, f"row {i}")


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"use_cache": False}])
def test_generate_follows_the_last_span(zoo, settings, padded):
    """The prompt's spans as in forward; what is generated belongs to the last."""
    ids = tokens(len(SPANS), 9)
    mask = torch.ones_like(ids)
    for row in range(len(SPANS)) if padded else ():
        mask[row, : row % 3] = 0
    model = zoo.attached()
    found = model.generate(ids, attention_mask=mask, adapter_names=SPANS, **GREEDY, **settings)
    assert found.shape == (len(SPANS), 15)
    if settings.get("num_beams"):
        alone = [
            model.generate(
                ids[i : i + 1][:, mask[i].bool()],
                adapter_names=[entry],
                **GREEDY,
                **settings,
            )
            for i, entry in enumerate(SPANS)
        ]
        assert all(torch.equal(f[9:], a[0, -6:]) for f, a in zip(found, alone, strict=True))
        return
    for i, entry in enumerate(SPANS):
        row = [(entry, 0)] if entry is None or isinstance(entry, str) else entry
        sequence = ids[i][mask[i].bool()]
        for _ in range(6):
            logits = spans_alone(zoo, row, sequence, torch.float32)[-1]
            logits[2] = -torch.inf
            sequence = torch.cat([sequence, logits.argmax().unsqueeze(0)])
        assert torch.equal(found[i, 9:], sequence[-6:]), f"row {i}"


@pytest.mark.parametrize("masked", [True, False])
def test_spans_go_on_where_the_cache_ends(zoo, masked):
    """One column after the other is the whole."""
    model, ids, mask = zoo.attached(), tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[1, :2] = 0 if masked else 1
    names = [[("flora3", 3), ("lora4", 1)], [("lora4", 2), (None, 1)]]
    positions = (mask.cumsum(1) - 1).clamp(min=0)

    def logits(columns: slice, past: Any) -> Any:
        arguments = {"attention_mask": mask[:, : columns.stop]} if masked else {}
        return model(
            ids[:, columns],
            position_ids=positions[:, columns],
            past_key_values=past,
            adapter_names=names,
            **arguments,
        )

    past, parts = None, []
    for columns in (slice(0, 5), slice(5, 6), slice(6, 9)):
        output = logits(columns, past)
        past = output.past_key_values
        parts.append(output.logits)
    found, expected = torch.cat(parts, dim=1), logits(slice(0, 9), None).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-5, atol=1e-5)


def test_spans_reach_a_head_that_keeps_its_last_columns(zoo):
    model = zoo.fresh()
    generator = torch.Generator().manual_seed(5)
    for name in ("one", "two"):
        factors = random_factors(VOCABULARY, 32, pairs=2, generator=generator)
        flora.attach(
            model, {name: flora.Adapter(kind="X", identity=name, layers={"lm_head": factors})}
        )
    names = [[("one", count), ("two", 0)] for count in range(1, 9)]
    expected = model(tokens(), adapter_names=names).logits[:, -4:]
    found = model(tokens(), adapter_names=names, logits_to_keep=4).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# --- training through the host


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("calls", [[NAMES], [NAMES, NAMES[::-1]], [NAMES, None]])
def test_gradient_checkpointing_changes_no_gradient(zoo, use_reentrant, calls):
    """Also where two forwards of different rows precede one backward."""

    def gradient(model: nn.Module) -> Tensor:
        x = model.get_input_embeddings()(tokens()).detach().requires_grad_()
        loss = sum(
            (model(inputs_embeds=x, adapter_names=names).logits.square().sum() * (i + 1))
            for i, names in enumerate(calls)
        )
        loss.backward()
        return x.grad

    # A reentrant checkpoint runs a layer without gradients first, which rounds otherwise on a CPU.
    expected = gradient(zoo.attached(backend="eager").train())
    model = zoo.attached(backend="eager").train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert model.is_gradient_checkpointing
    for _ in range(2):  # the sum over two calls comes in another order
        torch.testing.assert_close(gradient(model), expected, rtol=1e-5, atol=1e-5)


# --- compilation


def attach_then_compile(zoo: Zoo, backend: Any) -> nn.Module:
    return torch.compile(zoo.attached(), backend=backend, dynamic=False)


def compile_then_attach(zoo: Zoo, backend: Any) -> nn.Module:
    model = zoo.fresh()
    compiled = torch.compile(model, backend=backend, dynamic=False)
    flora.attach(model, zoo.paths)
    return compiled


def compile_the_forward(zoo: Zoo, backend: Any) -> nn.Module:
    model = zoo.fresh()
    model.forward = torch.compile(model.forward, backend=backend, dynamic=False)
    return flora.attach(model, zoo.paths)


@pytest.mark.parametrize("make", [attach_then_compile, compile_then_attach, compile_the_forward])
def test_compiled_code_serves_every_mix(zoo, make):
    """No mix is compiled in, and none is compiled anew."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model, eager = make(zoo, counter), zoo.attached()
    frames = []
    with torch.no_grad():
        for names in [*SHUFFLES, [None] * 8, ["flora1"] * 8, [[("flora3", 4), ("lora4", 5)]] * 8]:
            found = model(tokens(), adapter_names=names).logits
            expected = eager(tokens(), adapter_names=names).logits
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            frames.append(counter.frame_count)
    assert frames[0] > 0
    assert set(frames) == {frames[0]}


def input_gradient(model: nn.Module, zoo: Zoo, names: list[Any]) -> Tensor:
    x = zoo.base.get_input_embeddings()(tokens()).detach().requires_grad_()
    model(inputs_embeds=x, adapter_names=names).logits.square().sum().backward()
    assert x.grad is not None
    return x.grad


def test_compiled_code_has_gradients(zoo):
    """In one graph, forward and backward; a batch without adapters too."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model, eager = attach_then_compile(zoo, counter), zoo.attached()
    for names in (NAMES, NAMES[::-1], [None] * len(NAMES)):
        found, expected = (input_gradient(own, zoo, names) for own in (model, eager))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's
def test_compiled_code_has_gradients_through_checkpoints_and_autocast(zoo):
    for checkpointing in (True, False):
        torch.compiler.reset()
        model, eager = attach_then_compile(zoo, "aot_eager"), zoo.attached()
        if checkpointing:
            model.train().gradient_checkpointing_enable({"use_reentrant": False})
        with torch.autocast("cpu", enabled=not checkpointing):
            found, expected = (input_gradient(own, zoo, NAMES) for own in (model, eager))
        # What is cast is rounded where the compiler casts it.
        within = 1e-4 if checkpointing else 0.05 * float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=0, atol=within)


def test_a_compiled_graph_is_gone_through_once(zoo):
    torch.compiler.reset()
    model = attach_then_compile(zoo, "aot_eager")
    x = zoo.base.get_input_embeddings()(tokens()).detach().requires_grad_()
    loss = model(inputs_embeds=x, adapter_names=NAMES).logits.square().sum()
    loss.backward(retain_graph=True)
    with pytest.raises(FloraError, match="backward runs once"):
        loss.backward()


def test_a_compiled_model_generates(zoo):
    torch.compiler.reset()
    model = compile_the_forward(zoo, "aot_eager")
    settings = {**GREEDY, "cache_implementation": "static", "adapter_names": NAMES}
    assert torch.equal(
        model.generate(tokens(), **settings), zoo.attached().generate(tokens(), **settings)
    )


def test_a_batch_gives_its_pages_back_as_soon_as_it_is_over(zoo):
    model = zoo.attached()
    bank = model._flora_host.source.bank
    gc.disable()  # which would find them late
    try:
        model.generate(tokens(), **GREEDY, adapter_names=NAMES)
        model(tokens(), adapter_names=NAMES)
        lent = [pages for pool in bank._pools.values() for pages in pool._lent]
    finally:
        gc.enable()
    assert lent == []


# --- attach and detach


def state(model: nn.Module) -> dict[str, Any]:
    """Every module's own attributes, by identity."""
    return {
        f"{name}.{key}": id(value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
    }


def test_detach_gives_the_model_back(zoo):
    model = zoo.fresh()
    inner = model.model.layers[0].mlp.up_proj
    inner.forward = lambda x: nn.functional.linear(x, inner.weight)  # an earlier one's doing
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before, expected = state(model), model(tokens()).logits
    flora.attach(model, zoo.paths)
    assert state(model) != before
    assert isinstance(inner, nn.Linear)
    model(tokens(), adapter_names=NAMES)
    model.generate(tokens(), adapter_names=NAMES, **GREEDY)
    assert flora.detach(model) is model
    assert state(model) == before
    assert list(model.state_dict()) == list(tensors)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in tensors.items())
    assert torch.equal(model(tokens()).logits, expected)
    with pytest.raises(UsageError, match="no adapters attached"):
        flora.detach(model)


def test_attaching_again_after_detaching(zoo):
    model = zoo.attached()
    expected = model(tokens(), adapter_names=NAMES).logits
    flora.attach(flora.detach(model), zoo.paths)
    assert torch.equal(model(tokens(), adapter_names=NAMES).logits, expected)


@pytest.fixture
def broken(zoo: Zoo, tmp_path: Path) -> dict[str, Any]:
    params = {"model.layers.0.mlp.up_proj": {"flora_A": torch.full((1, 48), torch.nan)}}
    params["model.layers.0.mlp.up_proj"]["flora_B"] = torch.ones(1, 32)
    write_checkpoint(tmp_path / "nan", Checkpoint(kind="FLORA", config=Config(), params=params))
    good = {"good": zoo.paths["flora1"]}
    return {
        "nan": ({**good, "bad": tmp_path / "nan"}, {}, InvalidAdapterError),
        "unknown folder": ({**good, "bad": tmp_path / "nowhere"}, {}, UsageError),
        "unknown backend": (good, {"backend": "nope"}, BackendError),
        "budget": ({**good, "more": zoo.paths["flora3"]}, {"budget": 10_000}, OutOfBudgetError),
    }


@pytest.mark.parametrize("fault", ["nan", "unknown folder", "unknown backend", "budget"])
def test_an_attach_that_fails_changes_nothing(zoo, broken, fault):
    adapters, settings, error = broken[fault]
    model = zoo.fresh()
    before = state(model)
    with pytest.raises(error) as caught:
        flora.attach(model, adapters, **settings)
    assert isinstance(caught.value, FloraError)
    assert "\n" not in str(caught.value)
    assert state(model) == before


@pytest.mark.parametrize("fault", ["nan", "unknown folder", "unknown backend"])
def test_a_second_attach_that_fails_changes_nothing(zoo, broken, fault):
    adapters, settings, error = broken[fault]
    model = flora.attach(zoo.fresh(), {"old": zoo.paths["lora4"]})
    source = getattr(model, HOST).source
    before = state(model), dict(source.identities), source.bank.residents
    with pytest.raises(error):
        flora.attach(model, {"old": zoo.paths["flora3"], **adapters}, **settings)
    assert (state(model), dict(source.identities), source.bank.residents) == before


def test_a_second_attach_over_the_budget_changes_nothing(zoo):
    fits = flora.attach(zoo.fresh(), {"a": zoo.paths["lora4"]})
    most = getattr(fits, HOST).source.bank.used_bytes + 5_000  # room for flora1, not for flora3
    model = flora.attach(zoo.fresh(), {"a": zoo.paths["lora4"]}, budget=most)
    bank = getattr(model, HOST).source.bank
    before = bank.residents
    with pytest.raises(OutOfBudgetError):
        flora.attach(model, {"b": zoo.paths["flora1"], "c": zoo.paths["flora3"]})
    assert bank.residents == before
    expected = fits(tokens(), adapter_names=["a"] * 8).logits
    assert torch.equal(model(tokens(), adapter_names=["a"] * 8).logits, expected)


def test_a_second_attach_adds_and_renames(zoo):
    model = flora.attach(zoo.fresh(), {"a": zoo.paths["lora4"], "b": zoo.paths["flora1"]})
    flora.attach(model, {"a": zoo.paths["flora3"], "c": zoo.paths["flora1"]})
    names = ["a", "b", "c", None] * 2
    meant = ["flora3", "flora1", "flora1", None] * 2
    expected = zoo.attached()(tokens(), adapter_names=meant).logits
    torch.testing.assert_close(model(tokens(), adapter_names=names).logits, expected)
    # Nothing is called by the first one's content any more, and one content is held once.
    assert len(getattr(model, HOST).source.bank.residents) == 2


@pytest.mark.parametrize("call", ["forward", "generate"])
@pytest.mark.parametrize(
    ("names", "error"),
    [
        (NAMES[:7], ShapeError),
        ([], ShapeError),
        ([*NAMES[:7], "nobody"], UnknownAdapterError),
        ([*NAMES[:7], [("flora1", 2), ("nobody", 1)]], UnknownAdapterError),
        ([*NAMES[:7], []], ShapeError),
        ([*NAMES[:7], [("flora1", -1), ("lora4", 1)]], ShapeError),
        ([*NAMES[:7], [("flora1", 9), ("lora4", 1)]], ShapeError),
    ],
)
def test_names_that_do_not_fit_are_refused_and_leave_no_trace(zoo, call, names, error):
    model = zoo.attached()
    arguments = GREEDY if call == "generate" else {}
    mask = torch.ones(8, 9, dtype=torch.long)
    with pytest.raises(error) as caught:
        getattr(model, call)(tokens(), attention_mask=mask, adapter_names=names, **arguments)
    assert "\n" not in str(caught.value)
    assert torch.equal(model(tokens()).logits, zoo.base(tokens()).logits)


def test_a_submodule_called_alone_is_the_base(zoo):
    model = zoo.attached()
    model(tokens(), adapter_names=NAMES)
    assert torch.equal(model.model(tokens())[0], zoo.base.model(tokens())[0])


def test_a_model_in_training_takes_no_others(zoo):
    class Source:
        def __contains__(self, name: str) -> bool:
            return False

        def factors(self, *_: object) -> None:
            return None

        def lay(self, _: object) -> None:
            return None

        def trained(self, _: str) -> list[Tensor]:
            return []

    model = zoo.fresh()
    host = patch(model, Source())
    with pytest.raises(UsageError, match="in training"):
        flora.attach(model, zoo.paths)
    with pytest.raises(UsageError, match="detach it first"):
        patch(model, Source())
    host.unpatch()
    flora.attach(model, zoo.paths)


def test_a_forward_that_fails_leaves_no_trace(zoo):
    model = zoo.attached()
    for call, settings in ((model, {}), (model.generate, GREEDY)):
        with pytest.raises(IndexError):
            call(torch.full((8, 9), VOCABULARY), adapter_names=NAMES, **settings)
        assert torch.equal(model(tokens()).logits, zoo.base(tokens()).logits)


def test_a_layer_that_cannot_tell_whose_tokens_it_has_says_so(zoo):
    model = zoo.attached()
    layer = model.model.layers[0]
    inner = layer.forward
    layer.forward = lambda x, *args, **kwargs: inner(x[:5], *args, **kwargs)
    with pytest.raises(ShapeError, match=r"model\.layers\.0\.self_attn\.\w+ was given the shape"):
        model(tokens(), adapter_names=NAMES)


def test_arguments_by_position_are_seen(zoo):
    model, ids = zoo.attached(), tokens(2, 6)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    spans = [[("flora3", 2), ("lora4", 0)], "flora1"]
    with torch.no_grad():
        named = model(input_ids=ids, attention_mask=mask, adapter_names=spans).logits
        assert torch.equal(model(ids, mask, adapter_names=spans).logits, named)


def test_a_loss_on_hidden_states_alone_checkpoints_too(zoo):
    model, ids = zoo.attached(), tokens(2, 6)
    grads = []
    for checkpointing in (False, True):
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        output = model(
            inputs_embeds=embedded,
            adapter_names=["flora3", "lora4"],
            output_hidden_states=True,
            use_cache=False,
        )
        output.hidden_states[-1].square().sum().backward()
        grads.append(embedded.grad)
    torch.testing.assert_close(*grads)
