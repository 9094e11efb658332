"""Sequences as pieces of work: which programs walk which tokens. What a kernel is told about packing and cutting."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pieces:
    """table (pieces, 4) int32: batch row, first token, end, number of its first chunk. All pieces of a sequence follow
    one another. spans: of one sequence, where all are cut alike; empty for packed documents, which are not cut.
    chunks: how many there are; longest: how many the longest piece has. each (chunks, 3) int32: batch row, first token,
    end.
    """

    table: Tensor
    each: Tensor
    spans: tuple[tuple[int, int], ...]
    sequences: int
    chunks: int
    longest: int

    @property
    def split(self) -> int:
        """Into how many pieces each sequence is cut."""
        return max(len(self.spans), 1)


def _pieces(
    rows: list[tuple[int, int, int]], spans: tuple[tuple[int, int], ...], chunk: int, device: torch.device
) -> Pieces:
    sizes = [-(-(stop - start) // chunk) for _, start, stop in rows]
    table, before = [], 0
    each = [(row, at, min(at + chunk, stop)) for row, start, stop in rows for at in range(start, stop, chunk)]
    for (row, start, stop), size in zip(rows, sizes, strict=True):
        table.append((row, start, stop, before))
        before += size
    held = torch.tensor(table, dtype=torch.int32, device=device).view(-1, 4)
    cut = torch.tensor(each, dtype=torch.int32, device=device).view(-1, 3)
    return Pieces(held, cut, spans, len(rows) // max(len(spans), 1), before, max(sizes, default=0))


@lru_cache(maxsize=64)
def even(batch: int, n: int, split: int, chunk: int, device: torch.device) -> Pieces:
    """Every row of the batch is one sequence of n tokens, cut into at most `split` pieces of whole chunks."""
    length = chunk * max(1, -(-n // (split * chunk)))  # a whole number of chunks
    spans = tuple((start, min(start + length, n)) for start in range(0, n, length)) or ((0, 0),)
    return _pieces([(b, *span) for b in range(batch) for span in spans], spans, chunk, device)


@lru_cache(maxsize=64)
def documents(ends: tuple[int, ...], chunk: int, device: torch.device) -> Pieces:
    """One row of the batch, with a sequence between each two of `ends` (0, …, N)."""
    rows = [(0, start, stop) for start, stop in pairwise(ends)]
    return _pieces(rows, (), chunk, device)
