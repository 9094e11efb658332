"""Combiner: every earlier token keeps a weight above zero, at a cost between linear and quadratic; and what waits."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from regard.attend import attend
from regard.evidence.claim import Measured, Settings, claim, later, verdict
from regard.evidence.clock import cpu_milliseconds
from regard.layers.combiner import PAPER
from regard.layers.combiner_regions import Pooling, axial, fixed, logsparse
from regard.patterns import causal


@claim(
    "combiner/full-support",
    paper=PAPER,
    statement="every token attends to all it may see, with the cost of sparse attention",
    figure="full attention capability in O(L√L) (fixed, axial) or O(L log L) (logsparse)",
    measurement="weights of each query over 1024 tokens, causal, random q and k in float64, for the fixed, axial and "
    "logsparse regions; operations of the fixed ones with segments of √N, 1k to 16k tokens, as the power of the length "
    "(least squares on logarithmic axes); time of one forward at 16k tokens in float32 on the CPU, 2 heads of 64, "
    "beside the fused dense causal attention of torch",
    unit="power of the length",
    tolerance="weights above zero for all j ≤ i and no others, sums 1 to 1e-9, under all three; power at most 1.6; "
    "fixed faster than dense at 16k; partly: all but the time",
    needs="cpu",
    minutes=0.5,
)
@torch.no_grad()
def full_support(settings: Settings) -> Measured:
    n = settings.pick(1024, 64)
    generator = torch.Generator().manual_seed(settings.seed)
    q, k = torch.randn(2, 1, 1, n, 64, dtype=torch.float64, generator=generator)
    allowed = torch.ones(n, n, dtype=torch.bool).tril()
    least, support = {}, True
    for name in ("fixed", "axial", "logsparse"):
        weights = _mixed(name, q, k, torch.eye(n, dtype=torch.float64)[None, None], math.isqrt(n))[0, 0]
        least[name] = float(weights[allowed].min())
        support &= least[name] > 0 and not weights[~allowed].any() and bool(((weights.sum(-1) - 1).abs() < 1e-9).all())

    lengths = settings.pick((1024, 2048, 4096, 8192, 16384), (64, 128))
    operations = []
    for length in lengths:
        x = torch.empty(1, 1, length, 64, device="meta")
        with FlopCounterMode(display=False) as counter:
            _mixed("fixed", x, x, x, math.isqrt(length))
        operations.append(counter.get_total_flops())
    power = _slope(lengths, operations)
    q, k, v = torch.randn(3, 1, 2, lengths[-1], 64, generator=generator)
    works: dict[str, Any] = {
        name: partial(_mixed, name, q, k, v, math.isqrt(lengths[-1])) for name in ("fixed", "logsparse")
    }
    times = cpu_milliseconds({**works, "dense": partial(attend, q, k, v, pattern=causal(), backend="sdpa")}, rounds=3)
    cheap = support and power <= 1.6
    word = verdict(reproduced=cheap and times["fixed"] < times["dense"], partly=cheap)
    why = (
        f"{'full support, and nothing beyond it' if support else 'not full support'}; operations grow with the length "
        f"to the power {power:.2f}; at {lengths[-1]} tokens "
        + ", ".join(f"{name} {value:.0f} ms" for name, value in times.items())
    )
    details = {"least weight": least, "operations": dict(zip(lengths, operations, strict=True)), "ms": times}
    return Measured(power, word, why, details)


def _mixed(name: str, q: Tensor, k: Tensor, v: Tensor, size: int) -> Tensor:
    real = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool, device=q.device)
    if name == "fixed":
        return fixed(q, k, v, real, size, Pooling(), causal=True)[0]
    return axial(q, k, v, real, size, Pooling()) if name == "axial" else logsparse(q, k, v, real, Pooling())


def _slope(lengths: tuple[int, ...], values: list[int]) -> float:
    """Of the line of least squares through (ln length, ln value)."""
    x = torch.tensor(lengths, dtype=torch.float64).log()
    y = torch.tensor(values, dtype=torch.float64).log()
    x = x - x.mean()
    return float((x * y).sum() / (x * x).sum())


later(
    "combiner/likelihood",
    paper=PAPER,
    statement="better likelihood than sparse attention of the same cost",
    figure="better likelihood than other sparse attention on images and text",
    needs="training of language models over characters (2 layers of width 128 on 512 characters), one with the fixed "
    "regions and one with its segments alone",
)
