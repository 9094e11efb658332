"""Block-sparse attention in Triton: FULL tiles have no mask, PARTIAL ones a bit per entry, EMPTY ones are not read.

One kernel for every pattern. What a pattern says is data: for each query block the key blocks to visit, and for each
PARTIAL tile BM·BN bits (`tile_lists`). Another pattern compiles nothing.

The forward is the online softmax of FlashAttention (Dao 2023, arXiv 2307.08691) in base 2. The backward has two
kernels: dq walks a query block's key blocks; dk and dv walk a key block's query blocks, over all query heads of its
group, so that nothing is added atomically and results repeat bit for bit.

Logits are always `queries · keysᵀ` of loaded tiles: no accumulator is ever transposed, which gives wrong gradients on
Hopper with some versions of Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from regard.kernels.triton.tile_lists import TileLists, Tiles

LOG2E = 1.4426950408889634
TilesOf = Callable[[tuple[int, int]], Tiles]


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched: query and key block, warps, pipeline stages; rows taken at a time by dk and dv."""

    block: tuple[int, int]
    warps: int
    stages: int
    rows: int = 64


@dataclass(frozen=True)
class Launches:
    """Forward, and the two kernels of the backward, which share a block."""

    forward: Launch
    queries: Launch
    keys: Launch


SHORT, LONG = Launch((64, 64), 4, 3), Launch((128, 128), 8, 3)
"""The forward for queries that see few keys, and for those that see at least LONG_ROW of them on average: larger tiles
do more per byte they load (a sparse 131,072 of 26,000 keys a row: 137 against 181 ms), and waste more at the edges
(a window of 1024: 1.88 against 1.60 ms)."""
LONG_ROW = 4096


def launches(head_dim: int, dtype: torch.dtype) -> Launches:
    """Chosen by shape, measured on an H100 at head dim 128 in bfloat16; larger ones and float32 take smaller steps."""
    if head_dim > 128 or dtype == torch.float32:
        small = Launch((32, 32), 4, 2, 32)
        return Launches(small, small, small)
    return Launches(SHORT, Launch((128, 64), 8, 2), Launch((128, 64), 4, 2))


@triton.jit
def _allowed(Bits, slot, rows, cols, BM: tl.constexpr, BN: tl.constexpr):
    """bool, broadcast over rows and cols: the entries of PARTIAL tile `slot`."""
    byte = tl.load(Bits + slot.to(tl.int64) * (BM * BN // 8) + rows * (BN // 8) + cols // 8)
    return ((byte.to(tl.int32) >> (cols % 8)) & 1) != 0


@triton.jit
def _rows(base, index, step, dims, limit):
    """A tile (index, dims) of a matrix whose rows are `step` apart; zeros beyond `limit`."""
    return tl.load(base + index[:, None].to(tl.int64) * step + dims[None], mask=index[:, None] < limit, other=0.0)


@triton.jit
def _absorb(q, k, v, keep, top, total, acc, scale, MASK: tl.constexpr, PRECISION: tl.constexpr):
    """One tile into the online softmax. `scale` is in base 2."""
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASK:
        logits = tl.where(keep, logits * scale, -float("inf"))
        new = tl.maximum(top, tl.max(logits, 1))
        safe = tl.where(new == -float("inf"), 0.0, new)
        weights = tl.exp2(logits - safe[:, None])
        fade = tl.exp2(top - safe)
    else:
        new = tl.maximum(top, tl.max(logits, 1) * scale)
        weights = tl.exp2(logits * scale - new[:, None])
        fade = tl.exp2(top - new)
    total = total * fade + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
    return new, total, acc


@triton.jit
def _forward(
    Q, K, V, Out, Lse, Start, First, Count, Other, Slot, Bits, MaskOf,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sob, soh, son,
    n, m, heads, group, scale, blocks,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One query block of one head: out (B, H, N, DV), lse (B, H, N) natural."""
    block = blocks - 1 - tl.program_id(0) % blocks  # under causality the longest lists come first
    bh = tl.program_id(0) // blocks
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    entry = Start + (tl.load(MaskOf + bh) * blocks + block) * 4
    run, run_end, part, part_end = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)
    rows, cols, ds, dv = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, D), tl.arange(0, DV)
    i = block * BM + rows
    q = _rows(Q + b * sqb + h * sqh, i, sqn, ds, n)
    k_base = K + b * skb + (h // group) * skh
    v_base = V + b * svb + (h // group) * svh
    top = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, DV], tl.float32)
    for r in range(run, run_end):
        begin = tl.load(First + r) * BN
        end = begin + tl.load(Count + r) * BN
        for j in range(begin, end, BN):
            k = tl.load(k_base + (j + cols)[:, None] * skn + ds[None])
            v = tl.load(v_base + (j + cols)[:, None] * svn + dv[None])
            top, total, acc = _absorb(q, k, v, 0, top, total, acc, scale, False, PRECISION)
    for t in range(part, part_end):
        j = tl.load(Other + t) * BN + cols
        keep = _allowed(Bits, tl.load(Slot + t), rows[:, None], cols[None], BM, BN)
        k, v = _rows(k_base, j, skn, ds, m), _rows(v_base, j, svn, dv, m)
        top, total, acc = _absorb(q, k, v, keep, top, total, acc, scale, True, PRECISION)
    blind = total == 0.0
    acc = acc / tl.where(blind, 1.0, total)[:, None]
    lse = tl.where(blind, -float("inf"), (top + tl.log2(tl.where(blind, 1.0, total))) / 1.4426950408889634)
    out = Out + b * sob + h * soh + i[:, None].to(tl.int64) * son + dv[None]
    tl.store(out, acc.to(Out.dtype.element_ty), mask=i[:, None] < n)
    tl.store(Lse + bh.to(tl.int64) * n + i, lse, mask=i < n)


@triton.jit
def _delta(
    Out, DOut, DLse, Lse, Delta, Base, sob, soh, son, sdb, sdh, sdn, n, heads,
    BM: tl.constexpr, DV: tl.constexpr, HAS_DLSE: tl.constexpr,
):  # fmt: skip
    """delta = Σ_d dout·out − dlse, and lse in base 2, +inf for queries that saw nothing: their weights are then 0."""
    blocks = tl.cdiv(n, BM)
    bh = tl.program_id(0) // blocks
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    i = tl.program_id(0) % blocks * BM + tl.arange(0, BM)
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
def _dlogits(q, k, v, dout, base, delta, keep, scale, MASK: tl.constexpr, PRECISION: tl.constexpr):
    """Weights and the gradient of logits (natural, before scale) of one tile of queries × keys."""
    weights = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale - base[:, None])
    if MASK:
        weights = tl.where(keep, weights, 0.0)
    dweights = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    return weights * (dweights - delta[:, None])


@triton.jit
def _backward_q(
    Q, K, V, DOut, Base, Delta, DQ, Start, First, Count, Other, Slot, Bits, MaskOf,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sdb, sdh, sdn, sgb, sgh, sgn,
    n, m, heads, group, scale, blocks,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One query block of one head: dq (B, H, N, D). `scale` is the natural one."""
    block = blocks - 1 - tl.program_id(0) % blocks
    bh = tl.program_id(0) // blocks
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    entry = Start + (tl.load(MaskOf + bh) * blocks + block) * 4
    run, run_end, part, part_end = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)
    rows, cols, ds, dv = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, D), tl.arange(0, DV)
    i = block * BM + rows
    q, dout = _rows(Q + b * sqb + h * sqh, i, sqn, ds, n), _rows(DOut + b * sdb + h * sdh, i, sdn, dv, n)
    place = bh.to(tl.int64) * n + i
    base = tl.load(Base + place, mask=i < n, other=float("inf"))
    delta = tl.load(Delta + place, mask=i < n, other=0.0)
    k_base = K + b * skb + (h // group) * skh
    v_base = V + b * svb + (h // group) * svh
    base2 = scale * 1.4426950408889634
    dq = tl.zeros([BM, D], tl.float32)
    for r in range(run, run_end):
        begin = tl.load(First + r) * BN
        end = begin + tl.load(Count + r) * BN
        for j in range(begin, end, BN):
            k = tl.load(k_base + (j + cols)[:, None] * skn + ds[None])
            v = tl.load(v_base + (j + cols)[:, None] * svn + dv[None])
            dlogits = _dlogits(q, k, v, dout, base, delta, 0, base2, False, PRECISION)
            dq = tl.dot(dlogits.to(k.dtype), k, dq, input_precision=PRECISION)
    for t in range(part, part_end):
        j = tl.load(Other + t) * BN + cols
        keep = _allowed(Bits, tl.load(Slot + t), rows[:, None], cols[None], BM, BN)
        k, v = _rows(k_base, j, skn, ds, m), _rows(v_base, j, svn, dv, m)
        dlogits = _dlogits(q, k, v, dout, base, delta, keep, base2, True, PRECISION)
        dq = tl.dot(dlogits.to(k.dtype), k, dq, input_precision=PRECISION)
    out = DQ + b * sgb + h * sgh + i[:, None].to(tl.int64) * sgn + ds[None]
    tl.store(out, (dq * scale).to(DQ.dtype.element_ty), mask=i[:, None] < n)


@triton.jit
def _add_queries(
    k, v, dk, dvalue, q_base, d_base, Base, Delta, line, i, keep, sqn, sdn, n, scale,
    D: tl.constexpr, DV: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What queries i add to dk and dv of a key block; everything lies as (keys, queries)."""
    ds, dv = tl.arange(0, D), tl.arange(0, DV)
    q, dout = _rows(q_base, i, sqn, ds, n), _rows(d_base, i, sdn, dv, n)
    base = tl.load(Base + line + i, mask=i < n, other=float("inf"))
    delta = tl.load(Delta + line + i, mask=i < n, other=0.0)
    weights = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale - base[None])
    if MASK:
        weights = tl.where(keep, weights, 0.0)
    dvalue = tl.dot(weights.to(dout.dtype), dout, dvalue, input_precision=PRECISION)
    dweights = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
    dk = tl.dot((weights * (dweights - delta[None])).to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dvalue


@triton.jit
def _backward_kv(
    Q, K, V, DOut, Base, Delta, DK, DVal, Start, First, Count, Other, Slot, Bits, MaskOf,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sdb, sdh, sdn, sgb, sgh, sgn, swb, swh, swn,
    n, m, heads, group, scale, blocks,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One key block of one KV head: dk (B, Hkv, M, D) and dv (B, Hkv, M, DV), summed over its group's query heads."""
    block, lane = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    kv_heads = heads // group
    b, hk = (lane // kv_heads).to(tl.int64), (lane % kv_heads).to(tl.int64)
    cols, ds, dv, some = tl.arange(0, BN), tl.arange(0, D), tl.arange(0, DV), tl.arange(0, ROWS)
    j = block * BN + cols
    k, v = _rows(K + b * skb + hk * skh, j, skn, ds, m), _rows(V + b * svb + hk * svh, j, svn, dv, m)
    base2 = scale * 1.4426950408889634
    dk, dvalue = tl.zeros([BN, D], tl.float32), tl.zeros([BN, DV], tl.float32)
    for g in range(0, group):
        h = hk * group + g
        bh = b * heads + h
        entry = Start + (tl.load(MaskOf + bh) * blocks + block) * 4
        run, run_end, part, part_end = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)
        q_base, d_base, line = Q + b * sqb + h * sqh, DOut + b * sdb + h * sdh, bh * n
        for r in range(run, run_end):
            begin = tl.load(First + r) * BM
            end = begin + tl.load(Count + r) * BM
            for i in range(begin, end, ROWS):
                dk, dvalue = _add_queries(
                    k, v, dk, dvalue, q_base, d_base, Base, Delta, line, i + some, 0, sqn, sdn, n, base2,
                    D, DV, False, PRECISION,
                )  # fmt: skip
        steps: tl.constexpr = BM // ROWS
        for u in range(part * steps, part_end * steps):
            rows = (u % steps) * ROWS + some
            i = tl.load(Other + u // steps) * BM + rows
            keep = _allowed(Bits, tl.load(Slot + u // steps), rows[None], cols[:, None], BM, BN)
            dk, dvalue = _add_queries(
                k, v, dk, dvalue, q_base, d_base, Base, Delta, line, i, keep, sqn, sdn, n, base2,
                D, DV, True, PRECISION,
            )  # fmt: skip
    at = j[:, None].to(tl.int64)
    tl.store(DK + b * sgb + hk * sgh + at * sgn + ds[None], (dk * scale).to(DK.dtype.element_ty), mask=j[:, None] < m)
    tl.store(DVal + b * swb + hk * swh + at * swn + dv[None], dvalue.to(DVal.dtype.element_ty), mask=j[:, None] < m)


def _strides(*tensors: Tensor) -> list[int]:
    return [s for t in tensors for s in t.stride()[:3]]


class BlockSparse(torch.autograd.Function):
    """out (B, Hq, N, Dv) and lse (B, Hq, N) float32 of softmax(scale · q kᵀ) v over the entries of a pattern.

    `tiles(block)` gives the pattern's lists for that block: forward and backward are fastest with different ones.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, tiles: TilesOf, scale: float, how: Launches
    ) -> tuple[Tensor, Tensor]:
        batch, heads, n, dim = q.shape
        kv_heads, m, dim_v = v.shape[1:]
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        out = torch.empty(batch, heads, n, dim_v, dtype=q.dtype, device=q.device)
        lse = torch.empty(batch, heads, n, dtype=torch.float32, device=q.device)
        held, lists = _read(tiles(how.forward.block), "by_query")
        _forward[(lists.blocks * batch * heads,)](
            q, k, v, out, lse, *held, *_strides(q, k, v, out),
            n, m, heads, heads // kv_heads, scale * LOG2E, lists.blocks,
            D=dim, DV=dim_v, **_options(how.forward, q),
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.tiles, ctx.scale, ctx.how = tiles, scale, how
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        batch, heads, n, dim = q.shape
        kv_heads, m, dim_v = v.shape[1:]
        how: Launches = ctx.how
        dout = torch.zeros_like(out) if dout is None else dout if dout.stride(-1) == 1 else dout.contiguous()
        base, delta = torch.empty_like(lse), torch.empty_like(lse)
        _delta[(triton.cdiv(n, 64) * batch * heads,)](
            out, dout, None if dlse is None else dlse.contiguous(), lse, delta, base, *_strides(out, dout), n, heads,
            BM=64, DV=dim_v, HAS_DLSE=dlse is not None,
        )  # fmt: skip
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        shape = (n, m, heads, heads // kv_heads, ctx.scale)
        held, lists = _read(ctx.tiles(how.queries.block), "by_query")
        _backward_q[(lists.blocks * batch * heads,)](
            q, k, v, dout, base, delta, dq, *held, *_strides(q, k, v, dout, dq), *shape, lists.blocks,
            D=dim, DV=dim_v, **_options(how.queries, q),
        )  # fmt: skip
        held, lists = _read(ctx.tiles(how.keys.block), "by_key")
        _backward_kv[(lists.blocks * batch * kv_heads,)](
            q, k, v, dout, base, delta, dk, dv, *held, *_strides(q, k, v, dout, dk, dv), *shape, lists.blocks,
            D=dim, DV=dim_v, ROWS=min(how.keys.rows, how.keys.block[0]), **_options(how.keys, q),
        )  # fmt: skip
        return dq, dk, dv, None, None, None


def _read(tiles: Tiles, side: str) -> tuple[list[Tensor], TileLists]:
    """The tensors of one side's lists in the order that the kernels take them, and the lists."""
    lists: TileLists = getattr(tiles, side)
    return [lists.start, lists.first, lists.count, lists.other, lists.slot, tiles.bits, tiles.mask_of], lists


def _options(launch: Launch, q: Tensor) -> dict[str, Any]:
    precision = "ieee" if q.dtype == torch.float32 else "tf32"
    bm, bn = launch.block
    return {"BM": bm, "BN": bn, "PRECISION": precision, "num_warps": launch.warps, "num_stages": launch.stages}
