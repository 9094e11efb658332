"""A diagonal decay per channel, within a chunk: all that does not depend on the state, for any decay ≤ 0.

Wanted is P_ij = Σ_d q_id k_jd e^{b_id − b_jd} for i > j, b the running sum of the log decays, as products of matrices.

Within a block whose decays are mild, the reference is its middle m, for both halves:

    e^{b_i − b_j} = e^{b_i − b_m} e^{b_m − b_j}

The factors are above 1 for some tokens, and no more than 2^{LIMIT}. The largest such blocks (of 1, 2, 4, … C tokens)
are chosen by what the decays are: for most models one block is the whole chunk. Pairs of larger blocks, in
neighbouring halves of one, have the middle between the halves as reference, both factors at most 1, and are added size
by size: X Xᵀ for the pairs of that size, where X has q e^{b_i − b_m} in the later halves and k e^{b_m − b_j} in the
earlier.

Every exponent is a sum of log decays, never a difference, so −inf needs no care. The sums are products with matrices of
0 and 1 (`segments`). For products in half precision the log decay is split into two bfloat16 numbers, 16 bits of
mantissa. In base 2 it counts as −160 at least: 2^−160 is zero in float32.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from regard.kernels.triton.loads import tile


def limit(dtype: torch.dtype) -> float:
    """LIMIT, in base 2: float16 has no room for factors above 1, the others have 127."""
    return 0.0 if dtype == torch.float16 else 60.0


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
def mild(steepest, LEVELS: tl.constexpr, LIMIT: tl.constexpr):
    """The largest l ≤ LEVELS for which 2^{l − 1} tokens decay by LIMIT at most, if none by more than `steepest`."""
    level = tl.floor(tl.log2(LIMIT / tl.maximum(steepest, 1e-30))) + 1.0
    return tl.minimum(tl.maximum(level, 0.0), LEVELS).to(tl.int32)


@triton.jit
def from_middle(segments, index, level, high, low, C: tl.constexpr, EXACT: tl.constexpr):
    """(weights, sign, b_i − b_m) for the middles m of blocks of 2^level tokens; b_i − b_m = sign · weights · g.

    segments: where the first of them lies."""
    half = tl.maximum(level - 1, 0)
    weights = tl.load(segments + half * (C * C) + index[:, None] * C + tl.arange(0, C)[None])
    sign = tl.where(level == 0, 0.0, tl.where(later_half(index, half), 1.0, -1.0))[:, None]
    return weights, sign, sign * sums(weights, high, low, EXACT)


@triton.jit
def channel_factors(
    Q, K, G, Factors, Kept, Steep, P, Segments, Table,
    sqb, sqh, sqn, skb, skh, skn, sgb, sgh, sgn, sf, heads, DK,
    C: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, EXACT: tl.constexpr,
    LIMIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk of one head, C = 2^LEVELS tokens, BD channels at a time.

    Factors (2, chunks, H, C, BK), parts sf apart: q e^{b} and k e^{b_C − b}; Kept = e^{b_C} (chunks, H, BK) float32,
    Steep (chunks, H, BK) float32, the largest decay of a token, or 0 where the whole chunk decays by LIMIT at most, and
    P (chunks, H, C, C), zeros where there are no tokens or channels; Segments as `segments` makes it; Table (chunks,
    3): batch row, first token, end."""
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
        total = tl.sum(-g, 0)
        steep = tl.where(total <= LIMIT, 0.0, tl.max(-g, 0))
        tl.store(Kept + place * BK + dims, tl.exp2(-total))
        tl.store(Steep + place * BK + dims, steep)
        own += tl.sum(q.to(tl.float32) * k.to(tl.float32), 1)
        block = mild(tl.max(steep, 0), LEVELS, LIMIT)
        _, _, e = from_middle(Segments, c, block, high, low, C, EXACT)
        reads, writes = (q * tl.exp2(e)).to(q.dtype), (k * tl.exp2(-e)).to(q.dtype)
        pairs = tl.dot(reads, tl.trans(writes), input_precision=PRECISION)
        p += tl.where((i >> block) == (j >> block), pairs, 0.0)  # those with i ≤ j, which may not be finite, go below
        for level in tl.range(block, LEVELS, num_stages=1):
            x = tl.exp2(sums(tl.load(Segments + level * (C * C) + square), high, low, EXACT))
            x = (tl.where(later_half(i, level), q, k) * x).to(q.dtype)
            pairs = tl.dot(x, tl.trans(x), input_precision=PRECISION)
            p += tl.where(apart(i, j, level), pairs, 0.0)
    p = tl.where(i > j, p, tl.where(i == j, own[:, None], 0.0))
    tl.store(P + place * (C * C) + square, p.to(P.dtype.element_ty))
