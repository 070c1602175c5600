"""An adapter's folder: what is written is read, and all that is wrong is said in one line."""

import json
import os
import pickle
import re
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn

import flora
from flora.adapters import checkpoint as module
from flora.adapters.checkpoint import (
    CONFIG_FILE,
    PREFIX,
    TENSORS_FILE,
    Checkpoint,
    Limits,
    find_adapters,
    read_checkpoint,
    write_checkpoint,
)
from flora.adapters.kinds import KINDS, get_kind
from flora.base import ModelBase
from flora.errors import FloraError, InvalidAdapterError, UnknownAdapterError, UsageError
from tests import zoo


class Toy(nn.Module):
    """A model of three linear layers."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.ModuleDict({"up": nn.Linear(4, 6), "down": nn.Linear(6, 4)})
        self.layers = nn.ModuleList([layer])
        self.head = nn.Linear(4, 9)

    def get_output_embeddings(self) -> nn.Module:
        return self.head


BASE = ModelBase(Toy())


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{kind: (kind, {}) for kind in KINDS},
    "LORA, dora": ("LORA", {"use_dora": True, "bias": "lora_only"}),
    "LORA, all biases": ("LORA", {"lora_bias": True, "bias": "all"}),
    "IA3, inputs": ("IA3", {"feedforward_modules": ["down"]}),
    "ADALORA, pruned": (
        "ADALORA",
        {"bias": "lora_only", "rank_pattern": {"layers.0.up.lora_E": [True, False]}},
    ),
    "VERA, drawn": ("VERA", {"save_projection": False}),
    "VERA, biases": ("VERA", {"bias": "vera_only"}),
}


def made(kind: str, **config: Any) -> Checkpoint:
    """An adapter of the base, away from its start."""
    module = get_kind(kind)
    field = module.Config.rank_field
    rank = {} if field is None else {field: 2}
    typed = module.Config(**{**rank, "target_modules": ["up", "down"], **config})
    generator = torch.Generator().manual_seed(0)

    def moved(tensor: Tensor) -> Tensor:
        return tensor + torch.randn(tensor.shape, generator=generator)

    biases = {"bias": "none", "lora_bias": False}
    plain = typed.model_copy(update={n: v for n, v in biases.items() if hasattr(typed, n)})
    params = {}
    for name in ("layers.0.up", "layers.0.down"):
        sizes = dict(zip(("out", "in"), BASE.shapes[name], strict=True))
        start = module.init(plain, name, BASE, generator)
        for tensor, dims in {**module.shapes(typed, name), **typed.extras()}.items():
            shape = [sizes.get(dim, dim) for dim in dims]
            if tensor != "bias" and tensor not in typed.optional:
                found = start.get(tensor)
                if found is None or list(found.shape) != shape:
                    start[tensor] = torch.zeros(shape)
        params[name] = {n: moved(t) for n, t in start.items()}
    if "bias" in typed.extras():
        params["head"] = {"bias": moved(torch.zeros(9))}
    derived = typed.derived(6, 6)
    shared = {name: derived[name] for name in typed.shared()}
    return Checkpoint(kind=kind, config=typed, params=params, shared=shared, base_model="org/base")


def tensors_of(found: Checkpoint) -> dict[str, Tensor]:
    return found.tensors()


class Folder:
    """A good adapter's folder, to be broken."""

    def __init__(self, path: Path, kind: str = "FLORA", **config: Any) -> None:
        self.path = path
        write_checkpoint(path, made(kind, **config))
        self.config = json.loads((path / CONFIG_FILE).read_text())
        self.tensors = tensors_of(made(kind, **config))

    def write(self) -> None:
        (self.path / CONFIG_FILE).write_text(json.dumps(self.config))
        save_file(self.tensors, self.path / TENSORS_FILE)

    def faults(self, base: Any = BASE, **limits: int) -> str:
        with pytest.raises(InvalidAdapterError) as caught:
            read_checkpoint(self.path, base, Limits(**limits))
        text = str(caught.value)
        assert "\n" not in text
        prefix = f"adapter {str(self.path)!r}: "
        assert text.startswith(prefix)
        return text.removeprefix(prefix)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "adapter")


UP_A, UP_B = f"{PREFIX}layers.0.up.flora_A", f"{PREFIX}layers.0.up.flora_B"


# --- what holds


@pytest.mark.parametrize("base", [BASE, None])
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_written_is_read(variant, base, tmp_path):
    kind, config = VARIANTS[variant]
    written = made(kind, **config)
    write_checkpoint(tmp_path / "deep" / "adapter", written)
    found = read_checkpoint(tmp_path / "deep" / "adapter", base)
    assert found.kind == kind
    assert found.config == written.config
    assert found.base_model == "org/base"
    assert found.identity == written.identity
    expected = tensors_of(written)
    assert tensors_of(found).keys() == expected.keys()
    assert all(torch.equal(t, expected[n]) for n, t in tensors_of(found).items())
    assert found.adapter(BASE).identity == written.identity


def test_the_layout_is_pefts(tmp_path):
    folder = Folder(tmp_path / "adapter")
    assert sorted(os.listdir(folder.path)) == [CONFIG_FILE, TENSORS_FILE]
    assert folder.config["peft_type"] == "FLORA"
    assert {n: tuple(t.shape) for n, t in folder.tensors.items()} == {
        "base_model.model.layers.0.up.flora_A": (2, 6),
        "base_model.model.layers.0.up.flora_B": (2, 4),
        "base_model.model.layers.0.down.flora_A": (2, 4),
        "base_model.model.layers.0.down.flora_B": (2, 6),
    }
    f = read_checkpoint(folder.path).adapter(BASE).layers["layers.0.up"]
    weight = torch.randn(6, 4)
    a, b = folder.tensors[UP_A], folder.tensors[UP_B]
    torch.testing.assert_close(f.merge(weight), weight * (a.T @ b) / 2)


@pytest.mark.parametrize("base", [BASE, None])
def test_three_keys_are_enough(folder, base):
    folder.config = {"peft_type": "FLORA", "r": 2, "target_modules": ["up", "down"]}
    folder.write()
    assert read_checkpoint(folder.path, base).config.r == 2


@pytest.mark.parametrize(
    "extra",
    [
        {"peft_type": "flora"},
        {"target_modules": "all-linear"},
        {"target_modules": "ALL-LINEAR"},
        {"target_modules": r".*\.(up|down)"},
        {"target_modules": None},
        {"target_modules": ["up", "down", "head"], "exclude_modules": ["head"]},
        {"some_new_key": None},
        {"some_new_key": False, "another": [], "third": {}},
        {"task_type": "CAUSAL_LM", "peft_version": "9.9", "auto_mapping": {"a": 1}},
        {"init_weights": False},
    ],
)
def test_what_passes(folder, extra):
    folder.config |= extra
    folder.write()
    assert read_checkpoint(folder.path, BASE).identity == made("FLORA").identity


@pytest.mark.parametrize("dtype", module.FLOATS)
def test_every_float_type_is_read_and_filled_in_fp32_at_least(folder, dtype):
    folder.tensors = {n: t.to(dtype) for n, t in folder.tensors.items()}
    folder.write()
    factors = read_checkpoint(folder.path, BASE).adapter(BASE).layers["layers.0.up"]
    assert factors.hadamard_in.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(factors.hadamard_in, folder.tensors[UP_B].to(factors.hadamard_in.dtype))


# --- what does not


def no_file(name: str) -> Callable[[Folder], None]:
    return lambda f: (f.path / name).unlink()


def text(content: str | bytes) -> Callable[[Folder], None]:
    raw = content.encode() if isinstance(content, str) else content
    return lambda f: (f.path / CONFIG_FILE).write_bytes(raw)


def config(**change: Any) -> Callable[[Folder], None]:
    def apply(f: Folder) -> None:
        f.config |= change
        f.write()

    return apply


def tensors(**change: Callable[[Tensor], Tensor] | Tensor | None) -> Callable[[Folder], None]:
    """Names relative to the up layer; None takes the tensor away."""

    def apply(f: Folder) -> None:
        for name, value in change.items():
            key = f"{PREFIX}layers.0.up.{name}"
            found = value(f.tensors[key]) if callable(value) else value
            if found is None:
                del f.tensors[key]
            else:
                f.tensors[key] = found.contiguous()
        f.write()

    return apply


def with_nan(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor[1, 2] = torch.nan
    return tensor


def all_tensors(change: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]) -> Callable[..., None]:
    def apply(f: Folder) -> None:
        f.tensors = change(f.tensors)
        f.write()

    return apply


def raw_tensors(change: Callable[[bytes], bytes]) -> Callable[[Folder], None]:
    def apply(f: Folder) -> None:
        path = f.path / TENSORS_FILE
        path.write_bytes(change(path.read_bytes()))

    return apply


FAULTS: dict[str, tuple[Callable[[Folder], None], list[str]]] = {
    "no config": (no_file(CONFIG_FILE), [f"{CONFIG_FILE} is missing"]),
    "no tensors": (no_file(TENSORS_FILE), [f"{TENSORS_FILE} is missing"]),
    "broken JSON": (text('{"r": 2'), [CONFIG_FILE, "not JSON"]),
    "not text": (text(b"\xff\xfe\x00\x80"), [CONFIG_FILE, "not JSON"]),
    "deep nesting": (text("[" * 100_000), [CONFIG_FILE, "not JSON"]),
    "a number of many digits": (text('{"r": ' + "1" * 9999 + "}"), [CONFIG_FILE, "not JSON"]),
    "huge config": (text(b" " * 5 * 2**20), [CONFIG_FILE, "larger than"]),
    "a list": (text("[]"), [CONFIG_FILE, "not a JSON object"]),
    "no kind": (text("{}"), ["peft_type None", "FLORA, LORA"]),
    "unknown kind": (config(peft_type="X\nY"), [r"peft_type 'X\nY'", "FLORA, LORA"]),
    "kind of a wrong type": (config(peft_type=["FLORA"]), ["peft_type ['FLORA']"]),
    "unknown key": (config(use_magic=True), ["use_magic"]),
    "modules_to_save": (config(modules_to_save=["head"]), ["modules_to_save"]),
    "a key of two lines": (config(**{"x\ny": 1}), ["'x\\ny' = 1 is not supported"]),
    "r = 0": (config(r=0), ["r = 0"]),
    "r < 0": (config(r=-1), ["r = -1"]),
    "r of a wrong type": (config(r="2"), ["r = '2'"]),
    "r = 2.0": (config(r=2.0), ["r = 2.0"]),
    "r = true": (config(r=True), ["r = True"]),
    "huge r": (
        config(r=10**9),
        ["layers.0.up.flora_A: found shape [2, 6], expected [1000000000, 6]"],
    ),
    "a regex that is none": (config(target_modules="*up("), ["target_modules"]),
    "a rank_pattern that is none": (config(rank_pattern={"*up(": 2}), ["rank_pattern"]),
    "targets of a wrong type": (config(target_modules=3), ["target_modules"]),
    "two wrong keys": (
        config(r=0, rank_pattern={"up": -1}, magic=1),
        ["r = 0", "rank_pattern.up = -1", "magic"],
    ),
    "no such target": (config(target_modules=["nope"]), ["target_modules mean no linear layer"]),
    "target without tensors": (
        config(target_modules=["up", "down", "head"]),
        ["head.flora_A is missing", "head.flora_B is missing"],
    ),
    "layer not in the base": (
        all_tensors(lambda t: {n.replace("0.up", "7.up"): v for n, v in t.items()}),
        ["layers.7.up: the base model has no such", "layers.0.up.flora_A is missing"],
    ),
    "NaN": (tensors(flora_A=with_nan), ["layers.0.up.flora_A holds NaN or Inf"]),
    "Inf": (tensors(flora_B=lambda t: t / 0), ["layers.0.up.flora_B holds NaN or Inf"]),
    "wrong shape": (
        tensors(flora_A=torch.ones(2, 5)),
        ["layers.0.up.flora_A: found shape [2, 5], expected [2, 6]"],
    ),
    "wrong rank": (
        tensors(flora_B=torch.ones(3, 4)),
        ["layers.0.up.flora_B: found shape [3, 4], expected [2, 4]"],
    ),
    "transposed": (
        tensors(flora_A=lambda t: t.T, flora_B=lambda t: t.T),
        ["found shape [6, 2], expected [2, 6]", "found shape [4, 2], expected [2, 4]"],
    ),
    "a vector": (tensors(flora_A=torch.ones(6)), ["found shape [6], expected [2, 6]"]),
    "empty": (tensors(flora_A=torch.ones(0, 6)), ["found shape [0, 6], expected [2, 6]"]),
    "integers": (
        tensors(flora_A=torch.ones(2, 6, dtype=torch.int32)),
        ["flora_A: found torch.int32"],
    ),
    "complex": (tensors(flora_A=torch.ones(2, 6) * 1j), ["flora_A"]),
    "missing tensor": (tensors(flora_A=None), ["layers.0.up.flora_A is missing"]),
    "extra tensor": (
        tensors(flora_C=torch.ones(2)),
        [f"{PREFIX}layers.0.up.flora_C", "not a tensor of FLORA"],
    ),
    "another kind's tensors": (
        tensors(**{"lora_A.weight": torch.ones(2, 4)}),
        ["up.lora_A.weight", "not a tensor of FLORA"],
    ),
    "a name of two lines": (tensors(**{"x\ny": torch.ones(2)}), ["not a tensor of FLORA"]),
    "a module of two lines": (
        all_tensors(lambda t: {n.replace("0.up", "0\n.up"): v for n, v in t.items()}),
        [r"layers.0\n.up.flora_A", "not a tensor of FLORA"],
    ),
    "no prefix": (
        all_tensors(lambda t: {n.removeprefix(PREFIX): v for n, v in t.items()}),
        ["layers.0.up.flora_A", "not a tensor of FLORA"],
    ),
    "no tensor": (all_tensors(lambda _: {}), ["layers.0.up.flora_A is missing"]),
    "truncated": (raw_tensors(lambda b: b[:-1]), [TENSORS_FILE, "not a safetensors file"]),
    "empty file": (raw_tensors(lambda _: b""), [TENSORS_FILE, "not a safetensors file"]),
    "header of absurd length": (
        raw_tensors(lambda b: struct.pack("<Q", 2**63) + b[8:]),
        [TENSORS_FILE, "not a safetensors file"],
    ),
    "two faults in two tensors": (
        tensors(flora_A=with_nan, flora_B=None, flora_C=torch.ones(1)),
        ["flora_A holds NaN", "flora_B is missing", "flora_C"],
    ),
    "config and tensors": (
        lambda f: (tensors(flora_A=with_nan)(f), config(r=0)(f), (f.path / TENSORS_FILE).unlink()),
        ["r = 0", f"{TENSORS_FILE} is missing"],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_said(folder, fault):
    spoil, expected = FAULTS[fault]
    spoil(folder)
    found = folder.faults()
    missing = [part for part in expected if part not in found]
    assert not missing, found


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (tensors(flora_B=torch.ones(3, 4)), "found shape [3, 4], expected [2, 4]"),
        (config(r=3), "found shape [2, 4], expected [3, 4]"),
        (tensors(flora_A=lambda t: t.T), "found shape [6, 2], expected [2, 2]"),
        (tensors(flora_A=None), "layers.0.up.flora_A is missing"),
        (tensors(flora_A=with_nan), "holds NaN"),
    ],
)
def test_without_a_base_sizes_are_checked_against_each_other(folder, spoil, expected):
    spoil(folder)
    assert expected in folder.faults(base=None)


@pytest.mark.parametrize(
    "change",
    [
        {"lora_alpha": float("nan")},
        {"lora_alpha": float("inf")},
        {"lora_alpha": 10**400},
        {"alpha_pattern": {"up": float("nan")}},
        {"bias": "some"},
        {"use_dora": True, "lora_bias": True},
        {"use_qalora": True},
        {"init_lora_weights": "pissa"},
        {"layer_replication": [[0, 1]]},
        {"trainable_token_indices": [1]},
        {"lora_alpha": "16"},
    ],
    ids=str,
)
def test_a_lora_config_that_cannot_be_meant(tmp_path, change):
    folder = Folder(tmp_path / "adapter", "LORA")
    folder.config |= change
    folder.write()
    assert next(iter(change)) in folder.faults()


def test_limits(folder):
    assert "rank over the limit of 1" in folder.faults(rank=1)
    assert read_checkpoint(folder.path, BASE, Limits(rank=2))
    size = (folder.path / TENSORS_FILE).stat().st_size
    assert f"{TENSORS_FILE} is larger than {size - 1} bytes" in folder.faults(file_bytes=size - 1)
    assert read_checkpoint(folder.path, BASE, Limits(file_bytes=size))


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", TENSORS_FILE])
def test_a_pickle_is_never_opened(folder, tmp_path, name):
    bomb = pickle.dumps(Bomb(tmp_path / "exploded"))
    (folder.path / TENSORS_FILE).unlink()
    (folder.path / name).write_bytes(bomb)
    found = folder.faults()
    assert name in found
    assert ("is a pickle" in found) == (name != TENSORS_FILE)
    assert not (tmp_path / "exploded").exists()
    pickle.loads(bomb).close()
    assert (tmp_path / "exploded").exists()


def test_no_folder_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="no adapter folder"):
        read_checkpoint(tmp_path / "nowhere")


# --- any bytes


def damage(draw: st.DrawFn, content: bytes) -> bytes:
    spoiled = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        spoiled[draw(st.integers(0, len(spoiled) - 1))] = draw(st.integers(0, 255))
    return bytes(spoiled[: draw(st.integers(0, len(spoiled)))] if draw(st.booleans()) else spoiled)


def outcome(path: Path, base: Any) -> Checkpoint | str:
    """What was read and filled, or the one line of its refusal."""
    try:
        found = read_checkpoint(path, base)
        found.adapter(BASE)
        return found
    except InvalidAdapterError as error:
        refusal = str(error)
    assert "\n" not in refusal
    return refusal


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pristine")
    return {
        variant: Folder(root / str(number), kind, **config).path
        for number, (variant, (kind, config)) in enumerate(VARIANTS.items())
    }


@given(data=st.data())
@settings(max_examples=300)
def test_damaged_bytes_are_refused_or_hold(pristine, data):
    source = pristine[data.draw(st.sampled_from(sorted(VARIANTS)))]
    target = source.parent / "damaged"
    shutil.copytree(source, target, dirs_exist_ok=True)
    name = data.draw(st.sampled_from([CONFIG_FILE, TENSORS_FILE]))
    (target / name).write_bytes(damage(data.draw, (source / name).read_bytes()))
    found = outcome(target, data.draw(st.sampled_from([BASE, None])))
    if isinstance(found, Checkpoint):
        assert all(t.isfinite().all() for t in tensors_of(found).values())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


@given(data=st.data())
@settings(max_examples=200)
def test_any_config_is_refused_or_holds(pristine, data):
    variant = data.draw(st.sampled_from(sorted(VARIANTS)))
    target = pristine[variant].parent / "configured"
    shutil.copytree(pristine[variant], target, dirs_exist_ok=True)
    keys = sorted(get_kind(VARIANTS[variant][0]).Config.model_fields)
    change = data.draw(
        st.dictionaries(st.sampled_from(keys) | st.text(max_size=5), JSON, max_size=3)
    )
    raw = json.loads((target / CONFIG_FILE).read_text()) | change
    (target / CONFIG_FILE).write_text(json.dumps(raw))
    outcome(target, data.draw(st.sampled_from([BASE, None])))


# --- several faults at once


Damage = Callable[[dict[str, Tensor], str], str]
"""Spoils the tensor of a key among all of a folder; a pattern of what has to be said of it."""


def renamed(tensors: dict[str, Tensor], key: str) -> str:
    tensors[f"{key}_"] = tensors.pop(key)
    return re.escape(f"{f'{key}_'!r}: not a tensor of ")


def moved_away(tensors: dict[str, Tensor], key: str) -> str:
    layer, _, rest = key.removeprefix(PREFIX).partition(".0.")
    tensors[f"{PREFIX}{layer}.7.{rest}"] = tensors.pop(key)
    return rf"{layer}\.7\.(up|down): the base model has no such linear layer"


def transposed(tensors: dict[str, Tensor], key: str) -> str:
    tensors[key] = tensors[key].T.contiguous()
    return said_of(key, f": found shape {list(tensors[key].shape)}, expected ")


def not_finite(tensors: dict[str, Tensor], key: str) -> str:
    tensors[key] = tensors[key].clone()
    tensors[key].view(-1)[-1] = torch.nan
    return said_of(key, " holds NaN or Inf")


def of_integers(tensors: dict[str, Tensor], key: str) -> str:
    tensors[key] = tensors[key].to(torch.int32)
    return said_of(key, ": found torch.int32, expected a float type")


def dropped(tensors: dict[str, Tensor], key: str) -> str:
    del tensors[key]
    return said_of(key, " is missing")


def said_of(key: str, fault: str) -> str:
    return rf"(?:^|; ){re.escape(key.removeprefix(PREFIX) + fault)}"


ANY: list[Damage] = [renamed, not_finite, of_integers]


def damages(found: Checkpoint) -> dict[str, list[Damage]]:
    """Those that have to be noticed of each tensor, by its key."""
    possible = {f"base_model.{name}": [*ANY, dropped, transposed] for name in found.shared}
    extras = found.config.extras()
    for layer, own in found.params.items():
        shapes = {**get_kind(found.kind).shapes(found.config, layer), **extras}
        sizes = dict(zip(("out", "in"), BASE.shapes[layer], strict=True))
        for name, tensor in own.items():
            known = possible[f"{PREFIX}{layer}.{name}"] = [*ANY]
            # Biases, and tensors that others may stand for, need not be there.
            if name not in extras.keys() | found.config.optional:
                known.append(dropped)
            if layer != "head":
                known.append(moved_away)
            # A size that has a name of its own is whatever the tensor says.
            expected = [sizes.get(dim, dim) for dim in shapes[name]]
            turned = zip(expected, reversed(tensor.shape), strict=True)
            if any(isinstance(size, int) and size != other for size, other in turned):
                known.append(transposed)
    return possible


@given(data=st.data())
@settings(max_examples=300)
def test_each_of_several_damages_is_named(pristine, data):
    variant = data.draw(st.sampled_from(sorted(VARIANTS)))
    kind, config = VARIANTS[variant]
    good = made(kind, **config)
    tensors = tensors_of(good)
    possible = damages(good)
    some = st.lists(st.sampled_from(sorted(possible)), min_size=1, max_size=4, unique=True)
    keys = data.draw(some)
    expected = [data.draw(st.sampled_from(possible[key]))(tensors, key) for key in keys]
    target = pristine[variant].parent / "spoiled"
    shutil.copytree(pristine[variant], target, dirs_exist_ok=True)
    save_file(tensors, target / TENSORS_FILE)
    found = outcome(target, BASE)
    assert isinstance(found, str)
    found = found.removeprefix(f"adapter {str(target)!r}: ")
    assert [pattern for pattern in expected if not re.search(pattern, found)] == []


@given(data=st.data())
@settings(max_examples=100)
def test_each_wrong_key_of_a_config_is_named(pristine, data):
    variant = data.draw(st.sampled_from(sorted(VARIANTS)))
    kind, _ = VARIANTS[variant]
    target = pristine[variant].parent / "misconfigured"
    shutil.copytree(pristine[variant], target, dirs_exist_ok=True)
    fields = sorted(get_kind(kind).Config.model_fields)
    wrong = data.draw(st.lists(st.sampled_from(fields), unique=True, max_size=3))
    unknown = data.draw(st.lists(st.sampled_from(["use_magic", "loft", "a b"]), unique=True))
    raw = json.loads((target / CONFIG_FILE).read_text())
    raw |= {key: [[None]] for key in wrong} | dict.fromkeys(unknown, 1)
    (target / CONFIG_FILE).write_text(json.dumps(raw))
    truncated = data.draw(st.booleans())
    if truncated:
        content = (target / TENSORS_FILE).read_bytes()
        (target / TENSORS_FILE).write_bytes(content[: len(content) // 2])
    found = outcome(target, data.draw(st.sampled_from([BASE, None])))
    if not (wrong or unknown or truncated):
        assert isinstance(found, Checkpoint)
        return
    assert isinstance(found, str)
    assert [key for key in wrong if not re.search(rf"[ ;]{key}(\.[^;]*)? = ", found)] == []
    assert [key for key in unknown if f"{key!r} = 1 is not supported" not in found] == []
    assert ("not a safetensors file" in found) == truncated


@pytest.mark.filterwarnings("ignore:Specified to not (save|load) vera_A")
def test_a_refused_folder_leaves_the_host_as_it_was(tmp_path):
    """Its good adapters give the same bits, and the good one beside the refused is not there."""
    model = zoo.build("Qwen2")
    good = {"one": "dora", "two": "vera", "three": "ia3"}
    for name, case in good.items():
        zoo.make_adapter(case, model, tmp_path / name)
    flora.attach(model, {name: tmp_path / name for name in good})
    inputs = zoo.rows(model, 4)
    names = [*good, None]
    expected = model(**inputs, adapter_names=names).logits
    for number, case in enumerate(zoo.CASES):
        zoo.make_adapter(case, zoo.build("Qwen2"), tmp_path / case, seed=1)
        tensors = load_file(tmp_path / case / TENSORS_FILE)
        key = sorted(tensors)[number % len(tensors)]
        pattern = [not_finite, of_integers, renamed][number % 3](tensors, key)
        save_file(tensors, tmp_path / case / TENSORS_FILE)
        with pytest.raises(InvalidAdapterError) as caught:
            flora.attach(model, {"four": tmp_path / "one", "one": tmp_path / case})
        prefix = f"adapter {str(tmp_path / case)!r}: "
        assert re.search(pattern, str(caught.value).removeprefix(prefix))
        with pytest.raises(UnknownAdapterError):
            model(**inputs, adapter_names=["four", *names[1:]])
        assert torch.equal(model(**inputs, adapter_names=names).logits, expected)


# --- writing


def test_an_older_folder_is_replaced_as_a_whole(folder, tmp_path):
    (folder.path / "stale").touch()
    newer = made("LORA")
    write_checkpoint(folder.path, newer)
    assert sorted(os.listdir(folder.path)) == [CONFIG_FILE, TENSORS_FILE]
    assert os.listdir(tmp_path) == ["adapter"]
    assert read_checkpoint(folder.path, BASE).identity == newer.identity


@pytest.mark.parametrize("step", ["save_file", "json", "rename"])
def test_a_write_that_fails_changes_nothing(folder, tmp_path, monkeypatch, step):
    before = read_checkpoint(folder.path).identity

    def fail(*_: object, **__: object) -> None:
        raise OSError("no space left")

    if step == "rename":
        rename = Path.rename
        monkeypatch.setattr(
            Path, "rename", lambda self, to: fail() if self.name == "new" else rename(self, to)
        )
    elif step == "json":
        monkeypatch.setattr(module.json, "dumps", fail)
    else:
        monkeypatch.setattr(module, "save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        write_checkpoint(folder.path, made("LORA"))
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["adapter"]
    assert read_checkpoint(folder.path).identity == before


def test_parameters_that_train_are_written(tmp_path):
    checkpoint = made("FLORA")
    for params in checkpoint.params.values():
        for name, tensor in params.items():
            params[name] = tensor.T.contiguous().T.requires_grad_()
    write_checkpoint(tmp_path / "a", checkpoint)
    assert read_checkpoint(tmp_path / "a").identity == made("FLORA").identity


# --- identity


def changed(**config: Any) -> Checkpoint:
    return made("LORA", **config)


def test_the_identity_is_of_what_is_computed(tmp_path):
    first = made("LORA")
    write_checkpoint(tmp_path / "one", first)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    raw = json.loads((tmp_path / "two" / CONFIG_FILE).read_text())
    raw |= {"task_type": "X", "peft_version": "9", "base_model_name_or_path": "other"}
    raw |= {"target_modules": "all-linear", "lora_dropout": 0.5, "init_lora_weights": False}
    (tmp_path / "two" / CONFIG_FILE).write_text(json.dumps(raw))
    backwards = dict(reversed(tensors_of(first).items()))
    (tmp_path / "two" / TENSORS_FILE).write_bytes(save(backwards, {"some": "metadata"}))
    assert read_checkpoint(tmp_path / "two", BASE).identity == first.identity


def test_all_else_gives_another_identity():
    first = made("LORA")
    others = [
        changed(lora_alpha=9.0),
        changed(use_rslora=True),
        changed(alpha_pattern={"up": 9.0}),
        made("FLORA"),
    ]
    for name in first.params["layers.0.up"]:
        params = {m: dict(p) for m, p in first.params.items()}
        tensor = params["layers.0.up"][name].clone()
        tensor[0, 0] = tensor[0, 0].nextafter(torch.tensor(9.0))
        params["layers.0.up"][name] = tensor
        others.append(Checkpoint(kind="LORA", config=first.config, params=params))
    half = {m: {n: t.double() for n, t in p.items()} for m, p in first.params.items()}
    others.append(Checkpoint(kind="LORA", config=first.config, params=half))
    moved = {m.replace("up", "gate"): p for m, p in first.params.items()}
    others.append(Checkpoint(kind="LORA", config=first.config, params=moved))
    assert len({first.identity, *(other.identity for other in others)}) == len(others) + 1


# --- a folder of folders


def test_find_adapters(tmp_path):
    for name in ("b", "a"):
        write_checkpoint(tmp_path / name, made("FLORA"))
    (tmp_path / "else").mkdir()
    assert find_adapters(tmp_path) == {"a": tmp_path / "a", "b": tmp_path / "b"}
    assert find_adapters(tmp_path / "a") == {"a": tmp_path / "a"}
    with pytest.raises(UsageError, match="holds no adapter") as caught:
        find_adapters(tmp_path / "else")
    assert isinstance(caught.value, FloraError)


def test_the_order_of_patterns_counts_and_is_kept(tmp_path):
    """PEFT takes the first pattern that matches."""
    first = {"q_proj": 4.0, ".*_proj": 64.0}
    found = [
        made("LORA", alpha_pattern=dict(order)) for order in (first.items(), [*first.items()][::-1])
    ]
    assert found[0].identity != found[1].identity
    for number, checkpoint in enumerate(found):
        write_checkpoint(tmp_path / str(number), checkpoint)
        read = read_checkpoint(tmp_path / str(number))
        assert read.identity == checkpoint.identity
        assert list(read.config.alpha_pattern) == list(checkpoint.config.alpha_pattern)


def test_a_folder_of_something_else_is_not_replaced(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/precious.txt").write_text("mine")
    with pytest.raises(UsageError, match="no adapter's folder"):
        write_checkpoint(tmp_path / "data", made("FLORA"))
    assert (tmp_path / "data/precious.txt").read_text() == "mine"
