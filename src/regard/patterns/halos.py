"""Blocks that see a halo around themselves: HaloNet's local attention (Vaswani et al. 2021, arXiv 2103.12731)."""

from __future__ import annotations

from regard.errors import require
from regard.patterns.algebra import Pattern
from regard.patterns.axes import Halo
from regard.patterns.grid import AxisProduct
from regard.patterns.order import check_layout
from regard.registry import Paper, register

HALONET = Paper(
    "Scaling Local Self-Attention for Parameter Efficient Visual Backbones", "Vaswani et al.", 2021, "2103.12731"
)


@register(
    "halonet",
    kind="pattern",
    families=("static-pattern",),
    paper=HALONET,
    cost="N·∏(block + 2·halo) entries",
    example=lambda: AxisProduct((4, 6), 0, 0, (Halo(4, 2, 1), Halo(6, 2, 1))),
    causal=False,
)
def halonet(
    layout: int | tuple[int, ...],
    block: int | tuple[int, ...],
    halo: int | tuple[int, ...],
    *,
    before: int = 0,
    after: int = 0,
) -> Pattern:
    """The tokens of a block see that block and `halo` tokens around it, on every axis; cut at the border.

    layout: one to three sizes, row-major; with the tokens `before` and `after`, which see all and are seen by all, they
    make N. block, halo: one for all axes or one each. block = 1 is a sliding window of 2·halo + 1 cut at the border
    (SASA), halo = 0 is blocked attention. A block at the border may be shorter. Raises ArgumentError.

    >>> halonet(6, 2, 1).dense(6).int()[0, 0].tolist()[1:3]
    [[1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 0]]
    """
    sizes = check_layout(layout)
    blocks = check_layout((block,) * len(sizes) if isinstance(block, int) else block, "block", len(sizes))
    halos = (halo,) * len(sizes) if isinstance(halo, int) else halo
    listed = isinstance(halos, tuple | list) and len(halos) == len(sizes)
    require(listed, "halo", repr(halo), f"an int ≥ 0 for all axes, or {len(sizes)} of them")
    axes = tuple(Halo(*axis) for axis in zip(sizes, blocks, halos, strict=True))
    return AxisProduct(sizes, before, after, axes)
