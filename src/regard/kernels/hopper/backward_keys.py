"""Block-sparse attention on Hopper, backward: dk and dv of a block of 128 keys, from the queries that see it.

Everything lies as (keys, queries): Pᵀ = exp(scale · K Qᵀ − lse), dV = Pᵀ dO, dK = scale · (Pᵀ ∘ (V dOᵀ − δ)) Q, over
all query heads of the group.

A block that many queries see (a sink) would keep one multiprocessor busy long after the others. Its tiles are dealt out
in pieces; a piece leaves its sums in float32, and `add_pieces` adds them in order: results repeat bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from regard.kernels.hopper.parts import (
    barriers,
    copy_in,
    copy_out,
    following,
    lists_of,
    meet,
    operand,
    product,
)
from regard.kernels.hopper.words import ZERO, keep_allowed, load_words


@gluon.jit
def backward_keys(
    q_desc, d_desc, base_desc, delta_desc, k_desc, v_desc, dk_desc, dv_desc, Pieces, Work,
    Start, First, Count, Ahead, Other, Words, MaskOf, heads, group, blocks, works, scale, natural_scale,
    BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, SLOTS: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """dk (B, Hkv, M, D) and dv (B, Hkv, M, DV), or a piece of them, (128, D + DV) float32, in Pieces.

    Work (works, 6) int32: key head · blocks + block; first and end query head of its group; the first and the end of
    each one's tiles, the PARTIAL ones first; the piece to write, −1 where these are all tiles of all heads. Ahead: how
    many tiles come before each run of FULL ones. (No loop may carry what is used for bounds of loops inside it alone:
    Triton 3.6 leaves it at its first value.)
    """
    dtype: gl.constexpr = q_desc.dtype
    q_smem = gl.allocate_shared_memory(dtype, [SLOTS, 1, 1, BM, D], q_desc.layout)
    d_smem = gl.allocate_shared_memory(dtype, [SLOTS, 1, 1, BM, DV], d_desc.layout)
    base_smem = gl.allocate_shared_memory(gl.float32, [SLOTS, 1, BM], base_desc.layout)
    delta_smem = gl.allocate_shared_memory(gl.float32, [SLOTS, 1, BM], delta_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [2, 1, 1, 64, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [2, 1, 1, 64, DV], v_desc.layout)
    bars = (barriers(1, 1), barriers(1, 2), barriers(SLOTS, 1), barriers(SLOTS, 2))
    fence_async_shared()
    UPPER: gl.constexpr = 0
    LOWER: gl.constexpr = 1
    gl.warp_specialize(
        [
            (_differentiate, (UPPER, q_smem, d_smem, base_smem, delta_smem, k_smem, v_smem, dk_desc, dv_desc, bars,
                              Pieces, Work, Start, Count, Ahead, Words, MaskOf, heads, group, blocks, works, scale,
                              natural_scale, BM, BN, D, DV, SLOTS)),
            (_differentiate, (LOWER, q_smem, d_smem, base_smem, delta_smem, k_smem, v_smem, dk_desc, dv_desc, bars,
                              Pieces, Work, Start, Count, Ahead, Words, MaskOf, heads, group, blocks, works, scale,
                              natural_scale, BM, BN, D, DV, SLOTS)),
            (_load, (q_desc, d_desc, base_desc, delta_desc, k_desc, v_desc, q_smem, d_smem, base_smem, delta_smem,
                     k_smem, v_smem, bars, Work, Start, First, Count, Ahead, Other, MaskOf, heads, group, blocks, works,
                     BM, BN, SLOTS)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip


@gluon.jit
def _work(Work, w):
    row = Work + 6 * w
    return gl.load(row), gl.load(row + 1), gl.load(row + 2), gl.load(row + 3), gl.load(row + 4), gl.load(row + 5)


@gluon.jit
def _load(
    q_desc, d_desc, base_desc, delta_desc, k_desc, v_desc, q_smem, d_smem, base_smem, delta_smem, k_smem, v_smem, bars,
    Work, Start, First, Count, Ahead, Other, MaskOf, heads, group, blocks, works,
    BM: gl.constexpr, BN: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    held, released, full, free = bars
    kv_heads = heads // group
    slot, phase, held_phase = gl.to_tensor(0), gl.to_tensor(0), gl.to_tensor(0)
    for w in range(gl.program_id(0), works, gl.num_programs(0)):
        place, head, head_end, first, end, _ = _work(Work, w)
        kv_head, block = place // blocks, place % blocks
        b, hk = kv_head // kv_heads, kv_head % kv_heads
        mbarrier.wait(released.index(0), held_phase ^ 1)
        held_phase ^= 1
        mbarrier.expect(held.index(0), 2 * (k_desc.block_type.nbytes + v_desc.block_type.nbytes))
        for half in gl.static_range(2):
            at = [b, hk, block * BN + half * 64, 0]
            copy_in(k_desc, at, held.index(0), k_smem.index(half))
            copy_in(v_desc, at, held.index(0), v_smem.index(half))
        for g in range(head, head_end):
            h = hk * group + g
            run, run_end, part, part_end = lists_of(Start, MaskOf, b * heads + h, block, blocks)
            for t in range(part + first, part + gl.minimum(end, part_end - part)):
                _load_tile(
                    q_desc, d_desc, base_desc, delta_desc, q_smem, d_smem, base_smem, delta_smem, full, free,
                    b, h, b * heads + h, gl.load(Other + t) * BM, slot, phase,
                )  # fmt: skip
                slot, phase = following(slot, phase, SLOTS)
            for r in range(run, run_end):
                ahead = gl.load(Ahead + r)
                begin = gl.load(First + r)
                for i in range(gl.maximum(first - ahead, 0), gl.minimum(end - ahead, gl.load(Count + r))):
                    _load_tile(
                        q_desc, d_desc, base_desc, delta_desc, q_smem, d_smem, base_smem, delta_smem, full, free,
                        b, h, b * heads + h, (begin + i) * BM, slot, phase,
                    )  # fmt: skip
                    slot, phase = following(slot, phase, SLOTS)


@gluon.jit
def _load_tile(
    q_desc, d_desc, base_desc, delta_desc, q_smem, d_smem, base_smem, delta_smem, full, free, b, h, head, i, slot, phase
):
    mbarrier.wait(free.index(slot), phase ^ 1)
    bar = full.index(slot)
    mbarrier.expect(bar, q_desc.block_type.nbytes + d_desc.block_type.nbytes + 2 * base_desc.block_type.nbytes)
    copy_in(q_desc, [b, h, i, 0], bar, q_smem.index(slot))
    copy_in(d_desc, [b, h, i, 0], bar, d_smem.index(slot))
    copy_in(base_desc, [head, i], bar, base_smem.index(slot))
    copy_in(delta_desc, [head, i], bar, delta_smem.index(slot))


@gluon.jit
def _differentiate(
    half: gl.constexpr, q_smem, d_smem, base_smem, delta_smem, k_smem, v_smem, dk_desc, dv_desc, bars, Pieces, Work,
    Start, Count, Ahead, Words, MaskOf, heads, group, blocks, works, scale, natural_scale,
    BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """64 keys of each block."""
    held, released, full, free = bars
    kv_heads = heads // group
    slot, phase, held_phase = gl.to_tensor(0), gl.to_tensor(0), gl.to_tensor(0)
    k = k_smem.index(half).reshape([64, D])
    v = v_smem.index(half).reshape([64, DV])
    for w in range(gl.program_id(0), works, gl.num_programs(0)):
        place, head, head_end, first, end, piece = _work(Work, w)
        kv_head, block = place // blocks, place % blocks
        b, hk = kv_head // kv_heads, kv_head % kv_heads
        dk = gl.zeros([64, D], gl.float32, product(D))
        dv = gl.zeros([64, DV], gl.float32, product(DV))
        mbarrier.wait(held.index(0), held_phase)
        held_phase ^= 1
        for g in range(head, head_end):
            run, run_end, part, part_end = lists_of(Start, MaskOf, b * heads + hk * group + g, block, blocks)
            for t in range(part + first, part + gl.minimum(end, part_end - part)):
                words = load_words(Words, t, half, BN, BM)
                dk, dv, slot, phase = _step(
                    k, v, q_smem, d_smem, base_smem, delta_smem, full, free, slot, phase, dk, dv, scale, words,
                    True, BM, D, DV, SLOTS,
                )  # fmt: skip
            for r in range(run, run_end):
                ahead = gl.load(Ahead + r)
                for _ in range(gl.maximum(first - ahead, 0), gl.minimum(end - ahead, gl.load(Count + r))):
                    dk, dv, slot, phase = _step(
                        k, v, q_smem, d_smem, base_smem, delta_smem, full, free, slot, phase, dk, dv, scale, 0,
                        False, BM, D, DV, SLOTS,
                    )  # fmt: skip
        dk = dk * natural_scale
        if piece >= 0:
            rows = piece.to(gl.int64) * BN + half * 64 + gl.arange(0, 64, gl.SliceLayout(1, product(D)))
            gl.store(Pieces + rows[:, None] * (D + DV) + gl.arange(0, D, gl.SliceLayout(0, product(D)))[None, :], dk)
            rows = piece.to(gl.int64) * BN + half * 64 + gl.arange(0, 64, gl.SliceLayout(1, product(DV)))
            dims = D + gl.arange(0, DV, gl.SliceLayout(0, product(DV)))
            gl.store(Pieces + rows[:, None] * (D + DV) + dims[None, :], dv)
        else:
            k.store(dk.to(k.dtype))  # the keys and values are not needed any more
            v.store(dv.to(v.dtype))
            fence_async_shared()
            meet()
            at = [b, hk, block * BN + half * 64, 0]
            copy_out(dk_desc, at, k_smem.index(half))
            copy_out(dv_desc, at, v_smem.index(half))
            tma.store_wait(0)
        mbarrier.arrive(released.index(0))


@gluon.jit
def _step(
    k, v, q_smem, d_smem, base_smem, delta_smem, full, free, slot, phase, dk, dv, scale, words,
    MASK: gl.constexpr, BM: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """Add one tile; no product is in flight when it ends (see `parts`)."""
    q = q_smem.index(slot).reshape([BM, D])
    d = d_smem.index(slot).reshape([BM, DV])
    zero = gl.zeros([64, BM], gl.float32, product(BM))
    mbarrier.wait(full.index(slot), phase)
    base = gl.expand_dims(base_smem.index(slot).reshape([BM]).load(gl.SliceLayout(0, product(BM))), 0)
    delta = gl.expand_dims(delta_smem.index(slot).reshape([BM]).load(gl.SliceLayout(0, product(BM))), 0)
    s = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)
    dweights = warpgroup_mma(v, d.permute((1, 0)), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(1, deps=(s,))
    weights = gl.exp2(s * scale + base)
    if MASK:
        weights = keep_allowed(weights, words, ZERO, BM)
    dv = warpgroup_mma(gl.convert_layout(weights.to(k.dtype), operand(DV)), d, dv, is_async=True)
    dweights = warpgroup_mma_wait(1, deps=(dweights,))
    dk = warpgroup_mma(gl.convert_layout((weights * (dweights + delta)).to(k.dtype), operand(D)), q, dk, is_async=True)
    dk, dv = warpgroup_mma_wait(0, deps=(dk, dv))
    mbarrier.arrive(free.index(slot))
    slot, phase = following(slot, phase, SLOTS)
    return dk, dv, slot, phase


@triton.jit
def add_pieces(
    Pieces, Cut, DK, DVal, sgb, sgh, sgn, swb, swh, swn, m, kv_heads, blocks,
    BN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dk and dv of the blocks that were cut. Cut (cuts, 3) int32: key head · blocks + block, first and end piece."""
    cut = Cut + tl.program_id(0) * 3
    place, first, end = tl.load(cut), tl.load(cut + 1), tl.load(cut + 2)
    head, block = place // blocks, place % blocks
    b, hk = (head // kv_heads).to(tl.int64), (head % kv_heads).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    ds, dv = tl.arange(0, D), tl.arange(0, DV)
    sum_k, sum_v = tl.zeros([ROWS, D], tl.float32), tl.zeros([ROWS, DV], tl.float32)
    for piece in range(first, end):
        at = Pieces + (tl.cast(piece, tl.int64) * BN + row[:, None]) * (D + DV)
        sum_k += tl.load(at + ds[None])
        sum_v += tl.load(at + D + dv[None])
    j = block * BN + row
    inside, at = (j < m)[:, None], j[:, None].to(tl.int64)
    tl.store(DK + b * sgb + hk * sgh + at * sgn + ds[None], sum_k.to(DK.dtype.element_ty), mask=inside)
    tl.store(DVal + b * swb + hk * swh + at * swn + dv[None], sum_v.to(DVal.dtype.element_ty), mask=inside)
