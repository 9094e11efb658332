"""Patterns over one sequence of tokens: full, causal, windows, sinks, prefix."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from regard.patterns.algebra import Pattern, at_least
from regard.patterns.tiles import answer
from regard.registry import Paper, register

TRANSFORMER = Paper("Attention Is All You Need", "Vaswani et al.", 2017, "1706.03762")
LONGFORMER = Paper("Longformer: The Long-Document Transformer", "Beltagy et al.", 2020, "2004.05150")
STREAMING = Paper("Efficient Streaming Language Models with Attention Sinks", "Xiao et al.", 2023, "2309.17453")
T5 = Paper(
    "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer",
    "Raffel et al.",
    2019,
    "1910.10683",
)


@dataclass(frozen=True)
class Full(Pattern):
    """Everything."""

    exact = True

    def rule(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i == i) & (j == j)  # all True, in the shape of both

    def tiles(self, b: Tensor, h: Tensor, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor) -> Tensor:
        true = self.rule(b, h, i0, j0)
        return answer(true, true)


@dataclass(frozen=True)
class Causal(Pattern):
    """j ≤ i."""

    exact = True

    def rule(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j <= i

    def tiles(self, b: Tensor, h: Tensor, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor) -> Tensor:
        return answer(j0 <= i1, j1 <= i0)


@dataclass(frozen=True)
class SlidingWindow(Pattern):
    """i − size < j ≤ i + right."""

    size: int
    right: int = 0

    exact = True

    def __post_init__(self) -> None:
        at_least("size", self.size, 1)
        at_least("right", self.right, 0)

    def rule(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j > i - self.size) & (j <= i + self.right)

    def tiles(self, b: Tensor, h: Tensor, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor) -> Tensor:
        some = (j1 > i0 - self.size) & (j0 <= i1 + self.right)
        return answer(some, (j0 > i1 - self.size) & (j1 <= i0 + self.right))


@dataclass(frozen=True)
class DilatedWindow(Pattern):
    """i − j is one of 0, dilation, …, (size − 1) · dilation."""

    size: int
    dilation: int

    exact = True

    def __post_init__(self) -> None:
        at_least("size", self.size, 1)
        at_least("dilation", self.dilation, 1)
        at_least("size · dilation", self.size * self.dilation, 1)

    def rule(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        back = i - j
        return (back >= 0) & (back < self.size * self.dilation) & (back % self.dilation == 0)

    def tiles(self, b: Tensor, h: Tensor, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor) -> Tensor:
        least, most = i0 - j1, i1 - j0  # every distance between the two occurs in the tile
        d, farthest = self.dilation, (self.size - 1) * self.dilation
        first_tap = (least.clamp(min=0) + (d - 1)) // d * d
        some = first_tap <= most.clamp(max=farthest)
        every = (least >= 0) & (most <= farthest)
        if d > 1:  # neighbouring distances are never both taps: only a tile of one entry can be full
            every = every & (least == most) & (least % d == 0)
        return answer(some, every)


@dataclass(frozen=True)
class _FirstKeys(Pattern):
    """j < a number of first keys, for every query."""

    exact = True

    def _count(self) -> int:
        raise NotImplementedError

    def rule(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j < self._count()) & (i == i)  # the second is True, and gives the shape of both

    def tiles(self, b: Tensor, h: Tensor, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor) -> Tensor:
        return answer(self.rule(b, h, i0, j0), self.rule(b, h, i0, j1))


@dataclass(frozen=True)
class AttentionSink(_FirstKeys):
    """j < size."""

    size: int

    def __post_init__(self) -> None:
        at_least("size", self.size, 1)

    def _count(self) -> int:
        return self.size


@dataclass(frozen=True)
class Prefix(_FirstKeys):
    """j < length."""

    length: int

    def __post_init__(self) -> None:
        at_least("length", self.length, 1)

    def _count(self) -> int:
        return self.length


@register(
    "full",
    kind="pattern",
    families=("static-pattern",),
    paper=TRANSFORMER,
    cost="N² entries",
    example=lambda: Full(),
    causal=False,
)
def full() -> Pattern:
    """Every query attends to every key.

    >>> full().dense(2).int()[0, 0].tolist()
    [[1, 1], [1, 1]]
    """
    return Full()


@register(
    "causal",
    kind="pattern",
    families=("static-pattern",),
    paper=TRANSFORMER,
    cost="N²/2 entries",
    example=lambda: Causal(),
    causal=True,
)
def causal() -> Pattern:
    """Each token attends to itself and to those before it: j ≤ i.

    >>> causal().dense(3).int()[0, 0].tolist()
    [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    >>> causal().dense(1, 3).int()[0, 0].tolist()  # decoding: one query, the last of three positions
    [[1, 1, 1]]
    """
    return Causal()


@register(
    "sliding-window",
    kind="pattern",
    families=("static-pattern",),
    paper=LONGFORMER,
    cost="N·(size + right) entries",
    example=lambda: SlidingWindow(5),
    causal=True,
)
def sliding_window(size: int, right: int = 0) -> Pattern:
    """The last `size` tokens, the query's own included, and `right` tokens after it: i − size < j ≤ i + right.

    Causal while right = 0. `sliding_window(w + 1, right=w)` reaches w tokens to both sides (Longformer's window of 2w).
    Raises ArgumentError for size < 1 or right < 0.

    >>> sliding_window(2).dense(3).int()[0, 0].tolist()
    [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    >>> sliding_window(2, right=1).dense(3).int()[0, 0].tolist()
    [[1, 1, 0], [1, 1, 1], [0, 1, 1]]
    """
    return SlidingWindow(size, right)


@register(
    "dilated-window",
    kind="pattern",
    families=("static-pattern",),
    paper=LONGFORMER,
    cost="N·size entries, but its tiles reach N·size·dilation",
    example=lambda: DilatedWindow(3, 2),
    causal=True,
)
def dilated_window(size: int, dilation: int) -> Pattern:
    """`size` keys, `dilation` apart, backwards from the query: j = i, i − dilation, …, i − (size − 1) · dilation.

    Raises ArgumentError for size or dilation < 1.

    >>> dilated_window(2, 2).dense(4).int()[0, 0].tolist()
    [[1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1]]
    """
    return DilatedWindow(size, dilation)


@register(
    "attention-sink",
    kind="pattern",
    families=("static-pattern",),
    paper=STREAMING,
    cost="N·size entries",
    example=lambda: AttentionSink(4),
    causal=False,
)
def attention_sink(size: int) -> Pattern:
    """The first `size` keys, visible to every query; combine it with `causal()`.

    Raises ArgumentError for size < 1.

    >>> (causal() & (sliding_window(1) | attention_sink(1))).dense(3).int()[0, 0].tolist()
    [[1, 0, 0], [1, 1, 0], [1, 0, 1]]
    """
    return AttentionSink(size)


@register(
    "prefix",
    kind="pattern",
    families=("static-pattern",),
    paper=T5,
    cost="N·length entries",
    example=lambda: Prefix(6),
    causal=False,
)
def prefix(length: int) -> Pattern:
    """The first `length` keys, visible to every query: `causal() | prefix(length)` is a prefix language model.

    Raises ArgumentError for length < 1.

    >>> (causal() | prefix(2)).dense(3).int()[0, 0].tolist()
    [[1, 1, 0], [1, 1, 0], [1, 1, 1]]
    """
    return Prefix(length)
