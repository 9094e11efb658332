"""Block-sparse attention in Triton: FULL tiles without a mask, PARTIAL tiles with one bit per entry, EMPTY tiles never read.

One kernel for every pattern. What a pattern says is data: for each query block the key blocks to visit, and for each
PARTIAL tile BM·BN bits (`tile_lists`). Another pattern compiles nothing.

The forward is the online softmax of FlashAttention (Dao 2023, arXiv 2307.08691) in base 2. The backward has two kernels:
dq walks a query block's key blocks; dk and dv walk a key block's query blocks, over all query heads of its group, so that
nothing is added atomically and results repeat bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from regard.kernels.triton.tile_lists import Tiles

LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched: warps, pipeline stages, and rows taken at a time in the backward of keys."""

    warps: int
    stages: int
    rows: int = 64


@triton.jit
def _allowed(Bits, slot, rows, cols, BM: tl.constexpr, BN: tl.constexpr):
    """bool, broadcast over rows and cols: the entries of PARTIAL tile `slot`."""
    byte = tl.load(Bits + slot.to(tl.int64) * (BM * BN // 8) + rows * (BN // 8) + cols // 8)
    return ((byte.to(tl.int32) >> (cols % 8)) & 1) != 0


@triton.jit
def _forward(
    Q, K, V, Out, Lse, Start, Other, Slot, Bits, MaskOf,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sob, soh, son,
    n, m, heads, group, scale, blocks,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One query block of one head: out (B, H, N, DV), lse (B, H, N) natural."""
    block = blocks - 1 - tl.program_id(0)  # under causality the longest lists come first
    bh = tl.program_id(1)
    b, h = bh // heads, bh % heads
    entry = Start + (tl.load(MaskOf + bh) * blocks + block) * 3
    full, partial, end = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    rows, cols, ds, dv = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, D), tl.arange(0, DV)
    i = block * BM + rows
    inside = i < n
    q = tl.load(Q + b.to(tl.int64) * sqb + h.to(tl.int64) * sqh + i[:, None].to(tl.int64) * sqn + ds[None], mask=inside[:, None], other=0.0)
    k_base = K + b.to(tl.int64) * skb + (h // group).to(tl.int64) * skh
    v_base = V + b.to(tl.int64) * svb + (h // group).to(tl.int64) * svh
    top = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, DV], tl.float32)
    for t in range(full, partial):
        j = tl.load(Other + t) * BN + cols
        k = tl.load(k_base + j[None] * skn + ds[:, None])
        logits = tl.dot(q, k, input_precision=PRECISION)
        new = tl.maximum(top, tl.max(logits, 1) * scale)
        weights = tl.exp2(logits * scale - new[:, None])
        fade = tl.exp2(top - new)
        total = total * fade + tl.sum(weights, 1)
        v = tl.load(v_base + j[:, None] * svn + dv[None])
        acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
        top = new
    for t in range(partial, end):
        j = tl.load(Other + t) * BN + cols
        here = j < m
        k = tl.load(k_base + j[None] * skn + ds[:, None], mask=here[None], other=0.0)
        logits = tl.dot(q, k, input_precision=PRECISION) * scale
        keep = _allowed(Bits, tl.load(Slot + t), rows[:, None], cols[None], BM, BN)
        logits = tl.where(keep, logits, -float("inf"))
        new = tl.maximum(top, tl.max(logits, 1))
        safe = tl.where(new == -float("inf"), 0.0, new)
        weights = tl.exp2(logits - safe[:, None])
        fade = tl.exp2(top - safe)
        total = total * fade + tl.sum(weights, 1)
        v = tl.load(v_base + j[:, None] * svn + dv[None], mask=here[:, None], other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
        top = new
    blind = total == 0.0
    acc = acc / tl.where(blind, 1.0, total)[:, None]
    lse = tl.where(blind, -float("inf"), (top + tl.log2(tl.where(blind, 1.0, total))) / 1.4426950408889634)
    out = Out + b.to(tl.int64) * sob + h.to(tl.int64) * soh + i[:, None].to(tl.int64) * son + dv[None]
    tl.store(out, acc.to(Out.dtype.element_ty), mask=inside[:, None])
    tl.store(Lse + bh.to(tl.int64) * n + i, lse, mask=inside)


@triton.jit
def _delta(
    Out, DOut, DLse, Lse, Delta, Base, sob, soh, son, sdb, sdh, sdn, n, heads,
    BM: tl.constexpr, DV: tl.constexpr, HAS_DLSE: tl.constexpr,
):  # fmt: skip
    """delta = Σ_d dout·out − dlse, and lse in base 2 with +inf for queries that saw nothing: their weights are then 0."""
    bh = tl.program_id(1)
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    inside, dv = i < n, tl.arange(0, DV)
    at = i[:, None].to(tl.int64)
    out = tl.load(Out + b * sob + h * soh + at * son + dv[None], mask=inside[:, None], other=0.0).to(tl.float32)
    dout = tl.load(DOut + b * sdb + h * sdh + at * sdn + dv[None], mask=inside[:, None], other=0.0).to(tl.float32)
    delta = tl.sum(out * dout, 1)
    place = bh.to(tl.int64) * n + i
    if HAS_DLSE:
        delta -= tl.load(DLse + place, mask=inside, other=0.0)
    lse = tl.load(Lse + place, mask=inside, other=0.0)
    tl.store(Delta + place, delta, mask=inside)
    tl.store(Base + place, tl.where(lse == -float("inf"), float("inf"), lse * 1.4426950408889634), mask=inside)


@triton.jit
def _backward_q(
    Q, K, V, DOut, Base, Delta, DQ, Start, Other, Slot, Bits, MaskOf,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sdb, sdh, sdn, sgb, sgh, sgn,
    n, m, heads, group, scale, blocks,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One query block of one head: dq (B, H, N, D). `scale` is the natural one."""
    block = blocks - 1 - tl.program_id(0)
    bh = tl.program_id(1)
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    entry = Start + (tl.load(MaskOf + bh) * blocks + block) * 3
    full, partial, end = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    rows, cols, ds, dv = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, D), tl.arange(0, DV)
    i = block * BM + rows
    inside = i < n
    at = i[:, None].to(tl.int64)
    q = tl.load(Q + b * sqb + h * sqh + at * sqn + ds[None], mask=inside[:, None], other=0.0)
    dout = tl.load(DOut + b * sdb + h * sdh + at * sdn + dv[None], mask=inside[:, None], other=0.0)
    place = bh.to(tl.int64) * n + i
    base = tl.load(Base + place, mask=inside, other=float("inf"))
    delta = tl.load(Delta + place, mask=inside, other=0.0)
    k_base = K + b * skb + (h // group) * skh
    v_base = V + b * svb + (h // group) * svh
    scale2 = scale * 1.4426950408889634
    dq = tl.zeros([BM, D], tl.float32)
    for t in range(full, end):
        j = tl.load(Other + t) * BN + cols
        here = j < m
        k = tl.load(k_base + j[:, None] * skn + ds[None], mask=here[:, None], other=0.0)
        v = tl.load(v_base + j[:, None] * svn + dv[None], mask=here[:, None], other=0.0)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        weights = tl.exp2(logits * scale2 - base[:, None])
        if t >= partial:
            keep = _allowed(Bits, tl.load(Slot + t), rows[:, None], cols[None], BM, BN)
            weights = tl.where(keep, weights, 0.0)
        dweights = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        dlogits = (weights * (dweights - delta[:, None])).to(k.dtype)
        dq = tl.dot(dlogits, k, dq, input_precision=PRECISION)
    tl.store(DQ + b * sgb + h * sgh + at * sgn + ds[None], (dq * scale).to(DQ.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _backward_kv(
    Q, K, V, DOut, Base, Delta, DK, DV_, Start, Other, Slot, Bits, MaskOf,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sdb, sdh, sdn, sgb, sgh, sgn, swb, swh, swn,
    n, m, heads, group, scale, blocks,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One key block of one KV head: dk (B, Hkv, M, D) and dv (B, Hkv, M, DV), summed over the query heads of its group.

    Everything is transposed — logits are (keys, queries) — so that no accumulator ever is: a transposed accumulator gives
    wrong gradients on Hopper with some versions of Triton.
    """
    block = tl.program_id(0)
    kv_heads = heads // group
    b, hk = (tl.program_id(1) // kv_heads).to(tl.int64), tl.program_id(1) % kv_heads
    cols, ds, dv, some = tl.arange(0, BN), tl.arange(0, D), tl.arange(0, DV), tl.arange(0, ROWS)
    j = block * BN + cols
    here = j < m
    at = j[:, None].to(tl.int64)
    k = tl.load(K + b * skb + hk.to(tl.int64) * skh + at * skn + ds[None], mask=here[:, None], other=0.0)
    v = tl.load(V + b * svb + hk.to(tl.int64) * svh + at * svn + dv[None], mask=here[:, None], other=0.0)
    scale2 = scale * 1.4426950408889634
    dk = tl.zeros([BN, D], tl.float32)
    dvalue = tl.zeros([BN, DV], tl.float32)
    for g in range(0, group):
        h = hk * group + g
        bh = (b * heads + h).to(tl.int32)
        entry = Start + (tl.load(MaskOf + bh) * blocks + block) * 3
        full, partial, end = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
        q_base = Q + b * sqb + h.to(tl.int64) * sqh
        d_base = DOut + b * sdb + h.to(tl.int64) * sdh
        line = bh.to(tl.int64) * n
        steps: tl.constexpr = BM // ROWS
        for u in range(full * steps, end * steps):
            t = u // steps
            rows = (u % steps) * ROWS + some
            i = tl.load(Other + t) * BM + rows
            inside = i < n
            q = tl.load(q_base + i[:, None] * sqn + ds[None], mask=inside[:, None], other=0.0)
            dout = tl.load(d_base + i[:, None] * sdn + dv[None], mask=inside[:, None], other=0.0)
            base = tl.load(Base + line + i, mask=inside, other=float("inf"))
            delta = tl.load(Delta + line + i, mask=inside, other=0.0)
            logits = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            weights = tl.exp2(logits * scale2 - base[None])
            if t >= partial:
                keep = _allowed(Bits, tl.load(Slot + t), rows[None], cols[:, None], BM, BN)
                weights = tl.where(keep, weights, 0.0)
            dvalue = tl.dot(weights.to(dout.dtype), dout, dvalue, input_precision=PRECISION)
            dweights = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
            dlogits = (weights * (dweights - delta[None])).to(q.dtype)
            dk = tl.dot(dlogits, q, dk, input_precision=PRECISION)
    hk = hk.to(tl.int64)
    tl.store(DK + b * sgb + hk * sgh + at * sgn + ds[None], (dk * scale).to(DK.dtype.element_ty), mask=here[:, None])
    tl.store(DV_ + b * swb + hk * swh + at * swn + dv[None], dvalue.to(DV_.dtype.element_ty), mask=here[:, None])


def _strides(*tensors: Tensor) -> list[int]:
    return [s for t in tensors for s in t.stride()[:3]]


def _precision(q: Tensor) -> str:
    return "ieee" if q.dtype == torch.float32 else "tf32"


class BlockSparse(torch.autograd.Function):
    """out (B, Hq, N, Dv) and lse (B, Hq, N) float32 of softmax(scale · q kᵀ) v over the tiles' entries."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, tiles: Tiles, block: tuple[int, int], scale: float, how: Any
    ) -> tuple[Tensor, Tensor]:
        batch, heads, n, dim = q.shape
        kv_heads, m, dim_v = v.shape[1:]
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        out = torch.empty(batch, heads, n, dim_v, dtype=q.dtype, device=q.device)
        lse = torch.empty(batch, heads, n, dtype=torch.float32, device=q.device)
        lists = tiles.by_query
        launch: Launch = how["forward"]
        _forward[(lists.blocks, batch * heads)](
            q, k, v, out, lse, lists.start, lists.other, lists.slot, tiles.bits, tiles.mask_of,
            *_strides(q, k, v, out), n, m, heads, heads // kv_heads, scale * LOG2E, lists.blocks,
            BM=block[0], BN=block[1], D=dim, DV=dim_v, PRECISION=_precision(q),
            num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.tiles, ctx.block, ctx.scale, ctx.how = tiles, block, scale, how
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        batch, heads, n, dim = q.shape
        kv_heads, m, dim_v = v.shape[1:]
        tiles, (bm, bn), how = ctx.tiles, ctx.block, ctx.how
        dout = torch.zeros_like(out) if dout is None else dout if dout.stride(-1) == 1 else dout.contiguous()
        base, delta = torch.empty_like(lse), torch.empty_like(lse)
        _delta[(triton.cdiv(n, 64), batch * heads)](
            out, dout, None if dlse is None else dlse.contiguous(), lse, delta, base, *_strides(out, dout), n, heads,
            BM=64, DV=dim_v, HAS_DLSE=dlse is not None,
        )  # fmt: skip
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        common = {"BM": bm, "BN": bn, "D": dim, "DV": dim_v, "PRECISION": _precision(q)}
        lists, launch = tiles.by_query, how["queries"]
        _backward_q[(lists.blocks, batch * heads)](
            q, k, v, dout, base, delta, dq, lists.start, lists.other, lists.slot, tiles.bits, tiles.mask_of,
            *_strides(q, k, v, dout, dq), n, m, heads, heads // kv_heads, ctx.scale, lists.blocks,
            **common, num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip
        lists, launch = tiles.by_key, how["keys"]
        _backward_kv[(lists.blocks, batch * kv_heads)](
            q, k, v, dout, base, delta, dk, dv, lists.start, lists.other, lists.slot, tiles.bits, tiles.mask_of,
            *_strides(q, k, v, dout, dk, dv), n, m, heads, heads // kv_heads, ctx.scale, lists.blocks,
            **common, ROWS=min(launch.rows, bm), num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip
        return dq, dk, dv, None, None, None, None
