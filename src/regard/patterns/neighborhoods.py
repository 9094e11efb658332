"""Neighborhood attention in one, two and three dimensions, and its strided form.

Hassani et al. 2024 (FNA, arXiv 2403.04690): a window around the query on every axis, dilated and causal where asked.
Hassani et al. 2025 (GNA, arXiv 2504.16922): `stride` neighbouring queries share the window of their leader.
"""

from __future__ import annotations

from regard.errors import require
from regard.patterns.algebra import Pattern
from regard.patterns.axes import Neighborhood
from regard.patterns.grid import AxisProduct
from regard.patterns.order import check_layout
from regard.registry import Paper, register

FNA = Paper(
    "Faster Neighborhood Attention: Reducing the O(n²) Cost of Self Attention at the Threadblock Level",
    "Hassani, Hwu, Shi",
    2024,
    "2403.04690",
)
GNA = Paper(
    "Generalized Neighborhood Attention: Multi-dimensional Sparse Attention at the Speed of Light",
    "Hassani et al.",
    2025,
    "2504.16922",
)

PerAxis = int | tuple[int, ...]


def _neighborhood(
    layout: PerAxis,
    window: PerAxis,
    stride: PerAxis,
    dilation: PerAxis,
    causal: bool | tuple[bool, ...],
    before: int,
    after: int,
) -> Pattern:
    sizes = check_layout(layout)
    windows, strides, dilations = (
        check_layout((x,) * len(sizes) if isinstance(x, int) else x, name, len(sizes))
        for name, x in (("window", window), ("stride", stride), ("dilation", dilation))
    )
    flags = (causal,) * len(sizes) if isinstance(causal, bool) else causal
    listed = isinstance(flags, tuple | list) and len(flags) == len(sizes)
    right = listed and all(isinstance(flag, bool) for flag in flags)
    require(right, "causal", repr(causal), f"True or False, or {len(sizes)} of them")
    axes = zip(sizes, windows, strides, dilations, flags, strict=True)
    return AxisProduct(sizes, before, after, tuple(Neighborhood(*axis) for axis in axes))


@register(
    "neighborhood",
    kind="pattern",
    families=("static-pattern",),
    paper=GNA,
    cost="N·∏window entries; in tiles, what its `cost(tile=...)` says",
    example=lambda: _neighborhood((4, 6), (3, 4), (1, 2), 1, (False, True), 0, 0),
    causal=False,
)
@register(
    "generalized-neighborhood-attention",
    kind="pattern",
    families=("static-pattern",),
    paper=GNA,
    cost="N·∏window entries; in tiles, what its `cost(tile=...)` says",
    example=lambda: _neighborhood((4, 6), (4, 3), (2, 3), 1, False, 0, 0),
    causal=False,
)
def neighborhood(
    layout: PerAxis,
    window: PerAxis,
    stride: PerAxis = 1,
    dilation: PerAxis = 1,
    causal: bool | tuple[bool, ...] = False,
    *,
    before: int = 0,
    after: int = 0,
) -> Pattern:
    """Each token sees a window of its grid; at a border the window moves inward, so all see ∏window tokens.

    layout: one to three sizes, row-major; the product, with the tokens `before` and `after` the grid (text, which sees
    all and is seen by all), is the number of tokens. window, stride, dilation, causal: one for all axes or one each.
    stride: that many queries in a row share the window of their leader, the one right of the middle (on a causal axis
    the last, and each still sees nothing after itself). 1 is neighborhood attention; the window itself, where it
    divides the axis, is blocked attention. dilation: the window takes every dilation-th token, and so do the groups.
    On a causal axis the window ends at the query and is cut at the border. An even window leans to the left by one.

    Raises ArgumentError for sizes < 1, a stride above the window, or window × dilation above the axis, on any axis.

    >>> neighborhood(6, 3).dense(6).int()[0, 0].tolist()[:3]
    [[1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 0, 0]]
    >>> neighborhood((2, 4), (1, 2), stride=(1, 2)).dense(8).int()[0, 0, 0].tolist()
    [1, 1, 0, 0, 0, 0, 0, 0]
    """
    return _neighborhood(layout, window, stride, dilation, causal, before, after)


@register(
    "faster-neighborhood-attention",
    kind="pattern",
    families=("static-pattern",),
    paper=FNA,
    cost="N·∏window entries; in tiles, what its `cost(tile=...)` says",
    example=lambda: _neighborhood((4, 6), 3, 1, (1, 2), False, 0, 0),
    causal=False,
)
def faster_neighborhood_attention(
    layout: PerAxis,
    window: PerAxis,
    dilation: PerAxis = 1,
    causal: bool | tuple[bool, ...] = False,
    *,
    before: int = 0,
    after: int = 0,
) -> Pattern:
    """Neighborhood attention with a window of its own for every query: `neighborhood` with stride 1, same arguments.

    >>> faster_neighborhood_attention(5, 2, causal=True).dense(5).int()[0, 0].tolist()[:3]
    [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0]]
    """
    return _neighborhood(layout, window, 1, dilation, causal, before, after)
