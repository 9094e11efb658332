"""CLEAR: nearly all pairs of a large image are saved, and so is nearly all the time."""

from __future__ import annotations

import torch

from regard.evidence.claim import Measured, Settings, claim, later, verdict
from regard.evidence.sparse_speed import dense_ms, heads, sparse_ms
from regard.patterns import clear
from regard.patterns.disks import CLEAR
from regard.patterns.permutation import Tiling, best_tile, permuted

SIDE, TEXT, RADIUS = 512, 512, 8


@claim(
    "clear/pairs",
    paper=CLEAR,
    statement="attention at 8192 × 8192 pixels computes 99.5 % fewer pairs than dense attention",
    figure="99.5 % fewer attention computations at 8K",
    measurement=f"pairs that the pattern allows, counted exactly, borders included: {SIDE} × {SIDE} image tokens, "
    f"{TEXT} of text, radius {RADIUS}",
    unit="% of pairs saved",
    tolerance="at least 99.45 %; partly: at least 99 %",
    needs="cpu",
    minutes=0.3,
)
def pairs(settings: Settings) -> Measured:
    side = settings.pick(SIDE, 64)
    n = side * side + TEXT
    p = clear((side, side), RADIUS)
    whole = _seen(p, side // 2, side)  # of every row that is at least a radius from the border
    rows = (y for y in range(side) if not RADIUS <= y < side - RADIUS)
    image = sum(_seen(p, y, side) for y in rows) + (side - 2 * RADIUS) * whole
    allowed = image + TEXT * side * side * 2 + TEXT * TEXT
    saved = 100 * (1 - allowed / n**2)
    word = verdict(reproduced=saved >= 99.45, partly=saved >= 99)
    why = f"{allowed:,} of {n**2:,} pairs are left: {saved:.2f} % saved"
    return Measured(saved, word, why, {"allowed": allowed, "all": n**2, "image to image": image})


def _seen(p: object, y: int, side: int) -> int:
    """Keys that the queries of row y see: by the rule, from row y to all rows that a disk can reach."""
    zero = torch.zeros((), dtype=torch.long)
    rows = torch.arange(max(0, y - RADIUS), min(side, y + RADIUS + 1))
    apart = torch.arange(-RADIUS, RADIUS + 1)
    x = torch.arange(side)[:, None, None]
    other = (x + apart).broadcast_to(side, len(rows), len(apart))
    inside = (other >= 0) & (other < side)
    allowed = p.rule(zero, zero, y * side + x, rows[:, None] * side + other.clamp(0, side - 1))  # type: ignore[attr-defined]
    return int((allowed & inside).sum())


@claim(
    "clear/speed",
    paper=CLEAR,
    statement="the saved pairs are saved time",
    figure="6.3 × faster generation at 8K, the whole model",
    measurement="time of dense attention over ours, one forward in bf16, 24 heads of width 128, 128 × 128 image tokens "
    "and 512 of text, radius 16, tokens in tiles of 128",
    unit="× faster",
    tolerance="at least 3 ×; partly: at least 1.5 ×",
    needs="h100",
    minutes=1,
)
@torch.no_grad()
def speed(settings: Settings) -> Measured:
    side = settings.pick(128, 32)
    p = clear((side, side), 16, text=TEXT)
    tiling = Tiling((side, side), best_tile(p), before=TEXT)
    q, k, v = heads(tiling.length)
    dense, ours = dense_ms(q, k, v), sparse_ms(permuted(p, tiling), q, k, v)
    density = permuted(p, tiling).block_map(tiling.length).density
    word = verdict(reproduced=dense / ours >= 3, partly=dense / ours >= 1.5)
    why = f"dense {dense:.2f} ms, ours {ours:.2f} ms: {dense / ours:.1f} ×; tiles allow {1 / density:.1f} ×"
    return Measured(dense / ours, word, why, {"dense ms": dense, "ms": ours, "tile": tiling.tile, "density": density})


later(
    "clear/distillation",
    paper=CLEAR,
    statement="a short distillation of the attention layers makes a diffusion transformer under this mask as good as "
    "with dense attention",
    figure="10,000 iterations on 10,000 images of the model's own, with results comparable to FLUX",
    needs="training of a small diffusion transformer (width 64, 4 layers, 16 × 16 blobs) and its distillation under "
    "the mask, which has to close the gap to the teacher 5 ×",
)
