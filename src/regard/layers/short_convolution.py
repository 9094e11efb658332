"""The short convolution before a recurrence: each channel a weighted sum of its last few tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, pad, silu

from regard.errors import require
from regard.layers.checks import sizes


class ShortConvolution(nn.Module):
    """Causal depthwise convolution, y_t = Σ_{i=0}^{K−1} w_{·,K−1−i} ⊙ x_{t−i} (+ b), then SiLU where asked for.

    Only real tokens count: x_{t−i} is the i-th real token before t, padding between them or not, and 0 before the
    first. channels, kernel_size K ≥ 1; weight (channels, K), its last column at the token itself. Begins as nn.Conv1d
    does. The window handed from call to call is (B, K − 1, channels): each row's last K − 1 real inputs, oldest first.
    """

    def __init__(self, channels: int, kernel_size: int = 4, *, bias: bool = False, activation: bool = True) -> None:
        super().__init__()
        sizes(channels=channels, kernel_size=kernel_size)
        self.channels, self.kernel_size, self.activation = channels, kernel_size, activation
        bound = kernel_size**-0.5
        self.weight = nn.Parameter(torch.empty(channels, kernel_size).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(channels).uniform_(-bound, bound)) if bias else None

    def forward(
        self, x: Tensor, key_padding: Tensor | None = None, window: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x (B, N, channels), key_padding (B, N) bool; window: what the call before returned, None at the start.

        Returns (out (B, N, channels), zeros at padding; the next window). Raises ArgumentError for a wrong shape.
        """
        batch, n, kept = x.shape[0], x.shape[1], self.kernel_size - 1
        require(x.ndim == 3 and x.shape[2] == self.channels, "x", tuple(x.shape), f"(B, N, {self.channels})")
        wanted = (batch, kept, self.channels)
        if window is not None:
            require(window.shape == wanted, "state", tuple(window.shape), f"{wanted}: a window (B, K − 1, channels)")
        if key_padding is None:
            joined = self._after(window, x)
            return self._convolve(joined), joined[:, n:]
        # Real tokens move together to the left, in order; what they leave at the right is read by none of them.
        order = (~key_padding).long().argsort(dim=1, stable=True)[..., None].expand_as(x)
        joined = self._after(window, x.gather(1, order))
        convolved = self._convolve(joined)  # under autocast not in the dtype of x
        out = torch.zeros_like(convolved).scatter(1, order, convolved)
        last = key_padding.sum(-1)[:, None] + torch.arange(kept, device=x.device)
        following = joined.gather(1, last[..., None].expand(wanted))
        return out.masked_fill(~key_padding[..., None], 0.0), following

    def _after(self, window: Tensor | None, x: Tensor) -> Tensor:
        kept = self.kernel_size - 1
        return pad(x, (0, 0, kept, 0)) if window is None else torch.cat([window.to(x.dtype), x], 1)

    def _convolve(self, joined: Tensor) -> Tensor:
        """(B, K − 1 + N, channels) → (B, N, channels)."""
        if joined.shape[1] < self.kernel_size:  # no token
            return joined[:, :0]
        out = conv1d(joined.mT, self.weight[:, None], self.bias, groups=self.channels).mT
        return silu(out) if self.activation else out

    def extra_repr(self) -> str:
        """What it was made with."""
        return f"{self.channels}, kernel_size={self.kernel_size}, activation={self.activation}"
