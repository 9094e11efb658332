"""Time of causal attention under a pattern on the GPU, beside dense causal attention of the same run."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from regard.attend import attend
from regard.evidence.timing import milliseconds
from regard.patterns import Pattern, causal

EXECUTORS = ("hopper", "flex")
WRONG = 0.02


@torch.no_grad()
def beside_dense(pattern: Pattern, n: int, *, heads: int = 32, kv_heads: int = 8, width: int = 128) -> dict[str, Any]:
    """One forward in bf16, batch 1: times in milliseconds, and how many tiles of 128 the pattern leaves of causal's.

    Dense is the fastest of torch's fused causal kernels, ours the fastest executor that skips tiles, whose result is
    held against the reference at a hundred queries of the first and the last head before it is timed.
    """
    q = torch.randn(1, heads, n, width, device="cuda").to(torch.bfloat16)
    k, v = (torch.randn(1, kv_heads, n, width, device="cuda").to(torch.bfloat16) for _ in range(2))
    dense = []
    for kernel in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        with sdpa_kernel(kernel):
            call = partial(scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=heads != kv_heads)
            dense.append(milliseconds(call))
    rows = torch.arange(0, n, max(1, n // 100), device=q.device)
    ours = {}
    for backend in EXECUTORS:
        out = attend(q, k, v, pattern=pattern, backend=backend)
        for h in (0, heads - 1):
            kv = slice(h * kv_heads // heads, h * kv_heads // heads + 1)
            one = (q[:, h : h + 1, rows].float(), k[:, kv].float(), v[:, kv].float())
            want = attend(*one, pattern=pattern.for_head(h), q_positions=rows[None], backend="reference")
            wrong = float((out[:, h : h + 1, rows].float() - want).abs().max())
            if wrong > WRONG:
                raise AssertionError(f"{backend} differs from the reference by {wrong}")
        ours[backend] = milliseconds(partial(attend, q, k, v, pattern=pattern, backend=backend))
    left = pattern.block_map(n, heads=heads).density / causal().block_map(n).density
    best = min(ours.values())
    return {
        "n": n,
        "dense ms": min(dense),
        "ms": best,
        "by executor": ours,
        "tiles": left,
        "speed-up": min(dense) / best,
    }


def said(row: dict[str, Any]) -> str:
    """A row in words."""
    return (
        f"{row['n']} tokens: {row['ms']:.2f} ms against {row['dense ms']:.2f}, {row['speed-up']:.1f} × of "
        f"{1 / row['tiles']:.1f} × possible in tiles"
    )
