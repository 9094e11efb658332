"""Sequences as pieces of work: which programs walk which tokens. What a kernel is told about packing and cutting."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pieces:
    """table (pieces, 4) int32: batch row, first token, end, number of its first chunk. All pieces of a sequence follow
    one another. split: into how many pieces each sequence is cut; packed documents are not. chunks: how many there are;
    tokens: of the longest sequence. each (chunks, 3) int32: batch row, first token, end.
    """

    table: Tensor
    each: Tensor
    split: int
    chunks: int
    tokens: int

    @property
    def sequences(self) -> int:
        return self.table.shape[0] // self.split

    def feeding(self, reverse: bool) -> Tensor:
        """The table of those whose state another piece starts from: all but the last of a sequence, or the first."""
        return self._feeding[reverse]

    @cached_property
    def _feeding(self) -> tuple[Tensor, Tensor]:
        table = self.table.view(-1, self.split, 4)
        return table[:, :-1].reshape(-1, 4), table[:, 1:].reshape(-1, 4)

    def last(self, states: Tensor, reverse: bool) -> Tensor:
        """Of each sequence, (sequences, …), from those of its pieces."""
        return states if self.split == 1 else states.unflatten(0, (-1, self.split))[:, 0 if reverse else -1]


def _pieces(rows: list[tuple[int, int, int]], split: int, tokens: int, chunk: int, device: torch.device) -> Pieces:
    sizes = [-(-(stop - start) // chunk) for _, start, stop in rows]
    table, before = [], 0
    each = [(row, at, min(at + chunk, stop)) for row, start, stop in rows for at in range(start, stop, chunk)]
    for (row, start, stop), size in zip(rows, sizes, strict=True):
        table.append((row, start, stop, before))
        before += size
    held = torch.tensor(table, dtype=torch.int32, device=device).view(-1, 4)
    cut = torch.tensor(each, dtype=torch.int32, device=device).view(-1, 3)
    return Pieces(held, cut, split, before, tokens)


@lru_cache(maxsize=64)
def even(batch: int, n: int, split: int, chunk: int, device: torch.device) -> Pieces:
    """Every row of the batch is one sequence of n tokens, cut into at most `split` pieces of whole chunks."""
    length = chunk * max(1, -(-n // (split * chunk)))  # a whole number of chunks
    spans = tuple((start, min(start + length, n)) for start in range(0, n, length)) or ((0, 0),)
    return _pieces([(b, *span) for b in range(batch) for span in spans], len(spans), n, chunk, device)


@lru_cache(maxsize=64)
def documents(ends: tuple[int, ...], chunk: int, device: torch.device) -> Pieces:
    """One row of the batch, with a sequence between each two of `ends` (0, …, N)."""
    rows = [(0, start, stop) for start, stop in pairwise(ends)]
    return _pieces(rows, 1, max((stop - start for _, start, stop in rows), default=0), chunk, device)
