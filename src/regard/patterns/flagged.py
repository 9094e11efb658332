"""Tokens that are flagged: keys that everybody sees, or queries that see everybody."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from regard.errors import UnknownNameError
from regard.patterns.algebra import Pattern
from regard.patterns.per_token import PerTokenFlag, counted
from regard.patterns.tiles import answer
from regard.registry import Paper, register

LONGFORMER = Paper("Longformer: The Long-Document Transformer", "Beltagy et al.", 2020, "2004.05150")
Side = Literal["keys", "queries"]


@dataclass(frozen=True)
class Tokens(PerTokenFlag):
    """ids[j] (of = "keys"), or ids[i] (of = "queries")."""

    of: Side = "keys"

    exact = True

    def __post_init__(self) -> None:
        if self.of not in get_args(Side):
            raise UnknownNameError("of", str(self.of), get_args(Side))
        super().__post_init__()

    @property
    def _argument(self) -> str:
        return "mask"

    def rule(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return self._at(self.ids, b, j if self.of == "keys" else i) & self._within(i, j)

    @cached_property
    def _count(self) -> Tensor:
        return counted(self.ids)

    def tiles(self, b: Tensor, h: Tensor, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor) -> Tensor:
        first, last = (j0, j1) if self.of == "keys" else (i0, i1)
        count = self._at(self._count, b, last + 1) - self._at(self._count, b, first)
        both = (i0 == i0) & (j0 == j0)  # True in the shape of all tiles
        return answer((count > 0) & both, (count == last - first + 1) & both)


@register(
    "tokens",
    kind="pattern",
    families=("static-pattern",),
    paper=LONGFORMER,
    cost="N · flagged tokens entries",
    example=lambda: Tokens(torch.arange(24) % 5 == 0),
    causal=False,
)
def tokens(mask: Tensor, of: Side = "keys") -> Pattern:
    """Flagged tokens: as keys they are seen by every query, as queries they see every key. mask: bool (N,) or (B, N).

    `neighborhood(...) | tokens(is_text)` lets text be seen from everywhere; with `| tokens(is_text, of="queries")` it
    also looks everywhere (Longformer's global attention); `... & tokens(valid)` takes keys away. Raises ArgumentError
    for another dtype or shape, and when asked for more positions than the mask has.

    >>> tokens(torch.tensor([False, True])).dense(2).int()[0, 0].tolist()
    [[0, 1], [0, 1]]
    >>> tokens(torch.tensor([False, True]), of="queries").dense(2).int()[0, 0].tolist()
    [[0, 0], [1, 1]]
    """
    return Tokens(mask, of)
