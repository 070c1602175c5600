"""LoHa: few ranks and many, as in PEFT."""

import peft
import pytest

from tests import zoo
from tests.adapters.kinds.as_peft import assert_reads_as_peft, save_by_peft

OPTIONS = {
    "few ranks": ({"r": 2, "alpha": 3}, {4}),
    "as many as fit": ({"r": 4, "target_modules": ["k_proj"]}, {16}),
    "more than fit, more out than in": ({"r": 6, "target_modules": ["up_proj"]}, {32}),
    "more than fit, more in than out": ({"r": 6, "target_modules": ["down_proj"]}, {32}),
    "a square": ({"r": 6, "target_modules": ["q_proj"]}, {32}),
    "more than fit in some": ({"r": 5, "alpha": -2}, {16, 25}),
    "rank_pattern": ({"r": 2, "rank_pattern": {r"0\..*": 3, "q_proj": 7}}, {4, 9, 32}),
    "alpha_pattern": ({"r": 2, "alpha": 3, "alpha_pattern": {r"1\..*": 5, "v_proj": 1.5}}, {4}),
    "both patterns": (
        {"r": 2, "rank_pattern": {"o_proj": 3}, "alpha_pattern": {"o_proj": 5}},
        {4, 9},
    ),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_each_option_is_pefts(option, tmp_path):
    settings, ranks = OPTIONS[option]
    model = zoo.build("Qwen2")
    save_by_peft(peft.LoHaConfig, model, tmp_path, **settings)
    adapter = assert_reads_as_peft(model, tmp_path)
    assert {factors.rank for factors in adapter.layers.values()} == ranks
