"""How many tiles a pattern on a grid touches when a tile is a box of the grid: GNA's simulator.

Hassani et al. 2025, arXiv 2504.16922. A product of axes touches a pair of tiles where every axis does, so each axis is
counted alone and the counts are multiplied: a video of 115,200 tokens takes milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.errors import ArgumentError, require
from regard.patterns.axes import Axis
from regard.patterns.cost import Cost
from regard.patterns.order import check_layout

if TYPE_CHECKING:
    from regard.patterns.grid import AxisProduct

LARGEST = 1 << 26  # pairs of tiles on one axis


@dataclass(frozen=True)
class _Counted:
    """One axis: pairs of tiles (touched, full, all key tiles, all query tiles), entries, and touched by one tile."""

    touched: int
    full: int
    query_tiles: int
    key_tiles: int
    most: int
    entries: int
    tile_entries: int
    size: int


@dataclass(frozen=True)
class Simulation:
    """Tiles of a pattern on a grid, counted exactly. Full tiles count tokens only, not the empty slots at a border.

    touched, full: pairs of query tile and key tile that are not EMPTY, and that are FULL. query_tiles, key_tiles: all.
    most: key tiles that one query tile touches at most. entries: allowed pairs. tile_entries: pairs in touched tiles.
    all_entries: all pairs.
    """

    touched: int
    full: int
    query_tiles: int
    key_tiles: int
    most: int
    entries: int
    tile_entries: int
    all_entries: int

    @property
    def mean(self) -> float:
        """Key tiles that a query tile touches on average."""
        return self.touched / self.query_tiles

    @property
    def partial(self) -> int:
        """Touched pairs of tiles that need a mask."""
        return self.touched - self.full

    @property
    def perfect(self) -> bool:
        """Perfectly block-sparse: no tile needs a mask, and nothing is computed in vain."""
        return self.partial == 0

    @property
    def speedup_bound(self) -> float:
        """Key tiles over those touched by the busiest query tile: the most a kernel of these tiles can gain."""
        return self.key_tiles / self.most

    @property
    def flop_bound(self) -> float:
        """All entries over the allowed ones: the most anything can gain."""
        return self.all_entries / self.entries

    def cost(self, *, times: int = 1, head_dim: int = 128) -> Cost:
        """The same as a `Cost`, for `times` heads and rows together."""
        tiles = self.query_tiles * self.key_tiles
        entries, tile_entries, every = (times * x for x in (self.entries, self.tile_entries, self.all_entries))
        return Cost(entries, tile_entries, every, times * self.full, times * self.partial, times * tiles, head_dim)


def simulate(
    pattern: AxisProduct, tile: tuple[int, ...] | int, key_tile: tuple[int, ...] | int | None = None
) -> Simulation:
    """Count the tiles of `tile` queries × `key_tile` keys (the same if not given), one size for each axis.

    Raises ArgumentError for a pattern that is not a product of axes, for tiles of the wrong number of axes, and for an
    axis of more than 8192 tiles.
    """
    axes = getattr(pattern, "axes", None)
    if not axes:
        raise ArgumentError("pattern", repr(pattern), "a pattern that is a product of axes of a grid")
    tiles = check_layout(tile, "tile", len(axes))
    key_tiles = tiles if key_tile is None else check_layout(key_tile, "key_tile", len(axes))
    counted = [_count(axis, t, u) for axis, t, u in zip(axes, tiles, key_tiles, strict=True)]

    def times(of: Callable[[_Counted], int]) -> int:
        return prod(of(c) for c in counted)

    return Simulation(
        touched=times(lambda c: c.touched),
        full=times(lambda c: c.full),
        query_tiles=times(lambda c: c.query_tiles),
        key_tiles=times(lambda c: c.key_tiles),
        most=times(lambda c: c.most),
        entries=times(lambda c: c.entries),
        tile_entries=times(lambda c: c.tile_entries),
        all_entries=times(lambda c: c.size**2),
    )


def _count(axis: Axis, tile: int, key_tile: int) -> _Counted:
    (q0, q1), (k0, k1) = _ranges(axis.size, tile), _ranges(axis.size, key_tile)
    pairs = len(q0) * len(k0)
    require(pairs <= LARGEST, "tile", tile, f"a tile that cuts an axis of {axis.size} into at most 8192")
    some, every = axis.answers(q0[:, None], q1[:, None], k0, k1)
    some, every = (x.expand(len(q0), len(k0)) for x in (some, every))
    area = (q1 - q0 + 1)[:, None] * (k1 - k0 + 1)
    return _Counted(
        touched=int(some.sum()),
        full=int(every.sum()),
        query_tiles=len(q0),
        key_tiles=len(k0),
        most=int(some.sum(1).max()),
        entries=int(axis.seen(torch.arange(axis.size)).sum()),
        tile_entries=int(area[some].sum()),
        size=axis.size,
    )


def _ranges(size: int, tile: int) -> tuple[Tensor, Tensor]:
    first = torch.arange(0, size, tile)
    return first, (first + (tile - 1)).clamp(max=size - 1)
