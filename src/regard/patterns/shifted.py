"""Shifted groups: LongLoRA's S²-Attn, and SinkLoRA, which adds sinks and puts part of the heads back."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

from torch import Tensor

from regard.errors import ArgumentError, UnknownNameError, require
from regard.patterns.algebra import Pattern, at_least
from regard.patterns.by_head import PerHead
from regard.patterns.tiles import answer
from regard.registry import Paper, register

LONGLORA = Paper(
    "LongLoRA: Efficient Fine-tuning of Long-Context Large Language Models", "Chen et al.", 2023, "2309.12307"
)
SINKLORA = Paper(
    "SinkLoRA: Enhanced Efficiency and Chat Capabilities for Long-Context Large Language Models",
    "Zhang",
    2024,
    "2406.05678",
)
Border = Literal["leak-free", "wrapped"]


@dataclass(frozen=True)
class Groups(Pattern):
    """j ≤ i, and (i + shift) // size = (j + shift) // size or j < sinks.

    wrapped: the last group sees the first `shift` tokens too.

    length: the number of tokens, a multiple of size; None = not bound.
    """

    size: int
    shift: int = 0
    sinks: int = 0
    wrapped: bool = False
    length: int | None = None

    exact = True

    def __post_init__(self) -> None:
        if self.length is not None:
            require(self.length % self.size == 0, "length", self.length, f"a multiple of the group size {self.size}")

    @property
    def extent(self) -> int | None:
        return self.length

    def bind(self, n: int) -> Pattern:
        at_least("n", n, 1)
        if self.length not in (None, n):
            raise ArgumentError("n", n, f"{self.length}, which the pattern is for")
        return replace(self, length=n)

    @property
    def _last(self) -> int:
        """From this query on the first `shift` keys are seen."""
        if self.length is None:
            raise ArgumentError("pattern", f"{self!r}, which depends on the length", "pattern.bind(length)")
        return self.length - self.shift if self.length > self.size else 0  # of one group nothing is cut off

    def rule(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = ((i + self.shift) // self.size == (j + self.shift) // self.size) | (j < self.sinks)
        if self.wrapped:
            seen = seen | ((i >= self._last) & (j < self.shift))
        return (j <= i) & seen

    def tiles(self, b: Tensor, h: Tensor, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor) -> Tensor:
        a0, a1, c0, c1 = ((x + self.shift) // self.size for x in (i0, i1, j0, j1))
        some = (j0 <= i1) & (((c0 <= a1) & (a0 <= c1)) | (j0 < self.sinks))
        first = j0.clamp(min=self.sinks)  # the first key that is no sink; it is seen where its group is that of i1
        beyond = (first > j1) | ((first + self.shift) // self.size == a1)
        if self.wrapped:
            some = some | ((i1 >= self._last) & (j0 < self.shift) & (j0 <= i1))
            first = j0.clamp(min=max(self.sinks, self.shift))
            beyond = beyond | ((i0 >= self._last) & ((first > j1) | ((first + self.shift) // self.size == a1)))
        return answer(some, (j1 <= i0) & beyond)


def _shifted_half(heads: int, group: int, moved: int, sinks: int, border: Border, length: int | None) -> Pattern:
    if border not in get_args(Border):
        raise UnknownNameError("border", str(border), get_args(Border))
    plain = Groups(group, 0, sinks, length=length)
    shifted = Groups(group, group // 2, sinks, border == "wrapped", length)
    return PerHead(tuple(shifted if heads // 2 <= h < heads // 2 + moved else plain for h in range(heads)))


def _check(heads: int, group: int, length: int | None) -> None:
    for name, value in (("heads", heads), ("group", group)):
        at_least(name, value, 2)
        require(value % 2 == 0, name, value, "an even number: half the heads are shifted by half a group")
    if length is not None:
        at_least("length", length, 1)


@register(
    "longlora",
    kind="pattern",
    families=("static-pattern",),
    paper=LONGLORA,
    cost="N · group / 2 entries",
    example=lambda: _longlora_example(),
    causal=True,
)
def longlora(heads: int, group: int, *, border: Border = "leak-free", length: int | None = None) -> Pattern:
    """Shifted sparse attention: causal within groups of `group` tokens, displaced by half in half of the heads.

    border: what becomes of the half groups at the ends in displaced heads. "leak-free": groups of their own.
    "wrapped": one group, the last half of which also sees the first, as rolling the sequence gives it (the causal mask
    of the public code, applied after rolling, lets the first tokens see the last: that leak is not offered).

    length: the number of tokens, in whole groups; `bind(n)` gives it too. "wrapped" has no rule before it is known. A
    shorter row is padded on the right. Raises ArgumentError for an odd group or number of heads, and for ragged
    lengths.

    >>> longlora(2, 4).dense(1, 7).int()[0, :, 0].tolist()  # query 6: groups 4-7, and displaced 6-9
    [[0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0, 1]]
    """
    _check(heads, group, length)
    return _shifted_half(heads, group, heads // 2, 0, border, length)


@register(
    "sinklora",
    kind="pattern",
    families=("static-pattern",),
    paper=SINKLORA,
    cost="N · (group / 2 + sinks) entries",
    example=lambda: _sinklora_example(),
    causal=True,
)
def sinklora(
    heads: int,
    group: int,
    *,
    sinks: int = 4,
    rho: float = 0.5,
    border: Border = "leak-free",
    length: int | None = None,
) -> Pattern:
    """SF-Attn: LongLoRA's shifted groups in a share rho of the displaced heads, and sinks that every head sees.

    Of the second half of the heads the first round(rho · heads / 2) are displaced by half a group (halves rounded up);
    the others go back to the plain groups. The share and the order are ours: the paper does not give them, and its
    public code has neither. rho = 1 without sinks is `longlora`; rho = 0 with one group is `causal`. border, length
    and errors as there; also ArgumentError for rho outside [0, 1] or sinks < 0.

    For fine-tuning only; inference attends densely. Sinks are the first real tokens, also under left padding.

    >>> sinklora(4, 4, sinks=1).dense(1, 7).int()[0, :, 0].tolist()
    [[1, 0, 0, 0, 1, 1, 1], [1, 0, 0, 0, 1, 1, 1], [1, 0, 0, 0, 0, 0, 1], [1, 0, 0, 0, 1, 1, 1]]
    """
    _check(heads, group, length)
    at_least("sinks", sinks, 0)
    share = isinstance(rho, (int, float)) and not isinstance(rho, bool) and 0 <= rho <= 1
    require(share, "rho", repr(rho), "a number in [0, 1]")
    return _shifted_half(heads, group, math.floor(rho * (heads // 2) + 0.5), sinks, border, length)


def _sinklora_example() -> Pattern:
    return sinklora(4, 6, sinks=2, length=24)


def _longlora_example() -> Pattern:
    return longlora(4, 6, border="wrapped", length=24)
