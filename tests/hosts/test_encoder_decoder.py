"""Encoder-decoder models in the transformers host: each row against PEFT's model of its adapter.

Where tokens are compared, the models of the neighbours' adapters have to give others: a row that
answered with the adapter of another would be seen.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

import flora
from flora.base import ModelBase
from flora.errors import ShapeError, UsageError
from tests import zoo
from tests.helpers import assert_no_worse

BART = zoo.TOKENS | {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
    "dropout": 0.0,
}
ARCHITECTURES = ["T5", "BART", "Whisper"]
KINDS = ["lora", "flora1", "ia3", "hira", "dora"]
NAMES = ["lora", "encoder", None, "ia3", "flora1", "dora", "__base__", "hira"]
SHUFFLES = [NAMES, [*["ia3"] * 4, *NAMES[:4]]]


def bart() -> nn.Module:
    """As `zoo.build` makes the others."""
    torch.manual_seed(0)
    model = transformers.BartForConditionalGeneration(transformers.BartConfig(**BART))
    for layer in zoo.linear_layers(model).values():
        nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        nn.init.normal_(layer.bias, std=0.1)
    return model.eval().requires_grad_(False)


class Models:
    """A model, its adapters' folders, and for each adapter PEFT's own model of it."""

    def __init__(self, architecture: str, folder: Path) -> None:
        model = bart() if architecture == "BART" else zoo.build(architecture)
        if architecture == "Whisper":
            for name, value in WHISPER.items():
                setattr(model.generation_config, name, value)
        self.base, self.layers = model, len(ModelBase(model).layers)
        self.paths = {name: folder / name for name in [*KINDS, "encoder"]}
        self.own: dict[str | None, nn.Module] = {None: model, "__base__": model}
        for seed, kind in enumerate(KINDS):
            self.own[kind] = zoo.make_adapter(kind, model, self.paths[kind], seed)
        self.own["encoder"] = zoo.make_adapter(
            "lora",
            model,
            self.paths["encoder"],
            seed=9,
            target_modules=r"(model\.)?encoder\..*\.(q|v|q_proj|v_proj|fc2|wo)",
        )
        self._cast: dict[tuple[str | None, torch.dtype], nn.Module] = {}

    def attached(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        return flora.attach(copy.deepcopy(self.base).to(dtype), self.paths)

    def alone(self, name: str | None, dtype: torch.dtype = torch.float32) -> nn.Module:
        if dtype == torch.float32:
            return self.own[name]
        if (name, dtype) not in self._cast:
            self._cast[name, dtype] = copy.deepcopy(self.own[name]).to(dtype)
        return self._cast[name, dtype]

    def logits(
        self, names: Sequence[str | None], inputs: dict[str, Tensor], dtype: torch.dtype
    ) -> Tensor:
        """Each row's by the model of its own adapter."""
        return torch.cat(
            [
                self.alone(name, dtype)(**cast(row_of(inputs, i), dtype)).logits
                for i, name in enumerate(names)
            ]
        )


def row_of(inputs: dict[str, Any], i: int) -> dict[str, Any]:
    return {k: v[i : i + 1] if isinstance(v, Tensor) else v for k, v in inputs.items()}


def cast(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in inputs.items()
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Models]:
    return cache(lambda architecture: Models(architecture, tmp_path_factory.mktemp(architecture)))


def rows(model: nn.Module, count: int = 8) -> dict[str, Tensor]:
    """A batch whose sounds are as fine as bf16, so that every type hears the same."""
    return {
        k: v.bfloat16().float() if v.is_floating_point() else v
        for k, v in zoo.rows(model, count).items()
    }


# --- forward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_row_has_its_own_adapter_in_both_halves(models, architecture, dtype):
    own = models(architecture)
    model, inputs = own.attached(dtype), rows(own.base)
    for names in SHUFFLES:
        found = model(**cast(inputs, dtype), adapter_names=names).logits
        plain = own.logits(names, inputs, dtype)
        truth = own.logits(names, inputs, torch.float64)
        # An eps for each layer, as each one's rounding goes through those behind it.
        assert_no_worse(found, plain, truth, f"{names}", scale=own.layers * truth)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_base_rows_alone_are_the_base_bit_for_bit(models, architecture):
    own = models(architecture)
    model, inputs = own.attached(), rows(own.base)
    expected = own.base(**inputs).logits
    for names in ([None] * 8, ["__base__", None] * 4):
        assert torch.equal(model(**inputs, adapter_names=names).logits, expected)
    assert torch.equal(model(**inputs).logits, expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_labels_take_the_place_of_the_decoders_tokens(models, architecture):
    own = models(architecture)
    inputs = rows(own.base)
    inputs["labels"] = inputs.pop("decoder_input_ids")
    main, *others = inputs.values()
    found = own.attached()(main, labels=others[-1], adapter_names=NAMES)  # the first by position
    expected = own.logits(NAMES, inputs, torch.float32)
    torch.testing.assert_close(found.logits, expected, rtol=1e-4, atol=1e-4)
    loss = nn.functional.cross_entropy(expected.flatten(0, 1), inputs["labels"].flatten())
    torch.testing.assert_close(found.loss, loss, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_encoder_called_alone_is_the_base_and_its_output_may_be_given(models, architecture):
    own = models(architecture)
    model, inputs = own.attached(), rows(own.base)
    answer = inputs.pop("decoder_input_ids")
    model(**inputs, decoder_input_ids=answer, adapter_names=NAMES)
    (source,) = inputs.values()
    states = model.get_encoder()(source)
    expected = own.base.get_encoder()(source)
    assert torch.equal(states[0], expected[0])
    for given in (states, tuple(states.values())):
        found = model(encoder_outputs=given, decoder_input_ids=answer, adapter_names=NAMES).logits
        alone = [
            own.alone(name)(
                encoder_outputs=(expected[0][i : i + 1],), decoder_input_ids=answer[i : i + 1]
            ).logits
            for i, name in enumerate(NAMES)
        ]
        torch.testing.assert_close(found, torch.cat(alone), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(models, use_reentrant):
    """In the encoder too, and where two forwards of different rows precede one backward."""
    own = models("T5")
    inputs = rows(own.base)
    embedded = own.base.get_input_embeddings()(inputs["input_ids"])
    grads = []
    for checkpointing in (False, True):
        model = own.attached(torch.float64).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        x = embedded.double().requires_grad_()
        loss = torch.zeros((), dtype=torch.float64)
        for times, names in enumerate((NAMES, NAMES[::-1], None)):
            output = model(
                inputs_embeds=x,
                decoder_input_ids=inputs["decoder_input_ids"],
                adapter_names=names,
                use_cache=False,
            )
            loss = loss + (times + 1) * output.logits.square().sum()
        loss.backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


def test_compiled_code_serves_every_mix(models):
    own = models("T5")
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    eager, inputs, frames = own.attached(), rows(own.base), []
    model = torch.compile(own.attached(), backend=counter, dynamic=False)
    with torch.no_grad():
        for names in [*SHUFFLES, NAMES[::-1], [None] * 8]:
            found = model(**inputs, adapter_names=names).logits
            expected = eager(**inputs, adapter_names=names).logits
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            frames.append(counter.frame_count)
    assert frames[0] > 0
    assert set(frames) == {frames[0]}


# --- generate

GREEDY = {
    "max_new_tokens": 8,
    "min_new_tokens": 8,
    "do_sample": False,
    "no_repeat_ngram_size": 1,  # the next best tokens have to be the right ones too
}
ONE_SEGMENT = {"language": "en", "suppress_tokens": list(range(70, zoo.VOCABULARY))}
"""Whisper without times, which would begin another segment."""


def generate_alone(
    own: Models, names: Sequence[str | None], inputs: dict[str, Any], **settings: Any
) -> list[Tensor]:
    return [
        own.alone(name).generate(**row_of(inputs, i), **settings) for i, name in enumerate(names)
    ]


def texts(sequences: Tensor) -> list[list[int]]:
    """The rows' tokens without padding."""
    return [[token for token in row.tolist() if token != 0] for row in sequences]


def neighbours(names: Sequence[str | None]) -> list[str | None]:
    return [*names[1:], *names[:1]]


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("T5", {}),
        ("BART", {}),
        ("Whisper", {}),
        ("T5", {"num_beams": 3}),
        ("Whisper", {"num_beams": 3}),
        ("BART", {"num_beams": 3, "num_return_sequences": 2}),
        ("T5", {"cache_implementation": "static"}),
        ("BART", {"cache_implementation": "static", "num_beams": 2}),
        ("Whisper", {"cache_implementation": "static"}),
    ],
)
def test_generate_gives_each_row_its_own_tokens(models, architecture, settings):
    own = models(architecture)
    inputs, copies = rows(own.base), settings.get("num_return_sequences", 1)
    del inputs["decoder_input_ids"]
    settings = {**GREEDY, **settings}
    if architecture == "Whisper":
        settings |= ONE_SEGMENT
    found = own.attached().generate(**inputs, adapter_names=NAMES, **settings).split(copies)
    expected = generate_alone(own, NAMES, inputs, **settings)
    others = generate_alone(own, neighbours(NAMES), inputs, **settings)
    for name, row, alone, other in zip(NAMES, found, expected, others, strict=True):
        assert texts(row) == texts(alone), name
        assert texts(alone) != texts(other), name


@pytest.mark.parametrize("architecture", ["T5", "Whisper"])
def test_generate_goes_on_from_an_encoders_output(models, architecture):
    own = models(architecture)
    inputs = rows(own.base)
    states = own.base.get_encoder()(next(iter(inputs.values())))
    settings = dict(GREEDY)
    if architecture == "Whisper":
        settings |= ONE_SEGMENT
    found = own.attached().generate(
        encoder_outputs=copy.copy(states), adapter_names=NAMES, num_beams=2, **settings
    )
    for i, name in enumerate(NAMES):
        state = type(states)(last_hidden_state=states[0][i : i + 1])
        alone = own.alone(name).generate(encoder_outputs=state, num_beams=2, **settings)
        assert texts(found[i : i + 1]) == texts(alone), name


def test_generate_takes_its_inputs_by_each_of_their_names(models):
    own = models("T5")
    model, ids = own.attached(), rows(own.base)["input_ids"]
    expected = model.generate(input_ids=ids, adapter_names=NAMES, **GREEDY)
    embedded = model.get_input_embeddings()(ids)
    for given in ({"inputs": ids}, {"inputs_embeds": embedded}):
        assert torch.equal(model.generate(**given, adapter_names=NAMES, **GREEDY), expected)
    assert torch.equal(model.generate(ids, adapter_names=NAMES, **GREEDY), expected)


def test_sampling_is_that_of_each_rows_own_model(models):
    """The same seed draws the same tokens from the models one by one."""
    own = models("T5")
    ids = rows(own.base)["input_ids"]
    torch.manual_seed(3)
    found = own.attached().generate(
        ids,
        adapter_names=NAMES,
        num_return_sequences=2,
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=True,
        top_k=0,
    )
    torch.manual_seed(3)
    names = [name for name in NAMES for _ in range(2)]
    drawn = torch.zeros(16, 1, dtype=torch.long)
    for _ in range(6):
        inputs = {"input_ids": ids.repeat_interleave(2, dim=0), "decoder_input_ids": drawn}
        logits = own.logits(names, inputs, torch.float32)[:, -1]
        logits[:, 2] = -torch.inf  # what min_new_tokens does to the end of text
        drawn = torch.cat([drawn, torch.multinomial(logits.softmax(-1), 1)], dim=1)
    assert torch.equal(found, drawn)


@pytest.mark.parametrize("architecture", ["T5", "Whisper"])
@pytest.mark.parametrize("call", ["forward", "generate"])
def test_spans_and_rows_that_do_not_fit_are_one_line_and_leave_no_trace(models, architecture, call):
    own = models(architecture)
    model, inputs = own.attached(), rows(own.base)
    expected, before = model(**inputs).logits, state(model)
    if call == "generate":
        del inputs["decoder_input_ids"]
    for names in ([*NAMES[:7], [("lora", 2), ("ia3", 1)]], NAMES[:7], [*NAMES, None]):
        with pytest.raises(ShapeError) as caught:
            getattr(model, call)(**inputs, adapter_names=names)
        assert "\n" not in str(caught.value)
    assert state(model) == before
    assert torch.equal(model(**rows(own.base)).logits, expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_fails_in_generate_leaves_no_trace(models, architecture):
    def fail(*_: object) -> Tensor:
        raise IndexError

    own = models(architecture)
    model, inputs = own.attached(), rows(own.base)
    before = state(model)
    ids = inputs.pop("decoder_input_ids")
    with pytest.raises(IndexError):
        model.generate(**inputs, adapter_names=NAMES, logits_processor=[fail], **GREEDY)
    assert state(model) == before
    assert torch.equal(
        model(**inputs, decoder_input_ids=ids).logits, own.base(**rows(own.base)).logits
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_detach_gives_the_model_back(models, architecture):
    own = models(architecture)
    model, inputs = copy.deepcopy(own.base), rows(own.base)
    before = state(model)
    flora.attach(model, own.paths)
    model(**inputs, adapter_names=NAMES)
    del inputs["decoder_input_ids"]
    model.generate(**inputs, adapter_names=NAMES, **GREEDY)
    flora.detach(model)
    assert state(model) == before
    assert torch.equal(model(**rows(model)).logits, own.base(**rows(model)).logits)


def state(model: nn.Module) -> dict[str, Any]:
    """Every module's own attributes, by identity."""
    return {
        f"{name}.{key}": id(value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
    }


def test_a_model_that_leaves_generate_to_another_says_so(models):
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.generate = inner, inner.generate

        def forward(self, **inputs: Tensor) -> Any:
            return self.inner(**inputs)

    own = models("T5")
    wrapper = flora.attach(Wrapper(copy.deepcopy(own.base)), {})
    with pytest.raises(UsageError, match="Wrapper leaves `generate` to a model in it"):
        wrapper.generate(input_ids=rows(own.base)["input_ids"], adapter_names=[None] * 8)


# --- Whisper

LANGUAGES = list(TO_LANGUAGE_CODE.values())[:60]
WHISPER = {
    "is_multilingual": True,
    "lang_to_id": {f"<|{code}|>": 4 + i for i, code in enumerate(LANGUAGES)},
    "task_to_id": {"transcribe": 65, "translate": 66},
    "prev_sot_token_id": 67,
    "no_timestamps_token_id": 69,  # no speech is the one before, the times are those behind
    "max_initial_timestamp_index": 10,
}
FRAMES = 48
"""A segment's; Whisper cuts longer sounds into segments."""
FRAMES_OF = [2 * FRAMES, 3 * FRAMES, FRAMES + 5, 2 * FRAMES - 7, 60, 2 * FRAMES]
LONG = {"max_new_tokens": 6, "do_sample": False, "return_timestamps": True}


SPEAKERS = ["lora", "encoder", None, "ia3", "flora1", "dora"]


def sounds() -> dict[str, Tensor]:
    """Sounds of unequal length."""
    generator = torch.Generator().manual_seed(4)
    features = torch.randn(len(FRAMES_OF), 8, max(FRAMES_OF), generator=generator)
    mask = torch.arange(max(FRAMES_OF)) < torch.tensor(FRAMES_OF).unsqueeze(1)
    return {"input_features": features * mask.unsqueeze(1), "attention_mask": mask.long()}


def texts_alone(
    own: Models, names: Sequence[str | None], inputs: dict[str, Tensor], **settings: Any
) -> list[list[int]]:
    """Each sound alone, cut to its length, by the model of its own adapter."""
    found = []
    for i, name in enumerate(names):
        frames = int(inputs["attention_mask"][i].sum())
        features = inputs["input_features"][i : i + 1, :, :frames]
        found += texts(own.alone(name).generate(input_features=features, **settings))
    return found


@contextmanager
def encoded(model: nn.Module) -> Iterator[list[int]]:
    """How many rows each call of the encoder has."""
    counts: list[int] = []
    hook = model.get_encoder().register_forward_hook(
        lambda _, __, output: counts.append(len(output[0]))
    )
    yield counts
    hook.remove()


def test_each_row_has_its_own_language(models):
    own = models("Whisper")
    model, inputs = own.attached(), rows(own.base)
    del inputs["decoder_input_ids"]
    found: list[Tensor] = []
    detect = model.detect_language

    def listen(**arguments: Any) -> Tensor:
        found.append(detect(**arguments))
        return found[-1]

    model.detect_language = listen
    model.generate(**inputs, adapter_names=NAMES, num_beams=2, max_new_tokens=1)

    def alone(names: Sequence[str | None]) -> list[int]:
        return [
            own.alone(name).detect_language(**row_of(inputs, i)).item()
            for i, name in enumerate(names)
        ]

    assert found[0].tolist() == alone(NAMES)
    assert sum(a != b for a, b in zip(alone(NAMES), alone(neighbours(NAMES)), strict=True)) > 4


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_beams": 2},
        {"num_return_sequences": 2, "num_beams": 2},
        {"cache_implementation": "static"},
        {"condition_on_prev_tokens": True},
    ],
)
def test_rows_of_long_sounds_keep_their_adapters_when_others_end(models, settings):
    own, inputs = models("Whisper"), sounds()
    model, copies = own.attached(), settings.get("num_return_sequences", 1)
    settings = {**LONG, **settings}
    with encoded(model) as counts:
        found = texts(model.generate(**inputs, adapter_names=SPEAKERS, **settings))
    least = 6 if settings.get("cache_implementation") == "static" else copies
    assert least <= min(counts) <= max(least, 3 * copies)
    expected = texts_alone(own, SPEAKERS, inputs, **settings)
    others = texts_alone(own, neighbours(SPEAKERS), inputs, **settings)
    assert found == expected
    assert all(a != b for a, b in zip(expected[::copies], others[::copies], strict=True))


def between(values: list[float]) -> float:
    """A threshold that half of them are under."""
    low, high = sorted(values)[len(values) // 2 - 1 : len(values) // 2 + 1]
    return (low + high) / 2


WARM = (0.0, 1e-6, 1e-5)
"""Temperatures at which the likeliest token is drawn, so that the tokens can be compared."""


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": WARM},
        {"temperature": WARM, "num_beams": 2},
        {"temperature": WARM, "num_beams": 2, "no_speech_threshold": 1.1},
        {"temperature": WARM, "cache_implementation": "static"},
        {"temperature": WARM[1:], "do_sample": True, "num_return_sequences": 2},
    ],
)
def test_rows_that_fall_back_keep_their_adapters(models, settings):
    """Half of the rows of the first segment are run again, the others are not."""
    own, inputs = models("Whisper"), sounds()
    if "num_beams" in settings:
        # One row's fall ends the search with beams, in all segments behind and for all rows.
        inputs = {name: value[..., :FRAMES] for name, value in inputs.items()}
    model, copies = own.attached(), settings.get("num_return_sequences", 1)
    settings = {**LONG, "logprob_threshold": -torch.inf, **settings}
    scores: list[float] = []
    average = model._retrieve_avg_logprobs

    def listen(*arguments: Any) -> float:
        scores.append(float(average(*arguments)))
        return scores[-1]

    model._retrieve_avg_logprobs = listen
    model.generate(**inputs, adapter_names=SPEAKERS, **settings)
    settings["logprob_threshold"] = between(scores[: 6 * copies : copies])
    found = texts(model.generate(**inputs, adapter_names=SPEAKERS, **settings))
    expected = texts_alone(own, SPEAKERS, inputs, **settings)
    others = texts_alone(own, neighbours(SPEAKERS), inputs, **settings)
    assert found == expected
    assert all(a != b for a, b in zip(expected[::copies], others[::copies], strict=True))


@pytest.mark.parametrize("beams", [1, 2])
def test_rows_without_speech_are_found_by_their_own_adapters(models, beams):
    """Whisper asks for it in a forward of its own, of rows that are not repeated for beams."""
    own, inputs = models("Whisper"), sounds()
    start = torch.tensor([[own.base.config.decoder_start_token_id]])
    silences = [
        own.alone(name)(input_features=features[None, :, :FRAMES], decoder_input_ids=start)
        .logits.softmax(-1)[0, 0, WHISPER["no_timestamps_token_id"] - 1]
        .item()
        for name, features in zip(SPEAKERS, inputs["input_features"], strict=True)
    ]
    settings = {**LONG, "temperature": 0.0, "num_beams": beams}
    settings |= {"logprob_threshold": 0.0, "no_speech_threshold": between(silences)}
    found = texts(own.attached().generate(**inputs, adapter_names=SPEAKERS, **settings))
    assert found == texts_alone(own, SPEAKERS, inputs, **settings)
    assert [] in found
    assert found != texts_alone(own, neighbours(SPEAKERS), inputs, **settings)
    assert any(found)


def test_rows_that_whisper_counts_otherwise_are_one_line(models):
    model, inputs = models("Whisper").attached(), sounds()
    before = state(model)
    expand = model._expand_variables_for_generation

    def one_more(**arguments: Any) -> Any:
        found = list(expand(**arguments))
        for which in (3, 4):  # where each row is, and its end
            found[which] = torch.cat([found[which], found[which][:1]])
        return tuple(found)

    model._expand_variables_for_generation = one_more
    with pytest.raises(ShapeError, match="6 entries, Whisper 7 rows"):
        model.generate(**inputs, adapter_names=SPEAKERS, **LONG)
    del model._expand_variables_for_generation
    assert state(model) == before
