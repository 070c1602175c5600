"""Systems measured in turns, A B A B …, so that a machine that slows down slows all of them."""

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import NamedTuple

from flora.errors import UsageError

MOST_TURNS = 200

WARM_SECONDS = 1e-2
"""In so long a layer's weights are in the caches again, if they fit: some runs, not one."""


class Turns(NamedTuple):
    """The seconds of a system's counted turns, and those of what it is held against in each."""

    own: list[float]
    base: list[float]

    @property
    def ratio(self) -> float:
        return speed_ratio(self.own, self.base)


def measure_in_turns(
    systems: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    least_seconds: float = 0.0,
    warm: bool = False,
    after_turn: Callable[[str], None] = lambda _: None,
) -> dict[str, list[float]]:
    """The seconds of each system's counted turns, after one turn that is not counted.

    systems:       for each what is measured; it returns when the work is done.
    repeats:       counted turns, at least.
    least_seconds: turns go on until all of them took so long, as short ones are noisy.
    warm:          whether each turn runs first without being counted, until the caches no longer
                   hold what another system left there, which decides short times.
    after_turn:    told the system's name after each turn, the first as well.
    """
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    begin = time.perf_counter()
    turns = 0
    while turns <= repeats or (
        time.perf_counter() - begin < least_seconds and turns <= max(repeats, MOST_TURNS)
    ):
        for name, run in systems.items():
            if warm:
                _warm_up(run)
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
            after_turn(name)
        turns += 1
    return {name: values[1:] for name, values in seconds.items()}


def measure_beside(
    base: Callable[[], object],
    systems: Mapping[str, Callable[[], object]],
    alone: Mapping[str, Callable[[], object]] = {},
    *,
    repeats: int,
    after_turn: Callable[[str], None] = lambda _: None,
) -> dict[str, Turns]:
    """The turns of systems that each have a run of the base in front, and all of these as "base".

    A turn of many systems takes minutes, in which a machine may change its speed.

    alone: what runs in the same turns without the base in front; it stands beside itself.
    """
    runs: dict[str, Callable[[], object]] = {}
    for name, run in systems.items():
        runs |= {base_of(name): base, name: run}
    seconds = measure_in_turns({**runs, **alone}, repeats=repeats, after_turn=after_turn)
    turns = {name: Turns(seconds[name], seconds[base_of(name)]) for name in systems}
    of_base = [second for own in turns.values() for second in own.base]
    itself = {"base": of_base} | {name: seconds[name] for name in alone}
    return turns | {name: Turns(own, own) for name, own in itself.items()}


def base_of(system: str) -> str:
    """What the runs of the base in front of a system are called."""
    return f"the base beside {system}"


def _warm_up(run: Callable[[], object]) -> None:
    start = time.perf_counter()
    while True:
        run()
        if time.perf_counter() >= start + WARM_SECONDS:
            return


def check_systems(systems: Sequence[str], known: Sequence[str]) -> None:
    """Raises UsageError for a system that a study does not know."""
    if unknown := [name for name in systems if name not in known]:
        raise UsageError(f"no such systems: {', '.join(unknown)}; there are {', '.join(known)}")


def speed_ratio(system: Sequence[float], base: Sequence[float]) -> float:
    """How fast a system is beside another: the median over the turns, each beside its neighbour."""
    return median(theirs / own for own, theirs in zip(system, base, strict=True))
