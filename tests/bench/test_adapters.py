"""Random adapters of any kind, as their specification says."""

import pytest
import torch

from flora.adapters.checkpoint import read_checkpoint, write_checkpoint
from flora.adapters.kinds import KINDS
from flora.base import ModelBase
from flora.bench.adapters import Spec, parse_specs
from flora.commands.bench import MIXED
from flora.errors import FloraError, UsageError
from tests import zoo


@pytest.fixture(scope="module")
def base():
    return ModelBase(zoo.build("Qwen2"))


def test_a_batch_of_kinds_is_read():
    assert parse_specs("flora", 3) == [Spec("FLORA", 3)]
    assert parse_specs("IA3 + LORA/use_dora/use_rslora:8+HIRA:2", 1) == [
        Spec("IA3", None),
        Spec("LORA", 8, ("use_dora", "use_rslora")),
        Spec("HIRA", 2),
    ]
    assert [spec.name for spec in parse_specs("LORA/use_dora:8", 1)] == ["LORA/use_dora"]


def test_the_mixture_has_eight_kinds():
    specs = parse_specs(MIXED, 1)
    assert len({spec.name for spec in specs}) == 8
    assert {spec.rank for spec in specs if spec.kind in ("FLORA", "HIRA")} == {1}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is no KIND"),
        ("LORA:0", "is no KIND"),
        ("BASE+base", "name an adapter"),
        ("LORA:", "is no KIND"),
        ("LORA++IA3", "is no KIND"),
        ("IA3:4", "IA3 has no rank"),
    ],
)
def test_what_cannot_be_meant_is_refused(text, said):
    with pytest.raises(UsageError, match=said):
        parse_specs(text, 1)


def test_unknown_kinds_and_flags_are_named(base):
    with pytest.raises(FloraError, match="'NOPE' is not supported"):
        parse_specs("NOPE", 1)
    with pytest.raises(FloraError, match="use_nothing"):
        Spec("LORA", 1, ("use_nothing",)).adapter(base, 0)


def test_layers_of_one_input_may_have_one_b(base, tmp_path):
    checkpoint = Spec("FLORA", 2, ("share_input",)).checkpoint(base, 0)
    write_checkpoint(tmp_path, checkpoint)
    layers = read_checkpoint(tmp_path, base).adapter(base).layers
    inputs = {m.rpartition(".")[2]: own.hadamard_in for m, own in layers.items() if ".0." in m}
    torch.testing.assert_close(inputs["q_proj"], inputs["v_proj"], rtol=0, atol=0)
    torch.testing.assert_close(inputs["gate_proj"], inputs["up_proj"], rtol=0, atol=0)
    assert not torch.equal(inputs["q_proj"], inputs["gate_proj"])
    assert not torch.equal(inputs["q_proj"], inputs["o_proj"])


@pytest.mark.parametrize("kind", [*KINDS, "LORA/use_dora"])
def test_one_of_each_kind_is_away_from_the_identity_on_every_layer(base, kind):
    (spec,) = parse_specs(kind, 2)
    adapter, again, other = (spec.adapter(base, seed) for seed in (0, 0, 1))
    assert set(adapter.layers) == set(base.shapes) - {base.head}
    assert adapter.identity == again.identity != other.identity
    for module, factors in adapter.layers.items():
        weight = base.layers[module].weight
        moved = (factors.merge(weight) - weight).norm() / weight.norm()
        assert 1e-4 < moved < 10, module
    assert all(torch.isfinite(t).all() for f in adapter.layers.values() for _, t in f.parts())


def test_a_folder_of_each_of_the_mixture_is_read_again(base, tmp_path):
    for number, spec in enumerate(parse_specs(MIXED, 2)):
        made = spec.checkpoint(base, number)
        write_checkpoint(tmp_path / str(number), made)
        read = read_checkpoint(tmp_path / str(number), base)
        assert read.adapter(base).identity == spec.adapter(base, number).identity == made.identity
