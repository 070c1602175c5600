"""What every kind of the table keeps to."""

import ast
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import flora
from flora.adapters.kinds import KINDS, get_kind
from flora.base import ModelBase
from flora.errors import InvalidAdapterError

MODULE, SHAPE = "layers.0.up", (7, 5)
RANKS = [1, 3]
OPTIONS = {
    **{name: {} for name in KINDS},
    "LORA, dora": {"use_dora": True},
    "LORA, rslora": {"use_rslora": True},
    "IA3, inputs": {"feedforward_modules": ["up"]},
    "VERA, drawn": {"save_projection": False},
    "LOKR, both": {"decompose_both": True},
}
OWN_FACE = ("adapters/kinds", "tuner")
STARTS = ("commands", "training")


def one_layer():
    layer = nn.Linear(*SHAPE[::-1])
    for parameter in layer.parameters():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(2))
    return nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"up": layer})])})


BASE = ModelBase(one_layer())
WEIGHT = BASE.layers[MODULE].weight.detach()


@pytest.fixture(params=OPTIONS)
def option(request):
    return request.param


@pytest.fixture
def kind(option):
    return get_kind(option.partition(",")[0])


@pytest.fixture(params=RANKS)
def config(request, kind, option):
    field = kind.Config.rank_field
    return kind.Config(**({} if field is None else {field: request.param}), **OPTIONS[option])


def start(kind, config, seed=0):
    return kind.init(config, MODULE, BASE, torch.Generator().manual_seed(seed))


def fill(kind, config, params):
    common = config.derived(*SHAPE)
    return kind.fill(config, MODULE, {**common, **params}, BASE)


def test_the_start_has_the_shapes_that_are_named(kind, config):
    sizes = {"out": SHAPE[0], "in": SHAPE[1]}
    params, shapes = start(kind, config), kind.shapes(config, MODULE)
    assert shapes.keys() - config.optional <= params.keys() <= shapes.keys()
    for name, tensor in params.items():
        for dim, found in zip(shapes[name], tensor.shape, strict=True):
            # A name that is no side of the layer is one size in all of its tensors.
            assert found == (dim if isinstance(dim, int) else sizes.setdefault(dim, found))
    assert all(t.dtype == torch.float32 and t.device.type == "cpu" for t in params.values())
    again, other = start(kind, config), start(kind, config, seed=1)
    assert all(torch.equal(t, again[n]) for n, t in params.items())
    one_rank = kind.Config.rank_field is None or getattr(config, kind.Config.rank_field) == 1
    # What is drawn differs with the seed; a magnitude is the base's own.
    if not one_rank and any(t.ndim == 2 and len(t.unique()) > 1 for t in params.values()):
        assert any(not torch.equal(t, other[n]) for n, t in params.items())


def test_what_all_layers_share_has_the_shapes_that_are_named(config):
    sizes = {"out": SHAPE[0], "in": SHAPE[1]}
    derived = config.derived(*SHAPE)
    for name, dims in config.shared().items():
        assert derived[name].shape == tuple(sizes.get(dim, dim) for dim in dims)


def test_the_start_is_the_identity_to_rounding(kind, config):
    factors = fill(kind, config, start(kind, config))
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(factors.merge(WEIGHT), WEIGHT, rtol=4 * eps, atol=0)
    if factors.bias is not None:
        assert torch.equal(factors.bias, BASE.bias(MODULE))


def test_fill_is_differentiable_in_every_parameter(kind, config, option):
    generator = torch.Generator().manual_seed(3)
    params = {
        name: (t.double() + torch.randn(t.shape, generator=generator)).requires_grad_()
        for name, t in start(kind, config).items()
    }

    def computed(*tensors):
        factors = fill(kind, config, dict(zip(params, tensors, strict=True)))
        return factors.merge(WEIGHT.double()), *([] if factors.bias is None else [factors.bias])

    total = sum(tensor.sin().sum() for tensor in computed(*params.values()))
    grads = torch.autograd.grad(total, [*params.values()])
    assert all(grad.abs().max() > 0 for grad in grads)
    if option != "LORA, dora":  # its norm is a constant: tests/adapters/kinds/test_lora.py
        assert torch.autograd.gradcheck(computed, tuple(params.values()))


def test_fill_changes_no_parameter_and_says_the_same_again(kind, config):
    params = {name: tensor + 0.5 for name, tensor in start(kind, config).items()}
    before = {name: tensor.clone() for name, tensor in params.items()}
    first, again = (dict(fill(kind, config, params).parts()) for _ in range(2))
    assert first.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in params.items())


@pytest.mark.parametrize("r", [2, 5])
def test_floras_ranks_differ_after_the_first_step(r):
    """Equal ranks would have equal gradients for ever."""
    kind = get_kind("FLORA")
    config = kind.Config(r=r)
    params = start(kind, config)
    torch.testing.assert_close(params["flora_B"].mean(dim=0), torch.ones(5))
    assert (params["flora_A"] == 1).all()
    assert 0.03 < (params["flora_B"] - 1).std() < 0.2
    for tensor in params.values():
        tensor.requires_grad_()
    generator = torch.Generator().manual_seed(4)
    weight, grad = (torch.randn(SHAPE, generator=generator) for _ in range(2))
    (fill(kind, config, params).merge(weight) * grad).sum().backward()
    stepped = {name: tensor - 0.1 * tensor.grad for name, tensor in params.items()}
    assert len({tuple(row.tolist()) for row in stepped["flora_A"]}) == r


@pytest.mark.parametrize("name", [None, 3, "", "NOPE", ["FLORA"], "FLORA\n"])
def test_an_unknown_kind_is_refused_with_those_that_are(name):
    with pytest.raises(InvalidAdapterError) as caught:
        get_kind(name)
    assert all(kind in str(caught.value) for kind in KINDS)
    assert "\n" not in str(caught.value)


def test_a_kind_is_found_in_any_case_of_letters():
    assert get_kind("flora") is get_kind("FLORA")


def names_of(name):
    """What only one kind has: its PEFT type, its tensors, its own settings."""
    kind = get_kind(name)
    config = kind.Config()
    tensors = [*kind.shapes(config, ""), *config.shared()]
    others = [get_kind(other).Config.model_fields for other in KINDS if other != name]
    own = set(kind.Config.model_fields).difference(*others)
    return {name, *(tensor.partition(".")[0] for tensor in tensors), *own}


def lines_of(path, *, docstrings):
    """A module's lines by number, its docstrings' among them or not."""
    source = path.read_text()
    skipped = set()
    for node in ast.walk(ast.parse(source)):
        if not docstrings and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            skipped.update(range(node.lineno, node.end_lineno + 1))
    lines = enumerate(source.splitlines(), 1)
    return {number: line for number, line in lines if number not in skipped}


def test_no_kind_is_named_outside_its_module():
    """Neither its PEFT type nor a tensor nor a setting that is its own.

    The tuner is FLORA's own face in PEFT. What starts an adapter names a kind, as its user does:
    the commands, the measurements, and the examples of the training.
    """
    words = {"lora_magnitude_vector", "lora_B.bias"} | set().union(*map(names_of, KINDS))
    any_word = "|".join(map(re.escape, sorted(words)))
    pattern = re.compile(rf"""["'.](?:{any_word})\b|\b(?:{any_word})=""")
    root = Path(flora.__file__).parent
    places = {path: path.relative_to(root).as_posix() for path in sorted(root.rglob("*.py"))}
    read = {
        place: lines_of(path, docstrings=not place.startswith(STARTS))
        for path, place in places.items()
        if not place.startswith((*OWN_FACE, "commands", "bench"))
    }
    found = [
        f"{place}:{number}: {line.strip()}"
        for place, lines in read.items()
        for number, line in lines.items()
        if pattern.search(line)
    ]
    assert found == []
    assert {"adapters/checkpoint.py", "hosts/transformers.py", "training/trainer.py"} <= read.keys()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("FLORA", {"flora_A", "share_input"}),
        ("LORA", {"lora_A", "lora_B", "use_dora", "use_rslora", "lora_bias"}),
        ("IA3", {"ia3_l", "feedforward_modules"}),
        ("HIRA", {"hira_A", "hira_B"}),
        ("ADALORA", {"lora_E", "init_r"}),
        ("VERA", {"vera_A", "vera_lambda_d", "save_projection", "projection_prng_key"}),
        ("LOHA", {"hada_w1_a", "hada_w2_b"}),
        ("LOKR", {"lokr_w1", "lokr_w2_a", "decompose_both"}),
    ],
)
def test_what_names_a_kind(name, expected):
    """The words of the test above; what kinds share is no one's."""
    assert expected | {name} <= names_of(name)
    assert not names_of(name) & {"r", "bias", "alpha", "lora_alpha", "target_modules"}
