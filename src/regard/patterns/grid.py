"""Patterns over tokens that lie on a grid: an image, a video, a volume."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regard.errors import ArgumentError, UnsupportedError, require
from regard.patterns.algebra import Pattern, at_least
from regard.patterns.axes import Axis
from regard.patterns.order import Box, Coordinates, Order, Region
from regard.patterns.tiles import answer

if TYPE_CHECKING:
    from regard.patterns.cost import Cost


@dataclass(frozen=True)
class OnGrid(Pattern):
    """Tokens before, then the grid in row-major order, then tokens after: N = before + product of layout + after.

    Those beside the grid (text, say) see every token and are seen by every token. A subclass writes `grid_rule` over
    coordinates and `box_answers` for two boxes of the grid.
    """

    layout: tuple[int, ...]
    before: int
    after: int

    def __post_init__(self) -> None:
        at_least("before", self.before, 0)
        at_least("after", self.after, 0)

    def grid_rule(self, q: Coordinates, k: Coordinates) -> Tensor:
        """bool: may a token at q see one at k?"""
        raise NotImplementedError

    def box_answers(self, q: Box, k: Box) -> tuple[Tensor, Tensor]:
        """bool, bool: is some pair of the two boxes allowed, is every one?"""
        raise NotImplementedError

    exact = True

    @property
    def tokens(self) -> int:
        """Tokens on the grid."""
        return prod(self.layout)

    @property
    def extent(self) -> int:
        return self.before + self.tokens + self.after

    @property
    def laid_for(self) -> int:
        return self.extent

    def bind(self, n: int) -> Pattern:
        self._check_length("n", n)
        return self

    def _layout_said(self) -> str:
        grid = " × ".join(map(str, self.layout))
        return f": {grid}" + (f" + {self.before} before + {self.after} after" if self.before or self.after else "")

    def _check_length(self, argument: str, n: int) -> None:
        if n != self.extent:
            raise ArgumentError(argument, n, f"{self.extent}, the tokens of the layout{self._layout_said()}")

    @property
    def _order(self) -> Order:
        return Order(self.layout, self.layout, self.before)

    def places(self, i: Tensor) -> Coordinates:
        """The coordinates of positions; of those beside the grid, some on its border."""
        return self._order.coordinates((i - self.before).clamp(0, self.tokens - 1))

    def rule(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        slot_i, slot_j = (x - self.before for x in (i, j)) if self.before else (i, j)
        if not (self.before or self.after):
            return self.grid_rule(self._order.coordinates(slot_i), self._order.coordinates(slot_j))
        last = self.tokens - 1
        q, k = (self._order.coordinates(x.clamp(0, last)) for x in (slot_i, slot_j))
        beside = (slot_i < 0) | (slot_i > last) | (slot_j < 0) | (slot_j > last)
        return beside | self.grid_rule(q, k)

    def tiles(self, b: Tensor, h: Tensor, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor) -> Tensor:
        return self.region_answers(self._order.region(i0, i1), self._order.region(j0, j1))

    def region_answers(self, q: Region, k: Region) -> Tensor:
        """uint8 answers for the tokens of two regions; their empty slots do not count."""
        some = (q.beside & (k.beside | k.on_grid)) | (k.beside & q.on_grid)
        every = torch.ones_like(some)
        for x in q.boxes:
            for y in k.boxes:
                both = x.there & y.there
                box_some, box_every = self.box_answers(x, y)
                some = some | (both & box_some)
                every = every & (box_every | ~both)
        return answer(some, every & some)


@dataclass(frozen=True, repr=False)
class AxisProduct(OnGrid):
    """Allowed where every axis allows it."""

    axes: tuple[Axis, ...]

    def __repr__(self) -> str:
        beside = [f"{name}={getattr(self, name)}" for name in ("before", "after") if getattr(self, name)]
        return f"Grid({', '.join([' × '.join(map(repr, self.axes)), *beside])})"

    def grid_rule(self, q: Coordinates, k: Coordinates) -> Tensor:
        out = self.axes[0].rule(q[0], k[0])
        for axis, x, y in zip(self.axes[1:], q[1:], k[1:], strict=True):
            out = out & axis.rule(x, y)
        return out

    def box_answers(self, q: Box, k: Box) -> tuple[Tensor, Tensor]:
        some, every = self.axes[0].answers(q.first[0], q.last[0], k.first[0], k.last[0])
        for a, axis in enumerate(self.axes[1:], 1):
            axis_some, axis_every = axis.answers(q.first[a], q.last[a], k.first[a], k.last[a])
            some, every = some & axis_some, every & axis_every
        return some, every

    def cost(  # type: ignore[override]
        self,
        n: int | None = None,
        m: int | None = None,
        *,
        tile: tuple[int, ...] | int | None = None,
        key_tile: tuple[int, ...] | int | None = None,
        batch: int | None = None,
        heads: int | None = None,
        head_dim: int = 128,
        **asked: Any,
    ) -> Cost:
        """As `Pattern.cost`; with `tile` (and `key_tile`, if another) the tiles are boxes of the grid.

        With tiles of the grid it is counted axis by axis, at any size in milliseconds: the simulator of GNA (Hassani et
        al. 2025). See `regard.patterns.simulator.simulate` for what it says besides.
        """
        if tile is None or not set(asked) <= {"block", "q_offset", "device"}:
            require(key_tile is None or tile is not None, "key_tile", key_tile, "None without tile")
            length = self.extent if n is None else n
            return super().cost(length, m, batch=batch, heads=heads, head_dim=head_dim, **asked)
        from regard.patterns.simulator import simulate

        for name, value in (("n", n), ("m", m)):
            if value is not None:
                self._check_length(name, value)
        for name, value in (("batch", batch), ("heads", heads), ("head_dim", head_dim)):
            if value is not None:
                at_least(name, value, 1)
        require(not asked, "block", asked, "no block beside tile: the tile is the block")
        if self.before or self.after:
            raise UnsupportedError("cost by tiles counts the grid alone: leave out the tokens before and after it")
        return simulate(self, tile, key_tile).cost(times=(batch or 1) * (heads or 1), head_dim=head_dim)
