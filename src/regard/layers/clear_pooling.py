"""CLEAR's down-sampled variant: beside its disk an image token sees the whole image in pooled keys.

Liu et al. 2024, arXiv 2412.16112. For small radii, against repeated patterns.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from regard.attend import attend, merge
from regard.errors import require
from regard.patterns import clear
from regard.patterns.algebra import at_least
from regard.patterns.order import check_layout


class ClearPooling(nn.Module):
    """Attention under `clear(layout, radius, text=text)`, with one more key for each cell of factor × factor tokens.

    A cell's key is the sum of its tokens' keys (as they are attended to: normalised and rotated) weighted by one
    learned (factor, factor) table, 1 / factor² at the start; its value is the same sum of the values. All heads and
    channels share the table. Image tokens see all of these keys, text tokens none.

    layout: (height, width) of the image, which the factor divides (ours). radius, text: as in `clear`. factor: the
    paper's 4. Raises ArgumentError.
    """

    def __init__(self, layout: tuple[int, int], radius: int, *, text: int = 0, factor: int = 4) -> None:
        super().__init__()
        self.layout = check_layout(layout, "layout", 2)
        at_least("factor", factor, 1)
        divides = all(size % factor == 0 for size in self.layout)
        require(divides, "factor", factor, f"a divisor of both sides of the layout {self.layout}")
        self.pattern, self.text, self.factor = clear(self.layout, radius, text=text), text, factor
        self.weight = nn.Parameter(torch.full((factor, factor), factor**-2.0))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
        """q (B, Hq, N, D), k (B, Hkv, N, D), v (B, Hkv, N, Dv), text first; returns (B, Hq, N, Dv).

        Exact: the disk and the cells are attended to apart, and merged by their log-sum-exp.
        """
        out, lse = attend(q, k, v, pattern=self.pattern, scale=scale, return_lse=True)
        cells = attend(q[:, :, self.text :], self.pooled(k), self.pooled(v), scale=scale, return_lse=True)
        image = merge([(out[:, :, self.text :], lse[:, :, self.text :]), cells])[0]
        return torch.cat([out[:, :, : self.text], image.to(out.dtype)], 2)

    def pooled(self, x: Tensor) -> Tensor:
        """(B, H, cells, D), row-major, from the image's tokens in x (B, H, N, D)."""
        f, (height, width) = self.factor, self.layout
        image = x[:, :, self.text :].unflatten(2, (height // f, f, width // f, f))
        return torch.einsum("bhyfxgd,fg->bhyxd", image, self.weight.to(x.dtype)).flatten(2, 3)
