"""Radial attention: faster the longer the video, and nearer to dense attention than a window of as many pairs."""

from __future__ import annotations

import torch

from regard.attend import attend
from regard.evidence.claim import Measured, Settings, claim, later, verdict
from regard.evidence.sparse_speed import dense_ms, heads, sparse_ms
from regard.patterns import Pattern, halonet, radial_attention, sliding_window
from regard.patterns.radial import RADIAL, radial_blocks


@claim(
    "radial-attention/speed",
    paper=RADIAL,
    statement="the longer the video, the more is gained over dense attention",
    figure="1.9 × faster at default length, 3.7 × at four times the length, the whole model",
    measurement="time of dense attention over the block form, one forward in bf16, 24 heads of width 128, 32, 64 and "
    "128 frames of 1024 tokens",
    unit="× faster at 64 frames",
    tolerance="the gain grows with the frames and exceeds 2 × at 64; partly: it exceeds 1.5 × at 64",
    needs="h100",
    minutes=3,
)
@torch.no_grad()
def speed(settings: Settings) -> Measured:
    rows = []
    for frames in settings.pick((32, 64, 128), (4, 8)):
        p = radial_blocks(frames, 1024, device="cuda")
        q, k, v = heads(frames * 1024)
        dense, ours = dense_ms(q, k, v), sparse_ms(p, q, k, v)
        density = p.block_map(frames * 1024).density
        rows.append({"frames": frames, "dense ms": dense, "ms": ours, "density": density, "speed-up": dense / ours})
    gains = [row["speed-up"] for row in rows]
    grows = gains == sorted(gains)
    word = verdict(reproduced=grows and gains[1] > 2, partly=gains[1] > 1.5)
    why = "; ".join(
        f"{row['frames']} frames: {row['speed-up']:.2f} × of {1 / row['density']:.2f} × possible in tiles"
        for row in rows
    )
    return Measured(gains[1], word, why, {"rows": rows})


@claim(
    "radial-attention/decay",
    paper=RADIAL,
    statement="where weights decay with distance in frames and in places, its pairs are better chosen than those of a "
    "window that is the same everywhere",
    figure="equal video quality to dense attention at the default length",
    measurement="logits that fall by α per frame and β per place with noise of standard deviation 1, random values, "
    "(α, β) of (0.3, 0.02), (0.5, 0.05), (1, 0.1), 3 seeds, 32 frames of 64 tokens; error of the output against dense "
    "attention, of the radial rule without its sink (the law has none) and of two windows with at least as many pairs: "
    "the same places in all frames, and a stretch of the sequence",
    unit="× smaller error than the window over places, the least of the three decays",
    tolerance="smaller error than both windows under all three decays; partly: than one of the windows",
    needs="cpu",
    minutes=0.5,
)
@torch.no_grad()
def decay(settings: Settings) -> Measured:
    frames, s = settings.pick((32, 64), (6, 8))
    n, rows = frames * s, []
    radial = radial_attention(frames, s, sink=False)
    pairs = int(radial.dense(n).sum())
    places = next(p for p in (halonet((frames, s), (frames, 1), (0, w)) for w in range(s)) if _pairs(p, n) >= pairs)
    stretch = next(p for p in (sliding_window(w + 1, right=w) for w in range(0, n, 8)) if _pairs(p, n) >= pairs)
    rules = {"radial": radial, "places": places, "stretch": stretch}
    place, frame = torch.arange(n) % s, torch.arange(n) // s
    for alpha, beta in ((0.3, 0.02), (0.5, 0.05), (1.0, 0.1)):
        fall = alpha * (frame[:, None] - frame).abs() + beta * (place[:, None] - place).abs()
        found = []
        for number in range(3):
            g = torch.Generator().manual_seed(settings.seed + number)
            logits = torch.randn(n, n, generator=g) - fall
            v = torch.randn(1, 1, n, 16, generator=g)
            found.append([_error(logits, v, p) for p in rules.values()])
        rows.append(
            {"alpha": alpha, "beta": beta, **dict(zip(rules, torch.tensor(found).mean(0).tolist(), strict=True))}
        )
    better = {name: all(row["radial"] < row[name] for row in rows) for name in ("places", "stretch")}
    word = verdict(reproduced=all(better.values()), partly=any(better.values()))
    why = f"{pairs:,} of {n * n:,} pairs; errors of radial, places, stretch: " + "; ".join(
        f"α {row['alpha']}, β {row['beta']}: " + ", ".join(f"{row[name]:.3f}" for name in rules) for row in rows
    )
    counts = {name: _pairs(p, n) for name, p in rules.items()}
    return Measured(min(row["places"] / row["radial"] for row in rows), word, why, {"rows": rows, "pairs": counts})


def _pairs(pattern: Pattern, n: int) -> int:
    return int(pattern.dense(n).sum())


def _error(logits: torch.Tensor, v: torch.Tensor, pattern: Pattern) -> float:
    """Of the output under the pattern, relative to that of dense attention. The logits come in as a score."""
    nothing = torch.zeros(1, 1, len(logits), 1)

    def score(x: torch.Tensor, b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return x + logits[i, j]

    dense = attend(nothing, nothing, v, score=score)
    return float((attend(nothing, nothing, v, pattern=pattern, score=score) - dense).norm() / dense.norm())


later(
    "radial-attention/video-quality",
    paper=RADIAL,
    statement="video of default length is as good as with dense attention, and longer video after a short tuning",
    figure="1.9 × faster at default length, 3.7 × at four times the length, at equal quality",
    needs="a pretrained video diffusion transformer, and its tuning with LoRA for longer video",
)
