"""Systems measured in turns, A B A B …, so that a machine that slows down slows all of them."""

import time
from collections.abc import Callable, Mapping
from statistics import median


def tokens_per_second(
    systems: Mapping[str, Callable[[], int]],
    *,
    repeats: int,
    after_turn: Callable[[str], None] = lambda _: None,
) -> dict[str, float]:
    """The median speed of each system, after one turn that is not counted.

    systems:    for each a function that generates and returns how many tokens that were.
    repeats:    counted turns.
    after_turn: told the system's name after each turn, the first as well.
    """
    speeds: dict[str, list[float]] = {name: [] for name in systems}
    for _ in range(1 + repeats):
        for name, run in systems.items():
            start = time.perf_counter()
            tokens = run()
            speeds[name].append(tokens / (time.perf_counter() - start))
            after_turn(name)
    return {name: median(values[1:]) for name, values in speeds.items()}
