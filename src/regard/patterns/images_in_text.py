"""Decoder masks of training objectives: Croc's images that see themselves whole, BICO's masked tokens nobody sees."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from regard.errors import ArgumentError, require
from regard.patterns.algebra import Pattern
from regard.patterns.flagged import Tokens
from regard.patterns.per_token import PerToken, next_at
from regard.patterns.tiles import answer
from regard.registry import Paper, register

CROC = Paper(
    "Croc: Pretraining Large Multimodal Models with Cross-Modal Comprehension", "Xie et al.", 2024, "2410.14332"
)
BICO = Paper(
    "An Analysis and Mitigation of the Reversal Curse (Are We Falling in a Middle-Intelligence Trap?)",
    "Lv et al.",
    2023,
    "2311.07468",
)


@dataclass(frozen=True)
class WholeImages(PerToken):
    """j ≤ i, or both in the same image. ids: the image of each token, −1 for text; an image is one stretch.

    So each i sees 0..end(i): itself in text, the end of its image in an image; and `end` never falls.
    """

    end: Tensor = field(init=False, compare=False, repr=False)

    exact = True

    def __post_init__(self) -> None:
        super().__post_init__()
        last = torch.ones_like(self.ids, dtype=torch.bool)
        last[..., :-1] = (self.ids[..., 1:] != self.ids[..., :-1]) | (self.ids[..., :-1] < 0)
        object.__setattr__(self, "end", next_at(last))

    @property
    def _argument(self) -> str:
        return "images"

    def _checked(self, ids: Tensor) -> Tensor:
        require(isinstance(ids, Tensor), "images", type(ids).__name__, "an integer tensor of shape (N,) or (B, N)")
        whole = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
        require(whole, "images", f"dtype {ids.dtype}", "an integer dtype")
        if ids.numel():
            require(int(ids.min()) >= -1, "images", f"an id of {int(ids.min())}", "ids ≥ 0, or −1 for text")
        for row in ids.reshape(-1, ids.shape[-1]) if ids.ndim in (1, 2) else ():
            stretches = row.unique_consecutive()
            stretches = stretches[stretches >= 0]
            if len(stretches.unique()) < len(stretches):
                raise ArgumentError(
                    "images", "an image in several stretches", "one stretch each; else causal() | documents(images)"
                )
        return ids.long()

    def rule(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= self._at(self.end, b, i)) & self._within(i, j)

    def tiles(self, b: Tensor, h: Tensor, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor) -> Tensor:
        return answer(j0 <= self._at(self.end, b, i1), j1 <= self._at(self.end, b, i0))


@register(
    "croc",
    kind="pattern",
    families=("static-pattern", "objective"),
    paper=CROC,
    cost="N²/2 entries, and n²/2 for an image of n tokens",
    example=lambda: WholeImages(torch.tensor([-1] * 2 + [0] * 6 + [-1] * 3 + [1] * 5 + [2] * 4 + [-1] * 4)),
    causal=False,
)
def croc(images: Tensor) -> Pattern:
    """Causal, and the tokens of an image also see the rest of that image; never a later one, nor later text.

    images: integers (N,), or (B, N) where rows differ: the image of each token, −1 for text. An image is one stretch of
    tokens (ours; `causal() | documents(images)` takes any, with tile answers that are sound, not exact). An image has
    to be prefilled in one piece. Raises ArgumentError for another dtype or shape, ids < −1, or a scattered image.

    >>> croc(torch.tensor([-1, 0, 0, -1])).dense(4).int()[0, 0].tolist()
    [[1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    """
    return WholeImages(images)


@register(
    "bico",
    kind="pattern",
    families=("static-pattern", "objective"),
    paper=BICO,
    cost="N·(N − masked) entries",
    example=lambda: Tokens(torch.arange(24) % 6 != 2),
    causal=False,
)
def bico(masked: Tensor) -> Pattern:
    """Everybody sees every token that is not masked, in both directions; masked tokens ask but are not seen.

    masked: bool (N,), or (B, N) where rows differ. The token at m is predicted from the state at m − 1, as by a causal
    model; position 0 has no predictor. Padding is left to `key_padding`. Its other half, the rotary reflected for keys
    to the right, is a score and not part of this. Never with a cache. Raises ArgumentError for another dtype or shape.

    >>> bico(torch.tensor([False, True, False])).dense(3).int()[0, 0].tolist()
    [[1, 0, 1], [1, 0, 1], [1, 0, 1]]
    """
    require(isinstance(masked, Tensor), "masked", type(masked).__name__, "a bool tensor of shape (N,) or (B, N)")
    require(masked.dtype == torch.bool, "masked", f"dtype {masked.dtype}", "torch.bool")
    require(masked.ndim in (1, 2) and masked.numel() > 0, "masked", f"shape {tuple(masked.shape)}", "(N,) or (B, N)")
    return Tokens(~masked)
