"""SeNER's layer over word pairs: a cell attends along its row and along its column (Chen et al. 2025, 2502.07286)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from regard.attend import attend
from regard.errors import require
from regard.layers.band import band_places, from_band, transpose_band
from regard.layers.base import Context, Example, Layer, Output, Padding, Tokens
from regard.layers.checks import flags, from_zero
from regard.layers.rotary import rotate
from regard.patterns import Pattern
from regard.patterns.arrow import SENER
from regard.patterns.checks import at_least
from regard.registry import mechanism


class _Axial(nn.Module):
    """Attention of every row of a band within itself, with rotary positions along it."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim, bias=False) for _ in range(3))

    def forward(self, band: Tensor, valid: Tensor) -> Tensor:
        """band (B, n, L, C), valid (B, n, L) bool → (B, n, L, C)."""
        rows, cells = band.flatten(0, 1), torch.arange(band.shape[2], device=band.device)[None]
        q, k, v = (
            p(rows).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = attend(rotate(q, cells), rotate(k, cells), v, key_padding=valid.flatten(0, 1))
        return out.transpose(1, 2).flatten(2).view_as(band)


@mechanism(
    "sener",
    paper=SENER,
    families=("static-pattern",),
    cost="O(n·reach²·C) time, O(n·reach·C) memory for n words, in place of O(n³·C) and O(n²·C)",
    causal=False,
    bidirectional=False,
    cross=False,
    patterns=False,
    gqa=False,
    steps=False,
    compiles=False,
    example=lambda: Example(settings={"reach": 1}, lengths=(3, 6, 12, 15)),
)
class SpanGridAttention(Layer):
    """Plus-shaped attention on the band |i − j| ≤ reach of word pairs, then two 3×3 convolutions (BiSPA).

    x (B, n·(2·reach + 1), C): for each word i the cells j = i − reach … i + reach, one after another; cells with j
    outside the text do not exist, and come out as zeros. To each cell is added what it is (j < i or j ≥ i, learned);
    then, with softmaxes and projections of their own, cell (i, j) attends to (i, j′) and to (i′, j) within the band,
    rotary positions counting along the row or column. Both results, joined, go through a linear map and a residual
    LayerNorm; then convolution, GELU, convolution on the band as it is stored (ours), and a residual LayerNorm.

    reach: the longest span less one (the paper: 128). heads: 1 in the paper; C / heads is even. dropout: before the
    first residual. swapped: the public code puts what column j gives (i, j) at (j, i); True does the same.
    key_padding takes out whole words, from one end or both: all cells of their rows. Words on both sides of a hole are
    refused. Made by `BandedBiaffine`, flattened; the paper stacks two, adds their input, and ends in a linear map.
    """

    def __init__(
        self, dim: int, heads: int = 1, *, reach: int = 128, dropout: float = 0.0, swapped: bool = False
    ) -> None:
        super().__init__(dim, heads)
        require(dim % heads == 0 and dim // heads % 2 == 0, "heads", heads, f"one with dim={dim} / heads even")
        at_least("reach", reach, 0)
        from_zero("dropout", dropout, below=1.0)
        flags(swapped=swapped)
        self.reach, self.swapped = reach, swapped
        self.side = nn.Parameter(torch.randn(2, dim) * 0.02)
        self.along_row, self.along_column = _Axial(dim, heads), _Axial(dim, heads)
        self.join, self.dropout = nn.Linear(2 * dim, dim), nn.Dropout(dropout)
        self.attended, self.convolved = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.first, self.second = (nn.Conv2d(dim, dim, 3, padding=1) for _ in range(2))

    def forward(
        self,
        x: Tokens,
        context: Context | None = None,
        *,
        pattern: Pattern | None = None,
        key_padding: Padding | None = None,
        state: Any = None,
    ) -> Output:
        """See `Layer.forward`."""
        for given, what in ((context, "context"), (pattern, "pattern but its own"), (state, "state")):
            if given is not None:
                raise self.refuse(what)
        self.check_tokens(x, None, key_padding)
        cells = 2 * self.reach + 1
        require(x.shape[1] % cells == 0, "x", f"{x.shape[1]} tokens", f"a multiple of 2·reach + 1 = {cells}")
        band, valid = x.unflatten(1, (-1, cells)), self.valid(x, key_padding)
        there = valid[..., None].to(x.dtype)
        later = torch.arange(cells, device=x.device) >= self.reach
        band = (band.masked_fill(~valid[..., None], 0.0) + self.side[later.long()]) * there
        band = self.attended(band + self.dropout(self.join(torch.cat(self.plus(band, valid), -1))))
        hidden = gelu(_convolved(self.first, band * there))
        band = self.convolved(band + _convolved(self.second, hidden * there))
        return Output((band * there).flatten(1, 2))

    def plus(self, band: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """What every cell gets from its row, and from its column: (B, n, 2·reach + 1, C) each."""
        column = self.along_column(transpose_band(band, self.reach), valid)
        return self.along_row(band, valid), column if self.swapped else transpose_band(column, self.reach)

    def valid(self, x: Tensor, key_padding: Tensor | None) -> Tensor:
        """bool (B, n, 2·reach + 1): cells of two real words."""
        cells = 2 * self.reach + 1
        n = x.shape[1] // cells
        j, there = band_places(n, self.reach, x.device)
        if key_padding is None:
            return there.expand(x.shape[0], n, cells)
        rows = key_padding.unflatten(1, (n, cells))
        words = rows[..., 0]
        whole = bool((rows == words[..., None]).all())
        require(whole, "key_padding", "part of a word's cells", f"all {cells} cells of a word, or none")
        begins = words.long().diff(dim=1, prepend=words.new_zeros(len(words), 1, dtype=torch.long)) > 0
        require(bool((begins.sum(1) <= 1).all()), "key_padding", "a hole between words", "one stretch of real words")
        return there & words[..., None] & words[:, j]

    @classmethod
    def identity(cls) -> tuple[Tensor, Tensor]:
        """Rows and columns of the band are dense attention over all n² cells, masked to the same i or the same j."""
        n, reach = 5, 2
        layer = cls(4, reach=reach).double()
        x = torch.randn(2, n * (2 * reach + 1), 4, dtype=torch.float64)
        valid = layer.valid(x, None)
        band = x.unflatten(1, (n, -1)) * valid[..., None]
        grid = from_band(band, reach).flatten(1, 2)
        i, j = (t.flatten() for t in torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij"))
        within = (i - j).abs() <= reach
        wanted = []
        for axial, line, place in ((layer.along_row, i, j), (layer.along_column, j, i)):
            q, k, v = (p(grid)[:, None] for p in (axial.q_proj, axial.k_proj, axial.v_proj))
            logits = rotate(q, place[None]) @ rotate(k, place[None]).mT / 2
            same = (line[:, None] == line) & within
            wanted.append((logits.masked_fill(~same, -torch.inf).softmax(-1) @ v)[:, 0][:, within])
        got = [from_band(part, reach).flatten(1, 2)[:, within] for part in layer.plus(band, valid)]
        return torch.cat(got, -1), torch.cat(wanted, -1)


def _convolved(conv: nn.Conv2d, band: Tensor) -> Tensor:
    """The convolution over (word, cell) of a band (B, n, L, C)."""
    if band.numel() == 0:
        return band
    out: Tensor = conv(band.movedim(-1, 1))
    return out.movedim(1, -1)
