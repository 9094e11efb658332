"""A window of 1024 and four sinks on a CPU: attend against torch's dense causal attention; memory by length.

8 heads of 64, float32, N = 16,384. Floor: the pattern's share of causal FLOPs. Equal outputs are checked first. The
two are timed in turn, on two cores by the clock (only if nothing else is running) and on one by processor time; the
ratio is that of the medians, with its extremes over the rounds.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

from regard.attend import attend
from regard.evidence.record import machine, versions
from regard.patterns import attention_sink, causal, sliding_window

PATTERN = causal() & (sliding_window(1024) | attention_sink(4))
ROUNDS = 7
Figures = dict[str, float]
PEAK = """
import sys, torch
sys.path.insert(0, {folder!r})
from window_cpu import PATTERN
from regard.attend import attend
def peak():  # of this process alone: ru_maxrss begins with the peak of the process that started it
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
torch.set_num_threads(1)
q, k, v = (torch.randn(1, 8, {n}, 64, requires_grad=True) for _ in range(3))
before = peak()
attend(q, k, v, pattern=PATTERN).sum().backward()
print(peak() - before)
"""


def in_turn(ours: Callable[[], object], dense: Callable[[], object], clock: Callable[[], float]) -> Figures:
    """Seconds of both, medians over the rounds, and dense ÷ ours."""

    def timed(function: Callable[[], object]) -> float:
        start = clock()
        function()
        return clock() - start

    rounds = [(timed(ours), timed(dense)) for _ in range(ROUNDS)]
    a, b = (statistics.median(times) for times in zip(*rounds, strict=True))
    ratios = [y / x for x, y in rounds]
    return {"attend_s": a, "dense_causal_s": b, "ratio": b / a, "ratio_least": min(ratios), "ratio_most": max(ratios)}


def peak_mib(n: int) -> float:
    """Growth of the peak resident set over forward and backward, in a process of its own."""
    code = PEAK.format(folder=str(Path(__file__).parent), n=n)
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout) / 1024


@torch.no_grad()
def main() -> None:
    n = 16384
    q, k, v = (torch.randn(1, 8, n, 64) for _ in range(3))
    small = [x[:, :, :3000] for x in (q, k, v)]
    truth = attend(*(x.double() for x in small), pattern=PATTERN, backend="reference")
    assert (attend(*small, pattern=PATTERN) - truth).abs().max() < 1e-5
    ours, dense = (
        (lambda: attend(q, k, v, pattern=PATTERN)),
        (lambda: scaled_dot_product_attention(q, k, v, is_causal=True)),
    )
    figures: dict[str, Figures | None] = {"two_cores": None}
    if os.getloadavg()[0] < 1:
        torch.set_num_threads(2)
        ours(), dense()
        figures["two_cores"] = in_turn(ours, dense, time.perf_counter)
    else:
        print(f"two cores: not measured, the machine is at work (load {os.getloadavg()[0]:.1f})")
    torch.set_num_threads(1)
    figures["one_core"] = in_turn(ours, dense, time.process_time)
    share = PATTERN.cost(n).entries / (n * (n + 1) / 2)
    for name, found in figures.items():
        if found is None:
            continue
        found["floor_s"] = found["dense_causal_s"] * share
        print(name, {key: round(value, 3) for key, value in found.items()})
    memory = {length: round(peak_mib(length), 1) for length in (16384, 32768, 65536)}
    print("peak MiB forward+backward", memory)
    result = {
        "n": n,
        "figures": figures,
        "peak_mib": memory,
        "load": os.getloadavg()[0],
        "machine": machine(),
        "versions": versions(),
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
