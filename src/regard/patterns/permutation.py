"""Tokens of a grid in the order of multi-dimensional tiles, so that a block of the sequence is a box of the grid.

In row-major order a block of 128 tokens is a thin line, and a window of the grid touches many of them. Tile by tile the
same window touches few: the permutation of FNA and GNA (Hassani et al. 2024, 2025).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from functools import cached_property, reduce
from math import prod
from typing import Any

import torch
from torch import Tensor

from regard.errors import ArgumentError, require
from regard.patterns.algebra import And, Not, Or, Pattern, a_pattern, at_least
from regard.patterns.by_head import PerHead, _among
from regard.patterns.cost import Cost
from regard.patterns.grid import AxisProduct, OnGrid
from regard.patterns.order import Order, Region, check_layout
from regard.patterns.simulator import LARGEST, simulate
from regard.patterns.tiles import EMPTY, PARTIAL

COUNTED = {"batch", "heads", "head_dim"}  # what a cost that is counted by axes depends on


@dataclass(frozen=True)
class Tiling:
    """`before` tokens, a grid of `layout`, `after` tokens; to be reordered so that each `tile` of the grid is one run.

    In the new order the tiles come first, in row-major order of tiles, and the tokens beside the grid last, so that
    blocks of ∏tile tokens are tiles. Where a size is not a multiple of the tile, the tiles at that border are filled up
    with empty slots: the new sequence is longer (`length`), and nobody sees or is an empty slot.
    Raises ArgumentError for sizes < 1 and for a tile with another number of axes.
    """

    layout: tuple[int, ...]
    tile: tuple[int, ...]
    before: int = field(default=0, kw_only=True)
    after: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        layout = check_layout(self.layout)
        object.__setattr__(self, "layout", layout)
        object.__setattr__(self, "tile", check_layout(self.tile, "tile", len(layout)))
        at_least("before", self.before, 0)
        at_least("after", self.after, 0)

    @property
    def grid_order(self) -> Order:
        """Slots of the tiles."""
        return Order(self.layout, self.tile)

    @property
    def tokens(self) -> int:
        """N, as the caller has them."""
        return self.before + prod(self.layout) + self.after

    @property
    def length(self) -> int:
        """Slots in the new order, empty ones included."""
        return self.grid_order.slots + self.before + self.after

    @property
    def block(self) -> int:
        """Tokens of a tile: the block of block maps and kernels that fits."""
        return prod(self.tile)

    def token(self, slot: Tensor) -> tuple[Tensor, Tensor]:
        """Which token (as the caller counts) stands in each slot, and whether there is one at all; else any token."""
        slots, grid = self.grid_order.slots, prod(self.layout)
        at = self.grid_order.coordinates(slot.clamp(0, slots - 1))
        real = slot >= 0
        for a, size in enumerate(self.layout):
            if size % self.tile[a]:
                real = real & (at[a] < size)
        inside = tuple(x.clamp(max=size - 1) for x, size in zip(at, self.layout, strict=True))
        token = Order(self.layout, self.layout).slot(inside) + self.before
        if not (self.before or self.after):
            return token, real & (slot < slots)
        beside = slot - slots
        beside = torch.where(beside < self.before, beside, beside + grid).clamp(0, self.tokens - 1)
        return torch.where(slot < slots, token, beside), torch.where(slot < slots, real, slot < self.length)

    def order(self, device: torch.device | str | None = None) -> Tensor:
        """(length,) long: the token of each slot; an empty slot repeats one nearby, which nobody looks at."""
        return self.token(torch.arange(self.length, device=device))[0]

    def inverse(self, device: torch.device | str | None = None) -> Tensor:
        """(N,) long: the slot of each token."""
        token, real = self.token(torch.arange(self.length, device=device))
        out = torch.empty(self.tokens, dtype=torch.long, device=device)
        out[token[real]] = real.nonzero()[:, 0]
        return out

    def permute(self, x: Tensor, dim: int = 2) -> Tensor:
        """The tokens along `dim`, N of them, in the new order: `length` of them. Raises ArgumentError for another N."""
        require(x.shape[dim] == self.tokens, "x", f"{x.shape[dim]} tokens", f"{self.tokens}, as the tiling has")
        return x.index_select(dim, self.order(x.device))

    def restore(self, x: Tensor, dim: int = 2) -> Tensor:
        """Back to the caller's order along `dim`, without empty slots."""
        require(x.shape[dim] == self.length, "x", f"{x.shape[dim]} slots", f"{self.length}, as the tiling has")
        return x.index_select(dim, self.inverse(x.device))


@dataclass(frozen=True)
class Permuted(Pattern):
    """`pattern` for tokens in the order of `tiling`; empty slots see nothing and are not seen.

    Patterns on the same grid, and what is composed of them, answer from the boxes that a range of slots holds: exact,
    as they are in their own order. Any other pattern is asked about the whole range of tokens that the slots span:
    sound, and `refine` finds the rest.
    """

    pattern: Pattern
    tiling: Tiling

    def __post_init__(self) -> None:
        a_pattern("pattern", self.pattern)
        require(isinstance(self.tiling, Tiling), "tiling", repr(self.tiling), "a Tiling")
        own = self.pattern.extent
        fits = own is None or own == self.tiling.tokens
        require(fits, "tiling", f"{self.tiling.tokens} tokens", f"{own}, as the pattern has")

    @property
    def extent(self) -> int:
        return self.tiling.length

    @property
    def laid_for(self) -> int:
        return self.extent

    @property
    def exact(self) -> bool:
        p = self.pattern.a if isinstance(self.pattern, Not) else self.pattern
        return isinstance(p, OnGrid) and p.exact and _same_grid(p, self.tiling)

    def bind(self, n: int) -> Pattern:
        """n counts tokens, as for the pattern itself."""
        require(n == self.tiling.tokens, "n", n, f"{self.tiling.tokens}, as the tiling has")
        return self._rebuilt(lambda p: p.bind(n))

    def cost(self, n: int, m: int | None = None, *, block: int | tuple[int, int] = 128, **asked: Any) -> Cost:
        """As `Pattern.cost`; a product of axes is counted by axes where a block is a tile and no slot is empty."""
        p, tiling = self.pattern, self.tiling
        whole = n == prod(tiling.layout) == self.extent and m in (None, n)
        if isinstance(p, AxisProduct) and whole and block in (tiling.block, (tiling.block, tiling.block)):
            if set(asked) <= COUNTED:
                return p.cost(n, tile=tiling.tile, **asked)
        return super().cost(n, m, block=block, **asked)

    def rule(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        (q, q_real), (k, k_real) = self.tiling.token(i), self.tiling.token(j)
        return self.pattern.rule(b, h, q, k) & q_real & k_real

    def tiles(self, b: Tensor, h: Tensor, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor) -> Tensor:
        q, k = (_Slots(self.tiling, self._region(x0, x1)) for x0, x1 in ((i0, i1), (j0, j1)))
        kinds = _ask(self.pattern, b, h, q, k)
        kinds = torch.where(q.region.empty | k.region.empty, kinds.clamp(max=PARTIAL), kinds)
        return torch.where(q.real & k.real, kinds, torch.full_like(kinds, EMPTY))

    def _region(self, first: Tensor, last: Tensor) -> Region:
        return self.tiling.grid_order.region(first, last.clamp(max=self.extent - 1))


class _Slots:
    """A region in tile order, and the range of tokens that it spans."""

    def __init__(self, tiling: Tiling, region: Region) -> None:
        self.tiling, self.region = tiling, region
        self.real = region.beside | region.on_grid

    @cached_property
    def span(self) -> tuple[Tensor, Tensor]:
        """First and last token, in the caller's order. All tokens where it holds some that lie beside the grid."""
        end, raster = self.tiling.tokens - 1, Order(self.tiling.layout, self.tiling.layout)
        first, last = None, None
        for box in self.region.boxes:
            low, high = raster.slot(box.first) + self.tiling.before, raster.slot(box.last) + self.tiling.before
            low, high = torch.where(box.there, low, end), torch.where(box.there, high, 0)
            first = low if first is None else torch.minimum(first, low)
            last = high if last is None else torch.maximum(last, high)
        zero = torch.zeros_like(self.real, dtype=torch.long)
        first = zero if first is None or last is None else torch.where(self.region.beside, 0, first)
        last = zero + end if last is None else torch.where(self.region.beside, end, last)
        return torch.minimum(first, last), last


def _same_grid(p: OnGrid, tiling: Tiling) -> bool:
    return (p.layout, p.before, p.after) == (tiling.layout, tiling.before, tiling.after)


def _ask(p: Pattern, b: Tensor, h: Tensor, q: _Slots, k: _Slots) -> Tensor:
    """The answers of p for the tokens of two regions."""
    if isinstance(p, OnGrid) and _same_grid(p, q.tiling):
        return p.region_answers(q.region, k.region)
    if isinstance(p, And):
        return torch.minimum(_ask(p.a, b, h, q, k), _ask(p.b, b, h, q, k))
    if isinstance(p, Or):
        return torch.maximum(_ask(p.a, b, h, q, k), _ask(p.b, b, h, q, k))
    if isinstance(p, Not):
        return 2 - _ask(p.a, b, h, q, k)
    if isinstance(p, PerHead):
        return reduce(torch.maximum, (_among(h, heads) * _ask(own, b, h, q, k) for own, heads in p._groups))
    return p.tiles(b, h, *q.span, *k.span)


def permuted(pattern: Pattern, tiling: Tiling) -> Pattern:
    """The same pattern for tokens that `tiling.permute` has reordered. Raises ArgumentError where the sizes differ.

    >>> from regard.patterns import neighborhood
    >>> p = permuted(neighborhood((4, 4), (2, 2), stride=(2, 2)), Tiling((4, 4), (2, 2)))
    >>> p.block_map(16, block=4).kinds[0, 0].tolist()
    [[2, 0, 0, 0], [0, 2, 0, 0], [0, 0, 2, 0], [0, 0, 0, 2]]
    """
    return Permuted(pattern, tiling)


def best_tile(pattern: Pattern, block: int = 128) -> tuple[int, ...]:
    """The tile of `block` tokens with which the pattern, on its grid, touches the fewest tiles.

    Of equals the one nearest to a cube, then the longest on the last axis. A product of axes is counted axis by axis
    (`simulate`); any other pattern, and one with tokens beside its grid, by the block map of each candidate.
    Axes are cut into at most 8192 pieces. Raises ArgumentError for a pattern without a grid.

    >>> from regard.patterns import neighborhood
    >>> best_tile(neighborhood((32, 32), (8, 8), stride=(8, 8)), block=64)
    (8, 8)
    """
    at_least("block", block, 1)
    grid = grid_of(pattern)
    scored = []
    for tile in _factors(block, len(grid.layout)):
        tiling = Tiling(grid.layout, tile, before=grid.before, after=grid.after)
        if max(tiling.grid_order.counts) ** 2 > LARGEST:
            continue
        if isinstance(pattern, AxisProduct) and not (grid.before or grid.after):
            touched = simulate(pattern, tile).touched
        else:
            kinds = permuted(pattern, tiling).block_map(tiling.length, block=block).expand()
            touched = int((kinds != EMPTY).sum())
        scored.append((touched, max(tile), tuple(-t for t in reversed(tile)), tile))
    require(bool(scored), "block", block, f"a block that cuts no axis of {grid.layout} into more than 8192 pieces")
    return min(scored)[-1]


def grid_of(pattern: Pattern) -> OnGrid:
    """The grid that a pattern, or what it is composed of, is written for. Raises ArgumentError for none, or several."""
    a_pattern("pattern", pattern)
    found = {(p.layout, p.before, p.after): p for p in _grids(pattern)}
    if len(found) != 1:
        raise ArgumentError("pattern", repr(pattern), f"a pattern on one grid, not on {len(found)}; or give a tiling")
    return next(iter(found.values()))


def _grids(p: Pattern) -> list[OnGrid]:
    own = [p] if isinstance(p, OnGrid) else []
    return reduce(operator.add, (_grids(part) for part in p.parts()), own)


def _factors(block: int, axes: int) -> list[tuple[int, ...]]:
    """All ways to write `block` as a product of `axes` sizes."""
    if axes == 1:
        return [(block,)]
    divisors = [d for d in range(1, block + 1) if block % d == 0]
    return [(d, *rest) for d in divisors for rest in _factors(block // d, axes - 1)]
