"""What a pattern costs, counted before anything is run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from regard.patterns.block_map import Grid, distinct_heads, partial_tiles, tile_answers
from regard.patterns.tiles import FULL

if TYPE_CHECKING:
    from regard.patterns.algebra import Pattern


@dataclass(frozen=True)
class Cost:
    """Work of one attention forward under a pattern, over all rows and heads. Entries are query–key pairs.

    entries: allowed ones. tile_entries: all those inside tiles that are not EMPTY. all_entries: rows · heads · n · m.
    full, partial: tiles of that kind, after looking inside; tiles: all of them. head_dim: channels of q·k and of v.
    """

    entries: int
    tile_entries: int
    all_entries: int
    full: int
    partial: int
    tiles: int
    head_dim: int

    @property
    def touched(self) -> int:
        """Tiles that are not EMPTY."""
        return self.full + self.partial

    @property
    def density(self) -> float:
        """Share of all entries that are allowed."""
        return self.entries / self.all_entries

    @property
    def flops(self) -> int:
        """Operations of QKᵀ and of weights·V on the allowed entries alone: 4 · entries · head_dim."""
        return 4 * self.entries * self.head_dim

    @property
    def tile_flops(self) -> int:
        """The same for all entries of the touched tiles: what a kernel that works by tiles computes."""
        return 4 * self.tile_entries * self.head_dim

    @property
    def speedup_bound(self) -> float:
        """How many times faster than full attention a kernel by tiles can be at most; inf if no tile is touched."""
        return self.all_entries / self.tile_entries if self.tile_entries else float("inf")

    def __str__(self) -> str:
        return (
            f"{self.entries:,} of {self.all_entries:,} entries ({self.density:.2%}), "
            f"{self.touched:,} of {self.tiles:,} tiles ({self.full:,} full), "
            f"{self.flops / 1e9:.3g} GFLOP, at most {self.speedup_bound:.1f}× faster than full attention"
        )


def measure_cost(pattern: Pattern, grid: Grid, *, heads: int, batch: int, head_dim: int) -> Cost:
    """Counts by tiles, and by the rule inside PARTIAL ones only."""
    different, index = distinct_heads(pattern, heads)
    rows = pattern.rows or 1
    areas = grid.areas()
    entries = tile_entries = full = partial = 0
    for g, p in enumerate(different):
        times = index.count(g) * (batch // rows)
        kinds = tile_answers(p, grid, rows)
        for row in kinds == FULL:
            whole = int(areas[row].sum())
            entries += times * whole
            tile_entries += times * whole
            full += times * int(row.sum())
        for _, count, area in partial_tiles(p, grid, kinds):
            entries += times * int(count.sum())
            tile_entries += times * int(area[count > 0].sum())
            full += times * int((count == area).sum())
            partial += times * int(((count > 0) & (count < area)).sum())
    tiles, all_entries = batch * heads * areas.numel(), batch * heads * grid.n * grid.m
    return Cost(entries, tile_entries, all_entries, full, partial, tiles, head_dim)
