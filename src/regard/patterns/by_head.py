"""A pattern of its own for every query head."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from itertools import groupby

import torch
from torch import Tensor

from regard.errors import ArgumentError, require
from regard.patterns.algebra import Pattern
from regard.patterns.block_map import distinct_heads
from regard.patterns.sequence import causal, sliding_window
from regard.registry import Paper, register

SPARSE_TRANSFORMER = Paper("Generating Long Sequences with Sparse Transformers", "Child et al.", 2019, "1904.10509")


@dataclass(frozen=True)
class PerHead(Pattern):
    """Head h follows patterns[h]."""

    patterns: tuple[Pattern, ...]

    def __post_init__(self) -> None:
        ok = isinstance(self.patterns, tuple) and all(isinstance(p, Pattern) for p in self.patterns)
        require(ok and len(self.patterns) > 0, "patterns", self.patterns, "at least one Pattern, one for each head")
        for p in self.patterns:
            fits = p.heads in (None, self.heads)
            require(fits, "patterns", f"a pattern for {p.heads} heads among {self.heads}", "patterns for as many heads")
        object.__setattr__(self, "patterns", tuple(p.for_head(h) for h, p in enumerate(self.patterns)))
        _ = self.rows  # raises where they disagree
        _ = self._groups  # made now: it compares tensors by identity, which compiled code should not

    @property
    def heads(self) -> int:
        return len(self.patterns)

    @property
    def exact(self) -> bool:
        return all(p.exact for p in self.patterns)

    def for_head(self, h: int) -> Pattern:
        if not 0 <= h < self.heads:
            raise ArgumentError("h", h, f"a query head from 0 to {self.heads - 1}")
        return self.patterns[h]

    @cached_property
    def _groups(self) -> list[tuple[Pattern, list[range]]]:
        """The different patterns, each with the runs of heads that follow it."""
        different, index = distinct_heads(self, self.heads)
        return [(p, _runs(index, g)) for g, p in enumerate(different)]

    def rule(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return reduce(operator.or_, (_among(h, heads) & p.rule(b, h, i, j) for p, heads in self._groups))

    def tiles(self, b: Tensor, h: Tensor, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor) -> Tensor:
        answers = (_among(h, heads) * p.tiles(b, h, i0, i1, j0, j1) for p, heads in self._groups)
        return reduce(torch.maximum, answers)


def _runs(index: Sequence[int], g: int) -> list[range]:
    """The stretches of `index` that are g."""
    runs = []
    for value, run in groupby(range(len(index)), key=index.__getitem__):
        heads = list(run)
        if value == g:
            runs.append(range(heads[0], heads[-1] + 1))
    return runs


def _among(h: Tensor, heads: list[range]) -> Tensor:
    """bool: is h in one of the runs? By comparisons, so that no table has to live on the right device."""
    return reduce(operator.or_, ((h >= run.start) & (h < run.stop) for run in heads))


@register(
    "per-head",
    kind="pattern",
    families=("static-pattern",),
    paper=SPARSE_TRANSFORMER,
    cost="the sum of its heads",
    example=lambda: PerHead((causal(), causal() & sliding_window(4))),
    causal=False,
)
def per_head(patterns: Sequence[Pattern]) -> Pattern:
    """Query head h follows patterns[h]. Combines with others by `&`, `|`, `~`; equal heads are mapped and drawn once.

    Raises ArgumentError for no pattern, or for patterns that are themselves written for another number of heads.

    >>> per_head([causal(), sliding_window(1)]).dense(2).int()[0].tolist()
    [[[1, 0], [1, 1]], [[1, 0], [0, 1]]]
    """
    several = isinstance(patterns, Iterable) and not isinstance(patterns, str)
    require(several, "patterns", repr(patterns), "a list of patterns, one for each head")
    return PerHead(tuple(patterns))
