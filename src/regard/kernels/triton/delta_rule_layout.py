"""What the delta rule's kernels share: how they are launched, and the decays of a chunk."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched: columns it takes at a time, warps, pipeline stages."""

    columns: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Launches:
    """The four kernels, and the longest chunk they are given. What `columns` counts:

    factors: channels of keys per step. scan, reverse: values of the state that one program holds.
    gradients: values per step; `channels`: channels of keys that one program of it gives gradients for.
    merge: precision in which blocks of the inverse are put together. products: of all other products."""

    factors: Launch
    scan: Launch
    reverse: Launch
    gradients: Launch
    channels: int = 128
    chunk: int = 64
    merge: str = "tf32x3"
    products: str = "tf32"  # half precision has but one


@lru_cache(maxsize=64)
def launches(rows: int, columns: int, dtype: torch.dtype) -> Launches:
    """By the shape of the state, rows (Dk) × columns (Dv), so that its tiles stay in registers.

    Float32 takes small ones: its exact products keep both factors there."""
    wide = max(16, triton.next_power_of_2(columns))
    tall = max(16, triton.next_power_of_2(rows))
    if dtype == torch.float32:
        thin = Launch(16, 8, 1)
        short = 32 if tall <= 128 else 16
        return Launches(Launch(min(tall, 32), 4, 1), thin, thin, thin, min(tall, 64), short, "ieee", "ieee")
    column = Launch(min(wide, 64 if tall <= 64 else 32), 4 if tall <= 128 else 8, 2)
    channels = min(tall, 128)
    return Launches(Launch(channels, 4, 1), column, column, Launch(min(wide, 32), 8, 2), channels)


def strides(*tensors: Tensor) -> list[int]:
    return [s for x in tensors for s in x.stride()[:3]]


def compiled_for(q: Tensor, chunk: int, how: Launches) -> dict[str, Any]:
    """The chunk, the block of keys' channels and the precision that a kernel with the whole state is compiled for."""
    return {"C": chunk, "BK": max(16, triton.next_power_of_2(q.shape[3])), "PRECISION": how.products}


@triton.jit
def decays(base, at, step, index, end):
    """Of the chunk from token `at`: (b, r, forgets), each over `index`.

    b: running sum of the log decays in base 2; r: how many tokens so far forget everything (bool `forgets`).
    A log decay under −80 (e^−80 = 2e-35) counts as −inf and is left out of b, so that no difference of infinities
    arises and no exponent between two tokens of one r is ever positive."""
    g = tl.load(base + (at + index).to(tl.int64) * step, mask=at + index < end, other=0.0).to(tl.float32)
    forgets = g < -80.0
    return tl.cumsum(tl.where(forgets, 0.0, g * 1.4426950408889634), 0), tl.cumsum(forgets.to(tl.int32), 0), forgets


@triton.jit
def between(b, r, later, earlier, TRANSPOSED: tl.constexpr):
    """Γ (later, earlier) = 2^{b_i − b_j} for i ≥ j with nothing forgotten after j, else 0; or its transpose."""
    if TRANSPOSED:
        allowed = (earlier[:, None] <= later[None]) & (r[:, None] == r[None])
        return tl.exp2(tl.where(allowed, b[None] - b[:, None], -float("inf")))
    allowed = (later[:, None] >= earlier[None]) & (r[:, None] == r[None])
    return tl.exp2(tl.where(allowed, b[:, None] - b[None], -float("inf")))
