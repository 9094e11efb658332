"""The gradient of the log decays that are the same for all channels (`diagonal`):

    dg_s = Σ_{i ≥ s} c_i + e ,   c_i = q_i·dq_i − k_i·dk_i        e = ⟨S_N, dS_N⟩, what the final state adds

within each sequence. Long sums of differences: totals of blocks are kept in float64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from regard.kernels.triton.pieces import Pieces

BLOCK = 1024


@triton.jit
def _changes(
    Read, Written, Pieces, block, h, sequence, split, heads, length, size, reads, writes, BLOCK: tl.constexpr
):  # fmt: skip
    """Of one block of a sequence: (c (BLOCK), where its tokens lie in (B, H, N), which of them there are)."""
    first, last = Pieces + sequence * split * 4, Pieces + (sequence * split + split - 1) * 4
    at = tl.load(first + 1) + block * BLOCK + tl.arange(0, BLOCK)
    inside, place = at < tl.load(last + 2), (tl.load(first).to(tl.int64) * heads + h) * length + at
    c = tl.zeros([BLOCK], tl.float32)
    read, written = Read + place, Written + place
    for _ in range(reads):
        c += tl.load(read, mask=inside, other=0.0)
        read += size
    for _ in range(writes):
        c -= tl.load(written, mask=inside, other=0.0)
        written += size
    return c, place, inside


@triton.jit
def totals(
    Read, Written, Totals, Pieces, split, heads, length, size, reads, writes, BLOCK: tl.constexpr
):  # fmt: skip
    """Totals (sequences, H, blocks) float64: Σ c of each block. Read (reads, B, H, N), Written (writes, B, H, N): parts
    of q·dq and k·dk, `size` = B · H · N numbers each."""
    block, h, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    c, _, _ = _changes(
        Read, Written, Pieces, block, h, sequence, split, heads, length, size, reads, writes, BLOCK
    )  # fmt: skip
    place = (sequence * heads + h) * tl.num_programs(0) + block
    tl.store(Totals + place, tl.sum(c.to(tl.float64), 0))


@triton.jit
def sums_from_the_end(
    Read, Written, Totals, Ends, DG, Pieces, split, heads, length, size, reads, writes,
    BLOCK: tl.constexpr, ENDS: tl.constexpr,
):  # fmt: skip
    """DG (B, H, N) float32 from `totals`; Ends (sequences, H): e of each, if ENDS."""
    block, h, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    c, place, inside = _changes(
        Read, Written, Pieces, block, h, sequence, split, heads, length, size, reads, writes, BLOCK
    )  # fmt: skip
    line, blocks = (sequence * heads + h) * tl.num_programs(0), tl.num_programs(0)
    later = tl.zeros([BLOCK], tl.float64)
    for first in range(block + 1, blocks, BLOCK):
        index = first + tl.arange(0, BLOCK)
        later += tl.load(Totals + line + index, mask=index < blocks, other=0.0)
    behind = tl.sum(later, 0)
    if ENDS:
        behind += tl.load(Ends + sequence * heads + h).to(tl.float64)
    tl.store(DG + place, (behind + tl.cumsum(c, 0, reverse=True)).to(tl.float32), mask=inside)


def gates(read: Tensor, written: Tensor, ends: Tensor | None, pieces: Pieces) -> Tensor:
    """dg (B, H, N) float32; read, written (parts, B, H, N), ends (sequences, H) or None, float32 and contiguous."""
    batch, heads, n = read.shape[1:]
    blocks = -(-pieces.tokens // BLOCK)
    found = torch.empty(batch, heads, n, dtype=torch.float32, device=read.device)
    table = torch.empty(pieces.sequences, heads, blocks, dtype=torch.float64, device=read.device)
    about = (pieces.table, pieces.split, heads, n, batch * heads * n, read.shape[0], written.shape[0])
    grid = (blocks, heads, pieces.sequences)
    if blocks * heads * pieces.sequences:
        totals[grid](read, written, table, *about, BLOCK=BLOCK)
        given = table if ends is None else ends.float().contiguous()
        sums_from_the_end[grid](read, written, table, given, found, *about, BLOCK=BLOCK, ENDS=ends is not None)
    return found
