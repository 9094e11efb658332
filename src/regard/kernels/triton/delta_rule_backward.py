"""The gradients of the delta rule, in the notation of `delta_rule`.

d· is a gradient, S the state before a chunk, dS the gradient of the state after it, and τ = γ_C / γ.

`reverse_scan` walks a sequence from its end, with BV columns of dS in registers:

    dU = Pᵀ dO + τ ⊙ K dS ,   dY = Tᵀ dU   (Y = β ⊙ (V − γ ⊙ K S) is what T is applied to)
    dS ← γ_C dS + Qᵀ (γ ⊙ dO) − Kᵀ (γ ⊙ β ⊙ dY)

`gradients`, parallel over chunks, does the rest from the S, U, dY and dS stored for each. With the diagonal of P, which
no decay touches, kept apart (δ_i = dO_i·U_i), and

    X = strict_tril(Γ ⊙ dO Uᵀ) ,   Z = −strict_tril(Γ ⊙ dY Uᵀ)    gradients of Q Kᵀ, and of diag(β) K Kᵀ, within a chunk
    dQ = γ ⊙ dO Sᵀ + X K               and + δ ⊙ K
    dR = −γ ⊙ dY Sᵀ + Z K              keys as what reads the state, before β
    dW = τ ⊙ U dSᵀ + Xᵀ Q + (β ⊙ Z)ᵀ K   keys as what writes, and + δ ⊙ Q
    dK = β ⊙ dR + dW ,   dV = β ⊙ dY ,   dβ_i = dY_i·V_i + K_i·dR_i

Every term of dQ and dR holds e^{b_i} once and every term of dW e^{−b_j}, so the exponents need no sums over pairs:

    db_i = Q_i·dQ_i + β_i K_i·dR_i − K_i·dW_i (all without δ) ,   db_C += Σ_i τ_i K_i·(U dSᵀ)_i + γ_C ⟨S, dS⟩

and dg is the sum of db from each token to the end of its chunk. A token that forgets everything has dg = 0.

Xᵀ and Zᵀ are products of their own: a transposed accumulator gives wrong numbers on Hopper with some versions of
Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from regard.kernels.triton.delta_rule_layout import (
    Launches,
    between,
    compiled_for,
    decays,
    strides,
)
from regard.kernels.triton.loads import tile
from regard.kernels.triton.pieces import Pieces


@triton.jit
def reverse_scan(
    Q, K, DOut, T, P, Gates, DFinal, DStart, DStates, DY, Sequences,
    sqb, sqh, sqn, skb, skh, skn, sob, soh, son, heads, DK, DV,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, FINAL: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One head of one sequence, BV value columns. DStates (chunks, H, DK, DV): dS; DY (chunks, H, C, DV).

    DFinal (FINAL: there is one) and DStart (sequences, H, DK, DV) float32: gradients of the final and first states."""
    block, h, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    row = tl.load(Sequences + sequence * 4).to(tl.int64)
    begin, end = tl.load(Sequences + sequence * 4 + 1), tl.load(Sequences + sequence * 4 + 2)
    first = tl.load(Sequences + sequence * 4 + 3)
    c, dk, dv = tl.arange(0, C), tl.arange(0, BK), block * BV + tl.arange(0, BV)
    entry, held = dk[:, None] * DV + dv[None], (dk < DK)[:, None] & (dv < DV)[None]
    turned, rows = c[None] * C + c[:, None], c[:, None] * DV + dv[None]
    dstate = tl.zeros([BK, BV], tl.float32)
    if FINAL:
        dstate = tl.load(DFinal + (sequence * heads + h) * DK * DV + entry, mask=held, other=0.0)
    q_base, k_base, o_base = Q + row * sqb + h * sqh, K + row * skb + h * skh, DOut + row * sob + h * soh
    chunks = tl.cdiv(end - begin, C)
    for n in tl.range(0, chunks, num_stages=STAGES):
        at, place = begin + (chunks - 1 - n) * C, (first + chunks - 1 - n).to(tl.int64) * heads + h
        q, k = tile(q_base, at, sqn, c, dk, end, DK), tile(k_base, at, skn, c, dk, end, DK)
        do = tile(o_base, at, son, c, dv, end, DV)
        tt, pt = tl.load(T + place * (C * C) + turned), tl.load(P + place * (C * C) + turned)
        gates = Gates + place * (3 * C) + c
        gamma, tail, beta = tl.load(gates), tl.load(gates + C), tl.load(gates + 2 * C)
        kept = tl.load(Gates + place * (3 * C) + C - 1)
        low = dstate.to(k.dtype)
        tl.store(DStates + place * DK * DV + entry, low, mask=held)
        du = tl.dot(k, low, input_precision=PRECISION) * tail[:, None]
        du = tl.dot(pt, do, du, input_precision=PRECISION)
        dy = tl.dot(tt, du.to(k.dtype), input_precision=PRECISION)
        tl.store(DY + place * C * DV + rows, dy.to(k.dtype), mask=(dv < DV)[None])
        dstate = tl.dot(tl.trans(q), (do * gamma[:, None]).to(q.dtype), dstate * kept, input_precision=PRECISION)
        erased = (dy * -(gamma * beta)[:, None]).to(k.dtype)
        dstate = tl.dot(tl.trans(k), erased, dstate, input_precision=PRECISION)
    tl.store(DStart + (sequence * heads + h) * DK * DV + entry, dstate, mask=held)


@triton.jit
def gradients(
    Q, K, V, G, DOut, Gates, States, DStates, Written, DY, DQ, DKeys, DVal, DBeta, DG, Table,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sgb, sgh, sgn, sob, soh, son,
    sab, sah, san, scb, sch, scn, swb, swh, swn, spp, spb, sph, heads, DK, DV,
    C: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One chunk of one head: BD channels of dq (DQ) and dk (DKeys); the first program of a chunk writes dv (DVal).

    DBeta, DG (blocks of BD, B, H, N) float32: what these channels add."""
    chunk, h, part = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    row = tl.load(Table + chunk * 3).to(tl.int64)
    at, end = tl.load(Table + chunk * 3 + 1), tl.load(Table + chunk * 3 + 2)
    place = chunk * heads + h
    c, dk = tl.arange(0, C), part * BD + tl.arange(0, BD)
    gates = Gates + place * (3 * C) + c
    gamma, tail, beta = tl.load(gates), tl.load(gates + C), tl.load(gates + 2 * C)
    v_base, o_base, w_base = V + row * svb + h * svh, DOut + row * sob + h * soh, DVal + row * swb + h * swh
    x, xt = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    z, zt = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    dq, dr, dw = tl.zeros([C, BD], tl.float32), tl.zeros([C, BD], tl.float32), tl.zeros([C, BD], tl.float32)
    met, dbeta = tl.zeros([BD], tl.float32), tl.zeros([C], tl.float32)
    for step in tl.range(0, tl.cdiv(DV, BV), num_stages=STAGES):
        dv = step * BV + tl.arange(0, BV)
        own = dv < tl.where(part == 0, DV, 0)
        rows = place * C * DV + c[:, None] * DV + dv[None]
        entry, held = place * DK * DV + dk[:, None] * DV + dv[None], (dk < DK)[:, None] & (dv < DV)[None]
        u = tl.load(Written + rows, mask=(dv < DV)[None], other=0.0)
        dy = tl.load(DY + rows, mask=(dv < DV)[None], other=0.0)
        s, ds = tl.load(States + entry, mask=held, other=0.0), tl.load(DStates + entry, mask=held, other=0.0)
        do = tile(o_base, at, son, c, dv, end, DV)
        x = tl.dot(do, tl.trans(u), x, input_precision=PRECISION)
        xt = tl.dot(u, tl.trans(do), xt, input_precision=PRECISION)
        z = tl.dot(dy, tl.trans(u), z, input_precision=PRECISION)
        zt = tl.dot(u, tl.trans(dy), zt, input_precision=PRECISION)
        dq = tl.dot(do, tl.trans(s), dq, input_precision=PRECISION)
        dr = tl.dot(dy, tl.trans(s), dr, input_precision=PRECISION)
        dw = tl.dot(u, tl.trans(ds), dw, input_precision=PRECISION)
        if DECAY:
            met += tl.sum(s.to(tl.float32) * ds.to(tl.float32), 1)
        inside = (at + c < end)[:, None] & own[None]
        v = tl.load(v_base + at.to(tl.int64) * svn + c[:, None] * svn + dv[None], mask=inside, other=0.0)
        dbeta += tl.sum(dy.to(tl.float32) * v.to(tl.float32), 1)
        there = w_base + at.to(tl.int64) * swn + c[:, None] * swn + dv[None]
        tl.store(there, (dy * beta[:, None]).to(DVal.dtype.element_ty), mask=inside)
    q = tile(Q + row * sqb + h * sqh, at, sqn, c, dk, end, DK)
    k = tile(K + row * skb + h * skh, at, skn, c, dk, end, DK)
    delta = tl.sum(tl.where(c[:, None] == c[None], x, 0.0), 1)
    if DECAY:
        b, r, forgets = decays(G + row * sgb + h * sgh, at, sgn, c, end)
        weights, turned = between(b, r, c, c, False), between(b, r, c, c, True)
        x, xt, z, zt = x * weights, xt * turned, z * weights, zt * turned
    after, before = c[:, None] > c[None], c[:, None] < c[None]
    x, xt = tl.where(after, x, 0.0).to(k.dtype), tl.where(before, xt, 0.0).to(k.dtype)
    z, zt = tl.where(after, -z, 0.0).to(k.dtype), tl.where(before, -zt * beta[None], 0.0).to(k.dtype)
    dq = tl.dot(x, k, dq * gamma[:, None], input_precision=PRECISION)
    dr = tl.dot(z, k, dr * -gamma[:, None], input_precision=PRECISION)
    dw = dw * tail[:, None]
    wide = (at + c < end)[:, None] & (dk < DK)[None]
    line = part * spp + row * spb + h * sph + at + c
    by_key = tl.sum(k * dr, 1)
    tl.store(DBeta + line, dbeta + by_key, mask=at + c < end)
    if DECAY:
        last = tl.sum(tl.sum(k * dw, 1), 0) + tl.load(Gates + place * (3 * C) + C - 1) * tl.sum(met, 0)
        db = tl.sum(q * dq, 1) + beta * by_key
    dw = tl.dot(xt, q, dw, input_precision=PRECISION)
    dw = tl.dot(zt, k, dw, input_precision=PRECISION)
    if DECAY:
        dg = tl.cumsum(db - tl.sum(k * dw, 1), 0, reverse=True) + last
        tl.store(DG + line, tl.where(forgets, 0.0, dg), mask=at + c < end)
    dq += delta[:, None] * k
    dw += delta[:, None] * q + beta[:, None] * dr
    there = DQ + row * sab + h * sah + at.to(tl.int64) * san + c[:, None] * san + dk[None]
    tl.store(there, dq.to(DQ.dtype.element_ty), mask=wide)
    there = DKeys + row * scb + h * sch + at.to(tl.int64) * scn + c[:, None] * scn + dk[None]
    tl.store(there, dw.to(DKeys.dtype.element_ty), mask=wide)


def gradients_of(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, t: Tensor, p: Tensor, gates: Tensor,
    states: Tensor, written: Tensor, dout: Tensor, dfinal: Tensor | None, pieces: Pieces, how: Launches,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]:  # fmt: skip
    """dq, dk, dv, dβ, dg (None without decay) and the gradient of the first states (sequences, H, Dk, Dv) float32.

    T, P, gates from `factors`, states and U ("written") from `scan`, each per chunk."""
    (batch, heads, n, rows), columns, device = q.shape, v.shape[3], q.device
    count, chunk = t.shape[0], t.shape[-1]
    sequences = pieces.table.shape[0]
    dstart = torch.empty(sequences, heads, rows, columns, dtype=torch.float32, device=device)
    dstates, dy = torch.empty_like(states), torch.empty_like(written)
    dfinal = None if dfinal is None else dfinal.float().contiguous()
    wide = how.reverse.columns
    if sequences * heads:
        reverse_scan[(-(-columns // wide), heads, sequences)](
            q, k, dout, t, p, gates, dstart if dfinal is None else dfinal, dstart, dstates, dy, pieces.table,
            *strides(q, k, dout), heads, rows, columns, BV=wide, FINAL=dfinal is not None, STAGES=how.reverse.stages,
            num_warps=how.reverse.warps, num_stages=how.reverse.stages, **compiled_for(q, chunk, how),
        )  # fmt: skip
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))  # laid out as what they are gradients of
    parts = -(-rows // how.channels)
    dbeta = torch.empty(parts, batch, heads, n, dtype=torch.float32, device=device)
    dg = dbeta if g is None else torch.empty_like(dbeta)
    decay = beta if g is None else g
    if count * heads:
        gradients[(count, heads, parts)](
            q, k, v, decay, dout, gates, states, dstates, written, dy, dq, dk, dv, dbeta, dg, pieces.each,
            *strides(q, k, v, decay, dout, dq, dk, dv, dbeta), heads, rows, columns,
            BD=how.channels, BV=how.gradients.columns, DECAY=g is not None, STAGES=how.gradients.stages,
            num_warps=how.gradients.warps, num_stages=how.gradients.stages, C=chunk, PRECISION=how.products,
        )  # fmt: skip
    dbeta, dg = (x[0] if parts == 1 else x.sum(0) for x in (dbeta, dg))
    return dq, dk, dv, dbeta.to(beta.dtype), None if g is None else dg.to(g.dtype), dstart
