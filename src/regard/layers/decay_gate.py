"""The decay of Mamba-2 and Gated DeltaNet: one step size per token and head, one rate per head."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from regard.recurrence.diagonal import accumulation_dtype


class DecayGate(nn.Module):
    """Δ = softplus(z + b) and log α = −exp(A_log) · Δ: forward(z (B, N, H)) → both (B, H, N), in at least float32.

    At first A = exp(A_log) ~ U(least, most), and b is such that Δ is log-uniform in [1e-3, 0.1] at z = 0 and at least
    1e-4. Both parameters are (H,): the papers train them without weight decay.
    """

    def __init__(self, heads: int, least: float, most: float) -> None:
        super().__init__()
        self.a_log = nn.Parameter(torch.empty(heads).uniform_(least, most).log())
        dt = torch.empty(heads).uniform_(math.log(1e-3), math.log(0.1)).exp().clamp(min=1e-4)
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # softplus⁻¹

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N, H) → Δ, log α (B, H, N)."""
        dtype = accumulation_dtype(z)
        dt = softplus(z.to(dtype) + self.dt_bias.to(dtype)).transpose(1, 2)
        return dt, -self.a_log.to(dtype).exp()[:, None] * dt
