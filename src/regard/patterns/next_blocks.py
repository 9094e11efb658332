"""Next-block prediction: blocks of tokens that see themselves whole and all blocks before."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from regard.errors import ArgumentError, require
from regard.patterns.algebra import Pattern, at_least
from regard.patterns.tiles import answer
from regard.registry import Paper, register

PAPER = Paper(
    "Next Block Prediction: Video Generation via Semi-Autoregressive Modeling", "Ren et al.", 2025, "2502.07737"
)


@dataclass(frozen=True)
class BlockCausal(Pattern):
    """The block of j is not after that of i; the first `condition` tokens are one block before all others."""

    block: int
    condition: int = 0
    length: int | None = None

    exact = True

    def __post_init__(self) -> None:
        at_least("block", self.block, 1)
        at_least("condition", self.condition, 0)
        if self.length is not None:
            at_least("length", self.length, 1)
            blocks = self.length - self.condition
            allowed = f"{self.condition} condition tokens and one or more whole blocks of {self.block}"
            require(blocks > 0 and blocks % self.block == 0, "length", self.length, allowed)

    @property
    def extent(self) -> int | None:
        return self.length

    def bind(self, n: int) -> Pattern:
        at_least("n", n, 1)
        if self.length not in (None, n):
            raise ArgumentError("n", n, f"{self.length}, which the pattern is for")
        return replace(self, length=n)

    def _number(self, x: Tensor) -> Tensor:
        """0 for the condition, then 1, 2, …"""
        return ((x - self.condition) // self.block + 1).clamp(min=0)

    def rule(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return self._number(j) <= self._number(i)

    def tiles(self, b: Tensor, h: Tensor, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor) -> Tensor:
        a0, a1, c0, c1 = (self._number(x) for x in (i0, i1, j0, j1))
        return answer(c0 <= a1, c1 <= a0)


@register(
    "next-block-prediction",
    kind="pattern",
    families=("static-pattern",),
    paper=PAPER,
    cost="N² / 2 entries, and block / 2 more for each token",
    example=lambda: BlockCausal(5, 4),
    causal=False,
)
def next_block_prediction(block: int, condition: int = 0, length: int | None = None) -> Pattern:
    """Block-causal: `condition` tokens that see one another, then blocks of `block` that see all up to their own.

    The first block after the condition is the begin block (copies of a start token). Position i predicts token i +
    block, and a whole block is decoded at once, with no mask inside it. block = 1 without a condition is `causal()`.
    Condition tokens that are padding are taken away with `& tokens(valid)`.

    length: the number of tokens, the condition and whole blocks; `bind(n)` gives it too, and both refuse a ragged
    total, which training cannot use. Raises ArgumentError for that, for block < 1 and condition < 0.

    >>> next_block_prediction(2, 1).dense(5).int()[0, 0].tolist()
    [[1, 0, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]]
    """
    return BlockCausal(block, condition, length)
