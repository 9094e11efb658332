"""Pyramids of token maps, coarse to fine: each scale alone (M-VAR), or with all coarser ones (VAR)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from regard.errors import ArgumentError, require
from regard.patterns.algebra import Pattern, at_least, true_or_false
from regard.patterns.tiles import answer
from regard.registry import Paper, register

MVAR = Paper(
    "M-VAR: Decoupled Scale-wise Autoregressive Modeling for High-Quality Image Generation",
    "Ren et al.",
    2024,
    "2411.10433",
)
SIDES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)


@dataclass(frozen=True)
class Scales(Pattern):
    """Side p of each scale, p² tokens one after another. Same scale; with `across`, a scale no finer."""

    sides: tuple[int, ...]
    across: bool

    exact = True

    def __post_init__(self) -> None:
        ok = isinstance(self.sides, tuple) and len(self.sides) > 0
        require(ok, "sides", repr(self.sides), "at least one side of a scale")
        for side in self.sides:
            at_least("sides", side, 1)
        true_or_false("across", self.across)

    @property
    def extent(self) -> int:
        return sum(side**2 for side in self.sides)

    @property
    def laid_for(self) -> int:
        return self.extent

    def bind(self, n: int) -> Pattern:
        if n != self.extent:
            raise ArgumentError("n", n, f"{self.extent}, the tokens of all scales")
        return self

    def _scale(self, x: Tensor) -> Tensor:
        """The number of the scale of each position: how many scales have ended by then."""
        out = torch.zeros_like(x)
        for end in list(accumulate(side**2 for side in self.sides))[:-1]:
            out = out + (x >= end).to(x.dtype)
        return out

    def rule(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        q, k = self._scale(i), self._scale(j)
        return k <= q if self.across else k == q

    def tiles(self, b: Tensor, h: Tensor, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor) -> Tensor:
        q0, q1, k0, k1 = (self._scale(x) for x in (i0, i1, j0, j1))
        if self.across:
            return answer(k0 <= q1, k1 <= q0)
        return answer((k0 <= q1) & (q0 <= k1), (q0 == k1) & (k0 == q1))


@register(
    "m-var",
    kind="pattern",
    families=("static-pattern",),
    paper=MVAR,
    cost="Σ side⁴ entries: 110,468 of 462,400 with the default sides",
    example=lambda: Scales((1, 2, 3), False),
    causal=False,
)
def m_var(sides: tuple[int, ...] = SIDES, *, across: bool = False) -> Pattern:
    """Tokens of one scale of an image pyramid see each other; what passes between scales is left to a recurrence.

    sides: of the square token maps, coarse to fine, each row-major, one after another: N = Σ side². across=True is
    VAR's own pattern: the coarser scales are seen as well. Raises ArgumentError for a side < 1.

    >>> m_var((1, 2)).dense(5).int()[0, 0].tolist()[:2]
    [[1, 0, 0, 0, 0], [0, 1, 1, 1, 1]]
    >>> m_var((1, 2), across=True).dense(5).int()[0, 0].tolist()[:2]
    [[1, 0, 0, 0, 0], [1, 1, 1, 1, 1]]
    """
    return Scales(tuple(sides) if isinstance(sides, Sequence) else sides, across)
