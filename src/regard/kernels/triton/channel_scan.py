"""The walk along a sequence with a diagonal decay per channel, from the factors of its chunks (`channel_factors`).

    forward    O  = P V + Q̂ S        S  ← e^{b_C} ⊙ S + K̂ᵀ V          Q̂ = q e^{b} ,  K̂ = k e^{b_C − b}
    reverse    dV = Pᵀ dO + K̂ dS     dS ← e^{b_C} ⊙ dS + Q̂ᵀ dO

The two are one: exchange Q̂ and K̂, V and dO, transpose P, and start from the end. b_C is per channel of the keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

from regard.kernels.triton.loads import tile


@triton.jit
def scan_chunks(
    Read, Write, V, P, Kept, Out, Start, Final, Left, States, Pieces,
    svb, svh, svn, sob, soh, son, heads, DK, DV,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, REVERSE: tl.constexpr, START: tl.constexpr,
    OUT: tl.constexpr, KEEP: tl.constexpr, LEAVE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One piece of one head, BV value columns; its state stays in registers.

    Read (what outputs are read from the state with), Write (what is written to it with) (chunks, H, C, BK), P (chunks,
    H, C, C), Kept (chunks, H, BK) float32; Start, Final (pieces, H, DK, DV) float32; Pieces as `pieces.Pieces` says.
    OUT: outputs are wanted. KEEP: States (chunks, H, DK, DV), the one that each chunk meets, are.
    LEAVE: Left (pieces, H, DK), what the piece leaves of a state before it, is."""
    block, h, piece = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    row = tl.load(Pieces + piece * 4).to(tl.int64)
    begin, end = tl.load(Pieces + piece * 4 + 1), tl.load(Pieces + piece * 4 + 2)
    first = tl.load(Pieces + piece * 4 + 3)
    c, dk, dv = tl.arange(0, C), tl.arange(0, BK), block * BV + tl.arange(0, BV)
    entry, held = dk[:, None] * DV + dv[None], (dk < DK)[:, None] & (dv < DV)[None]
    factor = c[:, None] * BK + dk[None]
    square = (c[None] * C + c[:, None]) if REVERSE else (c[:, None] * C + c[None])
    state = tl.zeros([BK, BV], tl.float32)
    if START:
        state = tl.load(Start + (piece * heads + h) * DK * DV + entry, mask=held, other=0.0)
    v_base, out_base = V + row * svb + h * svh, Out + row * sob + h * soh
    chunks, left = tl.cdiv(end - begin, C), tl.full([BK], 1.0, tl.float32)
    for n in tl.range(0, chunks, num_stages=STAGES):
        turn = (chunks - 1 - n) if REVERSE else n
        at, place = begin + turn * C, (first + turn).to(tl.int64) * heads + h
        write, v = tl.load(Write + place * (C * BK) + factor), tile(v_base, at, svn, c, dv, end, DV)
        kept = tl.load(Kept + place * BK + dk)
        low = state.to(v.dtype)
        if LEAVE:
            left *= kept
        if KEEP:
            tl.store(States + place * DK * DV + entry, low, mask=held)
        if OUT:
            read, p = tl.load(Read + place * (C * BK) + factor), tl.load(P + place * (C * C) + square)
            acc = tl.dot(p, v, input_precision=PRECISION)
            acc = tl.dot(read, low, acc, input_precision=PRECISION)
            there = out_base + at.to(tl.int64) * son + c[:, None] * son + dv[None]
            tl.store(there, acc.to(Out.dtype.element_ty), mask=(at + c < end)[:, None] & (dv < DV)[None])
        state = tl.dot(tl.trans(write), v, state * kept[:, None], input_precision=PRECISION)
    tl.store(Final + (piece * heads + h) * DK * DV + entry, state, mask=held)
    if LEAVE:
        tl.store(Left + (piece * heads + h) * DK + dk, left, mask=dk < DK)
