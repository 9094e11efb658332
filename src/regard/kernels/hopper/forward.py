"""Block-sparse attention on Hopper, forward: out and log-sum-exp of a block of 128 queries.

The products of tile t+1's logits run while tile t's weights are multiplied with their values, and one group of warps
computes its softmax while the other one keeps the tensor cores busy: the scheme of FlashAttention-3 (Shah et al. 2024,
arXiv 2407.08608), over the lists of a pattern's tiles. PARTIAL tiles come first.
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
    fetch,
    following,
    lists_of,
    meet,
    operand,
    product,
)
from regard.kernels.hopper.words import MINUS_INFINITY, all_allowed, keep_allowed, load_words


@gluon.jit
def block_sparse_forward(
    q_desc, k_desc, v_desc, o_desc, Lse, Work, Start, First, Count, Other, Words, MaskOf,
    n, heads, group, blocks, works, scale,
    BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, SLOTS: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """out (B, H, N, DV), lse (B, H, N) natural. `scale` is in base 2; Work (works,) int32: heads · blocks + block."""
    dtype: gl.constexpr = q_desc.dtype
    q_smem = gl.allocate_shared_memory(dtype, [2, 1, 1, 64, D], q_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [SLOTS, 1, 1, BN, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [SLOTS, 1, 1, BN, DV], v_desc.layout)
    o_smem = gl.allocate_shared_memory(dtype, [2, 1, 1, 64, DV], o_desc.layout)
    bars = (barriers(1, 1), barriers(1, 2), barriers(SLOTS, 1), barriers(SLOTS, 2), barriers(SLOTS, 1),
            barriers(SLOTS, 2))  # fmt: skip
    fence_async_shared()
    UPPER: gl.constexpr = 0
    LOWER: gl.constexpr = 1
    gl.warp_specialize(
        [
            (_attend, (UPPER, q_smem, k_smem, v_smem, o_smem, o_desc, bars, Lse, Work, Start, Count, Words, MaskOf,
                           n, heads, blocks, works, scale, BM, BN, D, DV, SLOTS)),
            (_attend, (LOWER, q_smem, k_smem, v_smem, o_smem, o_desc, bars, Lse, Work, Start, Count, Words, MaskOf,
                            n, heads, blocks, works, scale, BM, BN, D, DV, SLOTS)),
            (_load, (q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, bars, Work, Start, First, Count, Other, MaskOf,
                     heads, group, blocks, works, BM, BN, SLOTS)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip


@gluon.jit
def _load(
    q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, bars, Work, Start, First, Count, Other, MaskOf,
    heads, group, blocks, works, BM: gl.constexpr, BN: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    q_full, q_free, k_full, k_free, v_full, v_free = bars
    slot, phase, q_phase = gl.to_tensor(0), gl.to_tensor(0), gl.to_tensor(0)
    for w in range(gl.program_id(0), works, gl.num_programs(0)):
        work = gl.load(Work + w)
        head, block = work // blocks, work % blocks
        b, h = head // heads, head % heads
        run, run_end, part, part_end = lists_of(Start, MaskOf, head, block, blocks)
        if (run < run_end) | (part < part_end):
            mbarrier.wait(q_free.index(0), q_phase ^ 1)
            for half in gl.static_range(2):
                at = [b, h, block * BM + half * 64, 0]
                if half == 0:
                    mbarrier.expect(q_full.index(0), q_desc.block_type.nbytes * 2)
                copy_in(q_desc, at, q_full.index(0), q_smem.index(half))
            q_phase ^= 1
            for t in range(part, part_end):
                at = [b, h // group, gl.load(Other + t) * BN, 0]
                _load_tile(k_desc, v_desc, at, k_smem, v_smem, k_full, k_free, v_full, v_free, slot, phase)
                slot, phase = following(slot, phase, SLOTS)
            for r in range(run, run_end):
                begin = gl.load(First + r) * BN
                for j in range(begin, begin + gl.load(Count + r) * BN, BN):
                    at = [b, h // group, j, 0]
                    _load_tile(k_desc, v_desc, at, k_smem, v_smem, k_full, k_free, v_full, v_free, slot, phase)
                    slot, phase = following(slot, phase, SLOTS)


@gluon.jit
def _load_tile(k_desc, v_desc, at, k_smem, v_smem, k_full, k_free, v_full, v_free, slot, phase):
    mbarrier.wait(k_free.index(slot), phase ^ 1)
    fetch(k_desc, at, k_full.index(slot), k_smem.index(slot))
    mbarrier.wait(v_free.index(slot), phase ^ 1)
    fetch(v_desc, at, v_full.index(slot), v_smem.index(slot))


@gluon.jit
def _attend(
    half: gl.constexpr, q_smem, k_smem, v_smem, o_smem, o_desc, bars, Lse, Work, Start, Count, Words, MaskOf,
    n, heads, blocks, works, scale,
    BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """64 queries of each block."""
    q_full, q_free, k_full, k_free, v_full, v_free = bars
    logits: gl.constexpr = product(BN)
    result: gl.constexpr = product(DV)
    slot, phase, q_phase = gl.to_tensor(0), gl.to_tensor(0), gl.to_tensor(0)
    q = q_smem.index(half).reshape([64, D])
    for w in range(gl.program_id(0), works, gl.num_programs(0)):
        work = gl.load(Work + w)
        head, block = work // blocks, work % blocks
        run, run_end, part, part_end = lists_of(Start, MaskOf, head, block, blocks)
        top = gl.full([64], -float("inf"), gl.float32, gl.SliceLayout(1, logits))
        total = gl.full([64], 0.0, gl.float32, gl.SliceLayout(1, logits))
        acc = gl.zeros([64, DV], gl.float32, result)
        if (run < run_end) | (part < part_end):
            whole = gl.to_tensor(0)  # FULL tiles to come
            for r in range(run, run_end):
                whole += gl.load(Count + r)
            words = all_allowed(BN)
            if part < part_end:
                words = load_words(Words, part, half, BM, BN)
            else:
                whole -= 1  # the first tile, below, is one of them
            mbarrier.wait(q_full.index(0), q_phase)
            q_phase ^= 1
            mbarrier.wait(k_full.index(slot), phase)
            k = k_smem.index(slot).reshape([BN, D]).permute((1, 0))
            s = warpgroup_mma(q, k, gl.zeros([64, BN], gl.float32, logits), use_acc=False)
            mbarrier.arrive(k_free.index(slot))
            weights, top, total, _ = _softmax(s, top, total, scale, words, True, BN)
            mbarrier.wait(v_full.index(slot), phase)
            for t in range(part + 1, part_end):
                words = load_words(Words, t, half, BM, BN)
                weights, acc, top, total, slot, phase = _step(
                    q, k_smem, v_smem, k_full, k_free, v_full, v_free, slot, phase, weights, acc, top, total, scale,
                    words, True, BN, D, DV, SLOTS,
                )  # fmt: skip
            for _ in range(0, whole):
                weights, acc, top, total, slot, phase = _step(
                    q, k_smem, v_smem, k_full, k_free, v_full, v_free, slot, phase, weights, acc, top, total, scale,
                    0, False, BN, D, DV, SLOTS,
                )  # fmt: skip
            mbarrier.arrive(q_free.index(0))
            p = gl.convert_layout(weights.to(q.dtype), operand(DV))
            acc = warpgroup_mma(p, v_smem.index(slot).reshape([BN, DV]), acc)
            mbarrier.arrive(v_free.index(slot))
            slot, phase = following(slot, phase, SLOTS)
        blind = total == 0.0
        total = gl.where(blind, 1.0, total)
        lse = gl.where(blind, -float("inf"), (top + gl.log2(total)) * 0.6931471805599453)
        i = block * BM + half * 64 + gl.arange(0, 64, gl.SliceLayout(1, logits))
        gl.store(Lse + head.to(gl.int64) * n + i, lse, mask=i < n)
        acc = acc * gl.expand_dims(gl.convert_layout(1.0 / total, gl.SliceLayout(1, result)), 1)
        tma.store_wait(0)  # the last block's results have left
        meet()
        o_smem.index(half).reshape([64, DV]).store(acc.to(q.dtype))
        fence_async_shared()
        meet()
        at = [head // heads, head % heads, block * BM + half * 64, 0]
        copy_out(o_desc, at, o_smem.index(half))
    tma.store_wait(0)


@gluon.jit
def _step(
    q, k_smem, v_smem, k_full, k_free, v_full, v_free, slot, phase, weights, acc, top, total, scale, words,
    MASK: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """Add the values of the tile in `slot`, whose weights these are; make the weights of the next one."""
    ahead, ahead_phase = following(slot, phase, SLOTS)
    mbarrier.wait(k_full.index(ahead), ahead_phase)
    k = k_smem.index(ahead).reshape([BN, D]).permute((1, 0))
    s = warpgroup_mma(q, k, gl.zeros([64, BN], gl.float32, product(BN)), use_acc=False, is_async=True)
    p = gl.convert_layout(weights.to(q.dtype), operand(DV))  # here: carried from step to step it would be unpacked
    acc = warpgroup_mma(p, v_smem.index(slot).reshape([BN, DV]), acc, is_async=True)
    s = warpgroup_mma_wait(1, deps=(s,))
    mbarrier.arrive(k_free.index(ahead))
    weights, top, total, fade = _softmax(s, top, total, scale, words, MASK, BN)
    mbarrier.wait(v_full.index(ahead), ahead_phase)  # here: ptxas moves no arithmetic across this loop
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(v_free.index(slot))
    acc = acc * gl.expand_dims(gl.convert_layout(fade, gl.SliceLayout(1, product(DV))), 1)
    return weights, acc, top, total, ahead, ahead_phase


@gluon.jit
def _softmax(s, top, total, scale, words, MASK: gl.constexpr, BN: gl.constexpr):
    """Weights of a tile under the new maximum, the maximum, the sum, and the factor of what was before."""
    if MASK:
        s = keep_allowed(s, words, MINUS_INFINITY, BN)
    new = gl.maximum(top, gl.max(s, 1) * scale)
    safe = gl.where(new == -float("inf"), 0.0, new) if MASK else new
    weights = gl.exp2(s * scale - gl.expand_dims(safe, 1))
    fade = gl.exp2(top - safe)
    return weights, new, total * fade + gl.sum(weights, 1), fade
