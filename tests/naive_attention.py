"""Attention by its definition: a query at a time, over the list of keys it sees, in float64. Shares no code."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out (B, Hq, N, Dv) and lse (B, Hq, N) in float64; seen bool and bias, both expandable to (B, Hq, N, M)."""
    q, k, v = q.double(), k.double(), v.double()
    batch, heads, n, width = q.shape
    m = k.shape[2]
    seen = seen.expand(batch, heads, n, m)
    scale = width**-0.5 if scale is None else scale
    outs, sums = [], []
    for b in range(batch):
        for h in range(heads):
            lane = h // (heads // k.shape[1])
            for i in range(n):
                keys = seen[b, h, i].nonzero()[:, 0]
                logits = (k[b, lane, keys] * q[b, h, i]).sum(-1) * scale
                if softcap is not None:
                    logits = (logits / softcap).tanh() * softcap
                if bias is not None:
                    logits = logits + bias.expand(batch, heads, n, m)[b, h, i, keys]
                if sinks is not None:
                    logits = torch.cat([logits, sinks[h : h + 1].double()])
                if logits.numel() == 0:
                    outs.append(v.new_zeros(v.shape[-1]))
                    sums.append(v.new_tensor(-torch.inf))
                    continue
                weights = logits.softmax(0)[: len(keys)]
                outs.append((weights[:, None] * v[b, lane, keys]).sum(0))
                sums.append(logits.logsumexp(0))
    return torch.stack(outs).view(batch, heads, n, -1), torch.stack(sums).view(batch, heads, n)


def qkv(
    batch: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    n: int = 9,
    m: int | None = None,
    width: int = 8,
    value_width: int = 12,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k, v."""
    m = n if m is None else m
    shapes = ((batch, heads, n, width), (batch, kv_heads, m, width), (batch, kv_heads, m, value_width))
    q, k, v = (torch.randn(shape, dtype=torch.float64).to(device, dtype) for shape in shapes)
    return q, k, v


Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def seen_under(rule: Rule, batch: int, heads: int, i: Tensor, j: Tensor) -> Tensor:
    """bool (B, Hq, N, M) for positions i (N,) or (B, N) and j (M,), (B, M) or (B, Hkv, M)."""
    b = torch.arange(batch)[:, None, None, None]
    h = torch.arange(heads)[None, :, None, None]
    i = i.expand(batch, -1)[:, None, :, None]
    j = j.expand(batch, -1)[:, None] if j.ndim < 3 else j.repeat_interleave(heads // j.shape[1], 1)
    return rule(b, h, i, j[:, :, None, :]).expand(batch, heads, i.shape[2], j.shape[2])
