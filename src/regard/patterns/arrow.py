"""The arrow: a window for all, and first tokens that see and are seen by everybody (SeNER; Longformer's pattern)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.patterns.algebra import Pattern, at_least
from regard.patterns.tiles import answer
from regard.registry import Paper, register

SENER = Paper("Small Language Model Makes an Effective Long Text Extractor", "Chen, Zhang, Tang", 2025, "2502.07286")


@dataclass(frozen=True)
class Arrow(Pattern):
    """i < first, or j < first, or |i − j| ≤ window."""

    window: int
    first: int

    exact = True

    def __post_init__(self) -> None:
        at_least("window", self.window, 0)
        at_least("first", self.first, 0)

    def rule(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i < self.first) | (j < self.first) | ((i - j).abs() <= self.window)

    def tiles(self, b: Tensor, h: Tensor, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor) -> Tensor:
        near = torch.maximum(j0 - i1, i0 - j1) <= self.window
        i, j = i0.clamp(min=self.first), j0.clamp(min=self.first)  # what lies before sees and is seen by all
        far = torch.maximum(j1 - i, i1 - j)
        some = (i0 < self.first) | (j0 < self.first) | near
        return answer(some, (i1 < self.first) | (j1 < self.first) | (far <= self.window))


@register(
    "sener",
    kind="pattern",
    families=("static-pattern",),
    paper=SENER,
    cost="N·(2·window + 1) + 2·N·first entries",
    example=lambda: Arrow(3, 2),
    causal=False,
)
def sener(window: int = 128, first: int = 1) -> Pattern:
    """Each token sees `window` tokens to both sides and the `first` tokens, which see everything ([CLS]).

    The paper also multiplies the logits of those first queries by ln n / ln 512: `score=log_n(n)` of
    `regard.scores.log_n`. Raises ArgumentError for a negative number.

    >>> sener(1).dense(4).int()[0, 0].tolist()
    [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 1, 1]]
    """
    return Arrow(window, first)
