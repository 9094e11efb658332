"""FlashAttention's block-sparse form: any static layout of blocks, and the butterfly layout."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from regard.errors import ArgumentError, require
from regard.patterns.algebra import Pattern, at_least
from regard.patterns.tiles import answer
from regard.registry import Paper, register

PAPER = Paper(
    "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness", "Dao et al.", 2022, "2205.14135"
)


@dataclass(frozen=True)
class BlockLayout(Pattern):
    """layout[i // rows of a block, j // columns of a block]."""

    layout: Tensor = field(compare=False, repr=False)
    block: tuple[int, int]

    exact = True

    def __post_init__(self) -> None:
        layout, block = self.layout, self.block
        require(isinstance(layout, Tensor), "layout", type(layout).__name__, "a bool tensor (query blocks, key blocks)")
        fits = layout.dtype == torch.bool and layout.ndim == 2 and layout.numel() > 0
        require(fits, "layout", f"{layout.dtype}, shape {tuple(layout.shape)}", "torch.bool (query blocks, key blocks)")
        require(isinstance(block, tuple) and len(block) == 2, "block", repr(block), "one size, or a pair of sizes")
        for size in block:
            at_least("block", size, 1)
        self._reads(layout)

    @property
    def extent(self) -> int:
        return min(self.layout.shape[0] * self.block[0], self.layout.shape[1] * self.block[1])

    def bind(self, n: int) -> Pattern:
        at_least("n", n, 1)
        if n > self.extent:
            raise ArgumentError("n", n, f"at most {self.extent}, the number of positions that the layout covers")
        return self

    def rule(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Positions beyond the layout attend to nothing: they can only be padding where `extent` was checked."""
        qb, kb = i // self.block[0], j // self.block[1]
        last_q, last_k = self.layout.shape[0] - 1, self.layout.shape[1] - 1
        within = (qb >= 0) & (qb <= last_q) & (kb >= 0) & (kb <= last_k)
        return self.layout[qb.clamp(0, last_q), kb.clamp(0, last_k)] & within

    @cached_property
    def _before(self) -> Tensor:
        """int32 (query blocks + 1, key blocks + 1): how many blocks are on above and to the left of each corner."""
        counts = self.layout.cumsum(0, dtype=torch.int32).cumsum(1, dtype=torch.int32)
        return torch.nn.functional.pad(counts, (1, 0, 1, 0))

    def tiles(self, b: Tensor, h: Tensor, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor) -> Tensor:
        a0, a1 = i0 // self.block[0], i1 // self.block[0] + 1
        c0, c1 = j0 // self.block[1], j1 // self.block[1] + 1
        t = self._before
        count = t[a1, c1] - t[a0, c1] - t[a1, c0] + t[a0, c0]
        return answer(count > 0, count == (a1 - a0) * (c1 - c0))


@register(
    "flashattention",
    kind="pattern",
    families=("static-pattern", "system"),
    paper=PAPER,
    cost="N² · share of blocks entries; memory traffic: see regard.kernels.traffic",
    example=lambda: BlockLayout(butterfly_layout(8), (4, 4)),
    causal=False,
)
def flashattention(layout: Tensor, block: int | tuple[int, int] = 128) -> Pattern:
    """Block-sparse FlashAttention: query block a sees key block c where layout[a, c] says so.

    layout: bool (query blocks, key blocks). block: tokens in a block, or the pair for queries and keys. Executors by
    tiles skip every block that is off; with an element rule on top (`& causal()`) a block that it cuts is masked
    inside. The exact attention under it is `attend`, which never writes the N × N map; the algorithm itself stands in
    `regard.kernels.reference.tiled`, the count of its memory traffic in `regard.kernels.traffic`. Raises ArgumentError
    for another dtype or shape, a block below 1, or positions beyond the layout.

    >>> flashattention(torch.tensor([[True, False], [True, True]]), block=1).dense(2).int()[0, 0].tolist()
    [[1, 0], [1, 1]]
    """
    return BlockLayout(layout, (block, block) if isinstance(block, int) else block)


def butterfly_layout(blocks: int) -> Tensor:
    """bool (blocks, blocks): block a sees itself and those whose number differs from a in one binary digit.

    The union of the supports of all butterfly factors: log₂(blocks) + 1 on each row, and log₂(blocks) layers connect
    all to all. Which factors the paper's runs keep is not stated; all is ours. Raises ArgumentError below 1.

    >>> butterfly_layout(4).int().tolist()
    [[1, 1, 1, 0], [1, 1, 0, 1], [1, 0, 1, 1], [0, 1, 1, 1]]
    """
    at_least("blocks", blocks, 1)
    number = torch.arange(blocks)
    differ = number[:, None] ^ number
    return (differ & (differ - 1)) == 0
