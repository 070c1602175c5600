"""Any mix of adapters in any order: a row gets what it gets alone."""

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

import flora
from tests import zoo

pytestmark = pytest.mark.filterwarnings("ignore:Specified to not")  # VeRA without its projections

PROMPTS = 3
LENGTHS = (1, 9, 40)
"""Of the longest, rows that share an adapter of several pairs take the weight side."""

names = st.lists(st.sampled_from([*zoo.CASES, None, "__base__"]), min_size=1, max_size=12)
seeds = st.integers(0, 2**32 - 1)


class Alone:
    """A model with an adapter of each case, and what rows of them get alone, in fp64."""

    def __init__(self, architecture: str, folder: Path) -> None:
        self.base = zoo.build(architecture).double()
        for name in zoo.CASES:
            zoo.make_adapter(name, self.base, folder / name)
        paths = {name: folder / name for name in zoo.CASES}
        self.model = flora.attach(copy.deepcopy(self.base), paths)
        self.prompts = {n: zoo.rows(self.base, PROMPTS, n, seed=n)["input_ids"] for n in LENGTHS}
        self.logits = cache(self._logits)

    @torch.no_grad()
    def _logits(self, name: str | None, prompt: int, length: int) -> Tensor:
        ids = self.prompts[length][prompt : prompt + 1]
        return self.model(ids, adapter_names=[name]).logits[0]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Alone]:
    return cache(lambda architecture: Alone(architecture, tmp_path_factory.mktemp(architecture)))


@pytest.mark.parametrize("architecture", ["Llama", "GPT2"])
@given(rows=names, length=st.sampled_from(LENGTHS), seed=seeds)
@example(rows=["lora", *["flora3"] * 6, None], length=40, seed=0)
def test_a_row_gets_what_it_gets_alone(alone, architecture, rows, length, seed):
    own = alone(architecture)
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(PROMPTS, (len(rows),), generator=generator).tolist()
    with torch.no_grad():
        found = own.model(own.prompts[length][prompts], adapter_names=rows).logits
    expected = torch.stack([own.logits(n, p, length) for n, p in zip(rows, prompts, strict=True)])
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("architecture", ["Llama", "GPT2"])
@given(rows=st.lists(st.sampled_from([None, "__base__"]), min_size=1, max_size=12), seed=seeds)
def test_rows_of_the_base_alone_are_the_base_bit_for_bit(alone, architecture, rows, seed):
    own = alone(architecture)
    batch = zoo.rows(own.base, len(rows), seed=seed)
    with torch.no_grad():
        found = own.model(**batch, adapter_names=rows).logits
        assert torch.equal(found, own.base(**batch).logits)


@given(rows=names, more=names, seed=seeds)
def test_one_batch_leaves_nothing_for_the_next(alone, rows, more, seed):
    """The same mix after another one is the same, bit for bit."""
    own = alone("Llama")
    batches = [(r, zoo.rows(own.base, len(r), seed=seed)) for r in (rows, more, rows)]
    with torch.no_grad():
        first, _, again = [own.model(**b, adapter_names=r).logits for r, b in batches]
    assert torch.equal(first, again)
