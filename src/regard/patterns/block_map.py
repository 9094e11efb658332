"""Block maps: the tile answers of a pattern over a grid of query blocks × key blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from regard.errors import require
from regard.patterns.checks import at_least, true_or_false
from regard.patterns.tiles import EMPTY, FULL, PARTIAL

if TYPE_CHECKING:
    from regard.patterns.algebra import Pattern

STRIP = 1 << 15  # tiles asked at a time: small temporaries, and too few for torch to start threads
ENTRIES = 1 << 18  # entries of PARTIAL tiles evaluated at a time


@dataclass(frozen=True)
class Grid:
    """n queries from position q_offset on, m keys from 0 on, cut into blocks of bq and bk. The last may be shorter."""

    n: int
    m: int
    bq: int
    bk: int
    q_offset: int
    device: torch.device

    @classmethod
    def of(
        cls, n: int, m: int | None, block: int | tuple[int, int], q_offset: int | None, device: torch.device
    ) -> Grid:
        """Checked; m = n, and the queries are the last n positions, unless said otherwise. Raises ArgumentError."""
        m = n if m is None else m
        pair = block if isinstance(block, tuple) else (block, block)
        for name, value in (("n", n), ("m", m), *(("block", size) for size in pair)):
            at_least(name, value, 1)
        require(len(pair) == 2, "block", block, "one size, or the pair of query block and key block")
        q_offset = max(m - n, 0) if q_offset is None else q_offset
        at_least("q_offset", q_offset, 0)
        return cls(n, m, pair[0], pair[1], q_offset, device)

    @property
    def shape(self) -> tuple[int, int]:
        """Number of query blocks and of key blocks."""
        return -(-self.n // self.bq), -(-self.m // self.bk)

    def ranges(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """First and last position of every query block (nq, 1), then of every key block (nk,); int32, both included."""
        i0 = torch.arange(0, self.n, self.bq, dtype=torch.int32, device=self.device)[:, None]
        j0 = torch.arange(0, self.m, self.bk, dtype=torch.int32, device=self.device)
        i1, j1 = (i0 + (self.bq - 1)).clamp_(max=self.n - 1), (j0 + (self.bk - 1)).clamp_(max=self.m - 1)
        return i0 + self.q_offset, i1 + self.q_offset, j0, j1

    def areas(self) -> Tensor:
        """long (nq, nk): entries of each tile."""
        i0, i1, j0, j1 = (x.long() for x in self.ranges())
        return (i1 - i0 + 1) * (j1 - j0 + 1)


class KeyBlockLists(NamedTuple):
    """For every query block the key blocks to visit, as FlexAttention's `BlockMask.from_kv_blocks` takes them.

    Counts (B or 1, H or 1, nq) int32; indices (B or 1, H or 1, nq, nk) int32, ascending, the first `count` of each row
    being meant and the rest 0. `kv_*` are the PARTIAL blocks, where the rule applies, `full_kv_*` the FULL ones.
    """

    kv_num_blocks: Tensor
    kv_indices: Tensor
    full_kv_num_blocks: Tensor
    full_kv_indices: Tensor


@dataclass(frozen=True, eq=False)
class BlockMap:
    """Tile answers, stored once per distinct head pattern.

    kinds uint8 (B or 1, G, nq, nk) of EMPTY, PARTIAL, FULL; head_index (H,) long: which of the G each query head uses.
    block: sizes of a query block and a key block. Queries are positions q_offset..q_offset+n−1, keys 0..m−1.
    """

    kinds: Tensor
    head_index: Tensor
    block: tuple[int, int]
    n: int
    m: int
    q_offset: int = 0

    def expand(self) -> Tensor:
        """uint8 (B or 1, H, nq, nk)."""
        return self._over_heads(self.kinds)

    @property
    def density(self) -> float:
        """Share of all tiles, over all heads, that are not EMPTY: what a block-sparse kernel visits."""
        share = (self.kinds != EMPTY).double().mean((0, 2, 3))
        return float(share[self.head_index].mean())

    def key_blocks(self) -> KeyBlockLists:
        """The lists of PARTIAL and FULL key blocks of every query block; one for all heads where they are alike."""
        lists = (*_ordered(self.kinds == PARTIAL), *_ordered(self.kinds == FULL))
        return KeyBlockLists(*(x if x.shape[1] == 1 else self._over_heads(x) for x in lists))

    def to(self, device: torch.device | str) -> BlockMap:
        """The same map on that device."""
        return replace(self, kinds=self.kinds.to(device), head_index=self.head_index.to(device))

    def _over_heads(self, x: Tensor) -> Tensor:
        if x.shape[1] == 1:  # a view: the heads are alike
            return x.expand(x.shape[0], len(self.head_index), *x.shape[2:])
        return x[:, self.head_index]


def _ordered(wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Counts (..., nq) and ascending indices (..., nq, nk), int32, of the True entries of a bool (..., nq, nk)."""
    rank = wanted.cumsum(-1, dtype=torch.int32)
    where = wanted.nonzero(as_tuple=True)
    indices = torch.zeros_like(rank)
    indices[(*where[:-1], (rank[where] - 1).long())] = where[-1].to(torch.int32)
    return rank[..., -1].contiguous(), indices


def distinct_heads(pattern: Pattern, heads: int) -> tuple[list[Pattern], list[int]]:
    """The G different patterns among the heads, and for each of `heads` query heads which of them it has.

    Tensors count by identity: equality of patterns alone looks at structure only.
    """
    if pattern.heads is None:
        return [pattern], [0] * heads
    found: dict[tuple[object, ...], int] = {}
    different: list[Pattern] = []
    index = []
    for h in range(heads):
        p = pattern.for_head(h)
        key = (p, *(id(t) for t in p.tensors()))
        if key not in found:
            found[key] = len(different)
            different.append(p)
        index.append(found[key])
    return different, index


def build_block_map(pattern: Pattern, grid: Grid, *, heads: int, refine: bool) -> BlockMap:
    """The block map, one strip of query blocks after another, for each distinct head."""
    true_or_false("refine", refine)
    different, index = distinct_heads(pattern, heads)
    kinds = torch.empty((pattern.rows or 1, len(different), *grid.shape), dtype=torch.uint8, device=grid.device)
    for g, p in enumerate(different):
        kinds[:, g] = tile_answers(p, grid, kinds.shape[0])
        if refine and not p.exact:
            for tile, count, area in partial_tiles(p, grid, kinds[:, g]):
                exact = torch.where(count == area, FULL, torch.where(count == 0, EMPTY, PARTIAL))
                kinds[:, g][tile] = exact.to(torch.uint8)
    return BlockMap(kinds, torch.tensor(index, device=grid.device), (grid.bq, grid.bk), grid.n, grid.m, grid.q_offset)


def tile_answers(pattern: Pattern, grid: Grid, rows: int) -> Tensor:
    """uint8 (rows, nq, nk) from `pattern.tiles`, for a pattern whose heads are alike."""
    out = torch.empty((rows, *grid.shape), dtype=torch.uint8, device=grid.device)
    b, h = torch.arange(rows, device=grid.device)[:, None, None], torch.zeros((), dtype=torch.long, device=grid.device)
    i0, i1, j0, j1 = grid.ranges()
    strip = max(1, STRIP // (rows * grid.shape[1]))
    for s in range(0, grid.shape[0], strip):
        out[:, s : s + strip] = pattern.tiles(b, h, i0[s : s + strip], i1[s : s + strip], j0, j1)
    return out


def partial_tiles(
    pattern: Pattern, grid: Grid, kinds: Tensor
) -> Iterator[tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor]]:
    """Look into the PARTIAL tiles of kinds (rows, nq, nk), some at a time.

    Yields their indices (row, query block, key block), how many of their entries are allowed, and how many they have.
    """
    row, iq, jk = (kinds == PARTIAL).nonzero(as_tuple=True)
    i0, i1, j0, j1 = (x.flatten().long() for x in grid.ranges())
    h = torch.zeros((), dtype=torch.long, device=grid.device)
    down = torch.arange(min(grid.bq, grid.n), device=grid.device)[:, None]
    across = torch.arange(min(grid.bk, grid.m), device=grid.device)
    step = max(1, ENTRIES // (len(down) * len(across)))
    for s in range(0, len(row), step):
        b, q, k = row[s : s + step], iq[s : s + step], jk[s : s + step]
        last_i, last_j = i1[q][:, None, None], j1[k][:, None, None]
        i, j = i0[q][:, None, None] + down, j0[k][:, None, None] + across
        allowed = pattern.rule(b[:, None, None], h, i.clamp(max=last_i), j.clamp(max=last_j))
        count = (allowed & (i <= last_i) & (j <= last_j)).sum((1, 2))
        yield (b, q, k), count, (i1[q] - i0[q] + 1) * (j1[k] - j0[k] + 1)
