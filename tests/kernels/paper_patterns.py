"""A pattern of each paper for 2 rows and 4 heads: small for the tests on a CPU, longer for those on a GPU."""

from __future__ import annotations

import torch

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

SMALL = 24
LARGE = 480  # no multiple of a kernel's tile
HEADS, KV_HEADS = 4, 2


def paper_patterns(n: int) -> dict[str, Pattern]:
    """The cases for n tokens, n = SMALL or a multiple of it; blocks, groups and windows grow with n."""
    u = n // SMALL
    flags = torch.arange(2 * n).view(2, n) % 7 % 3 == 0
    ranks = torch.tensor(
        [[-1] + [0] * 9 + [1] * 8 + [-1] * 6, [0] * 5 + [1] * 5 + [-1] * 4 + [0] * 3 + [1] * 5 + [-1] * 2]
    ).repeat_interleave(u, 1)
    return {
        "tokens": sliding_window(3 * u, right=2 * u) | tokens(flags) | tokens(flags, of="queries"),
        "bamm": bamm(flags),
        "ee-mllm": ee_mllm(flags),
        "aki": aki_modality_mutual_attention(ranks),
        "power": power_attention(1, 1, 2 * u),
        "s2": s2_attention(HEADS, kv_heads=KV_HEADS, local=1, stride=3, block=2 * u),
        "moa": moa_mixture_of_sparse_attention([(2 * u, 0.25), (4 * u, 0)], group=2, block=2 * u).bind(n),
        "longlora": longlora(HEADS, 8 * u, border="wrapped", length=n),
        "sinklora": sinklora(HEADS, 6 * u, sinks=2),
        "next-block": next_block_prediction(5 * u, 4 * u),
        "flashattention": causal() & flashattention(torch.arange(36).view(6, 6) % 5 < 3, 4 * u),
    }
