"""One scan for decays of their own per channel (GLA, HGRN-2): of the keys' channels, or of the values'.

    keys      o_i = Σ_{j ≤ i} (Σ_d q_id k_jd e^{b_id − b_jd}) v_j        state S_t = diag(e^{g_t}) S_{t−1} + k_t v_tᵀ
    values    o_id = Σ_{j ≤ i} (q_i·k_j) v_jd e^{b_id − b_jd}            state S_t = S_{t−1} diag(e^{g_t}) + k_t v_tᵀ

The forward of a gate per channel is `keys`; the gradients of q and k are `values`, that of v is `keys` in reverse
(pairs i ≥ j, from the end). Within a chunk, e^{b_i − b_j} is split into e^{b_i} e^{−b_j}: `scale` writes q e^{b} and
k e^{−b} once, for all four scans, which are then nearly those without a decay. Sound while b stays above −LIMIT; a
chunk that forgets more is done from q and k themselves in blocks of 16 tokens, and a block that still does, token by
token. So any decay down to −inf is exact, no exponent is ever above LIMIT, and it is slower only where that happens.
"""

from __future__ import annotations

import triton
import triton.language as tl

from regard.kernels.triton.diagonal_chunk import advance, tile


@triton.jit
def _gates(G, at, sgn, index, dims, end, width):
    """Log decays in base 2, (index, dims); 0 outside."""
    return tile(G, at, sgn, index, dims, end, width).to(tl.float32) * 1.4426950408889634


@triton.jit
def scale(
    Q, K, G, QS, KS, Total, Sound, Pieces,
    sqb, sqh, sqn, skb, skh, skn, sgb, sgh, sgn, ssb, ssh, ssn, heads, D, LIMIT: tl.constexpr,
    C: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """QS = q e^{b}, KS = k e^{−b} (B, H, N, D) alike in strides; of each chunk, Total (chunks, H, D), the whole sums in
    base 2, and Sound (chunks, H): whether all stay above −LIMIT."""
    n, h, piece = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, end = tl.load(Pieces + piece * 4).to(tl.int64), tl.load(Pieces + piece * 4 + 2)
    at = tl.load(Pieces + piece * 4 + 1) + n * C
    if at < end:
        h64 = h.to(tl.int64)
        c, d = tl.arange(0, C), tl.arange(0, BD)
        g = _gates(G + row * sgb + h64 * sgh, at, sgn, c, d, end, D)
        b, total = tl.cumsum(g, 0), tl.sum(g, 0)
        q = tile(Q + row * sqb + h64 * sqh, at, sqn, c, d, end, D) * tl.exp2(b)
        k = tile(K + row * skb + h64 * skh, at, skn, c, d, end, D) * tl.exp2(tl.minimum(-b, LIMIT))
        there = row * ssb + h64 * ssh + at.to(tl.int64) * ssn + c[:, None] * ssn + d[None]
        inside = (at + c < end)[:, None] & (d < D)[None]
        tl.store(QS + there, q.to(QS.dtype.element_ty), mask=inside)
        tl.store(KS + there, k.to(KS.dtype.element_ty), mask=inside)
        chunk = (tl.load(Pieces + piece * 4 + 3) + n).to(tl.int64) * heads + h
        tl.store(Total + chunk * D + d, total, mask=d < D)
        tl.store(Sound + chunk, (tl.min(total) >= -LIMIT).to(tl.int32))


@triton.jit
def scan_channel(
    Q, K, V, QS, KS, VS, G, Total, Sound, Out, Start, Final, Pieces,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sub, suh, sun, sgb, sgh, sgn, sob, soh, son,
    heads, DK, DV, LIMIT: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, KEYS: tl.constexpr, REVERSE: tl.constexpr,
    OUT: tl.constexpr, START: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One piece of one head, BV value columns. As `scan_scalar`; G (B, H, N, DK), or (B, H, N, DV) for the values.

    QS, KS, VS (strides su·) are the inputs with the scale of their place: q and k for the keys, v for the values."""
    block, h, piece = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = tl.load(Pieces + piece * 4).to(tl.int64)
    begin, end = tl.load(Pieces + piece * 4 + 1), tl.load(Pieces + piece * 4 + 2)
    first_chunk = tl.load(Pieces + piece * 4 + 3).to(tl.int64)
    c, dk, dv = tl.arange(0, C), tl.arange(0, BK), block * BV + tl.arange(0, BV)
    state = tl.zeros([BK, BV], tl.float32)
    entry = (piece * heads + h) * DK * DV + dk[:, None] * DV + dv[None]
    held = (dk < DK)[:, None] & (dv < DV)[None]
    if START:
        state = tl.load(Start + entry, mask=held, other=0.0)
    q_base, k_base, v_base = Q + row * sqb + h * sqh, K + row * skb + h * skh, V + row * svb + h * svh
    g_base, out_base, scaled = G + row * sgb + h * sgh, Out + row * sob + h * soh, row * sub + h * suh
    gated, width = (dk, DK) if KEYS else (dv, DV)
    chunks = tl.cdiv(end - begin, C)
    turn = chunks - 1 if REVERSE else 0
    chunk = (first_chunk + turn) * heads + h
    next_sound, next_total = (
        tl.load(Sound + chunk),
        tl.load(Total + chunk * width + gated, mask=gated < width, other=0.0),
    )
    for n in tl.range(0, chunks, num_stages=STAGES):
        at = begin + ((chunks - 1 - n) if REVERSE else n) * C
        sound, kept = next_sound, tl.exp2(next_total)
        turn = tl.maximum(chunks - 2 - n, 0) if REVERSE else tl.minimum(n + 1, chunks - 1)
        chunk = (first_chunk + turn) * heads + h  # the next one's are on their way while this one is worked on
        next_sound = tl.load(Sound + chunk)
        next_total = tl.load(Total + chunk * width + gated, mask=gated < width, other=0.0)
        if KEYS:
            q, k = tile(QS + scaled, at, sun, c, dk, end, DK), tile(KS + scaled, at, sun, c, dk, end, DK)
            v = tile(v_base, at, svn, c, dv, end, DV)
        else:
            q, k = tile(q_base, at, sqn, c, dk, end, DK), tile(k_base, at, skn, c, dk, end, DK)
            v = tile(VS + scaled, at, sun, c, dv, end, DV)
        if sound != 0:
            leaves = kept[:, None] if KEYS else kept[None]
            read = leaves
            if not KEYS and OUT:
                b = tl.cumsum(_gates(g_base, at, sgn, c, dv, end, DV), 0)
                read = tl.exp2(-b if REVERSE else b)
            acc, state = advance(q, k, v, leaves, read, state, c, not KEYS, REVERSE, OUT, PRECISION)
            if OUT:
                there = out_base + at.to(tl.int64) * son + c[:, None] * son + dv[None]
                tl.store(there, acc.to(Out.dtype.element_ty), mask=(at + c < end)[:, None] & (dv < DV)[None])
        else:
            blocks: tl.constexpr = C // 16
            for u in range(0, blocks):
                first = at + ((blocks - 1 - u) if REVERSE else u) * 16
                stop = tl.minimum(first + 16, end)  # a tile of C rows of which 16 are filled: all tiles have one shape
                g = _gates(g_base, first, sgn, c, gated, stop, width)
                if tl.min(tl.sum(g, 0)) >= -LIMIT:
                    qf, kf = tile(q_base, first, sqn, c, dk, stop, DK), tile(k_base, first, skn, c, dk, stop, DK)
                    vf, bf = tile(v_base, first, svn, c, dv, stop, DV), tl.cumsum(g, 0)
                    up, down = tl.exp2(-bf if REVERSE else bf), tl.exp2(bf if REVERSE else -bf)
                    if KEYS:
                        qf, kf = (qf * up).to(qf.dtype), (kf * down).to(kf.dtype)
                    else:
                        vf = (vf * down).to(vf.dtype)
                    fade = tl.exp2(tl.sum(g, 0))[:, None] if KEYS else tl.exp2(tl.sum(g, 0))[None]
                    accf, state = advance(qf, kf, vf, fade, up, state, c, not KEYS, REVERSE, OUT, PRECISION)
                    if OUT:
                        there = out_base + first.to(tl.int64) * son + c[:, None] * son + dv[None]
                        inside = (first + c < stop)[:, None] & (dv < DV)[None]
                        tl.store(there, accf.to(Out.dtype.element_ty), mask=inside)
                else:
                    for w in range(0, stop - first):
                        t = (stop - 1 - w if REVERSE else first + w).to(tl.int64)
                        g1 = tl.load(g_base + t * sgn + gated, mask=gated < width, other=0.0).to(tl.float32)
                        g1 = tl.exp2(g1 * 1.4426950408889634)
                        fade1 = g1[:, None] if KEYS else g1[None]
                        q1 = tl.load(q_base + t * sqn + dk, mask=dk < DK, other=0.0).to(tl.float32)
                        k1 = tl.load(k_base + t * skn + dk, mask=dk < DK, other=0.0).to(tl.float32)
                        v1 = tl.load(v_base + t * svn + dv, mask=dv < DV, other=0.0).to(tl.float32)
                        if not REVERSE:
                            state = state * fade1
                        state = state + k1[:, None] * v1[None]
                        if OUT:
                            o1 = tl.sum(q1[:, None] * state, 0).to(Out.dtype.element_ty)
                            tl.store(out_base + t * son + dv, o1, mask=dv < DV)
                        if REVERSE:
                            state = state * fade1
    tl.store(Final + entry, state, mask=held)


@triton.jit
def gate_gradients(
    Q, DQ, K, DK, DG, Ends, Pieces,
    sqb, sqh, sqn, sab, sah, san, skb, skh, skn, scb, sch, scn, sgb, sgh, sgn, heads, D,
    C: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dg_s = Σ_{t ≥ s} (q_t·dq_t − k_t·dk_t) + what the final state's gradient adds (Ends (pieces, H, D)), per channel.

    A pair i ≥ s > j of tokens meets the decay of s: it is in the first sum and not in the second."""
    block, h, piece = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = tl.load(Pieces + piece * 4).to(tl.int64)
    begin, end = tl.load(Pieces + piece * 4 + 1), tl.load(Pieces + piece * 4 + 2)
    c, d = tl.arange(0, C), block * BD + tl.arange(0, BD)
    later = tl.load(Ends + (piece * heads + h) * D + d, mask=d < D, other=0.0)
    chunks = tl.cdiv(end - begin, C)
    for n in range(0, chunks):
        at = begin + (chunks - 1 - n) * C
        q = tile(Q + row * sqb + h * sqh, at, sqn, c, d, end, D).to(tl.float32)
        dq = tile(DQ + row * sab + h * sah, at, san, c, d, end, D).to(tl.float32)
        k = tile(K + row * skb + h * skh, at, skn, c, d, end, D).to(tl.float32)
        dk = tile(DK + row * scb + h * sch, at, scn, c, d, end, D).to(tl.float32)
        change = q * dq - k * dk
        dg = tl.cumsum(change, 0, reverse=True) + later[None]
        there = DG + row * sgb + h * sgh + at.to(tl.int64) * sgn + c[:, None] * sgn + d[None]
        tl.store(there, dg.to(DG.dtype.element_ty), mask=(at + c < end)[:, None] & (d < D)[None])
        later += tl.sum(change, 0)
