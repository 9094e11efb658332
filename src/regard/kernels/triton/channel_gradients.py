"""The gradients of q, k and the log decays where a chunk's states are known (`channel_scan`), parallel over chunks.

With S the state before a chunk, dS the gradient of that after it, dP = tril(dO Vᵀ), and E the exponents that
`channel_factors` scales tokens by,

    dq = e^{b} ⊙ (dO Sᵀ) + …        dk = e^{b_C − b} ⊙ (V dSᵀ) + …

where the rest is, from the blocks with mild decays, dP within them, e^{E} ⊙ dP (e^{−E} ⊙ k) and
e^{−E} ⊙ dPᵀ (e^{E} ⊙ q), and from larger ones, size by size, e^{E} ⊙ (D X): D = dP + dPᵀ for the pairs of that size, X
the tokens scaled towards the middle of their block. Its later halves are of dq, the earlier of dk. Every exponent is a
sum ±M g of log decays with M of 0 and 1, so its gradient, the product of what was scaled and of the gradient of that,
goes to g by ±Mᵀ: no sums longer than half a block are ever subtracted.
"""

from __future__ import annotations

import triton
import triton.language as tl

from regard.kernels.triton.channel_factors import apart, from_middle, later_half, log_decays, mild, split, sums
from regard.kernels.triton.loads import tile


@triton.jit
def _passed_on(weights, x, dg, EXACT: tl.constexpr):
    """dg + weightsᵀ x: gradients of sums to what was summed."""
    if EXACT:
        return tl.dot(tl.trans(weights), x, dg, input_precision="ieee")
    else:
        return tl.dot(tl.trans(weights), x.to(tl.bfloat16), dg)


@triton.jit
def channel_gradients(
    Q, K, V, G, DOut, States, DStates, Kept, Steep, DQ, DKeys, DG, Segments, Table,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sgb, sgh, sgn, sob, soh, son,
    sab, sah, san, scb, sch, scn, swb, swh, swn, heads, DK, DV,
    C: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, GATED: tl.constexpr,
    EXACT: tl.constexpr, LIMIT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One chunk of one head, C = 2^LEVELS tokens: BD channels of DQ, DKeys and, if GATED, DG, all (B, H, N, DK).

    States, DStates (chunks, H, DK, DV); Kept = e^{b_C} and Steep (chunks, H, BK), Segments and Table as
    `channel_factors` has them."""
    chunk, h, part = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    row = tl.load(Table + chunk * 3).to(tl.int64)
    at, end = tl.load(Table + chunk * 3 + 1), tl.load(Table + chunk * 3 + 2)
    place = chunk * heads + h
    c, dims = tl.arange(0, C), part * BD + tl.arange(0, BD)
    i, j = c[:, None], c[None]
    v_base, o_base = V + row * svb + h * svh, DOut + row * sob + h * soh
    met = tl.zeros([BD], tl.float32)
    if GATED:  # a loop of its own: tiles that products read in the pipeline are not to be read otherwise too
        for step in tl.range(0, tl.cdiv(DV, BV), num_stages=1):
            dv = step * BV + tl.arange(0, BV)
            entry, held = place * DK * DV + dims[:, None] * DV + dv[None], (dims < DK)[:, None] & (dv < DV)[None]
            s, ds = tl.load(States + entry, mask=held, other=0.0), tl.load(DStates + entry, mask=held, other=0.0)
            met += tl.sum(s.to(tl.float32) * ds.to(tl.float32), 1)
        met *= tl.load(Kept + place * BK + dims)
    x, turned = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    for step in tl.range(0, tl.cdiv(DV, BV), num_stages=STAGES):
        dv = step * BV + tl.arange(0, BV)
        v, do = tile(v_base, at, svn, c, dv, end, DV), tile(o_base, at, son, c, dv, end, DV)
        x = tl.dot(do, tl.trans(v), x, input_precision=PRECISION)
        turned = tl.dot(v, tl.trans(do), turned, input_precision=PRECISION)
    own = tl.sum(tl.where(i == j, x, 0.0), 1)[:, None]
    both = tl.where(i > j, x, turned).to(Q.dtype.element_ty)
    dq, dw = tl.zeros([C, BD], tl.float32), tl.zeros([C, BD], tl.float32)
    for step in tl.range(0, tl.cdiv(DV, BV), num_stages=STAGES):
        dv = step * BV + tl.arange(0, BV)
        entry, held = place * DK * DV + dims[:, None] * DV + dv[None], (dims < DK)[:, None] & (dv < DV)[None]
        s, ds = tl.load(States + entry, mask=held, other=0.0), tl.load(DStates + entry, mask=held, other=0.0)
        v, do = tile(v_base, at, svn, c, dv, end, DV), tile(o_base, at, son, c, dv, end, DV)
        dq = tl.dot(do, tl.trans(s), dq, input_precision=PRECISION)
        dw = tl.dot(v, tl.trans(ds), dw, input_precision=PRECISION)
    q_base, k_base = Q + row * sqb + h * sqh, K + row * skb + h * skh
    q, k = tile(q_base, at, sqn, c, dims, end, DK), tile(k_base, at, skn, c, dims, end, DK)
    inside, at64 = (at + c < end)[:, None] & (dims < DK)[None], at.to(tl.int64) + i
    high, low = split(log_decays(G + row * sgb + h * sgh, at, sgn, c, dims, end, DK), EXACT)
    dg = tl.zeros([C, BD], tl.float32)
    dg += met[None]
    square = i * C + j
    for side in tl.range(0, 2, num_stages=1):  # dk and later decays, then dq and earlier ones; unrolled, it would spill
        weights = tl.load(Segments + (LEVELS + side) * (C * C) + square)
        scaled = tl.where(side == 1, dq, dw) * tl.exp2(sums(weights, high, low, EXACT))
        if GATED:
            dg = _passed_on(weights, tl.where(side == 1, q, k) * scaled, dg, EXACT)
        scaled += own * tl.where(side == 1, k, q)
        dq, dw = tl.where(side == 1, scaled, dq), tl.where(side == 1, dw, scaled)
    block = mild(tl.max(tl.load(Steep + place * BK + dims), 0), LEVELS, LIMIT)
    weights, sign, e = from_middle(Segments, c, block, high, low, C, EXACT)
    near = (i >> block) == (j >> block)
    pairs = tl.where(near & (i > j), both, 0.0).to(q.dtype)
    read = tl.dot(pairs, (k * tl.exp2(-e)).to(q.dtype), input_precision=PRECISION) * tl.exp2(e)
    pairs = tl.where(near & (i < j), both, 0.0).to(q.dtype)
    written = tl.dot(pairs, (q * tl.exp2(e)).to(q.dtype), input_precision=PRECISION) * tl.exp2(-e)
    if GATED:
        dg = _passed_on(weights, sign * (q * read - k * written), dg, EXACT)
    dq, dw = dq + read, dw + written
    for level in tl.range(block, LEVELS, num_stages=1):
        weights = tl.load(Segments + level * (C * C) + square)
        scale = tl.exp2(sums(weights, high, low, EXACT))
        late = later_half(i, level)
        there = tl.where(late, q_base + at.to(tl.int64) * sqn, k_base + at.to(tl.int64) * skn) + dims[None]
        there += i * tl.where(late, sqn, skn)
        own_half = tl.load(there, mask=inside, other=0.0)
        pairs = tl.where(apart(i, j, level), both, 0.0).to(q.dtype)
        found = tl.dot(pairs, (own_half * scale).to(q.dtype), input_precision=PRECISION) * scale
        if GATED:
            dg = _passed_on(weights, own_half * found, dg, EXACT)
        dq += tl.where(late, found, 0.0)
        dw += tl.where(late, 0.0, found)
    tl.store(DQ + row * sab + h * sah + at64 * san + dims[None], dq.to(DQ.dtype.element_ty), mask=inside)
    tl.store(DKeys + row * scb + h * sch + at64 * scn + dims[None], dw.to(DKeys.dtype.element_ty), mask=inside)
    if GATED:  # what has no influence in float32 has no gradient; loaded again: it is not to be held for so long
        g = log_decays(G + row * sgb + h * sgh, at, sgn, c, dims, end, DK)
        dg = tl.where(g > -160.0, dg, 0.0)
        tl.store(DG + row * swb + h * swh + at64 * swn + dims[None], dg.to(DG.dtype.element_ty), mask=inside)
