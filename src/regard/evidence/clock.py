"""Time on the CPU, in milliseconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping


def cpu_milliseconds(works: Mapping[str, Callable[[], object]], *, rounds: int = 5) -> dict[str, float]:
    """Least time of each of `works`, after one call that counts for nothing.

    They take turns, so that a busy machine is busy for all of them; the least is what the machine can do.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            begin = time.perf_counter()
            work()
            if number:
                times[name].append(1000 * (time.perf_counter() - begin))
    return {name: min(values) for name, values in times.items()}
