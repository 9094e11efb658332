"""Block top-k by pooled keys, as Kinetics uses it for decoding (Sadhukhan et al. 2025, arXiv 2506.05333).

A block is scored by the mean logit of its keys, averaged over the query heads of the group. Both means are linear, so
the score is one product, (mean query) · (mean key), and one mean key per complete block is all that has to be kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.errors import require
from regard.registry import Paper, register
from regard.selection.contract import BlockIndex
from regard.selection.rows import moved_to_front, query_positions, real_lengths

PAPER = Paper("Kinetics: Rethinking Test-Time Scaling Laws", "Sadhukhan et al.", 2025, "2506.05333")


def mean_keys(k: Tensor, block: int) -> Tensor:
    """(B, Hkv, M // block, D) in at least float32: the mean key of every complete block of k (B, Hkv, M, D)."""
    whole = k[:, :, : k.shape[2] // block * block]
    return whole.to(torch.promote_types(k.dtype, torch.float32)).unflatten(2, (-1, block)).mean(3)


@dataclass(frozen=True)
class BlockTopK:
    """Sinks, a local window, and the `top_blocks` complete blocks between them whose mean key fits the query best.

    Every query chooses for itself, each key/value head for its group: what a token attends to never depends on later
    ones. block: keys per block. sinks: the first tokens, always kept. local: the last tokens up to the query's own,
    always kept; a block not yet complete belongs to it. Both are rounded up to whole blocks.
    Keys are scored as they are given: after rotary embedding. Ties go to the earlier block.
    """

    top_blocks: int
    block: int = 16
    sinks: int = 4
    local: int = 64

    def __post_init__(self) -> None:
        for name, least in (("top_blocks", 0), ("block", 1), ("sinks", 0), ("local", 1)):
            require(getattr(self, name) >= least, name, getattr(self, name), f"an int ≥ {least}")

    def select(
        self,
        q: Tensor,
        k: Tensor,
        *,
        key_padding: Tensor | None = None,
        q_positions: Tensor | None = None,
        block_keys: Tensor | None = None,
    ) -> BlockIndex:
        """q (B, Hq, N, D), k (B, Hkv, M, D) → a BlockIndex over Hkv heads with query_block = 1.

        key_padding and q_positions as in `attend`. block_keys: `mean_keys(k, block)` of k without padding, where it was
        kept. Raises ArgumentError."""
        require(q.ndim == 4, "q", tuple(q.shape), "(B, Hq, N, D)")
        fits = k.ndim == 4 and k.shape[0] == q.shape[0] and k.shape[3] == q.shape[3] and q.shape[1] % k.shape[1] == 0
        require(fits, "k", tuple(k.shape), f"({q.shape[0]}, a divisor of {q.shape[1]}, M, {q.shape[3]})")
        positions = query_positions(q, k, key_padding, q_positions)
        if block_keys is None:
            (front,) = moved_to_front(key_padding, k)
            block_keys = mean_keys(front, self.block)
        complete = k.shape[2] // self.block
        wanted = (*k.shape[:2], complete, k.shape[3])
        require(tuple(block_keys.shape) == wanted, "block_keys", tuple(block_keys.shape), f"{wanted}")

        query = q.to(block_keys.dtype).unflatten(1, (k.shape[1], -1)).mean(2)  # (B, Hkv, N, D): mean over the group
        scores = query @ block_keys.mT  # (B, Hkv, N, complete)

        blocks = -(-k.shape[2] // self.block)
        first = torch.arange(blocks, device=q.device) * self.block  # the first token of every block
        p = positions[:, None, :, None]  # (B, 1, N, 1)
        exists = (first <= p) & (first < real_lengths(k, key_padding)[:, None, None, None])
        local = first + self.block > p - self.local + 1  # the block's last token is within the window
        kept = exists & ((first < self.sinks) | local)
        open_to_choice = (exists & ~kept)[..., :complete]  # before the window, so complete
        keep = kept.expand(*scores.shape[:3], blocks).clone()
        keep[..., :complete] |= _best(scores.masked_fill(~open_to_choice, -torch.inf), self.top_blocks) & open_to_choice
        return BlockIndex.from_mask(keep, key_block=self.block)


def _best(scores: Tensor, count: int) -> Tensor:
    """bool of the shape of scores: the `count` largest along the last axis, the earlier of equals."""
    order = scores.argsort(dim=-1, descending=True, stable=True)[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, True)


def _example() -> tuple[BlockTopK, BlockTopK]:
    """A small one, and one whose budget is everything."""
    return BlockTopK(2, block=4, sinks=2, local=5), BlockTopK(1000, block=4, sinks=2, local=5)


register(
    "kinetics",
    kind="selection",
    paper=PAPER,
    families=("dynamic-sparse",),
    cost="M/block + sinks + local + top_blocks·block reads per query and key/value head",
    example=_example,
    causal=True,
)(BlockTopK)
