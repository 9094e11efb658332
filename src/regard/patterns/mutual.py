"""AKI: tokens of an earlier modality may look ahead to the prompt that follows them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from regard.errors import require
from regard.patterns.algebra import Pattern
from regard.patterns.per_token import PerToken, counted, last_at, next_at
from regard.patterns.tiles import answer
from regard.registry import Paper, register

PAPER = Paper(
    "Seeing is Understanding: Unlocking Causal Attention into Modality-Mutual Attention for Multimodal LLMs",
    "Sony AI",
    2025,
    "2503.02597",
)


@dataclass(frozen=True)
class Mutual(PerToken):
    """j ≤ i, or 0 ≤ ids[i] < ids[j] in the same turn. ids are ranks, −1 for tokens that take no part."""

    turns: Tensor = field(init=False, compare=False, repr=False)
    """long, shaped like the ranks: which turn a token belongs to (for tokens of rank −1: the turn before it)."""

    exact = True

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "turns", _turns(self.ids))

    @property
    def _argument(self) -> str:
        return "ranks"

    def _checked(self, ids: Tensor) -> Tensor:
        require(isinstance(ids, Tensor), "ranks", type(ids).__name__, "an integer tensor of shape (N,) or (B, N)")
        whole = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
        require(whole, "ranks", f"dtype {ids.dtype}", "an integer dtype")
        least = int(ids.min()) if ids.numel() else 0
        require(least >= -1, "ranks", f"a rank of {least}", "ranks ≥ 0, or −1 for other tokens and answers")
        return ids.long()

    def rule(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        of_i, of_j = self._at(self.ids, b, i), self._at(self.ids, b, j)
        together = self._at(self.turns, b, i) == self._at(self.turns, b, j)
        return ((j <= i) | ((of_i >= 0) & (of_i < of_j) & together)) & self._within(i, j)

    @cached_property
    def _tables(self) -> _Tables:
        return _Tables.of(self.ids, self.turns)

    def tiles(self, b: Tensor, h: Tensor, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor) -> Tensor:
        t = self._tables

        def at(table: Tensor, x: Tensor) -> Tensor:
            return self._at(table, b, x)

        # Somebody looks ahead. Where all queries lie before all keys, the only turn with tokens on both sides is that
        # of the last ranked query and of the first ranked key; ranks never fall in it, so its first query and its last
        # key decide. (Elsewhere the tile is not empty anyway.)
        last, first = at(t.last, i1), at(t.next, j0)
        turn_i, turn_j = at(self.turns, last), at(self.turns, first)
        lowest = at(self.ids, at(t.next, torch.maximum(i0, at(t.starts, last))))
        highest = at(self.ids, at(t.last, torch.minimum(j1, at(t.ends, first))))
        ahead = (last >= i0) & (first <= j1) & (turn_i == turn_j) & (lowest < highest)
        some = (j0 <= i1) | ahead

        # Everybody does: all pairs i < j of the tile must be ranked, of one turn, and of rising rank.
        end, begin = torch.minimum(i1, j1 - 1), torch.maximum(j0, i0 + 1)  # queries and keys that such pairs have
        ranked = (at(t.ranked, end + 1) - at(t.ranked, i0) == end + 1 - i0) & (
            at(t.ranked, j1 + 1) - at(t.ranked, begin) == j1 + 1 - begin
        )
        flat = at(t.flat, torch.minimum(j1, i1 + 1) + 1) - at(t.flat, begin)  # neighbours i, i + 1 of no rising rank
        rising = (flat <= 0) & ((j0 <= i1 + 1) | (at(self.ids, i1) < at(self.ids, j0)))
        every = (j1 <= i0) | (ranked & rising & (at(self.turns, i0) == at(self.turns, j1)))
        return answer(some, every)


def _turns(ids: Tensor) -> Tensor:
    """A turn begins where the rank falls, and where the last modality begins again after a gap.

    So the ranks of a turn never fall, and an image is shown the first prompt after it.
    """
    real = ids >= 0
    before = torch.nn.functional.pad(last_at(real), (1, 0), value=-1)[..., :-1].long()  # the ranked token before
    old = torch.where(before >= 0, ids.gather(-1, before.clamp(min=0)), -1)
    place = torch.arange(ids.shape[-1], device=ids.device)
    resumed = (ids == ids.amax(-1, keepdim=True)) & (old == ids) & (before < place - 1)
    return (real & ((ids < old) | resumed)).long().cumsum(-1)


@dataclass(frozen=True)
class _Tables:
    """last, next: the nearest ranked position up to, and from, each; starts, ends: of the turn each position is in,
    counted over its ranked tokens. ranked, flat (..., N + 1): how many ranked tokens, and how many tokens of a rank not
    above the one just before them, come before each position."""

    last: Tensor
    next: Tensor
    starts: Tensor
    ends: Tensor
    ranked: Tensor
    flat: Tensor

    @classmethod
    def of(cls, ids: Tensor, turns: Tensor) -> _Tables:
        real, n = ids >= 0, ids.shape[-1]
        new = torch.ones_like(real)
        new[..., 1:] = turns[..., 1:] != turns[..., :-1]
        old = torch.ones_like(real)
        old[..., :-1] = new[..., 1:]
        flat = torch.zeros_like(real)
        flat[..., 1:] = ids[..., 1:] <= ids[..., :-1]
        ends = next_at(old).clamp(max=n - 1)
        return cls(last_at(real), next_at(real), last_at(new), ends, counted(real), counted(flat))


@register(
    "aki-modality-mutual-attention",
    kind="pattern",
    families=("static-pattern",),
    paper=PAPER,
    cost="N²/2 entries, and image · prompt more",
    example=lambda: Mutual(torch.tensor([-1] + [0] * 6 + [1] * 5 + [-1] * 3 + [0] * 3 + [-1] + [1] * 3 + [-1] * 2)),
    causal=False,
)
def aki_modality_mutual_attention(ranks: Tensor) -> Pattern:
    """Causal, and tokens of one modality also see the later modalities of their turn: image tokens see the prompt.

    ranks: integers (N,) or (B, N), the order of a token's modality before the answer: 0 for image tokens, 1 for the
    user's prompt (or more modalities, in their order); −1 for all else: BOS, system, and answers, which nobody sees
    ahead of time. allowed(i, j) = j ≤ i, or 0 ≤ ranks[i] < ranks[j] in the same turn. Within a modality attention
    stays causal.

    A turn begins where the rank falls, and where the last modality begins again after other tokens: with several images
    and prompts each image sees the first prompt after it (ours; the paper leaves it open).

    Image states depend on the prompt, so the whole prompt has to be there in one pass: chunked prefill that splits
    inside it computes something else. `crosses` finds that. Raises ArgumentError for another dtype, shape or a rank <
    −1.

    >>> aki_modality_mutual_attention(torch.tensor([0, 0, 1, -1])).dense(4).int()[0, 0].tolist()
    [[1, 0, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    """
    return Mutual(ranks)
