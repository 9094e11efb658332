"""Who sees whom along one axis of a grid. A pattern on a grid is mostly the product of its axes.

An axis answers for closed ranges of query coordinates × key coordinates, exactly, in a fixed number of operations.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from regard.errors import require
from regard.patterns.algebra import at_least, true_or_false


@dataclass(frozen=True, repr=False)
class Axis:
    """`size` coordinates, 0..size−1. This one lets everybody see everybody."""

    size: int

    def __repr__(self) -> str:
        """Its size, and what is not as usual."""
        said = (f"{f.name}={getattr(self, f.name)}" for f in fields(self)[1:] if getattr(self, f.name) != f.default)
        return f"{type(self).__name__}({', '.join([str(self.size), *said])})"

    def rule(self, q: Tensor, k: Tensor) -> Tensor:
        """bool: may coordinate q see coordinate k? Pointwise, as `Pattern.rule`."""
        return (q == q) & (k == k)

    def answers(self, q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor) -> tuple[Tensor, Tensor]:
        """bool, bool: is some pair of q0..q1 × k0..k1 allowed, is every one? Ranges are closed and not empty."""
        true = self.rule(q0, k0)
        return true, true

    def seen(self, q: Tensor) -> Tensor:
        """How many coordinates each q sees."""
        return torch.full_like(q, self.size)


@dataclass(frozen=True, repr=False)
class Same(Axis):
    """Each coordinate sees itself."""

    def rule(self, q: Tensor, k: Tensor) -> Tensor:
        return q == k

    def answers(self, q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor) -> tuple[Tensor, Tensor]:
        return (q0 <= k1) & (k0 <= q1), (q0 == q1) & (k0 == k1) & (q0 == k0)

    def seen(self, q: Tensor) -> Tensor:
        return torch.ones_like(q)


@dataclass(frozen=True, repr=False)
class Stretches(Axis):
    """Each q sees the stretch first(q)..last(q). Both never fall with q, and neighbouring stretches leave no gap.

    So a range of queries sees, together, first(q0)..last(q1), and all of them see first(q1)..last(q0).
    """

    def first(self, q: Tensor) -> Tensor:
        raise NotImplementedError

    def last(self, q: Tensor) -> Tensor:
        raise NotImplementedError

    def rule(self, q: Tensor, k: Tensor) -> Tensor:
        return (k >= self.first(q)) & (k <= self.last(q))

    def answers(self, q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor) -> tuple[Tensor, Tensor]:
        some = (k1 >= self.first(q0)) & (k0 <= self.last(q1))
        return some, (k0 >= self.first(q1)) & (k1 <= self.last(q0))

    def seen(self, q: Tensor) -> Tensor:
        return self.last(q).clamp(max=self.size - 1) - self.first(q).clamp(min=0) + 1


@dataclass(frozen=True, repr=False)
class Halo(Stretches):
    """The block of q, and `halo` coordinates on both sides of it; cut at the border."""

    block: int
    halo: int

    def __post_init__(self) -> None:
        at_least("block", self.block, 1)
        at_least("halo", self.halo, 0)

    def first(self, q: Tensor) -> Tensor:
        return q // self.block * self.block - self.halo

    def last(self, q: Tensor) -> Tensor:
        return q // self.block * self.block + (self.block - 1 + self.halo)


@dataclass(frozen=True, repr=False)
class Neighborhood(Stretches):
    """A window around q, or around the leader of its stride group; shifted inward at the border, so never cut.

    With a causal axis: the window ends at q, and is cut at 0. With a dilation d all this holds within each residue
    class mod d, which has n = ⌈(size − g)/d⌉ members.
    """

    window: int
    stride: int = 1
    dilation: int = 1
    causal: bool = False

    def __post_init__(self) -> None:
        for name in ("window", "stride", "dilation"):
            at_least(name, getattr(self, name), 1)
        true_or_false("causal", self.causal)
        reach = f"window {self.window} × dilation {self.dilation}"
        fits = self.window * self.dilation <= self.size
        require(fits, "window", f"{reach} on an axis of {self.size}", "a window × dilation of at most the axis")
        require(self.stride <= self.window, "stride", self.stride, f"1 to the window, {self.window}")

    def _ends(self, q: Tensor, n: Tensor | int) -> tuple[Tensor, Tensor]:
        """First and last member that member q of a class of n sees; the first may lie before 0 on a causal axis."""
        s, w = self.stride, self.window
        group = q if s == 1 else q // s * s
        if self.causal:
            return _at_most(group + (s - 1), n - 1) - (w - 1), q
        leader = _at_most(group + s // 2, n - 1)
        first = _at_most(leader - w // 2, n - w).clamp(min=0)
        return first, first + (w - 1)

    def first(self, q: Tensor) -> Tensor:
        return self._ends(q, self.size)[0]

    def last(self, q: Tensor) -> Tensor:
        return self._ends(q, self.size)[1]

    def rule(self, q: Tensor, k: Tensor) -> Tensor:
        d = self.dilation
        if d == 1:
            first, last = self._ends(q, self.size)
            return (k >= first) & (k <= last)
        g = q % d
        first, last = self._ends(q // d, (self.size - g + (d - 1)) // d)
        member = k // d
        return (k % d == g) & (member >= first) & (member <= last)

    def answers(self, q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor) -> tuple[Tensor, Tensor]:
        d = self.dilation
        if d == 1:
            return super().answers(q0, q1, k0, k1)
        # Two neighbours are in different classes: only a single pair can be all allowed.
        every = (q0 == q1) & (k0 == k1) & self.rule(q0, k0)
        some = torch.zeros_like(every)
        for g in self._classes(q0, q1, k0, k1):
            n = self.size // d + _number(g < self.size % d, q0)
            a, b = q0 // d + _number(q0 % d > g, q0), q1 // d - _number(q1 % d < g, q0)
            c, e = k0 // d + _number(k0 % d > g, q0), k1 // d - _number(k1 % d < g, q0)
            some = some | ((a <= b) & (c <= e) & (e >= self._ends(a, n)[0]) & (c <= self._ends(b, n)[1]))
        return some, every

    def _classes(self, q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor) -> list[Tensor | int]:
        """Residues that stand for all: between two of these breaks, every class has the same members in the ranges."""
        d = self.dilation
        if d <= 6:
            return list(range(d))
        return [0, self.size % d, q0 % d, (q1 + 1) % d, k0 % d, (k1 + 1) % d]

    def seen(self, q: Tensor) -> Tensor:
        d = self.dilation
        first, last = self._ends(q // d, (self.size - q % d + (d - 1)) // d)
        return last - first.clamp(min=0) + 1


def _at_most(x: Tensor, most: Tensor | int) -> Tensor:
    return x.clamp(max=most)  # type: ignore[arg-type]


def _number(x: Tensor | bool, like: Tensor) -> Tensor | int:
    """A truth value as 0 or 1, to be added to coordinates."""
    return x.to(like.dtype) if isinstance(x, Tensor) else int(x)
