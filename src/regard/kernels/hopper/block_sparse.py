"""Block-sparse attention on Hopper with gradients: which kernels run on what."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from regard.kernels.hopper.backward_keys import add_pieces, backward_keys
from regard.kernels.hopper.backward_queries import backward_queries
from regard.kernels.hopper.forward import block_sparse_forward
from regard.kernels.hopper.parts import ROWS, aligned, descriptor, line
from regard.kernels.hopper.schedule import key_works, query_works
from regard.kernels.hopper.words import words_by_key, words_by_query
from regard.kernels.triton.tile_lists import Tiles

LOG2E = 1.4426950408889634
FORWARD, QUERIES, KEYS = (128, 128), (128, ROWS), (ROWS, 128)
"""Blocks of queries and keys: two groups of warps hold ROWS each of the side that stays."""
LAUNCH = {"num_warps": 4, "REGISTERS": 240}
"""Of one group of warps; the second one and the loading warp come on top. 240 registers a thread for those that
compute, 24 for the one that loads: all that a multiprocessor has."""

TilesOf = Callable[[tuple[int, int]], Tiles]


class HopperBlockSparse(torch.autograd.Function):
    """out (B, Hq, N, Dv) and lse (B, Hq, N) float32 of softmax(scale · q kᵀ) v over the entries of a pattern.

    `tiles(block)` gives the pattern's lists for that block.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, tiles: TilesOf, scale: float) -> tuple[Tensor, Tensor]:
        batch, heads, n, dim = q.shape
        kv_heads, dim_v = v.shape[1], v.shape[3]
        q, k, v = aligned(q), aligned(k), aligned(v)
        out = torch.empty(batch, heads, n, dim_v, dtype=q.dtype, device=q.device)
        lse = torch.empty(batch, heads, n, dtype=torch.float32, device=q.device)
        told, programs = tiles(FORWARD), _multiprocessors(q.device)
        lists, works = told.by_query, query_works(told, programs)
        block_sparse_forward[(min(programs, len(works)),)](
            descriptor(q, ROWS), descriptor(k, FORWARD[1]), descriptor(v, FORWARD[1]), descriptor(out, ROWS), lse,
            works, lists.start, lists.first, lists.count, lists.other, words_by_query(told), told.mask_of,
            n, heads, heads // kv_heads, lists.blocks, len(works), scale * LOG2E,
            BM=FORWARD[0], BN=FORWARD[1], D=dim, DV=dim_v, SLOTS=2, **LAUNCH,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.tiles, ctx.scale = tiles, scale
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        batch, heads, n, dim = q.shape
        kv_heads, m, dim_v = v.shape[1:]
        shape, programs = {"D": dim, "DV": dim_v}, _multiprocessors(q.device)
        scales = (ctx.scale * LOG2E, ctx.scale)
        dout = torch.zeros_like(out) if dout is None else aligned(dout)
        padded = triton.cdiv(n, QUERIES[0]) * QUERIES[0]
        base, delta = (torch.empty(batch * heads, padded, dtype=torch.float32, device=q.device) for _ in range(2))
        row_terms[(padded // ROWS * batch * heads,)](
            out, dout, None if dlse is None else dlse.contiguous(), lse, base, delta, *out.stride()[:3],
            *dout.stride()[:3], n, padded, heads, ROWS=ROWS, DV=dim_v, HAS_DLSE=dlse is not None,
        )  # fmt: skip

        dq, dk, dv = (_like(x) for x in (q, k, v))
        rows = [descriptor(x, ROWS) for x in (q, dout, k, v)]
        told = ctx.tiles(QUERIES)
        lists, works = told.by_query, query_works(told, programs)
        backward_queries[(min(programs, len(works)),)](
            *rows, descriptor(dq, ROWS), base, delta,
            works, lists.start, lists.first, lists.count, lists.other, words_by_query(told), told.mask_of,
            padded, heads, heads // kv_heads, lists.blocks, len(works), *scales,
            BM=QUERIES[0], BN=QUERIES[1], SLOTS=3, **shape, **LAUNCH,
        )  # fmt: skip

        told = ctx.tiles(KEYS)
        lists, (dealt, cuts, pieces) = told.by_key, key_works(told, kv_heads, batch, programs)
        sums = torch.empty(max(1, pieces), KEYS[1], dim + dim_v, dtype=torch.float32, device=q.device)
        backward_keys[(min(programs, len(dealt)),)](
            *rows[:2], line(base, ROWS), line(delta, ROWS), *rows[2:], descriptor(dk, ROWS), descriptor(dv, ROWS), sums,
            dealt, lists.start, lists.first, lists.count, lists.ahead, lists.other, words_by_key(told), told.mask_of,
            heads, heads // kv_heads, lists.blocks, len(dealt), *scales,
            BM=KEYS[0], BN=KEYS[1], SLOTS=3, **shape, **LAUNCH,
        )  # fmt: skip
        if len(cuts):
            add_pieces[(len(cuts), KEYS[1] // 32)](
                sums, cuts, dk, dv, *dk.stride()[:3], *dv.stride()[:3], m, kv_heads, lists.blocks,
                BN=KEYS[1], ROWS=32, **shape,
            )  # fmt: skip
        return dq, dk, dv, None, None


@triton.jit
def row_terms(
    Out, DOut, DLse, Lse, Base, Delta, sob, soh, son, sdb, sdh, sdn, n, padded, heads,
    ROWS: tl.constexpr, DV: tl.constexpr, HAS_DLSE: tl.constexpr,
):  # fmt: skip
    """Base = −lse in base 2 and Delta = dlse − Σ dout · out, (B·H, padded) float32.

    Base is −inf for queries that saw nothing and beyond the last: all their weights become 0."""
    blocks = padded // ROWS
    head = tl.program_id(0) // blocks
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    i = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    inside, dv, at = i < n, tl.arange(0, DV), i[:, None].to(tl.int64)
    out = tl.load(Out + b * sob + h * soh + at * son + dv[None], mask=inside[:, None], other=0.0).to(tl.float32)
    dout = tl.load(DOut + b * sdb + h * sdh + at * sdn + dv[None], mask=inside[:, None], other=0.0).to(tl.float32)
    delta = -tl.sum(out * dout, 1)
    line = head.to(tl.int64) * n + i
    if HAS_DLSE:
        delta += tl.load(DLse + line, mask=inside, other=0.0)
    lse = tl.load(Lse + line, mask=inside, other=-float("inf"))
    place = head.to(tl.int64) * padded + i
    tl.store(Delta + place, delta)
    tl.store(Base + place, tl.where(lse == -float("inf"), -float("inf"), -lse * 1.4426950408889634))


def _like(x: Tensor) -> Tensor:
    """Memory for a gradient of x, in x's order of dimensions where copies can write it."""
    made = torch.empty_like(x)
    return made if aligned(made) is made else torch.empty_like(x, memory_format=torch.contiguous_format)


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
