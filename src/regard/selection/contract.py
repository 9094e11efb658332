"""The contract of a selection: which key blocks each query block takes, decided from content."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from regard.errors import require


@dataclass(frozen=True)
class BlockIndex:
    """What was selected. Blocks count real tokens: with padding removed, block j is tokens j·key_block … of its row.

    blocks (B, H, Q, K) long: key blocks in ascending order; only the first `count` of each list are meant, −1 fills up.
    count (B, H, Q) long. H is the number of key/value heads or of query heads.
    Q: blocks of `query_block` consecutive queries, as they stand in q; the last may be shorter.
    """

    blocks: Tensor
    count: Tensor
    key_block: int
    query_block: int = 1

    def __post_init__(self) -> None:
        fits = self.blocks.ndim == 4 and self.count.shape == self.blocks.shape[:3]
        require(
            fits, "blocks", (tuple(self.blocks.shape), tuple(self.count.shape)), "(B, H, Q, K) with count (B, H, Q)"
        )
        for name in ("key_block", "query_block"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "an int ≥ 1")

    @classmethod
    def from_mask(cls, keep: Tensor, *, key_block: int, query_block: int = 1) -> BlockIndex:
        """From keep (B, H, Q, all blocks) bool."""
        count = keep.sum(-1)
        most = int(count.max()) if count.numel() else 0
        blocks = (~keep).to(torch.uint8).argsort(dim=-1, stable=True)[..., :most]
        filler = torch.arange(most, device=keep.device) >= count[..., None]
        return cls(blocks.masked_fill(filler, -1), count, key_block, query_block)

    def mask(self, blocks: int) -> Tensor:
        """(B, H, Q, blocks) bool: the inverse of `from_mask`."""
        meant = torch.arange(self.blocks.shape[-1], device=self.blocks.device) < self.count[..., None]
        keep = torch.zeros(*self.count.shape, blocks + 1, dtype=torch.bool, device=self.blocks.device)
        return keep.scatter(-1, self.blocks.masked_fill(~meant, blocks), True)[..., :blocks]


class Selection(Protocol):
    """A frozen dataclass of settings with one method."""

    def select(
        self, q: Tensor, k: Tensor, *, key_padding: Tensor | None = None, q_positions: Tensor | None = None
    ) -> BlockIndex:
        """Choose for q (B, Hq, N, D) among k (B, Hkv, M, D), padding and positions as in `attend`."""
        ...
