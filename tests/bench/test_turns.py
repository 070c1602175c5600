"""Turns: A B A B, the first not counted; ratios of neighbours."""

import pytest

from flora.bench import turns
from flora.bench.turns import measure_beside, measure_in_turns, speed_ratio


class Clock:
    """Time that only what is measured spends."""

    def __init__(self) -> None:
        self.now = 0.0
        self.ran: list[str] = []

    def perf_counter(self) -> float:
        return self.now

    def system(self, name: str, *seconds: float):
        left = list(seconds)

        def run() -> None:
            self.ran.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(turns, "time", clock)
    return clock


def test_the_first_turn_does_not_count(clock):
    systems = {"a": clock.system("a", 100.0, 1.0, 2.0), "b": clock.system("b", 50.0, 3.0)}
    told: list[str] = []
    found = measure_in_turns(systems, repeats=2, after_turn=told.append)
    assert found == {"a": [1.0, 2.0], "b": [3.0, 3.0]}
    assert clock.ran == told == ["a", "b"] * 3


def test_short_turns_go_on(clock):
    found = measure_in_turns({"a": clock.system("a", 0.5)}, repeats=1, least_seconds=3.0)
    assert len(found["a"]) == 5
    found = measure_in_turns({"a": clock.system("a", 0.0)}, repeats=1, least_seconds=3.0)
    assert len(found["a"]) == turns.MOST_TURNS


def test_a_warm_turn_counts_once_the_caches_are_warm(clock):
    cold, warm = 0.6 * turns.WARM_SECONDS, 0.1 * turns.WARM_SECONDS
    for seconds, runs in ((9.0, 9.0, 9.0, warm), 4), ((cold, cold, 9.0, cold, cold, warm), 6):
        clock.ran.clear()
        found = measure_in_turns({"a": clock.system("a", *seconds)}, repeats=1, warm=True)
        assert (found["a"], len(clock.ran)) == ([pytest.approx(warm)], runs)


def test_a_ratio_is_that_of_neighbours():
    # The machine is three times slower in its second half; the system is twice as slow as the base.
    assert speed_ratio([2, 2, 6, 6, 6], [1, 1, 3, 3, 3]) == 0.5


def test_the_base_runs_in_front_of_each_system(clock):
    base = clock.system("base", 1.0, 1.0, 2.0, 4.0)
    systems = {"a": clock.system("a", 2.0), "b": clock.system("b", 8.0)}
    found = measure_beside(base, systems, repeats=1)
    assert clock.ran == ["base", "a", "base", "b"] * 2
    assert {name: found[name].ratio for name in systems} == {"a": 1.0, "b": 0.5}
    assert found["base"].own == [2.0, 4.0]
    assert found["base"].ratio == 1.0
