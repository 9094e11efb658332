"""Lightning Attention, the first version: the masked product, tile by tile (Qin et al. 2023, arXiv 2307.14995).

    O = ((Q Kᵀ) ⊙ M) V ,   M_ts = λ_h^{t−s} for t ≥ s, else 0

Quadratic in N, yet nothing of N×N is ever held, forward or backward. The linear version 2 is
`regard.recurrence.lightning_attention_2`, which computes the same; this one is the parallel form for short inputs and
an oracle for long ones. And the rotation of its first layer, LRPE-d, which is a map of queries and keys beforehand.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from regard.errors import require
from regard.patterns.checks import at_least
from regard.recurrence.diagonal import accumulation_dtype
from regard.registry import Paper

PAPER = Paper("TransNormerLLM: A Faster and Better Large Language Model", "Qin et al.", 2023, "2307.14995")


def tiled(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, block: int = 64) -> Tensor:
    """q, k (B, H, N, Dk), v (B, H, N, Dv), log_decay (H,) ≤ 0, fixed: no gradient → (B, H, N, Dv) in v's dtype.

    block: tokens of a tile's side. O(N²·(Dk + Dv)) time, O(N·(Dk + Dv) + block²) memory, the backward's too."""
    at_least("block", block, 1)
    require(q.ndim == 4, "q", tuple(q.shape), "(B, H, N, Dk)")
    require(k.shape == q.shape, "k", tuple(k.shape), f"the shape of q, {tuple(q.shape)}")
    require(v.ndim == 4 and v.shape[:3] == q.shape[:3], "v", tuple(v.shape), f"{tuple(q.shape[:3])} and Dv")
    require(log_decay.shape == q.shape[1:2], "log_decay", tuple(log_decay.shape), f"({q.shape[1]},): one per head")
    dtype = accumulation_dtype(q, k, v)
    out: Tensor = _Tiled.apply(q.to(dtype), k.to(dtype), v.to(dtype), log_decay.detach().to(dtype), block)
    return out.to(v.dtype)


def lrpe(x: Tensor, positions: Tensor, theta: Tensor) -> Tensor:
    """x (B, H, N, D), positions (B, N), theta (H, 1, D) → (B, H, N, 2D): [x cos(tθ), x sin(tθ)] of each channel.

    So q_t·k_s becomes Σ_d q_td k_sd cos(θ_d (t − s)), the real part of the papers' q_tᵀ k_s e^{iθ(t−s)}: it depends on
    t − s only. Twice the state of the plain recurrence. Angles are computed in at least float32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    angles = positions[:, None, :, None].to(dtype) * theta.to(dtype)
    return torch.cat([x * angles.cos(), x * angles.sin()], -1).to(x.dtype)


def lrpe_angles(heads: int, head_dim: int) -> Tensor:
    """(H, 1, D): 10000^{−2i/d} for i = 0 … d − 1 over all d = H·D channels, the first head turning fastest.

    Computed in float64, in torch's default dtype as any parameter."""
    dim = heads * head_dim
    angles = 10000.0 ** (-2 / dim * torch.arange(dim, dtype=torch.float64))
    return angles.view(heads, 1, head_dim).to(torch.get_default_dtype())


class _Tiled(torch.autograd.Function):
    """The forward and the backward of the card, over the same tiles."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, block: int) -> Tensor:
        ctx.save_for_backward(q, k, v, g)
        ctx.block = block
        out = torch.zeros_like(v)
        for i, j, m in _tiles(q.shape[2], g, block):
            out[:, :, i] += ((q[:, :, i] @ k[:, :, j].mT) * m) @ v[:, :, j]
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        q, k, v, g = ctx.saved_tensors
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        for i, j, m in _tiles(q.shape[2], g, ctx.block):
            weight = (q[:, :, i] @ k[:, :, j].mT) * m
            dweight = (grad[:, :, i] @ v[:, :, j].mT) * m
            dv[:, :, j] += weight.mT @ grad[:, :, i]
            dq[:, :, i] += dweight @ k[:, :, j]
            dk[:, :, j] += dweight.mT @ q[:, :, i]
        return dq, dk, dv, None, None


def _tiles(n: int, g: Tensor, block: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Row span, column span and M (H, rows, columns) of every tile that is not empty."""
    t = torch.arange(n, device=g.device)
    for top in range(0, n, block):
        for left in range(0, top + 1, block):
            i, j = slice(top, min(top + block, n)), slice(left, min(left + block, n))
            apart = t[i, None] - t[j]
            power = torch.where(apart > 0, g[:, None, None] * apart.clamp(min=1), 0.0)  # −∞·0 would be NaN
            yield i, j, torch.where(apart >= 0, power.exp(), 0.0)
