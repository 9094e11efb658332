"""Diagonal decays in a sequence that is cut into pieces: the state that each piece starts from.

A piece leaves S = λ ⊙ S₀ + L, where S₀ is the state before it. Its L, found as if nothing were before it, and its λ,
the decay of all its tokens, are what the scans without outputs write; here they are chained.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from regard.kernels.triton.pieces import Pieces


@triton.jit
def chain(
    Local, Left, Start, Starts, split, heads, columns, size, left_size,
    BLOCK: tl.constexpr, REVERSE: tl.constexpr, START: tl.constexpr,
):  # fmt: skip
    """BLOCK of the `size` = DK · DV entries of the states of one head of one sequence, all contiguous and float32:

    Starts (sequences, split, H, DK, DV) from Start (sequences, H, DK, DV), and Local (sequences, split − 1, H, DK, DV)
    and Left (sequences, split − 1, H, left_size = DK or 1) of all its pieces but the last, or, REVERSE, the first."""
    block, h, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    entry = block * BLOCK + tl.arange(0, BLOCK)
    inside, row = entry < size, tl.where(left_size == 1, 0, entry // columns)
    state = tl.zeros([BLOCK], tl.float32)
    if START:
        state = tl.load(Start + (sequence * heads + h) * size + entry, mask=inside, other=0.0)
    for n in range(split - 1):
        turn = (split - 1 - n) if REVERSE else n
        tl.store(Starts + ((sequence * split + turn) * heads + h) * size + entry, state, mask=inside)
        place = (sequence * (split - 1) + (turn - 1 if REVERSE else turn)) * heads + h
        left = tl.load(Left + place * left_size + row, mask=inside, other=0.0)
        state = state * left + tl.load(Local + place * size + entry, mask=inside, other=0.0)
    last = sequence * split + (0 if REVERSE else split - 1)
    tl.store(Starts + (last * heads + h) * size + entry, state, mask=inside)


def chained(local: Tensor, left: Tensor, state: Tensor | None, pieces: Pieces, reverse: bool) -> Tensor:
    """The state that each piece starts from, (pieces, H, Dk, Dv) float32; local, left: of `pieces.feeding(reverse)`."""
    heads, rows, columns = local.shape[1:]
    state = None if state is None else state.float().contiguous()
    found = torch.empty(pieces.table.shape[0], heads, rows, columns, dtype=torch.float32, device=local.device)
    grid = (-(-rows * columns // 1024), heads, pieces.sequences)
    chain[grid](
        local, left, local if state is None else state, found, pieces.split, heads, columns, rows * columns,
        left.shape[2], BLOCK=1024, REVERSE=reverse, START=state is not None,
    )  # fmt: skip
    return found
