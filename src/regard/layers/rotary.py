"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864): scores depend on the distance of two tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, positions: Tensor, base: float = 10000.0) -> Tensor:
    """Turn channel pairs (d, d + D/2) of x (B, H, N, D) by positions · base^{−2d/D}; D is even.

    positions (B, N) or (1, N). Angles are computed in at least float32."""
    half = x.shape[-1] // 2
    dtype = torch.promote_types(x.dtype, torch.float32)
    rates = base ** (-torch.arange(half, device=x.device, dtype=dtype) / half)
    angles = (positions[..., None] * rates)[:, None]  # (B, 1, N, D/2)
    cos, sin = angles.cos(), angles.sin()
    a, b = x.to(dtype).split(half, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)
