"""Time on the GPU, in milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil

import torch

ROUND = 20.0
"""Milliseconds that a round lasts at least, as long as MOST calls suffice for it."""
MOST = 20
LONG = 50.0
"""Milliseconds of one call from which one call warms up and three rounds are enough."""


def milliseconds(work: Callable[[], object], *, warm_up: int = 3, rounds: int = 10) -> float:
    """Median time of `work` between CUDA events, after `warm_up` calls that count for nothing.

    Short work is queued several times in a round, so that the GPU's time is measured and not the time until it begins:
    what Python does for one call is hidden behind the call before, wherever the GPU is the slower of the two.
    """
    work()
    once = _row(work, 1)
    if once >= LONG:
        rounds = min(rounds, 3)
    else:
        for _ in range(warm_up - 2):
            work()
        once = _row(work, 1)
    calls = min(MOST, max(1, ceil(ROUND / max(once, 1e-3))))
    return float(torch.tensor([_row(work, calls) for _ in range(rounds)]).median())


def _row(work: Callable[[], object], calls: int) -> float:
    """Milliseconds a call."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    for _ in range(calls):
        work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / calls
