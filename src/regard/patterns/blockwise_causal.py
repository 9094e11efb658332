"""Patterns of whole blocks under the causal rule: what power attention, S2 and MoA have in common.

Tokens are cut into blocks of `block`, aligned at 0. A rule over (query block, key block) says which earlier blocks are
seen; a query's own block always is; inside a block the causal rule holds.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from regard.patterns.algebra import Pattern, at_least
from regard.patterns.tiles import answer


@dataclass(frozen=True)
class BlockwiseCausal(Pattern):
    """j ≤ i, and the block of j is that of i or one that `sees` allows. A subclass has the field `block`."""

    block: int

    exact = True

    def __post_init__(self) -> None:
        at_least("block", self.block, 1)

    def sees(self, qb: Tensor, kb: Tensor) -> Tensor:
        """bool: may queries of block qb see block kb < qb? Any value elsewhere."""
        raise NotImplementedError

    def sees_some(self, a0: Tensor, a1: Tensor, c0: Tensor, c1: Tensor) -> Tensor:
        """bool: is there a query block in a0..a1 that sees an earlier key block in c0..c1? Exact."""
        raise NotImplementedError

    def sees_all(self, a0: Tensor, a1: Tensor, c0: Tensor, c1: Tensor) -> Tensor:
        """bool: do all query blocks in a0..a1 see all of c0..c1 but their own? Asked where c1 ≤ a0. Exact."""
        raise NotImplementedError

    def rule(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        qb, kb = i // self.block, j // self.block
        return (j <= i) & ((qb == kb) | self.sees(qb, kb))

    def tiles(self, b: Tensor, h: Tensor, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor) -> Tensor:
        a0, a1, c0, c1 = (x // self.block for x in (i0, i1, j0, j1))
        own = (c0 <= a1) & (a0 <= c1) & (j0 <= i1)  # a query and an earlier key in the same block
        some = own | ((c0 < a1) & self.sees_some(a0, a1, c0, c1))
        return answer(some, (j1 <= i0) & self.sees_all(a0, a1, c0, c1))


@dataclass(frozen=True)
class WindowAndSinkBlocks(BlockwiseCausal):
    """The last `window` blocks, the query's own included, and the first `sinks` blocks."""

    window: int
    sinks: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("window", self.window, 1)
        at_least("sinks", self.sinks, 0)

    def sees(self, qb: Tensor, kb: Tensor) -> Tensor:
        return (qb - kb < self.window) | (kb < self.sinks)

    def sees_some(self, a0: Tensor, a1: Tensor, c0: Tensor, c1: Tensor) -> Tensor:
        nearest = (a0 - c1).clamp(min=1)  # every distance from here to a1 − c0 occurs
        return (nearest < self.window) | (c0 < self.sinks)

    def sees_all(self, a0: Tensor, a1: Tensor, c0: Tensor, c1: Tensor) -> Tensor:
        return (a1 - c0.clamp(min=self.sinks) < self.window) | (c1 < self.sinks)
