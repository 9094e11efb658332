"""A disk around each token of an image, with text that sees everything: CLEAR (Liu et al. 2024, arXiv 2412.16112)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from regard.errors import require
from regard.patterns.algebra import Pattern, at_least
from regard.patterns.grid import OnGrid
from regard.patterns.order import Box, Coordinates, check_layout
from regard.registry import Paper, register

CLEAR = Paper(
    "CLEAR: Conv-Like Linearization Revs Pre-Trained Diffusion Transformers Up", "Liu, Tan, Wang", 2024, "2412.16112"
)


@dataclass(frozen=True)
class Disk(OnGrid):
    """Σ over axes of (q − k)² < radius²."""

    radius: int

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("radius", self.radius, 1)
        square = self.radius**2 + sum((size - 1) ** 2 for size in self.layout)
        require(square < 1 << 31, "radius", self.radius, "squared distances below 2³¹, on this layout")

    def grid_rule(self, q: Coordinates, k: Coordinates) -> Tensor:
        apart = [(x - y) * (x - y) for x, y in zip(q, k, strict=True)]
        return _sum(apart) < self.radius**2

    def box_answers(self, q: Box, k: Box) -> tuple[Tensor, Tensor]:
        """Nearest and farthest on every axis, which some pair of the boxes is on all axes at once."""
        near, far = [], []
        for q0, q1, k0, k1 in zip(q.first, q.last, k.first, k.last, strict=True):
            ahead, behind = k0 - q1, q0 - k1
            least = ahead.maximum(behind).clamp(min=0)
            most = (q1 - k0).maximum(k1 - q0)
            near.append(least * least)
            far.append(most * most)
        return _sum(near) < self.radius**2, _sum(far) < self.radius**2


def _sum(terms: list[Tensor]) -> Tensor:
    out = terms[0]
    for term in terms[1:]:
        out = out + term
    return out


@register(
    "clear",
    kind="pattern",
    families=("static-pattern",),
    paper=CLEAR,
    cost="N·π·radius² entries of the image, 2·text·N of the text",
    example=lambda: Disk((4, 5), 3, 0, 2),
    causal=False,
)
def clear(layout: int | tuple[int, ...], radius: int, *, text: int = 0) -> Pattern:
    """Image tokens see those nearer than `radius` (strictly; cut at the border); text sees all and is seen by all.

    `text` tokens first, then the image of layout (height, width), row-major. One axis or three work the same (ours).
    The paper's radii are 8, 16 and 32. Its down-sampled variant, where image tokens also see pooled keys, is
    `regard.layers.clear_pooling`. Raises ArgumentError for radius < 1.

    >>> clear((3, 3), 2).dense(9).sum(-1)[0, 0].tolist()  # radius 2 is the 3 × 3 square
    [4, 6, 4, 6, 9, 6, 4, 6, 4]
    """
    at_least("text", text, 0)
    return Disk(check_layout(layout), text, 0, radius)
