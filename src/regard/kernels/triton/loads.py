"""How the kernels of recurrences load a tile of a matrix."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile(base, at, step, index, dims, count, width):
    """(index, dims): rows at + index of a matrix, `step` apart; zeros from row `count` and from column `width` on."""
    inside = ((at + index) < count)[:, None] & (dims < width)[None]
    return tl.load(base + at.to(tl.int64) * step + index[:, None] * step + dims[None], mask=inside, other=0.0)
