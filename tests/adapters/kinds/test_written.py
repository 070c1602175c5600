"""What flora writes, PEFT reads: the same logits as those of the merged factors."""

import copy

import peft
import pytest
import torch

from flora.adapters.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from flora.adapters.kinds import KINDS, get_kind
from flora.adapters.targets import shortest_targets, targeted
from flora.base import ModelBase
from flora.hosts.transformers import merge
from tests import zoo

OPTIONS = {
    "FLORA": {"r": 2},
    "LORA": {"r": 3},
    "LORA, rslora": {"r": 3, "use_rslora": True, "alpha_pattern": {"v_proj": 3.0}},
    "LORA, rank_pattern": {"r": 3, "rank_pattern": {"v_proj": 2}},
    "LORA, dora": {"r": 3, "use_dora": True},
    "IA3": {},
    "IA3, inputs": {"feedforward_modules": ["down_proj", "k_proj"]},
    "IA3, inputs of few": {"feedforward_modules": ["1.mlp.down_proj"]},
    "HIRA": {"r": 2},
    "VERA": {"r": 5},
    "VERA, drawn": {"r": 5, "save_projection": False, "projection_prng_key": 3},
    "LOHA": {"r": 2},
    "LOHA, many": {"r": 6, "alpha": 3.0},
    "LOKR": {"r": 2},
    "LOKR, both": {"r": 2, "decompose_both": True, "alpha": 3.0},
    "LOKR, whole": {"r": 30, "decompose_factor": 4},
}
LAYERS = {
    "all": "all-linear",
    "some": r".*\.(0\.self_attn\.v|[01]\.mlp\.down)_proj",
}


def made(option, base, layers):
    kind = option.partition(",")[0]
    module = get_kind(kind)
    config = module.Config(**OPTIONS[option], target_modules=layers)
    generator = torch.Generator().manual_seed(0)
    params = {}
    for name in sorted(targeted(config, base)):
        start = module.init(config, name, base, generator)
        params[name] = {
            n: (t + 0.2 * torch.randn(t.shape, generator=generator)).double()
            for n, t in start.items()
        }
    largest = [max(sizes) for sizes in zip(*(base.shapes[n] for n in params), strict=True)]
    derived = config.derived(*largest)
    return Checkpoint(
        kind=kind,
        config=config.with_targets(shortest_targets(params, base)),
        params=params,
        shared={name: derived[name] for name in config.shared()},
    )


def test_every_kind_that_trains_is_written_here():
    trained = {kind for kind in KINDS if get_kind(kind).Config.trainable}
    assert {option.partition(",")[0] for option in OPTIONS} == trained


@pytest.mark.filterwarnings("ignore:Specified to not (save|load) vera_A")
@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("option", OPTIONS)
def test_peft_reads_what_is_written(option, layers, tmp_path):
    """In fp64 after numbers of fp32, so that no rounding hides what differs."""
    model = zoo.build("Qwen2").double()
    base = ModelBase(model)
    write_checkpoint(tmp_path / "adapter", made(option, base, LAYERS[layers]))
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "adapter").double()
    merged = copy.deepcopy(model)
    merge(merged, read_checkpoint(tmp_path / "adapter", base).adapter(base))
    inputs = zoo.rows(model, 2)
    expected = loaded.eval()(**inputs).logits
    torch.testing.assert_close(merged(**inputs).logits, expected, rtol=1e-10, atol=1e-12)
    assert (expected - model(**inputs).logits).abs().max() > 1e-2
