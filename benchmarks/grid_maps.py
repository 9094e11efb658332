"""How long block maps of patterns on grids take to build on a CPU, in tiles of 128 tokens. The least of five rounds.

Allowed: 0.2 s for the neighborhoods in tile order (FlexAttention's own builder takes 6 to 27 s for them on a GPU), 2 s
for all others at N ≈ 131,072. The floor is one byte written per tile, which is nothing; the number of tiles stands
beside the time. Each map is compared with the rule at 2,000 entries before it is timed.
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
    bico,
    clear,
    croc,
    enerverse,
    halonet,
    m_var,
    neighborhood,
    radial_attention,
    sener,
)
from regard.patterns.permutation import Tiling, best_tile, permuted
from regard.patterns.radial import radial_blocks

N, BLOCK, ROUNDS = 131_072, 128, 5


def tiled(layout: tuple[int, ...], window: tuple[int, ...], stride: int | tuple[int, ...]) -> Pattern:
    p = neighborhood(layout, window, stride)
    return permuted(p, Tiling(layout, best_tile(p, BLOCK)))


IDS = torch.arange(N) // 576
PATTERNS: dict[str, tuple[Callable[[], Pattern], float]] = {
    "neighborhood 256×256, 80×80, tiled": (lambda: tiled((256, 256), (80, 80), 1), 0.2),
    "neighborhood 256×256, 80×80, stride 16, tiled": (lambda: tiled((256, 256), (80, 80), 16), 0.2),
    "neighborhood 30×48×80, 18×24×24, stride 16×8×8, tiled": (
        lambda: tiled((30, 48, 80), (18, 24, 24), (16, 8, 8)),
        0.2,
    ),
    "neighborhood 256×512, 31×31, row-major": (lambda: neighborhood((256, 512), 31), 2),
    "neighborhood 32×64×64, 9×9×9, dilation 3×7×7, row-major": (
        lambda: neighborhood((32, 64, 64), 9, dilation=(3, 7, 7)),
        2,
    ),
    "neighborhood 131072, 1000, stride 16, dilation 9": (lambda: neighborhood(N, 1000, 16, 9), 2),
    "halonet 256×512, block 8, halo 3": (lambda: halonet((256, 512), 8, 3), 2),
    "clear 256×512, radius 32, 512 of text": (lambda: clear((256, 512), 32, text=512), 2),
    "radial-attention 128 × 1024": (lambda: radial_attention(128, 1024), 2),
    "radial-attention 4096 × 32": (lambda: radial_attention(4096, 32), 2),
    "radial_blocks 128 × 1024, making it included": (lambda: radial_blocks(128, 1024), 2),
    "m-var, 73 scales": (lambda: m_var(tuple(range(1, 74))), 2),
    "enerverse 512 frames of 256, chunks of 8": (lambda: enerverse(512, 8, range(0, 512, 50), tokens=256), 2),
    "croc": (lambda: croc(torch.where(IDS % 3 == 0, IDS, -1)), 2),
    "bico": (lambda: bico(IDS % 3 == 0), 2),
    "sener": (lambda: sener(), 2),
}


def check(p: Pattern, n: int) -> None:
    kinds = p.block_map(n, block=BLOCK).kinds[0, 0]
    i, j = torch.randint(0, n, (2, 2000), generator=torch.Generator().manual_seed(0))
    zero = torch.zeros((), dtype=torch.long)
    allowed, said = p.rule(zero, zero, i, j), kinds[i // BLOCK, j // BLOCK]
    assert not (allowed & (said == EMPTY)).any() and not (~allowed & (said == FULL)).any()


def main() -> None:
    torch.set_num_threads(2)
    figures = {}
    for name, (make, limit) in PATTERNS.items():
        p = make()
        n = p.extent or N
        check(p, n)
        times = []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            (make() if "included" in name else p).block_map(n, block=BLOCK)
            times.append(time.perf_counter() - start)
        mapped = p.block_map(n, block=BLOCK)
        about = {"seconds": round(min(times), 4), "allowed": limit, "N": n, "tiles": mapped.kinds.numel()}
        figures[name] = about | {"touched": round(mapped.density, 4)}
        late = "" if min(times) <= limit else "  LATE"
        print(f"{name:56s} {min(times):7.3f} s of {limit} s, {mapped.density:7.2%} of tiles touched{late}")
    result = {"figures": figures, "machine": machine(), "versions": versions()}
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
