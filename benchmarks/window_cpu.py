"""A window of 1024 and four sinks on a CPU: attend against torch's dense causal attention; memory by length.

8 heads of 64, float32, N = 16,384. Floor: the pattern's share of causal FLOPs. Equal outputs are checked first.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

from regard.attend import attend
from regard.evidence.record import machine, versions
from regard.patterns import attention_sink, causal, sliding_window

PATTERN = causal() & (sliding_window(1024) | attention_sink(4))
PEAK = """
import resource, sys, torch
sys.path.insert(0, {folder!r})
from window_cpu import PATTERN
from regard.attend import attend
q, k, v = (torch.randn(1, 8, {n}, 64, requires_grad=True) for _ in range(3))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
attend(q, k, v, pattern=PATTERN).sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def seconds(function: object, rounds: int = 3) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()  # type: ignore[operator]
        times.append(time.perf_counter() - start)
    return statistics.median(times)


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
    start = time.perf_counter()
    attend(q, k, v, pattern=PATTERN)
    first = time.perf_counter() - start
    ours = seconds(lambda: attend(q, k, v, pattern=PATTERN))
    dense = seconds(lambda: scaled_dot_product_attention(q, k, v, is_causal=True))
    floor = dense * PATTERN.cost(n).entries / (n * (n + 1) / 2)
    memory = {length: round(peak_mib(length), 1) for length in (16384, 32768, 65536)}
    figures = {"attend_s": ours, "first_call_s": first, "dense_causal_s": dense, "floor_s": floor}
    figures["ratio"] = dense / ours
    print({name: round(value, 3) for name, value in figures.items()}, "peak MiB forward+backward", memory)
    result = {"n": n, "figures": figures, "peak_mib": memory, "machine": machine(), "versions": versions()}
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
