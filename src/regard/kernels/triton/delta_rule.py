"""The (gated) delta rule on a GPU, forward and backward.

    S' = e^{g_t} S_{t−1} ,   S_t = S' + β_t k_t (v_t − S'ᵀ k_t)ᵀ ,   o_t = S_tᵀ q_t

In a chunk of C tokens, with b the running sum of g, γ = e^b, Γ_ij = e^{b_i − b_j} for i ≥ j, and S the state before it:

    A = strict_tril(diag(β) (Γ ⊙ K Kᵀ)) ,   T = (I + A)⁻¹ ,   P = tril(Γ ⊙ Q Kᵀ)
    U = T (β ⊙ (V − γ ⊙ K S)) ,   O = γ ⊙ Q S + P U ,   S ← γ_C S + Kᵀ ((γ_C / γ) ⊙ U)

Two kernels (DeltaNet's chunks: Yang et al. 2024, arXiv 2406.06484; with gates: arXiv 2412.06464). `factors`, parallel
over chunks, makes T, P and the gates: all that does not depend on the state. `scan` walks a sequence with BV columns of
its state in registers. The state is never written to memory, except for the backward, which runs the scan again
(`delta_rule_backward`).

T is found by forward substitution in blocks of 16, which are then merged: (I + A)⁻¹ is bounded, but powers of A are not
(keys that resemble each other make them explode), so no series of powers is used.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from regard.errors import UnsupportedError, require
from regard.kernels.triton.aligned import aligned, missing, widened
from regard.kernels.triton.delta_rule_backward import gradients_of
from regard.kernels.triton.delta_rule_layout import (
    Launches,
    between,
    compiled_for,
    decays,
    launches,
    strides,
)
from regard.kernels.triton.loads import tile
from regard.kernels.triton.pieces import Pieces, documents, even


@triton.jit
def _inverse(a, C: tl.constexpr, LEVELS: tl.constexpr, MERGE: tl.constexpr):
    """(I + a)⁻¹ in float32 of a strictly lower triangular a (C, C), C = 16 · 2^LEVELS."""
    n: tl.constexpr = C // 16
    block, fine, c = tl.arange(0, n), tl.arange(0, 16), tl.arange(0, C)
    same = block[:, None, None, None] == block[None, None, :, None]
    minus = -tl.sum(tl.where(same, tl.reshape(a, (n, 16, n, 16)), 0.0), 2)  # the blocks on the diagonal, (n, 16, 16)
    t = minus  # becomes the inverse less the identity, a row of every block at a time
    for i in range(2, 16):
        here = (fine == i)[None, :, None]
        row = tl.sum(tl.where(here, minus, 0.0), 1)
        row += tl.sum(row[:, :, None] * t, 1)
        t = tl.where(here, row[:, None, :], t)
    t = tl.where((fine[:, None] == fine[None])[None], 1.0, t)
    whole = tl.reshape(tl.where(same, t[:, :, None, :], 0.0), (C, C))
    for level in tl.static_range(LEVELS):
        # Of two neighbouring blocks X above Y on the diagonal: the inverse has −Y⁻¹ L X⁻¹ where a has L, below X.
        part = c // (16 << level)
        low = (part[:, None] == part[None] + 1) & (part[None] % 2 == 0)
        x = tl.dot(whole, tl.where(low, a, 0.0), input_precision=MERGE)
        whole -= tl.dot(x, whole, input_precision=MERGE)
    return whole


@triton.jit
def factors(
    Q, K, Beta, G, T, P, Gates, Table,
    sqb, sqh, sqn, skb, skh, skn, sbb, sbh, sbn, sgb, sgh, sgn, heads, DK,
    C: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, DECAY: tl.constexpr,
    MERGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk of one head: T and P (chunks, H, C, C), Gates (chunks, H, 3, C) float32: γ, γ_C / γ and β."""
    chunk, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row = tl.load(Table + chunk * 3).to(tl.int64)
    at, end = tl.load(Table + chunk * 3 + 1), tl.load(Table + chunk * 3 + 2)
    c = tl.arange(0, C)
    q_base, k_base = Q + row * sqb + h * sqh, K + row * skb + h * skh
    kk, qk = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    for d in range(0, BK, BD):
        dims = d + tl.arange(0, BD)
        q, k = tile(q_base, at, sqn, c, dims, end, DK), tile(k_base, at, skn, c, dims, end, DK)
        kk = tl.dot(k, tl.trans(k), kk, input_precision=PRECISION)
        qk = tl.dot(q, tl.trans(k), qk, input_precision=PRECISION)
    place = chunk * heads + h
    gates = Gates + place * (3 * C) + c
    at64 = (at + c).to(tl.int64)
    beta = tl.load(Beta + row * sbb + h * sbh + at64 * sbn, mask=at + c < end, other=0.0).to(tl.float32)
    tl.store(gates + 2 * C, beta)
    if DECAY:
        b, r, _ = decays(G + row * sgb + h * sgh, at, sgn, c, end)
        last = tl.sum(tl.where(c == C - 1, b, 0.0), 0)
        tl.store(gates, tl.exp2(tl.where(r == 0, b, -float("inf"))))
        tl.store(gates + C, tl.exp2(tl.where(r == tl.max(r, 0), last - b, -float("inf"))))
        weights = between(b, r, c, c, False)
        kk, qk = kk * weights, qk * weights
    else:
        tl.store(gates, tl.full([C], 1.0, tl.float32))
        tl.store(gates + C, tl.full([C], 1.0, tl.float32))
        qk = tl.where(c[:, None] >= c[None], qk, 0.0)
    a = tl.where(c[:, None] > c[None], kk * beta[:, None], 0.0)
    square = place * (C * C) + c[:, None] * C + c[None]
    tl.store(P + square, qk.to(P.dtype.element_ty))
    tl.store(T + square, _inverse(a, C, LEVELS, MERGE).to(T.dtype.element_ty))


@triton.jit
def scan(
    Q, K, V, T, P, Gates, Out, Start, Final, States, Written, Sequences,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sob, soh, son, heads, DK, DV,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, START: tl.constexpr, OUT: tl.constexpr, KEEP: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One head of one sequence, BV value columns.

    OUT: outputs are wanted. KEEP: States (chunks, H, DK, DV), S before each chunk, and Written (chunks, H, C, DV), U,
    are. Start, Final (sequences, H, DK, DV) float32.
    """
    block, h, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    row = tl.load(Sequences + sequence * 4).to(tl.int64)
    begin, end = tl.load(Sequences + sequence * 4 + 1), tl.load(Sequences + sequence * 4 + 2)
    first = tl.load(Sequences + sequence * 4 + 3)
    c, dk, dv = tl.arange(0, C), tl.arange(0, BK), block * BV + tl.arange(0, BV)
    entry, held = dk[:, None] * DV + dv[None], (dk < DK)[:, None] & (dv < DV)[None]
    square, written = c[:, None] * C + c[None], c[:, None] * DV + dv[None]
    state = tl.zeros([BK, BV], tl.float32)
    if START:
        state = tl.load(Start + (sequence * heads + h) * DK * DV + entry, mask=held, other=0.0)
    q_base, k_base, v_base = Q + row * sqb + h * sqh, K + row * skb + h * skh, V + row * svb + h * svh
    out_base = Out + row * sob + h * soh
    for n in tl.range(0, tl.cdiv(end - begin, C), num_stages=STAGES):
        at, place = begin + n * C, (first + n).to(tl.int64) * heads + h
        k, v = tile(k_base, at, skn, c, dk, end, DK), tile(v_base, at, svn, c, dv, end, DV)
        t = tl.load(T + place * (C * C) + square)
        gates = Gates + place * (3 * C) + c
        gamma, tail, beta = tl.load(gates), tl.load(gates + C), tl.load(gates + 2 * C)
        kept = tl.load(Gates + place * (3 * C) + C - 1)
        low = state.to(k.dtype)
        y = (v - gamma[:, None] * tl.dot(k, low, input_precision=PRECISION)) * beta[:, None]
        u = tl.dot(t, y.to(k.dtype), input_precision=PRECISION)
        if KEEP:
            tl.store(States + place * DK * DV + entry, low, mask=held)
            tl.store(Written + place * C * DV + written, u.to(k.dtype), mask=(dv < DV)[None])
        if OUT:
            q = tile(q_base, at, sqn, c, dk, end, DK)
            p = tl.load(P + place * (C * C) + square)
            acc = tl.dot(q, low, input_precision=PRECISION) * gamma[:, None]
            acc = tl.dot(p, u.to(k.dtype), acc, input_precision=PRECISION)
            there = out_base + at.to(tl.int64) * son + c[:, None] * son + dv[None]
            tl.store(there, acc.to(Out.dtype.element_ty), mask=(at + c < end)[:, None] & (dv < DV)[None])
        state = tl.dot(tl.trans(k), (u * tail[:, None]).to(k.dtype), state * kept, input_precision=PRECISION)
    tl.store(Final + (sequence * heads + h) * DK * DV + entry, state, mask=held)


class _DeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, state: Tensor | None,
        pieces: Pieces, chunk: int, how: Launches,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        t, p, gates = _factors(q, k, beta, g, pieces, chunk, how)
        batch, heads, n, _ = q.shape
        out = torch.empty(batch, n, heads, v.shape[3], dtype=v.dtype, device=v.device).transpose(1, 2)
        final = _scan(q, k, v, t, p, gates, state, pieces, how, out=out)
        ctx.save_for_backward(q, k, v, beta, g, state, t, p, gates)
        ctx.pieces, ctx.how = pieces, how
        ctx.set_materialize_grads(False)
        return out, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dfinal: Tensor | None) -> tuple[Any, ...]:
        q, k, v, beta, g, state, t, p, gates = ctx.saved_tensors
        pieces, how = ctx.pieces, ctx.how
        count, heads, chunk = t.shape[:3]
        states = torch.empty(count, heads, q.shape[3], v.shape[3], dtype=q.dtype, device=q.device)
        written = torch.empty(count, heads, chunk, v.shape[3], dtype=q.dtype, device=q.device)
        _scan(q, k, v, t, p, gates, state, pieces, how, kept=(states, written))
        dout = torch.zeros_like(v) if dout is None else dout.to(v.dtype)
        dout = aligned(dout)
        found = gradients_of(q, k, v, beta, g, t, p, gates, states, written, dout, dfinal, pieces, how)
        return *found[:5], found[5] if ctx.needs_input_grad[5] else None, None, None, None


def _factors(
    q: Tensor, k: Tensor, beta: Tensor, g: Tensor | None, pieces: Pieces, chunk: int, how: Launches
) -> tuple[Tensor, Tensor, Tensor]:
    """T, P (chunks, H, C, C) in the dtype of q and the gates (chunks, H, 3, C) float32."""
    count, heads = pieces.each.shape[0], q.shape[1]
    t, p = (torch.empty(count, heads, chunk, chunk, dtype=q.dtype, device=q.device) for _ in range(2))
    gates = torch.empty(count, heads, 3, chunk, dtype=torch.float32, device=q.device)
    if count * heads:
        decay = beta if g is None else g
        factors[(count, heads)](
            q, k, beta, decay, t, p, gates, pieces.each, *strides(q, k, beta, decay), heads, q.shape[3],
            LEVELS=(chunk // 16).bit_length() - 1, BD=how.factors.columns, DECAY=g is not None, MERGE=how.merge,
            num_warps=how.factors.warps, num_stages=how.factors.stages, **compiled_for(q, chunk, how),
        )  # fmt: skip
    return t, p, gates


def _scan(
    q: Tensor, k: Tensor, v: Tensor, t: Tensor, p: Tensor, gates: Tensor, state: Tensor | None, pieces: Pieces,
    how: Launches, *, out: Tensor | None = None, kept: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """The final states (sequences, H, Dk, Dv) float32; fills `out`, and `kept`: states and U of each chunk."""
    (_, heads, _, rows), columns, count = q.shape, v.shape[3], pieces.table.shape[0]
    final = torch.empty(count, heads, rows, columns, dtype=torch.float32, device=v.device)
    states, written = (v, v) if kept is None else kept
    if count * heads:
        scan[(-(-columns // how.scan.columns), heads, count)](
            q, k, v, t, p, gates, v if out is None else out, final if state is None else state, final, states, written,
            pieces.table, *strides(q, k, v, v if out is None else out), heads, rows, columns,
            BV=how.scan.columns, START=state is not None, OUT=out is not None, KEEP=kept is not None,
            STAGES=how.scan.stages, num_warps=how.scan.warps, num_stages=how.scan.stages,
            **compiled_for(q, t.shape[-1], how),
        )  # fmt: skip
    return final


@torch.compiler.disable  # its launches are Python's; torch.compile goes on around it
def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None = None, state: Tensor | None = None,
    *, ends: tuple[int, ...] | None = None, chunk_size: int = 64, how: Launches | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out (B, H, N, Dv) in v's dtype and the final state (B, H, Dk, Dv) float32, differentiable in all tensors.

    q, k (B, H, N, Dk), Dk ≤ 256, and v (B, H, N, Dv): one dtype of bfloat16, float16 and float32; any strides.
    beta (B, H, N); log_decay None or (B, H, N), ≤ 0, natural: under −80, −inf too, it forgets everything before.
    state (B, H, Dk, Dv) or None. No scale is applied to q, and k is not normalised.
    ends (0, …, N): documents packed into one row (B = 1); states are then one per document.
    chunk_size: 16, 32 or 64 tokens; float32 is done in at most 32. how: None for what suits the shape.
    Raises ArgumentError, and UnsupportedError for a dtype or Dk that the kernels do not take.
    """
    require(q.ndim == 4, "q", tuple(q.shape), "(B, H, N, Dk)")
    batch, heads, n, rows = q.shape
    require(k.shape == q.shape, "k", tuple(k.shape), f"the shape of q, {tuple(q.shape)}")
    require(v.ndim == 4 and v.shape[:3] == q.shape[:3], "v", tuple(v.shape), f"({batch}, {heads}, {n}, Dv)")
    for name, x in (("beta", beta), ("log_decay", log_decay)):
        shape = None if x is None else tuple(x.shape)
        require(shape is None or shape == (batch, heads, n), name, shape, f"({batch}, {heads}, {n})")
    require(chunk_size in (16, 32, 64), "chunk_size", chunk_size, "16, 32, 64")
    if ends is not None:
        rising = len(ends) > 0 and (ends[0], ends[-1]) == (0, n) and all(a <= b for a, b in pairwise(ends))
        require(batch == 1 and rising, "ends", (f"B = {batch}", ends), f"B = 1 and 0 ≤ … ≤ {n}, not descending")
    sequences = batch if ends is None else len(ends) - 1
    wanted = (sequences, heads, rows, v.shape[3])
    if state is not None:
        require(state.shape == wanted, "state", tuple(state.shape), f"{wanted}: (sequences, H, Dk, Dv)")
        state = state.float().contiguous()
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32) or not q.dtype == k.dtype == v.dtype:
        dtypes = f"q, k, v in {q.dtype}, {k.dtype}, {v.dtype}"
        raise UnsupportedError(f"{dtypes}: the kernels take one of bfloat16, float16, float32; the torch form, any")
    if rows > 256:
        raise UnsupportedError(f"Dk = {rows}: the kernels take at most 256; the torch form, any")
    how = launches(rows, v.shape[3], q.dtype) if how is None else how
    chunk = min(chunk_size, how.chunk)
    pieces = even(batch, n, 1, chunk, q.device) if ends is None else documents(tuple(ends), chunk, q.device)
    columns, more = v.shape[3], (missing(rows), missing(v.shape[3]))
    q, k, v = (aligned(x) for x in (q, k, v))
    state = None if state is None else widened(state, *more)
    with torch.cuda.device_of(q):  # kernels are launched on the current device, wherever their tensors lie
        out, final = _DeltaRule.apply(q, k, v, beta, log_decay, state, pieces, chunk, how)
    return (out[..., :columns], final[:, :, :rows, :columns]) if any(more) else (out, final)
