"""A causal convolution as long as the sequence, its filter written by a small network instead of stored.

As in Hyena (Poli et al. 2023, arXiv 2302.10866) and in the long layers of Zoology's BaseConv (arXiv 2312.04927).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from regard.errors import require
from regard.layers.checks import sizes
from regard.recurrence.diagonal import accumulation_dtype


class LongConvolution(nn.Module):
    """y_t = Σ_{s ≤ t} h_{t−s} ⊙ x_s (+ b): depthwise, through an FFT, h_τ = W₂ sin(W₁ z_τ + b₁) for any distance τ.

    z_τ = [τ/T, cos(2πjτ/T), sin(2πjτ/T)] for j = 1 … bands; T = max_length is the scale of z, not a limit. The network
    and its sizes are ours: the papers' codes differ. h is divided by √T, so that a sum over T tokens has scale 1.

    Only real tokens count. The window handed on is all of a row's real inputs, (B, M, channels), zeros before them;
    it grows as they do. O(N log N) time. FFTs are not causal to the last bit: 1e-12 in float64, 1e-5 in float32.
    """

    def __init__(
        self, channels: int, *, bias: bool = False, max_length: int = 2048, bands: int = 8, width: int = 32
    ) -> None:
        super().__init__()
        sizes(channels=channels, max_length=max_length, bands=bands, width=width)
        self.channels, self.max_length, self.bands = channels, max_length, bands
        self.filter = nn.Sequential(nn.Linear(1 + 2 * bands, width), Sine(), nn.Linear(width, channels, bias=False))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    def kernel(self, n: int) -> Tensor:
        """(n, channels): h_0 … h_{n−1}."""
        weight = next(self.filter.parameters())
        share = torch.arange(n, device=weight.device, dtype=torch.float64)[:, None] / self.max_length
        angles = 2 * math.pi * share * torch.arange(1, self.bands + 1, device=weight.device)
        z = torch.cat([share, angles.cos(), angles.sin()], -1).to(weight.dtype)
        h: Tensor = self.filter(z)
        return h / self.max_length**0.5

    def forward(
        self, x: Tensor, key_padding: Tensor | None = None, window: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `ShortConvolution`: x (B, N, channels) → (out (B, N, channels), zeros at padding; the next window)."""
        batch, n = x.shape[:2]
        require(x.ndim == 3 and x.shape[2] == self.channels, "x", tuple(x.shape), f"(B, N, {self.channels})")
        window = x[:, :0] if window is None else window
        fits = window.ndim == 3 and window.shape[::2] == (batch, self.channels)
        require(fits, "state", tuple(window.shape), f"({batch}, M, {self.channels}): a window of all inputs")
        if key_padding is None:
            joined = torch.cat([window.to(x.dtype), x], 1)
            return self._convolve(joined)[:, window.shape[1] :], joined
        # Real tokens move together to the left, in order; what they leave at the right is read by none of them.
        order = (~key_padding).long().argsort(dim=1, stable=True)[..., None].expand_as(x)
        packed = x.masked_fill(~key_padding[..., None], 0.0).gather(1, order)
        joined = torch.cat([window.to(x.dtype), packed], 1)
        out = torch.zeros_like(x).scatter(1, order, self._convolve(joined)[:, window.shape[1] :])
        ended = n - key_padding.sum(1, keepdim=True)  # the zeros at a row's end belong before its first token
        back = (torch.arange(joined.shape[1], device=x.device) - ended) % joined.shape[1]
        following = joined.gather(1, back[..., None].expand_as(joined))
        return out.masked_fill(~key_padding[..., None], 0.0), following

    def _convolve(self, x: Tensor) -> Tensor:
        if x.numel() == 0:
            return x
        n, dtype = x.shape[1], accumulation_dtype(x)
        size = 2 * n  # room for what would otherwise come round from the end
        spectrum = torch.fft.rfft(x.to(dtype), n=size, dim=1) * torch.fft.rfft(self.kernel(n).to(dtype), n=size, dim=0)
        out = torch.fft.irfft(spectrum, n=size, dim=1)[:, :n].to(x.dtype)
        return out if self.bias is None else out + self.bias


class Sine(nn.Module):
    """sin x."""

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise."""
        return x.sin()
