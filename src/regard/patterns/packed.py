"""Several documents packed into one row: nobody attends across a border."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from regard.errors import ArgumentError, require
from regard.patterns.algebra import Pattern, at_least
from regard.patterns.tiles import answer
from regard.registry import Paper, register

PACKING = Paper("Efficient Sequence Packing without Cross-contamination", "Krell et al.", 2021, "2107.02027")


@dataclass(frozen=True)
class Documents(Pattern):
    """id of i = id of j ≥ 0. ids (N,) or (B, N) long; per_row says which, and is structure."""

    ids: Tensor = field(compare=False, repr=False)
    per_row: bool = field(init=False)

    def __post_init__(self) -> None:
        ids = self.ids
        require(isinstance(ids, Tensor), "ids", type(ids).__name__, "an integer tensor of shape (N,) or (B, N)")
        whole = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
        require(whole, "ids", f"dtype {ids.dtype}", "an integer dtype")
        require(ids.ndim in (1, 2) and ids.numel() > 0, "ids", f"shape {tuple(ids.shape)}", "(N,) or (B, N), not empty")
        least = int(ids.min())
        require(least >= -1, "ids", f"an id of {least}", "ids ≥ 0, or −1 for a token that attends to nothing")
        object.__setattr__(self, "ids", ids.long())
        object.__setattr__(self, "per_row", ids.ndim == 2)
        self._reads(self.ids)

    @property
    def rows(self) -> int | None:
        return self.ids.shape[0] if self.per_row else None

    @property
    def extent(self) -> int:
        return self.ids.shape[-1]

    def bind(self, n: int) -> Pattern:
        at_least("n", n, 1)
        if n > self.extent:
            raise ArgumentError("n", n, f"at most {self.extent}, the number of positions that ids covers")
        return self

    def _at(self, table: Tensor, b: Tensor, i: Tensor) -> Tensor:
        return table[b, i] if self.per_row else table[i]

    def rule(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Positions beyond the ids attend to nothing: they can only be padding where `extent` was checked."""
        end = self.extent - 1
        of_i, of_j = self._at(self.ids, b, i.clamp(0, end)), self._at(self.ids, b, j.clamp(0, end))
        return (of_i == of_j) & (of_i >= 0) & (i >= 0) & (i <= end) & (j >= 0) & (j <= end)

    @cached_property
    def _tables(self) -> _Tables:
        return _Tables.of(self.ids)

    @property
    def exact(self) -> bool:
        """True where no document is interrupted by another. FULL is always exact; else an EMPTY may be missed."""
        return self._tables.contiguous

    def tiles(self, b: Tensor, h: Tensor, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor) -> Tensor:
        t = self._tables

        def at(table: Tensor, x: Tensor) -> Tensor:
            return self._at(table, b, x)

        def alike(x0: Tensor, x1: Tensor) -> Tensor:
            return at(t.changes, x0) == at(t.changes, x1)

        def inhabited(x0: Tensor, x1: Tensor) -> Tensor:
            return at(t.real, x1) - at(t.real, x0) + (at(self.ids, x0) >= 0) > 0

        every = alike(i0, i1) & alike(j0, j1) & (at(self.ids, i0) == at(self.ids, j0)) & (at(self.ids, i0) >= 0)
        meet = (at(t.lowest, i0) <= at(t.highest, j1)) & (at(t.lowest, j0) <= at(t.highest, i1))
        return answer(meet & inhabited(i0, i1) & inhabited(j0, j1), every)


@dataclass(frozen=True)
class _Tables:
    """For ranges of positions, each (..., N) long. Documents are ranked by first appearance.

    lowest[x], highest[x]: smallest rank from x on, largest up to x. Of a range x0..x1 that holds a real token,
    lowest[x0]..highest[x1] bounds the ranks, and is exact where documents are contiguous, since ranks then never fall.
    real[x]: tokens of id ≥ 0 up to x. changes[x]: places up to x where the id differs from the one before.
    """

    lowest: Tensor
    highest: Tensor
    real: Tensor
    changes: Tensor
    contiguous: bool

    @classmethod
    def of(cls, ids: Tensor) -> _Tables:
        rank = torch.stack([_ranked(row) for row in ids.reshape(-1, ids.shape[-1])]).view_as(ids)
        real = ids >= 0
        lowest = rank.masked_fill(~real, ids.shape[-1]).flip(-1).cummin(-1).values.flip(-1)
        highest = rank.cummax(-1).values
        change = torch.zeros_like(ids)
        change[..., 1:] = (ids[..., 1:] != ids[..., :-1]).long()
        falls = real & (rank < highest)
        return cls(lowest, highest, real.cumsum(-1), change.cumsum(-1), not bool(falls.any()))


def _ranked(ids: Tensor) -> Tensor:
    """(N,) long: 0, 1, 2, … in order of first appearance; −1 stays −1."""
    values, inverse = ids.unique(return_inverse=True)
    place = torch.arange(len(ids), device=ids.device)
    first = torch.full_like(values, len(ids)).scatter_reduce(0, inverse, place, "amin")
    return first.argsort().argsort()[inverse].masked_fill(ids < 0, -1)


@register(
    "documents",
    kind="pattern",
    families=("static-pattern",),
    paper=PACKING,
    cost="sum of squared document lengths",
    example=lambda: Documents(torch.arange(24) // 7),
    causal=False,
)
def documents(ids: Tensor) -> Pattern:
    """Tokens of the same document see each other. ids: integers (N,), or (B, N) where rows differ; −1 sees nothing.

    Ids may be any numbers ≥ 0 in any order. Tile answers are exact where no document is interrupted by another, else
    sound (`exact` says which). Raises ArgumentError for another dtype or shape, for ids < −1, and when asked for more
    positions than there are ids.

    >>> documents(torch.tensor([7, 7, 3, -1])).dense(4).int()[0, 0].tolist()
    [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    """
    return Documents(ids)


@register(
    "segments",
    kind="pattern",
    families=("static-pattern",),
    paper=PACKING,
    cost="sum of squared document lengths",
    example=lambda: Documents(torch.tensor([0] * 5 + [1] + [2] * 12 + [3] * 6)),
    causal=False,
)
def segments(lengths: Sequence[int]) -> Pattern:
    """Documents one after another, given by their lengths in tokens. Raises ArgumentError for none, or one below 1.

    >>> segments([2, 1]).dense(3).int()[0, 0].tolist()
    [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    """
    several = isinstance(lengths, Sequence) and len(lengths) > 0
    require(several, "lengths", repr(lengths), "a list of at least one length")
    for length in lengths:
        at_least("lengths", length, 1)
    return Documents(torch.arange(len(lengths)).repeat_interleave(torch.tensor(list(lengths))))
