"""BAMM: tokens that are given are seen by all; tokens to be predicted are causal among themselves."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from regard.patterns.algebra import Pattern
from regard.patterns.per_token import PerTokenFlag, counted, last_at
from regard.patterns.tiles import answer
from regard.registry import Paper, register

PAPER = Paper("BAMM: Bidirectional Autoregressive Motion Model", "Pinyoanuntapong et al.", 2024, "2403.19435")


@dataclass(frozen=True)
class Given(PerTokenFlag):
    """ids[j], or j ≤ i and not ids[i]."""

    exact = True

    @property
    def _argument(self) -> str:
        return "given"

    def rule(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        behind = (j <= i) & ~self._at(self.ids, b, i)
        return (self._at(self.ids, b, j) | behind) & self._within(i, j)

    @cached_property
    def _tables(self) -> tuple[Tensor, Tensor]:
        """How many tokens are given before each position; the last one to be predicted up to each position."""
        return counted(self.ids), last_at(~self.ids)

    def tiles(self, b: Tensor, h: Tensor, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor) -> Tensor:
        count, last = self._tables
        keys_given = self._at(count, b, j1 + 1) - self._at(count, b, j0)
        queries_given = self._at(count, b, i1 + 1) - self._at(count, b, i0)
        asking = self._at(last, b, i1)  # the last query that looks back; it sees the most
        some = (keys_given > 0) | ((asking >= i0) & (j0 <= asking))
        asked = self._at(last, b, j1)  # the last key that is not given; the hardest to see
        every = (asked < j0) | ((queries_given == 0) & (asked <= i0))
        return answer(some, every)


@register(
    "bamm",
    kind="pattern",
    families=("static-pattern",),
    paper=PAPER,
    cost="N²/2 entries with nothing given, N² with all",
    example=lambda: Given(torch.arange(24) % 5 == 0),
    causal=False,
)
def bamm(given: Tensor) -> Pattern:
    """Given tokens are seen by all and see only one another; the others see them and their own past.

    given: bool (N,) or (B, N).

    allowed(i, j) = given[j], or j ≤ i and not given[i]. Position 0 is the condition, and given. With nothing else
    given it is causal, with all given it is full. What is not given never reaches a given token, so the keys and
    values of given tokens are computed once, and the rest is then decoded step by step with a cache ("two passes").

    `given` is aligned to the key's position: the token that position i *predicts* stands at i + 1. The END token is
    among the given ones in the second pass, padding never is. Raises ArgumentError for another dtype or shape, and
    when asked for more positions than `given` has.

    >>> bamm(torch.tensor([True, False, False, True])).dense(4).int()[0, 0].tolist()
    [[1, 0, 0, 1], [1, 1, 0, 1], [1, 1, 1, 1], [1, 0, 0, 1]]
    """
    return Given(given)
