"""PowerAttention: keys at distances that are powers of two; and how far any stack of patterns reaches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.errors import require
from regard.patterns.algebra import Pattern, a_pattern, at_least
from regard.patterns.blockwise_causal import WindowAndSinkBlocks
from regard.registry import Paper, register

PAPER = Paper(
    "PowerAttention: Exponentially Scaling of Receptive Fields for Effective Sparse Attention",
    "Chen et al.",
    2025,
    "2503.03588",
)
LARGEST = 4096


@dataclass(frozen=True)
class PowerBlocks(WindowAndSinkBlocks):
    """The last `window` blocks, the first `sinks` blocks, and blocks 1, 2, 4, 8, … before the query's own."""

    def sees(self, qb: Tensor, kb: Tensor) -> Tensor:
        back = (qb - kb).clamp(min=0)  # a negative distance may look like a power of two
        return super().sees(qb, kb) | ((back & (back - 1)) == 0)

    def sees_some(self, a0: Tensor, a1: Tensor, c0: Tensor, c1: Tensor) -> Tensor:
        farthest, below = a1 - c0, (a0 - c1).clamp(min=1) - 1
        power = (farthest & ~below) > below  # one lies in below + 1 … farthest: farthest has the higher leading bit
        return super().sees_some(a0, a1, c0, c1) | power

    def sees_all(self, a0: Tensor, a1: Tensor, c0: Tensor, c1: Tensor) -> Tensor:
        """Distances below some length are all seen; beyond it, powers of two stand alone."""
        unbroken = self.window
        while unbroken & (unbroken - 1) == 0:
            unbroken += 1
        nearest, farthest = a0 - c1, a1 - c0.clamp(min=self.sinks)  # of the keys that are no sinks
        alone = (nearest == farthest) & ((nearest & (nearest - 1)) == 0)
        return (farthest < unbroken) | alone | (c1 < self.sinks)


@register(
    "power-attention",
    kind="pattern",
    families=("static-pattern",),
    paper=PAPER,
    cost="N · block · (window + sinks + log₂(N / block)) entries",
    example=lambda: PowerBlocks(2, 2, 1),
    causal=True,
)
def power_attention(window: int = 8, sinks: int = 1, block: int = 64) -> Pattern:
    """Power-of-two distances: the last `window` blocks, the first `sinks`, and those 1, 2, 4, 8, … blocks back; causal.

    Sizes are in blocks of `block` tokens; block=1 is the paper's token form. The defaults (64, 8, 1) are ours, the
    paper's are not known. The distance is taken from the query's block: the pattern slides, so no old key is ever done
    with, and a cache saves reads, not memory.

    With window = 1 and no sinks, d layers carry information over exactly those distances that are sums of at most d
    powers of two: all of 0 … 2^(d+1) − 2 (see `receptive_field`). Raises ArgumentError for a window or block below 1.

    >>> power_attention(1, 0, block=1).dense(1, 6).int()[0, 0].tolist()
    [[0, 1, 0, 1, 1, 1]]
    """
    return PowerBlocks(block, window, sinks)


def receptive_field(layers: Sequence[Pattern], n: int, query: int | None = None) -> Tensor:
    """bool (n, n), or (n,) for one query: whether it can learn of token j, one edge per layer, the residual being one.

    layers: patterns from the first layer to the last; where heads differ, an edge of any head counts. Small n only: it
    looks at n × n entries. Raises ArgumentError for no layer, for patterns that differ by row, or n > 4096.

    >>> receptive_field([power_attention(1, 0, block=1)] * 2, 8, query=7).int().tolist()
    [0, 1, 1, 1, 1, 1, 1, 1]
    """
    require(isinstance(layers, Sequence) and len(layers) > 0, "layers", repr(layers), "a list of at least one pattern")
    for p in layers:
        a_pattern("layers", p)
    at_least("n", n, 1)
    require(n <= LARGEST, "n", n, f"1 to {LARGEST}")
    if query is not None:
        at_least("query", query, 0)
        require(query < n, "query", query, f"a position from 0 to {n - 1}")
    edges: dict[int, Tensor] = {}
    for p in layers:
        require(p.rows is None, "layers", f"a pattern for {p.rows} batch rows", "patterns alike for all rows")
        if id(p) not in edges:
            edges[id(p)] = (p.dense(n)[0].any(0) | torch.eye(n, dtype=torch.bool)).float()
    field = torch.eye(n) if query is None else torch.eye(n)[query : query + 1]
    for p in reversed(layers):  # from the query down
        field = ((field @ edges[id(p)]) > 0).float()
    return field[0] > 0 if query is not None else field > 0
