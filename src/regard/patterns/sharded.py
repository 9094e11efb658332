"""S2-Attention: every head keeps the recent past and its own shard of the far past."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.errors import require
from regard.patterns.algebra import Pattern, a_pattern, at_least
from regard.patterns.blockwise_causal import BlockwiseCausal
from regard.patterns.by_head import PerHead
from regard.patterns.sequence import causal
from regard.registry import Paper, register

PAPER = Paper("S2-Attention: Hardware-Aware Context Sharding Among Attention Heads", "Lin et al.", 2024, "2407.17678")


@dataclass(frozen=True)
class Shard(BlockwiseCausal):
    """The last `local` blocks, and every block kb with (kb + offset) mod stride = 0."""

    local: int
    stride: int
    offset: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("local", self.local, 1)
        at_least("stride", self.stride, 1)

    def _in_shard(self, kb: Tensor) -> Tensor:
        return (kb + self.offset) % self.stride == 0

    def sees(self, qb: Tensor, kb: Tensor) -> Tensor:
        return (qb - kb < self.local) | self._in_shard(kb)

    def sees_some(self, a0: Tensor, a1: Tensor, c0: Tensor, c1: Tensor) -> Tensor:
        column = c0 + (-(c0 + self.offset)) % self.stride  # the first of the shard from c0 on
        return ((a0 - c1).clamp(min=1) < self.local) | ((column <= c1) & (column < a1))

    def sees_all(self, a0: Tensor, a1: Tensor, c0: Tensor, c1: Tensor) -> Tensor:
        if self.stride == 1:
            return (a0 == a0) & (c0 == c0)
        other = c0 + self._in_shard(c0).to(c0.dtype)  # the first block from c0 on that is not of the shard
        return (other > c1) | (a1 - other < self.local)


@register(
    "s2-attention",
    kind="pattern",
    families=("static-pattern",),
    paper=PAPER,
    cost="N · (local · block + N / (2 · stride)) entries a head",
    example=lambda: _example(),
    causal=True,
)
def s2_attention(
    heads: int,
    *,
    kv_heads: int | None = None,
    local: int = 16,
    stride: int = 16,
    block: int = 64,
    offset: int = 0,
    dense: int = 0,
) -> Pattern:
    """Head-wise shards: the last `local` blocks, and of the far past every `stride`-th block, another for each KV head.

    With H KV heads (dense ones counted: ours), KV head g sees a far block kb where (kb + g · max(1, stride // H) +
    offset) mod stride = 0; the query heads of a group share its keys. The last `dense` KV heads see the whole past.
    Where H ≥ stride all heads together see everything; with fewer, some far blocks are seen by no sparse head.

    Columns are absolute, so a block outside a head's shard can be dropped for good when it leaves the local band
    (`drops_for_good`). The paper's dense first layers are layers with `causal()`. Defaults are ours, within its
    ranges; `offset` is in blocks, and so is `local`. Raises ArgumentError for sizes below 1, for heads that are not a
    multiple of kv_heads, and for more dense heads than there are.

    >>> s2_attention(4, local=1, stride=4, block=1).dense(1, 8).int()[0, :, 0].tolist()[:2]
    [[1, 0, 0, 0, 1, 0, 0, 1], [0, 0, 0, 1, 0, 0, 0, 1]]
    """
    at_least("heads", heads, 1)
    kv_heads = heads if kv_heads is None else kv_heads
    at_least("kv_heads", kv_heads, 1)
    require(heads % kv_heads == 0, "kv_heads", kv_heads, f"a divisor of heads={heads}")
    at_least("stride", stride, 1)
    whole = isinstance(offset, int) and not isinstance(offset, bool)
    require(whole, "offset", repr(offset), "an int, in blocks")
    at_least("dense", dense, 0)
    require(dense <= kv_heads, "dense", dense, f"at most the {kv_heads} KV heads")
    step = max(1, stride // kv_heads)
    of_kv: list[Pattern] = [
        causal() if g >= kv_heads - dense else Shard(block, local, stride, (g * step + offset) % stride)
        for g in range(kv_heads)
    ]
    _ = Shard(block, local, stride)  # raises for bad sizes also where every head is dense
    return PerHead(tuple(of_kv[h // (heads // kv_heads)] for h in range(heads)))


def drops_for_good(pattern: Pattern, n: int, local: int) -> bool:
    """Is every key that a later query sees also seen by the queries before it, once `local` tokens lie between?

    Then what is not seen can be freed: pattern(q + 1, k) implies pattern(q, k) for all q − k ≥ local. True of absolute
    columns, False of a dilation that slides with the query. Looks at n × n entries. Raises ArgumentError.
    """
    a_pattern("pattern", pattern)
    at_least("n", n, 2)
    at_least("local", local, 1)
    allowed = pattern.dense(n)
    i, j = torch.arange(n - 1)[:, None], torch.arange(n)
    return not bool((allowed[:, :, 1:] & ~allowed[:, :, :-1] & (i - j >= local)).any())


def _example() -> Pattern:
    return s2_attention(4, kv_heads=2, local=2, stride=3, block=2)
