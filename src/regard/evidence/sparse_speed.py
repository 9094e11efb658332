"""Time of attention under a pattern on the GPU, beside dense attention of the same run."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from regard.attend import attend
from regard.evidence.timing import milliseconds
from regard.patterns import Pattern

EXECUTORS = ("hopper", "flex")


def heads(n: int, *, q_heads: int = 24, kv_heads: int = 24, width: int = 128) -> tuple[Tensor, Tensor, Tensor]:
    """Random q (1, Hq, n, D), k and v (1, Hkv, n, D) in bf16 on the GPU."""
    q, k, v = (torch.randn(1, h, n, width, device="cuda").to(torch.bfloat16) for h in (q_heads, kv_heads, kv_heads))
    return q, k, v


def dense_ms(q: Tensor, k: Tensor, v: Tensor) -> float:
    """Milliseconds of the fastest of torch's fused dense kernels."""
    grouped = q.shape[1] != k.shape[1]
    times = []
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        with sdpa_kernel(backend):
            times.append(milliseconds(partial(scaled_dot_product_attention, q, k, v, enable_gqa=grouped)))
    return min(times)


def sparse_ms(pattern: Pattern, q: Tensor, k: Tensor, v: Tensor) -> float:
    """Milliseconds of the fastest executor that skips tiles, after its result was held against the reference."""
    rows = torch.arange(0, q.shape[2], max(1, q.shape[2] // 100), device=q.device)
    one = [x[:, :1].float() for x in (q[:, :, rows], k, v)]
    want = attend(one[0], one[1], one[2], pattern=pattern, q_positions=rows[None], backend="reference")
    times = []
    for backend in EXECUTORS:
        out = attend(q, k, v, pattern=pattern, backend=backend)
        wrong = float((out[:, :1, rows].float() - want).abs().max())
        if wrong > 0.02:
            raise AssertionError(f"{backend} differs from the reference by {wrong}")
        times.append(milliseconds(partial(attend, q, k, v, pattern=pattern, backend=backend)))
    return min(times)
