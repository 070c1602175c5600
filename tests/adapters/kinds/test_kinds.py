"""What every kind of the table keeps to."""

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
PARTS = ("adapters", "ops", "hosts")
CONFIGS = [1, 3]


@pytest.fixture(params=KINDS)
def kind(request):
    return get_kind(request.param)


BASE = ModelBase(
    nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"up": nn.Linear(*SHAPE[::-1])})])})
)


def of_rank(kind, rank):
    field = kind.Config.rank_field
    return kind.Config(**({} if field is None else {field: rank}))


def start(kind, config, seed=0):
    return kind.init(config, MODULE, BASE, torch.Generator().manual_seed(seed))


def fill(kind, config, params):
    common = config.derived(*SHAPE)
    return kind.fill(config, MODULE, {**common, **params}, BASE)


@pytest.mark.parametrize("rank", CONFIGS)
def test_the_start_has_the_shapes_that_are_named(kind, rank):
    config = of_rank(kind, rank)
    sizes = {"out": SHAPE[0], "in": SHAPE[1]}
    params = start(kind, config)
    assert {n: tuple(t.shape) for n, t in params.items()} == {
        name: tuple(sizes.get(dim, dim) for dim in dims)
        for name, dims in kind.shapes(config, MODULE).items()
    }
    assert all(t.dtype == torch.float32 for t in params.values())
    again, other = start(kind, config), start(kind, config, seed=1)
    assert all(torch.equal(t, again[n]) for n, t in params.items())
    if rank > 1 and any(t.std() > 0 for t in params.values()):
        assert any(not torch.equal(t, other[n]) for n, t in params.items())


@pytest.mark.parametrize("rank", CONFIGS)
def test_the_start_is_the_identity_to_rounding(kind, rank):
    config = of_rank(kind, rank)
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
    merged = fill(kind, config, start(kind, config)).merge(weight)
    torch.testing.assert_close(merged, weight, rtol=4 * torch.finfo(torch.float32).eps, atol=0)


@pytest.mark.parametrize("rank", CONFIGS)
def test_fill_is_differentiable_in_every_parameter(kind, rank):
    config = of_rank(kind, rank)
    generator = torch.Generator().manual_seed(3)
    params = {
        name: (t.double() + torch.randn(t.shape, generator=generator)).requires_grad_()
        for name, t in start(kind, config).items()
    }
    weight = torch.randn(SHAPE, generator=generator, dtype=torch.float64)

    def merged(*tensors):
        return fill(kind, config, dict(zip(params, tensors, strict=True))).merge(weight)

    assert torch.autograd.gradcheck(merged, tuple(params.values()))


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


@pytest.mark.parametrize("name", KINDS)
def test_no_kind_is_named_outside_its_module(name):
    """Neither its PEFT type nor one of its tensors; the tuner is FLORA's own face in PEFT.

    What starts a new adapter names a kind, as its user does: the configs of training and commands.
    """
    root = Path(flora.__file__).parent
    kind = get_kind(name)
    words = [name, *(tensor.partition(".")[0] for tensor in kind.shapes(kind.Config(), ""))]
    pattern = re.compile(rf"""["'.]({"|".join(words)})\b""")
    files = [*root.glob("*.py"), *(f for part in PARTS for f in (root / part).rglob("*.py"))]
    found = [
        f"{path.relative_to(root)}:{number}: {line.strip()}"
        for path in files
        if "kinds" not in path.parts
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if pattern.search(line)
    ]
    assert len(files) > 15
    assert found == []
