"""The order in which the tokens of a grid stand in a sequence, and which boxes of the grid a range of it holds."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from regard.errors import require
from regard.patterns.algebra import at_least

Coordinates = tuple[Tensor, ...]


class Box(NamedTuple):
    """Coordinates first..last on every axis, both included, where `there`; else no box."""

    there: Tensor
    first: Coordinates
    last: Coordinates


class Region(NamedTuple):
    """What a range of positions holds: boxes of the grid that do not overlap, tokens beside the grid, empty slots."""

    boxes: list[Box]
    beside: Tensor
    empty: Tensor

    @property
    def on_grid(self) -> Tensor:
        """bool: does it hold a token of the grid?"""
        out = torch.zeros_like(self.beside)
        for box in self.boxes:
            out = out | box.there
        return out


def check_layout(layout: object, argument: str = "layout", axes: int | None = None) -> tuple[int, ...]:
    """One to three sizes ≥ 1, as a tuple; an int is one axis. Raises ArgumentError."""
    sizes = (layout,) if isinstance(layout, int) else layout
    wanted = f"{axes} size{'s' if axes > 1 else ''} ≥ 1, one for each axis" if axes else "one to three sizes ≥ 1"
    ok = isinstance(sizes, tuple | list) and (len(sizes) == axes if axes else 1 <= len(sizes) <= 3)
    require(ok, argument, repr(layout), wanted)
    assert isinstance(sizes, tuple | list)
    for size in sizes:
        at_least(argument, size, 1)
    return tuple(sizes)


@dataclass(frozen=True)
class Order:
    """The grid tile by tile, tiles in row-major order and row-major inside; tile = layout is plain row-major order.

    Tiles at the border are as large as the others: where they stick out they hold empty slots. `start` is the position
    of the first slot; positions before it, and from start + slots on, are tokens beside the grid.
    """

    layout: tuple[int, ...]
    tile: tuple[int, ...]
    start: int = 0

    @property
    def counts(self) -> tuple[int, ...]:
        """Tiles along each axis."""
        return tuple(-(-size // t) for size, t in zip(self.layout, self.tile, strict=True))

    @property
    def slots(self) -> int:
        """Slots of all tiles, empty ones included."""
        return prod(self.counts) * prod(self.tile)

    @property
    def _digits(self) -> list[tuple[int, int]]:
        """A slot is a number of digits: which tile, on each axis, then which place in it. (size, unit) of each."""
        sizes = [*self.counts, *self.tile]
        return [(size, prod(sizes[k + 1 :])) for k, size in enumerate(sizes)]

    def coordinates(self, slot: Tensor) -> Coordinates:
        """Coordinates of slots 0..slots−1; those of empty slots lie outside the layout."""
        axes = len(self.layout)
        digits = [slot // unit % size if size > 1 else None for size, unit in self._digits]
        out = []
        for a, t in enumerate(self.tile):
            which, place = digits[a], digits[axes + a]
            if which is None:
                out.append(torch.zeros_like(slot) if place is None else place)
            else:
                out.append(which * t if place is None else which * t + place)
        return tuple(out)

    def slot(self, at: Coordinates) -> Tensor:
        """The slot of these coordinates."""
        axes, out = len(self.layout), torch.zeros_like(at[0])
        for a, t in enumerate(self.tile):
            out = out + at[a] // t * self._digits[a][1] + at[a] % t * self._digits[axes + a][1]
        return out

    def region(self, i0: Tensor, i1: Tensor) -> Region:
        """What positions i0..i1 hold, both included: as few boxes as do for all of them, at most 4·axes − 1."""
        low = (i0 - self.start).clamp(0, self.slots)
        high = (i1 + (1 - self.start)).clamp(0, self.slots)
        beside = (i0 < self.start) | (i1 >= self.start + self.slots)
        empty = torch.zeros_like(beside)
        boxes: list[Box] = []
        for first, end in self._stretches(low, high):
            if not bool((first < end).any()):
                continue
            box, sticks_out = self._box(first, end)
            empty = empty | sticks_out
            alone = (n for n, other in enumerate(boxes) if not bool((other.there & box.there).any()))
            n = next(alone, None)  # where no range holds both, one serves for the two
            if n is None:
                boxes.append(box)
            else:
                boxes[n] = _either(boxes[n], box)
        return Region(boxes, beside, empty)

    def _stretches(self, low: Tensor, high: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Cut slots low..high−1 where digits carry over: within each piece one digit runs and all finer ones are full.

        From the finest digit up: what is left of the next carry on the low side, and over it on the high side.
        """
        pieces = []
        for size, unit in reversed(self._digits[1:]):
            if size == 1:
                continue
            carry = size * unit
            up = torch.minimum((low + (carry - 1)) // carry * carry, high)
            down = torch.maximum(high // carry * carry, up)
            pieces += [(low, up), (down, high)]
            low, high = up, down
        return [*pieces, (low, high)]

    def _box(self, first: Tensor, end: Tensor) -> tuple[Box, Tensor]:
        """The box of slots first..end−1, without what sticks out of the layout; and whether anything does."""
        there = first < end
        low, high = self.coordinates(first.clamp(max=self.slots - 1)), self.coordinates((end - 1).clamp(min=0))
        inside, sticks_out = there, torch.zeros_like(there)
        for a, size in enumerate(self.layout):
            if size % self.tile[a]:
                inside = inside & (low[a] < size)
                sticks_out = sticks_out | (there & (high[a] >= size))
        clipped = tuple(x.clamp(max=size - 1) for x, size in zip(high, self.layout, strict=True))
        return Box(inside, low, clipped), sticks_out


def _either(a: Box, b: Box) -> Box:
    """Box a where it is there, else b."""

    def pick(x: Coordinates, y: Coordinates) -> Coordinates:
        return tuple(torch.where(a.there, p, q) for p, q in zip(x, y, strict=True))

    return Box(a.there | b.there, pick(a.first, b.first), pick(a.last, b.last))
