"""Time on the GPU, in milliseconds."""

from __future__ import annotations

from collections.abc import Callable

import torch


def milliseconds(work: Callable[[], object], *, warm_up: int = 3, rounds: int = 10) -> float:
    """Median time of `work` between CUDA events, after `warm_up` calls that count for nothing."""
    for _ in range(warm_up):
        work()
    times = []
    for _ in range(rounds):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return float(torch.tensor(times).median())
