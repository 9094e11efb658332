"""Attention under patterns on grids, forward, bf16, on one GPU: our executors with tiled tokens beside dense cuDNN.

Counted first: touched tiles × 4 · 128 · 128 · D operations over the peak is the floor. `allowed` is 1.15 × touched ÷
all tiles × the dense time of the same run for neighborhoods, 1.5 × touched ÷ causal tiles × dense causal time for
radial attention. 200 random queries are compared with the reference in float32 before a time is printed. First-call
times (compilation) are measured as well. FlexAttention stands beside the neighborhoods; it compiles anew for each. Run
it with `python benchmarks/grid_attention_gpu.py [PART OF A NAME [EXECUTOR …]]`.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from regard.attend import attend
from regard.evidence.record import machine, versions
from regard.evidence.timing import milliseconds
from regard.patterns import EMPTY, Pattern, neighborhood, radial_attention
from regard.patterns.permutation import Tiling, best_tile, permuted
from regard.patterns.radial import radial_blocks

PEAK, BLOCK, D = 731e12, 128, 128  # bf16 operations per second of a large product, measured on an H100

WORK: dict[str, tuple[Pattern, int, int, float | None]] = {  # pattern, query heads, key heads, NATTEN's published ms
    "neighborhood 256×256, 80×80": (neighborhood((256, 256), 80), 24, 24, 18.6),
    "neighborhood 256×256, 80×80, stride 16": (neighborhood((256, 256), 80, 16), 24, 24, 10.6),
    "neighborhood 30×48×80, 18×24×24, stride 16×8×8": (
        neighborhood((30, 48, 80), (18, 24, 24), (16, 8, 8)),
        24,
        24,
        29.0,
    ),
    "neighborhood 64×64, 24×24, stride 8": (neighborhood((64, 64), 24, 8), 24, 24, None),
    "radial-attention 128 × 1024": (radial_attention(128, 1024), 32, 8, None),
    "radial_blocks 128 × 1024": (radial_blocks(128, 1024), 32, 8, None),
}


def dense(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> float:
    """Milliseconds of cuDNN's attention."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        run = lambda: scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=k.shape[1] < q.shape[1])  # noqa: E731
        return milliseconds(run, warm_up=2, rounds=5)


def error(out: Tensor, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> float:
    """The largest difference from the reference in float32 at 200 queries of head 0."""
    rows = torch.randint(0, q.shape[2], (200,), device=q.device).sort().values
    one = [x[:, :1].float() for x in (q[:, :, rows], k, v)]
    want = attend(*one, pattern=pattern, q_positions=rows[None], backend="reference")
    return float((out[:, :1, rows].float() - want).abs().max())


@torch.no_grad()
def measure(name: str) -> dict[str, Any]:
    pattern, heads, kv_heads, published = WORK[name]
    radial = "radial" in name
    n = pattern.extent
    assert n is not None
    q, k, v = (torch.randn(1, h, n, D, device="cuda", dtype=torch.bfloat16) for h in (heads, kv_heads, kv_heads))
    figures: dict[str, Any] = {"N": n, "published": published, "dense": dense(q, k, v, radial)}
    if not radial:
        layout = pattern.layout  # type: ignore[attr-defined]
        tiling = Tiling(layout, best_tile(pattern, BLOCK))
        figures |= {"tile": tiling.tile, "permuting q": milliseconds(lambda: tiling.permute(q))}
        pattern = permuted(pattern, tiling)
    start = time.perf_counter()
    kinds = pattern.block_map(n, block=BLOCK, device="cuda").kinds
    torch.cuda.synchronize()
    figures["map seconds"] = time.perf_counter() - start
    touched, tiles = int((kinds != EMPTY).sum()), kinds.shape[-1] * kinds.shape[-2]
    figures["floor"] = touched * heads * 4 * BLOCK * BLOCK * D / PEAK * 1e3
    share = touched / (tiles / 2) * 1.5 if radial else touched / tiles * 1.15
    figures |= {"touched": touched / tiles, "allowed": share * figures["dense"]}
    for executor in sys.argv[2:] or (("hopper",) if radial else ("hopper", "flex")):
        try:
            start = time.perf_counter()
            out = attend(q, k, v, pattern=pattern, backend=executor)
            torch.cuda.synchronize()
            first = time.perf_counter() - start
            wrong = error(out, q, k, v, pattern)
            assert wrong < 0.02, f"{executor} is wrong by {wrong}"
            ms = milliseconds(lambda e=executor: attend(q, k, v, pattern=pattern, backend=e), warm_up=2, rounds=5)
            figures[executor] = {"ms": ms, "over the floor": ms / figures["floor"], "first call seconds": first}
        except Exception as problem:  # one executor's refusal is a result too
            figures[executor] = f"{type(problem).__name__}: {problem}"[:300]
    return figures


def main() -> None:
    chosen = [name for name in WORK if sys.argv[1:] == [] or sys.argv[1] in name]
    results = {}
    for name in chosen:
        results[name] = measure(name)
        print(name, json.dumps(results[name], indent=1, ensure_ascii=False, default=str), flush=True)
        torch.cuda.empty_cache()
        path = Path(__file__).with_suffix(".json")
        held = json.loads(path.read_text())["figures"] if path.exists() else {}
        about = {"unit": "ms", "figures": held | results, "machine": machine(), "versions": versions()}
        path.write_text(json.dumps(about, indent=1, ensure_ascii=False, default=str) + "\n")


if __name__ == "__main__":
    main()
