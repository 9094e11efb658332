"""A learned number for each relative place inside a neighborhood: the bias of NAT and its followers.

Hassani et al. 2023 (NAT, CVPR) and 2024 (FNA, arXiv 2403.04690).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from regard.errors import require

Score = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def relative_bias(table: Tensor, layout: tuple[int, ...], dilation: tuple[int, ...] | int = 1) -> Score:
    """logits + table[h, k' − q' + w − 1]: a `score` for `attend` under a `neighborhood` of that layout and dilation.

    table: (heads, 2·w₁ − 1, …), one axis for each of the layout's; w is the window, and places count within a residue
    class of the dilation, k' = k // d. Windows move inward at a border, so k' − q' takes all values from −(w − 1) to
    w − 1. layout: one to three sizes, row-major, without tokens beside the grid. What lies outside a window gets the
    number of the nearest place, and is not seen anyway. Raises ArgumentError for a table of another number of axes or
    an even number of places, and for other dilations than one each.

    >>> import torch
    >>> zero = torch.zeros((), dtype=torch.long)
    >>> float(relative_bias(torch.arange(5.0)[None], (8,))(torch.zeros(()), zero, zero, zero + 3, zero + 2))  # −1
    1.0
    """
    dilations = (dilation,) * len(layout) if isinstance(dilation, int) else tuple(dilation)
    require(len(dilations) == len(layout), "dilation", dilation, f"an int ≥ 1, or {len(layout)} of them")
    require(all(isinstance(d, int) and d >= 1 for d in dilations), "dilation", dilation, "ints ≥ 1")
    fits = table.ndim == len(layout) + 1 and all(size % 2 == 1 for size in table.shape[1:])
    require(fits, "table", f"shape {tuple(table.shape)}", f"(heads, {', '.join('2·w − 1' for _ in layout)})")

    def score(logits: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        places: list[Tensor] = []
        for size, d, length in zip(reversed(layout), reversed(dilations), reversed(table.shape[1:]), strict=True):
            apart = (j % size) // d - (i % size) // d
            places.insert(0, (apart + length // 2).clamp(0, length - 1))
            i, j = i // size, j // size
        return logits + table[(h, *places)].to(logits.dtype)

    return score
