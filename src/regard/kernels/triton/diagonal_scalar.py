"""One scan for diagonal decays that are the same for all channels: none, fixed per head, or one gate per token.

    forward   o_i = Σ_{j ≤ i} e^{b_i − b_j} (q_i·k_j) v_j + e^{b_i} Sᵀ q_i        b: running sums of the log decays
    reverse   o_j = Σ_{i ≥ j} e^{b_i − b_j} (q_j·k_i) v_i + e^{b_N − b_j} Sᵀ q_j

The reverse is what the backward is made of: exchange the roles of q, k, v and the output's gradient, and all three
gradients are scans (`diagonal`). One program holds the state of one head and BV value columns in registers and walks
its piece of the sequence in chunks of C; nothing but inputs, outputs and states touches memory.

The running sums of each chunk (`running_sums`) are taken before, in base 2: a scan inside the loop costs more than the
matrix products. A log decay under −160 counts as −160: 2^−160 is zero in float32, so −inf forgets exactly and no
difference of infinities arises. Only loaded tiles are ever transposed: a transposed accumulator gives wrong numbers on
Hopper with some versions of Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from regard.kernels.triton.loads import tile


@triton.jit
def running_sums(G, Sums, Table, sgb, sgh, sgn, heads, C: tl.constexpr):
    """Sums (chunks, H, C) float32: Σ of the log decays G (B, H, N), in base 2, from a chunk's first token to each, the
    last repeated where there are no more; Table (chunks, 3): batch row, first token, end."""
    chunk, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row, c = tl.load(Table + chunk * 3).to(tl.int64), tl.arange(0, C)
    at = tl.load(Table + chunk * 3 + 1) + c
    inside = at < tl.load(Table + chunk * 3 + 2)
    g = tl.load(G + row * sgb + h * sgh + at.to(tl.int64) * sgn, mask=inside, other=0.0).to(tl.float32)
    b = tl.cumsum(tl.maximum(g * 1.4426950408889634, -160.0), 0)
    tl.store(Sums + (chunk * heads + h) * C + c, b)


@triton.jit
def _gates(sums, turn, chunks, heads, index, C: tl.constexpr):
    """Of chunk number `turn` of a piece, or the nearest there is: (running sums, their last)."""
    there = sums + tl.minimum(tl.maximum(turn, 0), chunks - 1).to(tl.int64) * heads * C
    return tl.load(there + index), tl.load(there + C - 1)


@triton.jit
def _counting(sums, chunks, heads, C: tl.constexpr, REVERSE: tl.constexpr):
    """(how many of the last chunks that a piece walks still count in the state that it leaves, its whole decay in base
    2). Those before are multiplied by 2^−160, zero in float32, or less."""
    whole, counting = 0.0, 0
    for first in range(0, chunks, 128):
        n = first + tl.arange(0, 128)  # counted from the last that is walked
        turn = n if REVERSE else chunks - 1 - n
        total = tl.load(sums + turn.to(tl.int64) * heads * C + C - 1, mask=n < chunks, other=0.0)
        behind = whole + tl.cumsum(total, 0) - total
        counting += tl.sum(((n < chunks) & (behind > -160.0)).to(tl.int32), 0)
        whole += tl.sum(total, 0)
    return counting, whole


@triton.jit
def scan_scalar(
    Q, K, V, Sums, Out, Start, Final, Left, Beside, Dots, Pieces,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sob, soh, son, sxb, sxh, sxn, sdv, sdb,
    heads, length, DK, DV,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr, REVERSE: tl.constexpr,
    OUT: tl.constexpr, START: tl.constexpr, DOTS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One piece of one head, BV value columns.

    Q, K (B, H, N, DK), V, Out, Beside (B, H, N, DV) by strides; Sums (chunks, H, C) and Start, Final (pieces, H, DK,
    DV) float32 and contiguous; Pieces as `pieces.Pieces` says. OUT: outputs are wanted, not the state alone. That
    comes with Left (pieces, H), what the piece leaves of a state before it, and without reading what is forgotten.
    DOTS: Dots (blocks of BV, B, H, N) gets Σ_d out·Beside, float32, before `out` is rounded.
    """
    block, h, piece = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    row = tl.load(Pieces + piece * 4).to(tl.int64)
    begin, end = tl.load(Pieces + piece * 4 + 1), tl.load(Pieces + piece * 4 + 2)
    c, dk, dv = tl.arange(0, C), tl.arange(0, BK), block * BV + tl.arange(0, BV)
    seen = (c[:, None] <= c[None]) if REVERSE else (c[:, None] >= c[None])
    state = tl.zeros([BK, BV], tl.float32)
    entry = (piece * heads + h) * DK * DV + dk[:, None] * DV + dv[None]
    held = (dk < DK)[:, None] & (dv < DV)[None]
    if START:
        state = tl.load(Start + entry, mask=held, other=0.0)
    q_base, k_base, v_base = Q + row * sqb + h * sqh, K + row * skb + h * skh, V + row * svb + h * svh
    sums = Sums + (tl.load(Pieces + piece * 4 + 3).to(tl.int64) * heads + h) * C
    out_base = Out + row * sob + h * soh
    x_base, line = Beside + row * sxb + h * sxh, Dots + block * sdv + row * sdb + h * length
    chunks = tl.cdiv(end - begin, C)
    whole, walked = 0.0, chunks
    if DECAY:
        if not OUT:
            walked, whole = _counting(sums, chunks, heads, C, REVERSE)
    step = -1 if REVERSE else 1
    first = (walked - 1) if REVERSE else (chunks - walked)
    if DECAY:
        b, total = _gates(sums, first, chunks, heads, c, C)
    for n in tl.range(0, walked, num_stages=STAGES):
        turn = first + n * step
        at = begin + turn * C
        k, v = tile(k_base, at, skn, c, dk, end, DK), tile(v_base, at, svn, c, dv, end, DV)
        if DECAY:  # those of the next chunk are on their way while this one is worked on
            next_b, next_total = _gates(sums, turn + step, chunks, heads, c, C)
            read, write = tl.exp2(total - b if REVERSE else b), tl.exp2(b if REVERSE else total - b)
        if OUT:
            q = tile(q_base, at, sqn, c, dk, end, DK)
            logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            acc = tl.dot(q, state.to(q.dtype), input_precision=PRECISION)
            if DECAY:
                apart = (b[None] - b[:, None]) if REVERSE else (b[:, None] - b[None])
                logits = logits * tl.exp2(tl.where(seen, apart, -float("inf")))
                acc = acc * read[:, None]
            else:
                logits = tl.where(seen, logits, 0.0)
            acc = tl.dot(logits.to(v.dtype), v, acc, input_precision=PRECISION)
            there = out_base + at.to(tl.int64) * son + c[:, None] * son + dv[None]
            tl.store(there, acc.to(Out.dtype.element_ty), mask=(at + c < end)[:, None] & (dv < DV)[None])
            if DOTS:
                x = tile(x_base, at, sxn, c, dv, end, DV).to(tl.float32)
                tl.store(line + at + c, tl.sum(acc * x, 1), mask=at + c < end)
        if DECAY:
            state = state * tl.exp2(total)
            v = (v * write[:, None]).to(v.dtype)
            b, total = next_b, next_total
        state = tl.dot(tl.trans(k), v, state, input_precision=PRECISION)
    tl.store(Final + entry, state, mask=held)
    if not OUT:
        tl.store(Left + piece * heads + h, tl.exp2(whole))
