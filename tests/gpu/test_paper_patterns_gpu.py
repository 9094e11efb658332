"""Patterns of papers on a GPU: block maps as on a CPU, and the kernels that skip tiles against the reference."""

from __future__ import annotations

import pytest
import torch

from regard.attend import attend
from regard.patterns import (
    Pattern,
    aki_modality_mutual_attention,
    bamm,
    causal,
    ee_mllm,
    flashattention,
    longlora,
    moa_mixture_of_sparse_attention,
    next_block_prediction,
    power_attention,
    s2_attention,
    sinklora,
    sliding_window,
    tokens,
)
from regard.patterns.block_layouts import butterfly_layout

pytestmark = pytest.mark.gpu
N = 512


def patterns() -> dict[str, Pattern]:
    place = torch.arange(N)
    flags = torch.stack([place % 50 < 9, place % 7 == 3])
    ranks = torch.where(place < 5, -1, torch.where(place < 200, 0, torch.where(place < 380, 1, -1)))
    return {
        "tokens": sliding_window(30, right=20) | tokens(flags) | tokens(flags, of="queries"),
        "bamm": bamm(flags),
        "ee-mllm": ee_mllm((place > 4) & (place < 300)),
        "aki": aki_modality_mutual_attention(ranks),
        "power": power_attention(2, 1, 16),
        "s2": s2_attention(4, kv_heads=2, local=2, stride=4, block=16),
        "moa": moa_mixture_of_sparse_attention([(32, 0.25), (64, 0)], group=2, block=16).bind(N),
        "longlora": longlora(4, 128, border="wrapped", length=N),
        "sinklora": sinklora(4, 128, sinks=2),
        "next-block": next_block_prediction(48, 32),
        "flashattention": causal() & flashattention(butterfly_layout(16), 32),
    }


NAMES = list(patterns())


@pytest.mark.parametrize("name", NAMES)
def test_the_map_is_that_of_the_cpu(name: str) -> None:
    p = patterns()[name]
    for block in (64, 100):
        here, there = p.block_map(N, block=block), p.to("cuda").block_map(N, block=block)
        assert there.kinds.is_cuda and torch.equal(here.kinds, there.kinds.cpu())


@pytest.mark.parametrize(("name", "backend"), [*((n, "triton") for n in NAMES), ("aki", "flex"), ("s2", "flex")])
def test_kernels_obey(name: str, backend: str) -> None:
    p = patterns()[name]
    q, k, v = (torch.randn(2, h, N, 64, device="cuda") for h in (4, 2, 2))
    up = torch.randn_like(q)
    results = []
    for dtype, executor in ((torch.float64, "reference"), (torch.bfloat16, backend)):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = attend(*leaves, pattern=p, backend=executor)
        results.append([out, *torch.autograd.grad(out, leaves, up.to(dtype))])
    for truth, ours in zip(*results, strict=True):
        assert ours.isfinite().all() and (ours - truth).abs().max() <= 0.03 * truth.abs().max()
