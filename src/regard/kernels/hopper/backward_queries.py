"""Block-sparse attention on Hopper, backward: dq of a block of 128 queries, from its key tiles.

dS = P ∘ (dO Vᵀ − δ), dQ = scale · dS K, with P = exp(scale · Q Kᵀ − lse) made again from lse, and δ = Σ dO ∘ O.
"""

from __future__ import annotations

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
    fetch_pair,
    following,
    lists_of,
    meet,
    operand,
    product,
)
from regard.kernels.hopper.words import ZERO, keep_allowed, load_words


@gluon.jit
def backward_queries(
    q_desc, d_desc, k_desc, v_desc, dq_desc, Base, Delta, Work, Start, First, Count, Other, Words, MaskOf,
    rows, heads, group, blocks, works, scale, natural_scale,
    BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, SLOTS: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """dq (B, H, N, D). Base and Delta (B·H, rows) as `row_terms` writes them; `scale` is in base 2."""
    dtype: gl.constexpr = q_desc.dtype
    q_smem = gl.allocate_shared_memory(dtype, [2, 1, 1, 64, D], q_desc.layout)
    d_smem = gl.allocate_shared_memory(dtype, [2, 1, 1, 64, DV], d_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [SLOTS, 1, 1, BN, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [SLOTS, 1, 1, BN, DV], v_desc.layout)
    bars = (barriers(1, 1), barriers(1, 2), barriers(SLOTS, 1), barriers(SLOTS, 2))
    fence_async_shared()
    UPPER: gl.constexpr = 0
    LOWER: gl.constexpr = 1
    gl.warp_specialize(
        [
            (_differentiate, (UPPER, q_smem, d_smem, k_smem, v_smem, dq_desc, bars, Base, Delta, Work, Start, Count,
                              Words, MaskOf, rows, heads, blocks, works, scale, natural_scale, BM, BN, D, DV, SLOTS)),
            (_differentiate, (LOWER, q_smem, d_smem, k_smem, v_smem, dq_desc, bars, Base, Delta, Work, Start, Count,
                              Words, MaskOf, rows, heads, blocks, works, scale, natural_scale, BM, BN, D, DV, SLOTS)),
            (_load, (q_desc, d_desc, k_desc, v_desc, q_smem, d_smem, k_smem, v_smem, bars, Work, Start, First, Count,
                     Other, MaskOf, heads, group, blocks, works, BM, BN, SLOTS)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip


@gluon.jit
def _load(
    q_desc, d_desc, k_desc, v_desc, q_smem, d_smem, k_smem, v_smem, bars, Work, Start, First, Count, Other, MaskOf,
    heads, group, blocks, works, BM: gl.constexpr, BN: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    held, released, full, free = bars
    slot, phase, held_phase = gl.to_tensor(0), gl.to_tensor(0), gl.to_tensor(0)
    for w in range(gl.program_id(0), works, gl.num_programs(0)):
        work = gl.load(Work + w)
        head, block = work // blocks, work % blocks
        b, h = head // heads, head % heads
        run, run_end, part, part_end = lists_of(Start, MaskOf, head, block, blocks)
        mbarrier.wait(released.index(0), held_phase ^ 1)
        held_phase ^= 1
        mbarrier.expect(held.index(0), 2 * (q_desc.block_type.nbytes + d_desc.block_type.nbytes))
        for half in gl.static_range(2):
            at = [b, h, block * BM + half * 64, 0]
            copy_in(q_desc, at, held.index(0), q_smem.index(half))
            copy_in(d_desc, at, held.index(0), d_smem.index(half))
        for t in range(part, part_end):
            mbarrier.wait(free.index(slot), phase ^ 1)
            tile = [b, h // group, gl.load(Other + t) * BN, 0]
            fetch_pair(k_desc, v_desc, tile, full.index(slot), k_smem.index(slot), v_smem.index(slot))
            slot, phase = following(slot, phase, SLOTS)
        for r in range(run, run_end):
            begin = gl.load(First + r) * BN
            for j in range(begin, begin + gl.load(Count + r) * BN, BN):
                mbarrier.wait(free.index(slot), phase ^ 1)
                fetch_pair(
                    k_desc, v_desc, [b, h // group, j, 0], full.index(slot), k_smem.index(slot), v_smem.index(slot)
                )
                slot, phase = following(slot, phase, SLOTS)


@gluon.jit
def _differentiate(
    half: gl.constexpr, q_smem, d_smem, k_smem, v_smem, dq_desc, bars, Base, Delta, Work, Start, Count, Words, MaskOf,
    rows, heads, blocks, works, scale, natural_scale,
    BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """64 queries of each block."""
    held, released, full, free = bars
    slot, phase, held_phase = gl.to_tensor(0), gl.to_tensor(0), gl.to_tensor(0)
    q = q_smem.index(half).reshape([64, D])
    d = d_smem.index(half).reshape([64, DV])
    for w in range(gl.program_id(0), works, gl.num_programs(0)):
        work = gl.load(Work + w)
        head, block = work // blocks, work % blocks
        run, run_end, part, part_end = lists_of(Start, MaskOf, head, block, blocks)
        i = block * BM + half * 64 + gl.arange(0, 64, gl.SliceLayout(1, product(BN)))
        base = gl.load(Base + head.to(gl.int64) * rows + i)
        delta = gl.load(Delta + head.to(gl.int64) * rows + i)
        dq = gl.zeros([64, D], gl.float32, product(D))
        mbarrier.wait(held.index(0), held_phase)
        held_phase ^= 1
        for t in range(part, part_end):
            words = load_words(Words, t, half, BM, BN)
            dq, slot, phase = _step(
                q, d, k_smem, v_smem, full, free, slot, phase, dq, base, delta, scale, words,
                True, BN, D, DV, SLOTS,
            )  # fmt: skip
        for r in range(run, run_end):
            for _ in range(0, gl.load(Count + r)):
                dq, slot, phase = _step(
                    q, d, k_smem, v_smem, full, free, slot, phase, dq, base, delta, scale, 0,
                    False, BN, D, DV, SLOTS,
                )  # fmt: skip
        q.store((dq * natural_scale).to(q.dtype))  # the queries are not needed any more
        fence_async_shared()
        meet()
        at = [head // heads, head % heads, block * BM + half * 64, 0]
        copy_out(dq_desc, at, q_smem.index(half))
        tma.store_wait(0)
        mbarrier.arrive(released.index(0))


@gluon.jit
def _step(
    q, d, k_smem, v_smem, full, free, slot, phase, dq, base, delta, scale, words,
    MASK: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """Add one tile; no product is in flight when it ends (see `parts`)."""
    k = k_smem.index(slot).reshape([BN, D])
    v = v_smem.index(slot).reshape([BN, DV])
    zero = gl.zeros([64, BN], gl.float32, product(BN))
    mbarrier.wait(full.index(slot), phase)
    s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
    dweights = warpgroup_mma(d, v.permute((1, 0)), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(1, deps=(s,))
    weights = gl.exp2(s * scale + gl.expand_dims(base, 1))
    if MASK:
        weights = keep_allowed(weights, words, ZERO, BN)
    dweights = warpgroup_mma_wait(0, deps=(dweights,))
    ds = weights * (dweights + gl.expand_dims(delta, 1))
    dq = warpgroup_mma(gl.convert_layout(ds.to(q.dtype), operand(D)), k, dq)
    mbarrier.arrive(free.index(slot))
    slot, phase = following(slot, phase, SLOTS)
    return dq, slot, phase
