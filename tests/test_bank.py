"""The bank against a plain dict of adapters: the same factors, whole after every step."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from flora import bank as bank_module
from flora.adapters.core import Adapter, LayerFactors
from flora.bank import AdapterBank, LayerSpec, _Key, _Pool, join_factors
from flora.base import ModelBase
from flora.bench.adapters import parse_specs
from flora.commands.bench import MIXED
from flora.errors import InvalidAdapterError, OutOfBudgetError, UnknownAdapterError
from flora.ops.adapted_linear import prepare
from tests import zoo
from tests.helpers import random_factors

SIZES = {"up": (7, 5), "twin": (7, 5), "down": (5, 7), "square": (6, 6)}
CPU = torch.device("cpu")


def specs(dtype=torch.float32):
    return {
        name: LayerSpec(out_features=o, in_features=i, dtype=dtype, device=CPU)
        for name, (o, i) in SIZES.items()
    }


def adapter(identity, layers=("up", "down"), *, pairs=1, rank=0, bias=False):
    generator = torch.Generator().manual_seed(sum(identity.encode()))
    return Adapter(
        kind="X",
        identity=identity,
        layers={
            name: random_factors(
                *SIZES[name], pairs=pairs, rank=rank, bias=bias, generator=generator
            )
            for name in layers
        },
    )


def pair_bytes(n, out, dtype):
    """Of one Hadamard page of each side: in bf16 with their centers, else in at least fp32."""
    if dtype == torch.bfloat16:
        return 2 * (n + out + 2)
    return max(4, dtype.itemsize) * (n + out)


def pool_of(bank):
    """That of the Hadamard pages of "up" and its twin."""
    return bank._pools[_Key.of(bank.layers["up"], "hadamard")]


def assert_same(found, expected):
    assert (found.pairs, found.ranks, found.biased) == (
        expected.pairs,
        expected.ranks,
        expected.biased,
    )
    for part in ("scales", "additive", "bias"):
        a, b = getattr(found, part), getattr(expected, part)
        assert (a is None) == (b is None), part
        if part == "bias" and a is not None:
            a, b = (a,), (b,)
        for one, other in zip(a or (), b or (), strict=True):
            assert one.dtype == other.dtype, part
            assert torch.equal(one, other), part


def assert_holds(bank, adapters):
    """The bank holds just these adapters, and gives their factors."""
    assert {r.identity for r in bank.residents} == {a.identity for a in adapters}
    groups = [None, *adapters]
    for module, spec in bank.layers.items():
        layers = [a and a.layers.get(module) for a in groups]
        found = bank.factors(module, [a and a.identity for a in groups])
        if not any(layers):
            assert found is None
        else:
            assert_same(found, join_factors(layers, spec.dtype))
    bank.check_integrity()


class BankMachine(RuleBasedStateMachine):
    """Random loads, uses and unloads beside a dict that does the same."""

    def __init__(self):
        super().__init__()
        self.bank = AdapterBank(specs(), budget=3000)
        self.held = {}
        self.uses = {}
        self.lent = []

    @rule(
        number=st.integers(0, 9),
        layers=st.sets(st.sampled_from(sorted(SIZES)), min_size=1),
        pairs=st.integers(0, 4),
        rank=st.integers(0, 5),
        bias=st.booleans(),
    )
    def load(self, number, layers, pairs, rank, bias):
        if not (pairs or rank or bias):
            return
        name = f"{number}-{sorted(layers)}-{pairs}-{rank}-{bias}"
        new = adapter(name, sorted(layers), pairs=pairs, rank=rank, bias=bias)
        before = self.bank.residents
        try:
            self.bank.load(new)
        except OutOfBudgetError:
            assert self.bank.residents == before
            return
        self.held[name] = new
        self.uses.setdefault(name, 0)
        resident = {r.identity for r in self.bank.residents}
        for name in set(self.held) - resident:
            assert self.uses.pop(name) == 0, "an adapter in use was evicted"
            del self.held[name]

    @rule(data=st.data())
    def use(self, data):
        if self.held:
            name = data.draw(st.sampled_from(sorted(self.held)))
            self.bank.acquire(name)
            self.uses[name] += 1

    @rule(data=st.data())
    def release(self, data):
        if names := sorted(n for n, uses in self.uses.items() if uses):
            name = data.draw(st.sampled_from(names))
            self.bank.release(name)
            self.uses[name] -= 1

    @rule(data=st.data())
    def unload(self, data):
        if not self.held:
            return
        name = data.draw(st.sampled_from(sorted(self.held)))
        if self.uses[name]:
            with pytest.raises(ValueError, match="is used by"):
                self.bank.unload(name)
        else:
            self.bank.unload(name)
            del self.held[name], self.uses[name]

    @rule(data=st.data())
    def lend(self, data):
        if self.held:
            names = data.draw(st.lists(st.sampled_from(sorted(self.held)), min_size=1, unique=True))
            module = data.draw(st.sampled_from(sorted(SIZES)))
            if (found := self.bank.factors(module, names)) is not None:
                layers = [self.held[name].layers.get(module) for name in names]
                self.lent.append((found, join_factors(layers, torch.float32)))

    @rule(data=st.data())
    def give_back(self, data):
        if self.lent:
            del self.lent[data.draw(st.integers(0, len(self.lent) - 1))]

    @invariant()
    def what_is_lent_stays_as_it_was(self):
        for found, expected in self.lent:
            assert_same(replace(found), expected)  # a copy, which gathers the pages anew

    @invariant()
    def is_whole(self):
        assert_holds(self.bank, list(self.held.values()))
        assert self.bank.used_bytes <= 3000
        assert {r.identity: r.uses for r in self.bank.residents} == self.uses


BankMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
TestBank = BankMachine.TestCase


def test_the_least_recently_used_leaves_first():
    one, two, three = (adapter(name) for name in ("1", "2", "3"))
    bank = AdapterBank(specs(), budget=2 * one.nbytes)
    bank.load(one)
    bank.load(two)
    bank.load(one)  # used again
    bank.load(three)
    assert_holds(bank, [one, three])
    assert bank.evictions == 1


def test_what_is_pinned_or_in_use_never_leaves():
    one, two, three = (adapter(name) for name in ("1", "2", "3"))
    bank = AdapterBank(specs(), budget=2 * one.nbytes)
    bank.load(one, pinned=True)
    bank.load(two)
    bank.acquire("2")
    with pytest.raises(OutOfBudgetError, match="does not fit"):
        bank.load(three)
    assert_holds(bank, [one, two])
    bank.release("2")
    bank.load(three)
    assert_holds(bank, [one, three])
    assert [(r.identity, r.pinned) for r in bank.residents] == [("1", True), ("3", False)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_memory_is_that_of_the_ranks(dtype):
    bank = AdapterBank(specs(dtype))
    expected = 0
    for n in range(32):
        pairs, rank = n % 3, n % 5 or 1
        bank.load(adapter(str(n), pairs=pairs, rank=rank, bias=n % 2 == 0))
        for out, inner in (SIZES["up"], SIZES["down"]):
            expected += pairs * pair_bytes(out, inner, dtype)
            expected += dtype.itemsize * rank * (out + inner)
            expected += dtype.itemsize * out * (n % 2 == 0)
    assert bank.used_bytes == expected
    assert expected <= bank.held_bytes <= 1.05 * expected
    assert sum(r.nbytes for r in bank.residents) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_of_every_kind_is_that_of_its_ranks(dtype):
    """Within 5% of those of all pairs, ranks and biases, while adapters come and go."""
    base = ModelBase(zoo.build("Qwen2").to(dtype))
    bank = AdapterBank(base.specs)
    specs = parse_specs(MIXED + "+LORA:3+FLORA:4", 1)
    made = [spec.adapter(base, seed) for seed in range(8) for spec in specs]
    held, waiting = made[:60], made[60:]
    for one in held:
        bank.load(one)
    for one in waiting:
        bank.unload(held.pop(0).identity)
        bank.load(one)
        held.append(one)
    expected = 0
    for one in held:
        for module, factors in one.layers.items():
            out, n = base.shapes[module]
            expected += factors.pairs * pair_bytes(n, out, dtype)
            expected += dtype.itemsize * factors.rank * (n + out)
            expected += 0 if factors.bias is None else dtype.itemsize * out
    assert bank.used_bytes == expected
    assert expected <= bank.held_bytes <= 1.05 * expected


@given(
    center=st.sampled_from([0.0, 0.25, 1.0, -3.0, 1e4]),
    spread=st.sampled_from([0.0, 1e-6, 0.1, 2.0]),
    seed=st.integers(0, 99),
)
def test_hadamard_pages_in_bf16_are_off_by_what_their_distance_from_the_median_rounds_to(
    center, spread, seed
):
    bank = AdapterBank(specs(torch.bfloat16))
    made = adapter(str(seed), pairs=3)
    for part in (made.layers["up"].hadamard_in, made.layers["up"].hadamard_out):
        part[0] = 1
        part[1:] = center + spread * (part[1:] - 1)
    bank.load(made)
    bank.load(adapter("other", pairs=2))
    bank.unload(str(seed))  # pages move
    bank.load(made)
    exact = join_factors([None, made.layers["up"]], torch.bfloat16).scales
    lent = bank.factors("up", [None, str(seed)])
    for found, true in zip(lent.scales, exact, strict=True):
        median = true.median(dim=1, keepdim=True).values
        # bf16 rounds by 2^-8: the distance, and the median that it is from.
        allowed = 2**-8 * ((true - median).abs() + 2**-8 * median.abs()) + 2**-24 * true.abs()
        assert ((found - true).abs() <= 1.001 * allowed).all()
        assert (found[0] == 1).all()
    bank.check_integrity()


def test_a_factor_beyond_the_layers_type_is_refused():
    bank = AdapterBank(specs(torch.float16))
    good, bad = adapter("a", rank=2), adapter("b", rank=2)
    bank.load(good)
    bad.layers["up"].up[0, 0] = 1e5
    with pytest.raises(InvalidAdapterError, match="up low_rank: 100000 is beyond float16"):
        bank.load(bad)
    held = AdapterBank(specs(torch.float16))
    held.load(good)
    assert [r.identity for r in bank.residents] == ["a"]
    assert_same(bank.factors("up", ["a"]), held.factors("up", ["a"]))


def test_unloading_frees_memory():
    bank = AdapterBank(specs())
    for n in range(16):
        bank.load(adapter(str(n), rank=4))
    full = bank.held_bytes
    for n in range(15):
        bank.unload(str(n))
    assert bank.held_bytes <= full / 4
    assert_holds(bank, [adapter("15", rank=4)])


def test_a_budget_bounds_the_pools_of_all_layers_together():
    ups = [adapter(f"u{n}", ["up"], pairs=4) for n in range(4)]
    downs = [adapter(f"d{n}", ["down"], pairs=4) for n in range(4)]
    budget = sum(a.nbytes for a in ups)
    bank = AdapterBank(specs(), budget=budget)
    for a in [*ups, *downs, *ups]:
        bank.load(a)
        assert bank.held_bytes <= budget * 1.05
    assert_holds(bank, ups)


def test_pages_are_used_again_when_no_batch_has_them():
    bank = AdapterBank(specs())
    for name in ("1", "2", "3"):
        bank.load(adapter(name, pairs=2))
    tensors = pool_of(bank).tensors
    lent = bank.factors("up", ["1"])
    del lent
    bank.unload("1")
    bank.load(adapter("4", pairs=2))
    assert pool_of(bank).tensors is tensors
    lent = bank.factors("up", ["2"])
    bank.unload("2")
    bank.load(adapter("5", pairs=2))
    kept = [pool[lent.hadamard.index] for pool in lent.hadamard.pools]
    two = adapter("2", pairs=2).layers["up"]
    assert all(map(torch.equal, kept, (two.hadamard_in, two.hadamard_out)))


def test_a_pool_moves_seldom():
    """An engine would stop for as long; on a CPU, what a pool has in reserve takes no memory."""
    bank = AdapterBank(specs())
    rooms = set()
    for n in range(200):
        bank.load(adapter(str(n), pairs=3))
        pool = pool_of(bank)
        rooms.add(len(pool.tensors[0]))
        assert pool.capacity == 3 * (n + 1)
        assert bank.held_bytes == bank.used_bytes
    assert len(rooms) <= 9


def test_a_full_budget_does_not_move_the_pools():
    """Each adapter that comes takes the pages of the one that leaves."""
    size = adapter("0", pairs=2).nbytes
    bank = AdapterBank(specs(), budget=4 * size)
    for n in range(4):
        bank.load(adapter(str(n), pairs=2))
    tensors = pool_of(bank).tensors
    for n in range(4, 20):
        bank.load(adapter(str(n), pairs=2))
        assert pool_of(bank).tensors is tensors
        assert bank.held_bytes == 4 * size
    assert_holds(bank, [adapter(str(n), pairs=2) for n in range(16, 20)])


def test_a_pool_stays_where_adapters_are_now_more_now_fewer():
    """With room again, once it has moved to less."""
    bank = AdapterBank(specs())

    def fill(first, last):
        for n in range(first, last):
            bank.load(adapter(str(n), pairs=2))

    fill(0, 16)
    tensors = pool_of(bank).tensors
    for n in range(11):
        bank.unload(str(n))
    fill(16, 27)
    assert pool_of(bank).tensors is tensors
    for n in range(11, 24):
        bank.unload(str(n))
    tensors = pool_of(bank).tensors
    assert pool_of(bank).capacity == 2 * 3
    fill(27, 30)
    assert pool_of(bank).tensors is tensors


def test_layers_of_one_size_share_their_pools():
    """So an adapter comes with few copies, and what one layer leaves another one takes."""
    bank = AdapterBank(specs())
    up, twin = adapter("1", ["up"], pairs=2), adapter("2", ["twin"], pairs=2)
    bank.load(up)
    bank.load(adapter("3", ["up", "twin", "square"], pairs=1))
    assert len(bank._pools) == 2
    tensors, capacity = pool_of(bank).tensors, pool_of(bank).capacity
    bank.unload("1")
    bank.load(twin)
    assert pool_of(bank).tensors is tensors
    assert pool_of(bank).capacity == capacity == 4
    assert_holds(bank, [adapter("3", ["up", "twin", "square"], pairs=1), twin])


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize("grad", [False, True])
def test_a_prepared_layer_keeps_what_it_was_lent(backend, grad):
    bank = AdapterBank(specs())
    bank.load(adapter("1"))
    bank.load(adapter("2"))
    weight, x = torch.randn(7, 5), torch.randn(1, 3, 5, requires_grad=grad)

    def again(linear):
        y = linear(x)
        return [y, *(torch.autograd.grad(y.sum(), x, retain_graph=True) if grad else ())]

    linear = prepare(
        x,
        lambda x: F.linear(x, weight),
        bank.factors("up", ["1"]),
        [0],
        weight=weight,
        backend=backend,
    )
    before, pending = again(linear), linear(x)
    bank.unload("1")
    bank.load(adapter("3"))
    for ours, theirs in zip(again(linear), before, strict=True):
        assert torch.equal(ours, theirs)
    del linear
    bank.unload("2")
    bank.load(adapter("4"))
    if grad:
        assert torch.equal(torch.autograd.grad(pending.sum(), x)[0], before[1])


def test_a_slot_that_is_used_again_holds_nothing_of_its_last_tenant():
    bank = AdapterBank(specs())
    bank.load(adapter("1", pairs=3, rank=3, bias=True))
    bank.load(adapter("2", pairs=1))
    bank.unload("1")
    three = adapter("3", pairs=2)
    bank.load(three)
    assert_holds(bank, [adapter("2", pairs=1), three])
    for pool in bank._pools.values():
        for tensor in pool.tensors:
            tensor[pool.free] = float("nan")
    assert_holds(bank, [adapter("2", pairs=1), three])


def test_a_load_that_fails_changes_nothing(monkeypatch):
    one = adapter("1", rank=2)
    bank = AdapterBank(specs())
    bank.load(one)
    wrong = Adapter(kind="X", identity="w", layers={"up": LayerFactors(bias=torch.zeros(9))})
    stranger = Adapter(kind="X", identity="s", layers={"else": LayerFactors(bias=torch.zeros(9))})
    for bad, said in ((wrong, r"found widths \[9\], expected \[7\]"), (stranger, "no such linear")):
        with pytest.raises(InvalidAdapterError, match=said):
            bank.load(bad)
        assert_holds(bank, [one])

    put, puts = _Pool.put, []

    def run_out(pool, *args):
        puts.append(pool)
        if len(puts) == 3:
            raise MemoryError
        put(pool, *args)

    monkeypatch.setattr(_Pool, "put", run_out)
    with pytest.raises(MemoryError):
        bank.load(adapter("2", rank=2))
    assert_holds(bank, [one])


def test_only_residents_can_be_used():
    bank = AdapterBank(specs())
    for call in (bank.acquire, bank.release, bank.unload, lambda i: bank.factors("up", [i])):
        with pytest.raises(UnknownAdapterError, match="not resident"):
            call("nobody")
    bank.load(adapter("1"))
    with pytest.raises(ValueError, match="not in use"):
        bank.release("1")


@pytest.mark.parametrize("damage", ["leak", "double", "stray"])
def test_the_check_notices(damage):
    bank = AdapterBank(specs())
    bank.load(adapter("1", pairs=2))
    pool = pool_of(bank)
    whole = pool.held["1"]
    if damage == "leak":
        pool.held["1"] = whole._replace(pages=whole.pages[:1])
    elif damage == "double":
        pool.free.append(int(whole.pages[0]))
    else:
        first, second = (whole._replace(pages=pages) for pages in np.split(whole.pages, 2))
        pool.held |= {"1": first, "2": second}
    with pytest.raises(RuntimeError):
        bank.check_integrity()
    pool.held = {"1": whole}
    pool.free = list(range(2, pool.capacity))
    bank.check_integrity()


def test_a_pool_that_cannot_grow_keeps_what_it_holds(monkeypatch):
    """Memory runs out at the second of a pool's two tensors."""
    one, two = adapter("1", pairs=2), adapter("2", pairs=3)
    bank = AdapterBank(specs())
    bank.load(one)
    bank.load(two)
    bank.unload("1")  # what is held lies behind a free page
    room, made = bank_module._room, []

    def run_out(*args):
        made.append(args)
        if len(made) == 2:
            raise MemoryError
        return room(*args)

    monkeypatch.setattr(bank_module, "_room", run_out)
    with pytest.raises(MemoryError):
        bank.load(adapter("3", pairs=9))
    assert_holds(bank, [two])
