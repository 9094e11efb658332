"""Several modalities in one decoder: EE-MLLM, whose visual tokens attend to nothing but themselves, and its cost."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from regard.errors import UnknownNameError
from regard.patterns.algebra import Pattern, at_least
from regard.patterns.per_token import PerTokenFlag, counted, last_at
from regard.patterns.tiles import answer
from regard.registry import Paper, register

PAPER = Paper(
    "EE-MLLM: A Data-Efficient and Compute-Efficient Multimodal Large Language Model", "Ma et al.", 2024, "2408.11795"
)
Reading = Literal["self-only", "ffn-only"]


@dataclass(frozen=True)
class Composite(PerTokenFlag):
    """ids[i] and j = i, or not ids[i] and j ≤ i."""

    exact = True

    @property
    def _argument(self) -> str:
        return "visual"

    def rule(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return ((j == i) | ((j < i) & ~self._at(self.ids, b, i))) & self._within(i, j)

    @cached_property
    def _tables(self) -> tuple[Tensor, Tensor]:
        """How many tokens are visual before each position; the last text token up to each position."""
        return counted(self.ids), last_at(~self.ids)

    def tiles(self, b: Tensor, h: Tensor, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor) -> Tensor:
        count, last = self._tables
        text = self._at(last, b, i1)  # the last text query; it sees the most
        visual = self._at(count, b, i1 + 1) - self._at(count, b, i0)
        on_diagonal = (i0 <= j1) & (j0 <= i1)
        some = on_diagonal | ((text >= i0) & (j0 <= text))
        # A visual query sees one key: a tile with one can be full only as a single column that starts on the diagonal.
        column = (j0 == j1) & (j0 == i0) & (visual == 1) & self._at(self.ids, b, i0)
        return answer(some, (j1 <= i0) & ((visual == 0) | column))


@register(
    "ee-mllm",
    kind="pattern",
    families=("static-pattern",),
    paper=PAPER,
    cost="text · visual + text²/2 entries",
    example=lambda: Composite((torch.arange(24) > 0) & (torch.arange(24) < 9)),
    causal=True,
)
def ee_mllm(visual: Tensor) -> Pattern:
    """A visual token sees itself alone, text sees all that precedes it. visual: bool (N,) or (B, N).

    This is the paper's composite attention in its reading (A): softmax over one key is 1, so a visual token's output is
    its own value, and its states depend on the image alone; keys and values of an image are computed once for all
    prompts. The same result without computing visual queries at all: attend with the text queries only (their
    positions as `q_positions`), and take `v` itself for the visual rows.

    Text before an image does not see it; images see neither one another nor, beyond each token itself, themselves.
    Raises ArgumentError for another dtype or shape, and when asked for more positions than `visual` has.

    >>> ee_mllm(torch.tensor([False, True, True, False])).dense(4).int()[0, 0].tolist()
    [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [1, 1, 1, 1]]
    """
    return Composite(visual)


def prefill_flops(
    visual: int, text: int, *, dim: int, hidden: int, reading: Reading | None = None, square: bool = False
) -> int:
    """Operations of one decoder layer's prefill: visual tokens, then text, gated FFN of width `hidden`, no GQA.

    reading: None = dense causal attention; "self-only" (A): visual tokens have no queries, but keys, values, output
    projection and FFN; "ffn-only" (B): visual tokens have keys, values and FFN. Causal pairs count half a square,
    unless square=True counts the dense model's as a whole one. Raises ArgumentError.
    """
    for name, value in (("visual", visual), ("text", text), ("dim", dim), ("hidden", hidden)):
        at_least(name, value, 0 if name in ("visual", "text") else 1)
    if reading is not None and reading not in get_args(Reading):
        raise UnknownNameError("reading", str(reading), get_args(Reading))
    projection, feed_forward = 2 * dim * dim, 6 * dim * hidden
    if reading is None:
        n = visual + text
        pairs = n * n if square else n * n // 2
        return n * (4 * projection + feed_forward) + 4 * dim * pairs
    of_visual = 3 if reading == "self-only" else 2  # of the four projections
    pairs = visual * text + text * text // 2
    return visual * (of_visual * projection + feed_forward) + text * (4 * projection + feed_forward) + 4 * dim * pairs
