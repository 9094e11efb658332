"""MoA: a window whose span grows with the prompt, its own for every head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from regard.errors import ArgumentError, require
from regard.patterns.algebra import Pattern, at_least
from regard.patterns.blockwise_causal import WindowAndSinkBlocks
from regard.patterns.by_head import PerHead
from regard.registry import Paper, register

PAPER = Paper(
    "MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression", "Fu et al.", 2024, "2406.14909"
)
Rule = tuple[float, float]
"""(α, β): a head's window has α + β · N tokens, for a prompt of N."""


def window_blocks(rule: Rule, n: int, block: int) -> int:
    """The window in blocks, the query's own included, for a prompt of n tokens: max(1, int(⌊α / B⌋ + β · n / B)).

    >>> window_blocks((2, 1 / 3), 12, 2), window_blocks((-4, 0.5), 12, 2)
    (3, 1)
    """
    alpha, beta = rule
    return max(1, int(alpha // block + beta * (n / block)))


@dataclass(frozen=True)
class ElasticWindow(Pattern):
    """The first block and the last α + β · N tokens, in whole blocks. It has no rule before N is bound."""

    alpha: float
    beta: float
    block: int = 64

    def __post_init__(self) -> None:
        at_least("block", self.block, 1)
        for name in ("alpha", "beta"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            require(number, name, repr(value), "a finite number")
        require(self.beta >= 0, "beta", self.beta, "≥ 0")

    def bind(self, n: int) -> Pattern:
        at_least("n", n, 1)
        return WindowAndSinkBlocks(self.block, window_blocks((self.alpha, self.beta), n, self.block), 1)

    def rule(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        raise self._unbound

    def tiles(self, b: Tensor, h: Tensor, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor) -> Tensor:
        raise self._unbound

    @property
    def _unbound(self) -> ArgumentError:
        return ArgumentError("pattern", f"{self!r}, which depends on the prompt's length", "pattern.bind(length)")


@register(
    "moa-mixture-of-sparse-attention",
    kind="pattern",
    families=("static-pattern",),
    paper=PAPER,
    cost="N · Σ (span + block) entries over the heads",
    example=lambda: _example(),
    causal=True,
)
def moa_mixture_of_sparse_attention(rules: Sequence[Rule], *, group: int = 1, block: int = 64) -> Pattern:
    """Per-head elastic windows: the first block, and max(1, ⌊α / B⌋ + β · N / B) blocks up to the query's own; causal.

    rules: (α, β) in tokens for each KV head, whose `group` query heads share it (the cache shrinks only then).
    `bind(n)` fixes N, the prompt's length, for good: a head with β > 0 has no rule before that, and decoding goes on
    with the prompt's N. β = 1 and α = 0 is dense for a prompt of whole blocks. Raises ArgumentError for no rule, β <
    0, numbers that are not finite, sizes below 1.

    >>> p = moa_mixture_of_sparse_attention([(2, 1 / 3), (4, 0)], block=2).bind(12)
    >>> p.dense(1, 12).int()[0, :, 0].tolist()
    [[1, 1, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1]]
    """
    at_least("group", group, 1)
    listed = isinstance(rules, Sequence) and len(rules) > 0
    pairs = listed and all(isinstance(rule, (tuple, list)) and len(rule) == 2 for rule in rules)
    require(pairs, "rules", rules, "a pair (alpha, beta) for each KV head")
    heads: list[Pattern] = []
    for alpha, beta in rules:
        elastic = ElasticWindow(alpha, beta, block)
        heads += [elastic.bind(1) if beta == 0 else elastic] * group
    return PerHead(tuple(heads))


def _example() -> Pattern:
    return moa_mixture_of_sparse_attention([(2, 1 / 3), (4, 0)], block=2).bind(24)
