"""Which layers are meant, by PEFT's own matching."""

from types import SimpleNamespace

import pytest

from flora.adapters.config import BlockConfig
from flora.adapters.targets import by_pattern, shortest_targets, targeted

NAMES = [f"m.layers.{i}.{part}" for i in range(3) for part in ("up", "down", "up_gate")]
BASE = SimpleNamespace(shapes=dict.fromkeys([*NAMES, "head"], (2, 2)), head="head")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, []),
        ({"target_modules": ["up"]}, [n for n in NAMES if n.endswith(".up")]),
        ({"target_modules": "all-linear"}, NAMES),
        ({"target_modules": "ALL-Linear"}, NAMES),
        ({"target_modules": ["head", "m.layers.1.down"]}, ["head", "m.layers.1.down"]),
        ({"target_modules": r".*\.[02]\.up"}, ["m.layers.0.up", "m.layers.2.up"]),
        ({"target_modules": "up"}, []),
        (
            {"target_modules": "all-linear", "exclude_modules": ["up", "down"]},
            [n for n in NAMES if "gate" in n],
        ),
        (
            {"target_modules": ["up"], "layers_to_transform": [0, 2]},
            ["m.layers.0.up", "m.layers.2.up"],
        ),
        (
            {"target_modules": ["up"], "layers_to_transform": 1, "layers_pattern": "layers"},
            ["m.layers.1.up"],
        ),
        ({"target_modules": ["up"], "layers_to_transform": 1, "layers_pattern": "h"}, []),
    ],
)
def test_targeted(config, expected):
    assert targeted(BlockConfig(**config), BASE) == set(expected)


@pytest.mark.parametrize(
    "modules", [["head"], NAMES, NAMES[:1], [n for n in NAMES if n.endswith("up")]]
)
def test_shortest_targets_mean_the_same_layers(modules):
    found = shortest_targets(modules, BASE)
    assert targeted(BlockConfig(target_modules=found), BASE) == set(modules)
    assert len(found) <= len(modules)
    assert sum(map(len, found)) <= sum(map(len, modules))


def test_by_pattern_is_pefts_rule():
    patterns = {"up": 3, r"layers\.1\..*": 4}
    names = ["m.layers.0.up", "m.layers.1.up", "m.layers.1.down", "m.layers.0.down", "m.x_up"]
    assert [by_pattern(patterns, name, 8) for name in names] == [3, 3, 4, 8, 8]
    assert by_pattern({}, "up", 8) == 8


@pytest.mark.parametrize("broken", ["(", "a{99999999999}", "(" * 5000, r"\1"])
@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "layers_pattern"])
def test_a_pattern_that_is_none_is_refused(key, broken):
    with pytest.raises(ValueError, match=f"(?s){key}.*no regular expression"):
        BlockConfig(**{key: broken})


def test_a_list_of_names_holds_no_patterns():
    assert BlockConfig(target_modules=["*"]).target_modules == ["*"]
