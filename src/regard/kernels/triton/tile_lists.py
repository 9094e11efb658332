"""A pattern as data for the block-sparse kernels: which tiles each block visits, and the bits of those half allowed."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.patterns.block_map import distinct_heads
from regard.patterns.tiles import EMPTY, FULL, PARTIAL

if TYPE_CHECKING:
    from regard.patterns.algebra import Pattern

ENTRIES = 1 << 24
"""Entries of PARTIAL tiles evaluated at a time."""
KEPT = 48
"""How many lists are kept, the most recently used: of a pattern one for each block, three where there is a backward."""
_lock = Lock()  # autograd walks backward in threads of its own


@dataclass(frozen=True, eq=False)
class TileLists:
    """For every block of one side, the blocks of the other side to visit.

    start (R, blocks, 4) int32: first and end of its runs of FULL tiles, then first and end of its PARTIAL tiles; R
    counts the distinct masks over batch rows and heads. first, count int32: the runs, of neighbouring blocks. other,
    slot int32: the PARTIAL tiles, their block and their place in the bits.
    """

    start: Tensor
    first: Tensor
    count: Tensor
    other: Tensor
    slot: Tensor

    @property
    def blocks(self) -> int:
        return self.start.shape[1]

    @property
    def visits(self) -> Tensor:
        """(R, blocks) long: how many tiles each block visits."""
        run, run_end, part, part_end = self.start.long().unbind(-1)
        up_to = torch.nn.functional.pad(self.count.long().cumsum(0), (1, 0))
        return up_to[run_end] - up_to[run] + part_end - part

    @cached_property
    def ahead(self) -> Tensor:
        """int32, of each run: how many tiles its block visits before it, the PARTIAL ones first."""
        run, run_end, part, part_end = self.start.long().view(-1, 4).unbind(-1)
        up_to = torch.nn.functional.pad(self.count.long().cumsum(0), (1, 0))
        before = (part_end - part - up_to[run]).repeat_interleave(run_end - run)
        return (before + up_to[:-1]).int()


@dataclass(frozen=True, eq=False)
class Tiles:
    """Everything the kernels read of a pattern.

    by_query, by_key: what each query block and each key block visits. bits (P, BM, BN // 8) uint8: the entries of each
    PARTIAL tile, eight keys a byte, the first in the lowest bit. mask_of (B · H,) int32: which of the R masks a row and
    head has. touched: share of all tiles visited, the mean over heads.
    """

    by_query: TileLists
    by_key: TileLists
    bits: Tensor
    mask_of: Tensor
    touched: float

    @property
    def bits_by_key(self) -> Tensor:
        """uint8 (P, BN, BM // 8): the PARTIAL tiles transposed, in the order in which `by_key` lists them. Made anew.

        (`by_query` lists them in the order of `bits`.)"""
        parts, bm, bytes_a_row = self.bits.shape
        out = self.bits.new_empty(parts, bytes_a_row * 8, bm // 8)
        eight = torch.arange(8, dtype=torch.uint8, device=self.bits.device)
        step = max(1, ENTRIES // (bm * bytes_a_row * 8))
        for s in range(0, parts, step):
            chosen = self.bits[self.by_key.slot[s : s + step].long()]
            entries = ((chosen[..., None] >> eight) & 1).flatten(2).mT.unflatten(2, (-1, 8))
            out[s : s + step] = (entries << eight).sum(-1, dtype=torch.uint8)
        return out


_kept: OrderedDict[tuple[object, ...], tuple[Pattern, Tiles]] = OrderedDict()


def tiles_of(
    pattern: Pattern, n: int, m: int, *, batch: int, heads: int, block: tuple[int, int], device: torch.device
) -> Tiles:
    """The lists of a pattern over n queries, the last of m positions, and m keys. Made once per pattern and shape."""
    key = (pattern, tuple(id(t) for t in pattern.facts.tensors), n, m, batch, heads, block, device)
    with _lock:
        if key in _kept:
            _kept.move_to_end(key)
            return _kept[key][1]
    tiles = _build(pattern, n, m, batch, heads, block, device)
    with _lock:
        _kept[key] = pattern, tiles  # the pattern keeps its tensors' ids taken
        if len(_kept) > KEPT:
            _kept.popitem(last=False)
    return tiles


def _build(
    pattern: Pattern, n: int, m: int, batch: int, heads: int, block: tuple[int, int], device: torch.device
) -> Tiles:
    bn = block[1]
    grid = pattern.block_map(n, m, block=block, heads=heads, batch=batch, device=device)
    of_head = distinct_heads(pattern, heads)[1]
    rows, groups, nq, nk = grid.kinds.shape
    kinds = grid.kinds.reshape(rows * groups, nq, nk).clone()
    if m % bn:  # keys beyond the end are masked by bits, so the last block of keys is never FULL
        last = kinds[:, :, -1]
        last[last == FULL] = PARTIAL
    partial = kinds == PARTIAL
    slots = (partial.flatten().cumsum(0, dtype=torch.int32) - 1).view_as(kinds)
    bits = _bits(pattern, partial, of_head, groups, n, m, block, max(m - n, 0))
    index = torch.tensor(of_head, dtype=torch.int32, device=device)
    base = torch.arange(rows, dtype=torch.int32, device=device)[:, None] * groups
    mask_of = (base + index).expand(batch, -1).flatten().contiguous()
    return Tiles(
        _lists(kinds, slots),
        _lists(kinds.transpose(1, 2), slots.transpose(1, 2)),
        bits,
        mask_of,
        float((kinds != EMPTY).float().mean((1, 2)).view(rows, groups)[:, of_head].mean()),
    )


def _lists(kinds: Tensor, slots: Tensor) -> TileLists:
    """kinds and slots (R, blocks, others)."""
    full, partial = kinds == FULL, kinds == PARTIAL
    before = torch.nn.functional.pad(full, (1, 0))[..., :-1]
    after = torch.nn.functional.pad(full, (0, 1))[..., 1:]
    begins, ends = full & ~before, full & ~after
    first = begins.nonzero()[:, 2]
    count = ends.nonzero()[:, 2] - first + 1  # runs are met in the same order by their first and by their last tile
    edges = []
    for wanted in (begins, partial):
        many = wanted.sum(-1, dtype=torch.int32).flatten()
        end = many.cumsum(0, dtype=torch.int32)
        edges += [end - many, end]
    r, block, other = partial.nonzero(as_tuple=True)
    start = torch.stack(edges, 1).view(*kinds.shape[:2], 4).contiguous()
    return TileLists(
        start, first.to(torch.int32), count.to(torch.int32), other.to(torch.int32), slots[r, block, other].contiguous()
    )


def _bits(
    pattern: Pattern,
    partial: Tensor,
    of_head: list[int],
    groups: int,
    n: int,
    m: int,
    block: tuple[int, int],
    q_offset: int,
) -> Tensor:
    """Bits of all PARTIAL tiles, in row-major order of `partial` (R, nq, nk)."""
    bm, bn = block
    device = partial.device
    representative = torch.tensor([of_head.index(g) for g in range(groups)], device=device)
    r, qb, kb = partial.nonzero(as_tuple=True)
    bits = torch.empty(len(r), bm, bn // 8, dtype=torch.uint8, device=device)
    weights = (2 ** torch.arange(8, device=device)).to(torch.uint8)
    step = max(1, ENTRIES // (bm * bn))
    for s in range(0, len(r), step):
        part = slice(s, s + step)
        i = qb[part, None, None] * bm + torch.arange(bm, device=device)[:, None]
        j = kb[part, None, None] * bn + torch.arange(bn, device=device)
        inside = (i < n) & (j < m)
        i, j = i.clamp(max=n - 1) + q_offset, j.clamp(max=m - 1)
        seen = pattern.rule((r[part] // groups)[:, None, None], representative[r[part] % groups][:, None, None], i, j)
        seen = (seen & inside).view(-1, bm, bn // 8, 8)
        bits[part] = (seen * weights).sum(-1, dtype=torch.uint8)
    return bits
