"""How every benchmark takes its samples: by a clock, and in turns."""

import time
from collections.abc import Callable, Mapping
from typing import TypeVar

Taken = TypeVar("Taken")


def timed(call: Callable[[], Taken], clock: Callable[[], float] = time.perf_counter) -> tuple[Taken, float]:
    """Call, and return the result with the seconds it took by the clock."""
    begin = clock()
    result = call()
    return result, clock() - begin


def take_turns(calls: Mapping[str, Callable[[], Taken]], rounds: int, warmup: int = 0) -> dict[str, list[Taken]]:
    """Call everything once per round, so that other work on the machine slows all alike. Returns the results of each
    call by its name, without those of the first `warmup` rounds."""
    taken: dict[str, list[Taken]] = {name: [] for name in calls}
    for _ in range(warmup + rounds):
        for name, call in calls.items():
            taken[name].append(call())
    return {name: results[warmup:] for name, results in taken.items()}
