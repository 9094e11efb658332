"""Patterns that know something of every token: what it is (a flag, a rank), given as a tensor of ids."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from regard.errors import ArgumentError, require
from regard.patterns.algebra import Pattern, at_least


@dataclass(frozen=True)
class PerToken(Pattern):
    """What a token is: ids (N,), or (B, N) where rows differ; per_row says which, and is structure.

    A subclass checks the ids in `_checked`, and builds the tables its tile answers read as cached properties.
    Positions beyond the ids can only be padding where `extent` was checked; they are clamped, and allowed nothing.
    """

    ids: Tensor = field(compare=False, repr=False)
    per_row: bool = field(init=False)

    def __post_init__(self) -> None:
        ids = self._checked(self.ids)
        fits = ids.ndim in (1, 2) and ids.numel() > 0
        require(fits, self._argument, f"shape {tuple(ids.shape)}", "(N,) or (B, N), not empty")
        object.__setattr__(self, "ids", ids)
        object.__setattr__(self, "per_row", ids.ndim == 2)
        self._reads(ids)

    @property
    def _argument(self) -> str:
        """What the ids are called where they are given."""
        return "ids"

    def _checked(self, ids: Tensor) -> Tensor:
        """The ids in the dtype that the rule reads. Raises ArgumentError."""
        raise NotImplementedError

    @property
    def rows(self) -> int | None:
        return self.ids.shape[0] if self.per_row else None

    @property
    def extent(self) -> int:
        return self.ids.shape[-1]

    def bind(self, n: int) -> Pattern:
        at_least("n", n, 1)
        if n > self.extent:
            raise ArgumentError("n", n, f"at most {self.extent}, the number of positions that {self._argument} covers")
        return self

    def _at(self, table: Tensor, b: Tensor, x: Tensor) -> Tensor:
        """What a table (N,) or (B, N) says at positions x; the ends are repeated beyond them."""
        x = x.clamp(0, table.shape[-1] - 1)
        return table[b, x] if self.per_row else table[x]

    def _within(self, i: Tensor, j: Tensor) -> Tensor:
        """bool: are both positions among those the ids cover?"""
        end = self.extent - 1
        return (i >= 0) & (i <= end) & (j >= 0) & (j <= end)


@dataclass(frozen=True)
class PerTokenFlag(PerToken):
    """A PerToken whose ids are bool."""

    def _checked(self, ids: Tensor) -> Tensor:
        require(isinstance(ids, Tensor), self._argument, type(ids).__name__, "a bool tensor of shape (N,) or (B, N)")
        require(ids.dtype == torch.bool, self._argument, f"dtype {ids.dtype}", "torch.bool")
        return ids


def counted(flag: Tensor) -> Tensor:
    """(..., N + 1) int32 from bool (..., N): how many are True before each position; for ranges, by subtraction."""
    return torch.nn.functional.pad(flag.cumsum(-1, dtype=torch.int32), (1, 0))


def last_at(flag: Tensor) -> Tensor:
    """(..., N) int32 from bool (..., N): the last True position up to and with each position, −1 if there is none."""
    place = torch.arange(flag.shape[-1], dtype=torch.int32, device=flag.device).expand(flag.shape)
    return place.masked_fill(~flag, -1).cummax(-1).values


def next_at(flag: Tensor) -> Tensor:
    """(..., N) int32 from bool (..., N): the first True position from each position on, N where there is none."""
    n = flag.shape[-1]
    place = torch.arange(n, dtype=torch.int32, device=flag.device).expand(flag.shape)
    return place.masked_fill(~flag, n).flip(-1).cummin(-1).values.flip(-1)
