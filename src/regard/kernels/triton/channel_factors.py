"""A diagonal decay per channel, within a chunk: all that does not depend on the state, for any decay ≤ 0.

Every exponent here is a sum of log decays, never a difference, so none is above 0 and −inf needs no care. For pairs of
tokens i > j that lie in neighbouring halves of a block (of 2, 4, …, C tokens), the middle m between the halves is the
reference,

    e^{b_i − b_j} = e^{b_i − b_m} e^{b_m − b_j} ,      b: running sum of the log decays

both factors at most 1. Each pair belongs to one size of block, and so P_ij = Σ_d q_id k_jd e^{b_id − b_jd} is, size by
size, X Xᵀ for the pairs of that size, where X has q e^{b_i − b_m} in the later halves and k e^{b_m − b_j} in the
earlier.

The sums are products with matrices of 0 and 1 (`segments`). For products in half precision the log decay is split into
two bfloat16 numbers, 16 bits of mantissa. In base 2 it counts as −160 at least: 2^−160 is zero in float32.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from regard.kernels.triton.loads import tile


@lru_cache(maxsize=8)
def segments(levels: int, exact: bool, device: torch.device) -> Tensor:
    """Which s the sum of token i contains, (levels + 2, C, C) of 0 and 1, C = 2^levels. Of each level, from the
    start of a later half up to i, or after i up to the end of an earlier half; then all after i, and all up to i."""
    c = torch.arange(1 << levels, device=device)
    i, s = c[:, None], c[None]
    found = [((i >> level) == (s >> level)) & (((i >> level) & 1 == 1) == (s <= i)) for level in range(levels)]
    return torch.stack([*found, s > i, s <= i]).to(torch.float32 if exact else torch.bfloat16)


@triton.jit
def log_decays(base, at, step, index, dims, end, width):
    """Base 2, (index, dims) float32; 0 outside."""
    return tl.maximum(tile(base, at, step, index, dims, end, width).to(tl.float32) * 1.4426950408889634, -160.0)


@triton.jit
def later_half(index, level):
    """Of blocks whose halves are 2^level tokens."""
    return ((index >> level) & 1) == 1


@triton.jit
def apart(i, j, level):
    """Whether i and j are in different halves of one block."""
    return (i >> level) == ((j >> level) ^ 1)


@triton.jit
def split(x, EXACT: tl.constexpr):
    """x ≈ high + low, both bfloat16; EXACT: x itself, twice."""
    if EXACT:
        return x, x
    else:
        high = x.to(tl.bfloat16)
        return high, (x - high.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def sums(weights, high, low, EXACT: tl.constexpr):
    """weights (C, C) times what was `split`: (C, dims) float32."""
    if EXACT:
        return tl.dot(weights, high, input_precision="ieee")
    else:
        return tl.dot(weights, low, tl.dot(weights, high))


@triton.jit
def channel_factors(
    Q, K, G, Factors, Kept, P, Segments, Table,
    sqb, sqh, sqn, skb, skh, skn, sgb, sgh, sgn, sf, heads, DK,
    C: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk of one head, C = 2^LEVELS tokens, BD channels at a time.

    Factors (2, chunks, H, C, BK), parts sf apart: q e^{b} and k e^{b_C − b}; Kept = e^{b_C} (chunks, H, BK) float32
    and P (chunks, H, C, C), zeros where there are no tokens or channels; Segments as `segments` makes it; Table
    (chunks, 3): batch row, first token, end."""
    chunk, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row = tl.load(Table + chunk * 3).to(tl.int64)
    at, end = tl.load(Table + chunk * 3 + 1), tl.load(Table + chunk * 3 + 2)
    place = chunk * heads + h
    c = tl.arange(0, C)
    i, j = c[:, None], c[None]
    square = i * C + j
    p, own = tl.zeros([C, C], tl.float32), tl.zeros([C], tl.float32)
    for first in tl.range(0, BK, BD, num_stages=1):
        dims = first + tl.arange(0, BD)
        q = tile(Q + row * sqb + h * sqh, at, sqn, c, dims, end, DK)
        k = tile(K + row * skb + h * skh, at, skn, c, dims, end, DK)
        g = log_decays(G + row * sgb + h * sgh, at, sgn, c, dims, end, DK)
        high, low = split(g, EXACT)
        there = Factors + (place * C + i) * BK + dims[None]
        for side in tl.range(0, 2, num_stages=1):  # k, then q; no loop is unrolled: registers would not do
            weights = tl.load(Segments + (LEVELS + side) * (C * C) + square)
            x = tl.where(side == 1, q, k) * tl.exp2(sums(weights, high, low, EXACT))
            tl.store(there + (1 - side) * sf, x.to(q.dtype))
        tl.store(Kept + place * BK + dims, tl.exp2(tl.sum(g, 0)))
        own += tl.sum(q.to(tl.float32) * k.to(tl.float32), 1)
        for level in tl.range(0, LEVELS, num_stages=1):
            x = tl.exp2(sums(tl.load(Segments + level * (C * C) + square), high, low, EXACT))
            x = (tl.where(later_half(i, level), q, k) * x).to(q.dtype)
            pairs = tl.dot(x, tl.trans(x), input_precision=PRECISION)
            p += tl.where(apart(i, j, level), pairs, 0.0)
    p = tl.where(i > j, p, tl.where(i == j, own[:, None], 0.0))
    tl.store(P + place * (C * C) + square, p.to(P.dtype.element_ty))
