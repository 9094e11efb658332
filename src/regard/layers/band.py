"""A grid of word pairs stored as a band: cell (i, j) with |i − j| ≤ reach lies at row i, column j − i + reach."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, pad

from regard.patterns.algebra import at_least


def band_places(n: int, reach: int, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    """j of every cell, long (n, 2·reach + 1), clamped into 0..n−1; and bool, whether there is such a j."""
    j = torch.arange(n, device=device)[:, None] + torch.arange(-reach, reach + 1, device=device)
    return j.clamp(0, n - 1), (j >= 0) & (j < n)


def to_band(grid: Tensor, reach: int) -> Tensor:
    """(B, n, n, …) → (B, n, 2·reach + 1, …), zeros where there is no cell."""
    n = grid.shape[1]
    j, there = band_places(n, reach, grid.device)
    out = grid[:, torch.arange(n, device=grid.device)[:, None], j]
    return out * _like(there, out)


def from_band(band: Tensor, reach: int) -> Tensor:
    """(B, n, 2·reach + 1, …) → (B, n, n, …), zeros outside the band."""
    n = band.shape[1]
    out = band.new_zeros((band.shape[0], n, n, *band.shape[3:]))
    j, there = band_places(n, reach, band.device)
    i = torch.arange(n, device=band.device)[:, None].expand_as(j)
    out[:, i[there], j[there]] = band[:, there]
    return out


def transpose_band(band: Tensor, reach: int) -> Tensor:
    """The band of the transposed grid: cell (i, j) changes places with (j, i); zeros where there is no cell."""
    i, there = band_places(band.shape[1], reach, band.device)
    out = band[:, i, torch.arange(2 * reach, -1, -1, device=band.device)]
    return out * _like(there, out)


def _like(there: Tensor, x: Tensor) -> Tensor:
    """(n, cells) bool as a factor for x (B, n, cells, …)."""
    return there.view(1, *there.shape, *[1] * (x.ndim - 3)).to(x.dtype)


class BandedBiaffine(nn.Module):
    """Scores of spans: words (B, n, C) → (B, n, 2·reach + 1, channels), only for |i − j| ≤ reach.

    X_ij = s_iᵀ U e_j + W [s_i; e_j] with s = GELU(start(words)), e = GELU(end(words)), a constant 1 at the end of each
    (SeNER, Chen et al. 2025, arXiv 2502.07286). hidden: width of s and e. Cells that do not exist are 0.
    """

    def __init__(self, dim: int, channels: int = 32, *, reach: int = 128, hidden: int = 100) -> None:
        super().__init__()
        for name, value, least in (
            ("dim", dim, 1),
            ("channels", channels, 1),
            ("reach", reach, 0),
            ("hidden", hidden, 1),
        ):
            at_least(name, value, least)
        self.reach = reach
        self.start, self.end = nn.Linear(dim, hidden), nn.Linear(dim, hidden)
        self.bilinear = nn.Parameter(torch.randn(channels, hidden + 1, hidden + 1) / (hidden + 1))
        self.linear = nn.Linear(2 * (hidden + 1), channels, bias=False)

    def forward(self, words: Tensor) -> Tensor:
        """(B, n, C) → (B, n, 2·reach + 1, channels)."""
        s, e = (pad(gelu(project(words)), (0, 1), value=1.0) for project in (self.start, self.end))
        j, there = band_places(words.shape[1], self.reach, words.device)
        of_start, of_end = self.linear.weight.chunk(2, -1)
        left = torch.einsum("bns,cse->bnce", s, self.bilinear)
        scores = torch.einsum("bnce,bnte->bntc", left, e[:, j]) + (s @ of_start.T)[:, :, None] + (e @ of_end.T)[:, j]
        return scores * _like(there, scores)
