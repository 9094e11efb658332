"""How long block maps of the sequence patterns of papers take to build on one CPU core, in tiles of 128 tokens.

N = 131,072; the time includes making the pattern from its ids, and is the least of three rounds. Allowed: 2 s. Each map
is compared with the rule at 2,000 entries of every head that differs before it is timed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from regard.evidence.record import machine, versions
from regard.patterns import (
    EMPTY,
    FULL,
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
    tokens,
)

N, BLOCK, ROUNDS, ALLOWED = 131_072, 128, 3, 2.0
PLACE = torch.arange(N)
RANKS = torch.where(PLACE < 4000, 0, torch.where(PLACE < 9000, 1, -1))
LAYOUT = torch.rand(1024, 1024, generator=torch.Generator().manual_seed(0)) < 0.1
WINDOWS = [(1024.0 * g, 0.05 * g) for g in range(8)]
PATTERNS: dict[str, Callable[[], Pattern]] = {
    "tokens, one in a thousand": lambda: causal() & tokens(PLACE % 1000 == 0),
    "bamm, a third given": lambda: bamm(PLACE % 3 == 0),
    "ee-mllm, 3000 visual tokens": lambda: ee_mllm((PLACE > 10) & (PLACE < 3010)),
    "aki, 4000 image and 5000 prompt tokens": lambda: aki_modality_mutual_attention(RANKS),
    "power-attention, tokens": lambda: power_attention(512, 64, block=1),
    "power-attention, blocks of 64": lambda: power_attention(),
    "s2-attention, 32 heads over 8": lambda: s2_attention(32, kv_heads=8),
    "s2-attention, 32 heads": lambda: s2_attention(32),
    "moa, 8 rules": lambda: moa_mixture_of_sparse_attention(WINDOWS, group=4).bind(N),
    "longlora, wrapped": lambda: longlora(32, 8192, border="wrapped", length=N),
    "sinklora": lambda: sinklora(32, 8192, length=N),
    "next-block-prediction": lambda: next_block_prediction(256, 0, N),
    "flashattention, a tenth of the blocks": lambda: flashattention(LAYOUT),
}


def check(p: Pattern) -> None:
    mapped = p.block_map(N, block=BLOCK)
    i, j = torch.randint(0, N, (2, 2000), generator=torch.Generator().manual_seed(0))
    zero = torch.zeros((), dtype=torch.long)
    for head, g in enumerate(mapped.head_index.tolist()):
        allowed, said = p.rule(zero, zero + head, i, j), mapped.kinds[0, g, i // BLOCK, j // BLOCK]
        assert not (allowed & (said == EMPTY)).any() and not (~allowed & (said == FULL)).any()


def main() -> None:
    torch.set_num_threads(1)
    figures = {}
    for name, make in PATTERNS.items():
        check(make())
        times = []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            mapped = make().block_map(N, block=BLOCK)
            times.append(time.perf_counter() - start)
        heads = mapped.kinds.shape[1]
        figures[name] = {
            "seconds": round(min(times), 4),
            "allowed": ALLOWED,
            "heads that differ": heads,
            "tiles": mapped.kinds.numel(),
            "touched": round(mapped.density, 4),
        }
        late = "" if min(times) <= ALLOWED else "  LATE"
        print(f"{name:42s} {min(times):7.3f} s of {ALLOWED} s, {heads:2d} maps, {mapped.density:7.2%} touched{late}")
    result = {"figures": figures, "N": N, "machine": machine(), "versions": versions()}
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
