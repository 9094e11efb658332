"""GNA: where no tile needs a mask, the whole theoretical speed-up is had."""

from __future__ import annotations

from typing import Any

import torch

from regard.evidence.claim import Measured, Settings, claim, later, verdict
from regard.evidence.sparse_speed import dense_ms, heads, sparse_ms
from regard.patterns import neighborhood
from regard.patterns.neighborhoods import GNA
from regard.patterns.permutation import Tiling, best_tile, permuted
from regard.patterns.simulator import simulate


@claim(
    "generalized-neighborhood-attention/bound",
    paper=GNA,
    statement="in perfectly block-sparse cases the speed-up over dense attention is the theoretical one",
    figure="the simulator's bound reached on B200 in many perfectly block-sparse settings",
    measurement="time of dense attention over ours, one forward in bf16, 24 heads of width 128, tokens in tiles of "
    "128: 64×64 tokens with windows of 24×48 and 256×256 with 80×80, each with the stride that needs no mask (8×16 "
    "and 16×16) and with stride 1",
    unit="of the bound, 256×256, no masks",
    tolerance="both settings without masks reach 75 % of the simulator's bound, and stride 1 gains less than they do; "
    "partly: 75 % at 256×256, or 50 % in both",
    needs="h100",
    minutes=3,
)
@torch.no_grad()
def bound(settings: Settings) -> Measured:
    rows: list[dict[str, Any]] = []
    chosen = [((64, 64), (24, 48), (8, 16)), ((64, 64), (24, 48), (1, 1))]
    if not settings.quick:
        chosen += [((256, 256), (80, 80), (16, 16)), ((256, 256), (80, 80), (1, 1))]
    for layout, window, stride in chosen:
        p = neighborhood(layout, window, stride)
        tiling = Tiling(layout, best_tile(p))
        said, tiled = simulate(p, tiling.tile), permuted(p, tiling)
        q, k, v = heads(tiling.length)
        dense, ours = dense_ms(q, k, v), sparse_ms(tiled, q, k, v)
        rows.append(
            {
                "layout": layout,
                "window": window,
                "stride": stride,
                "tile": tiling.tile,
                "masked tiles": said.partial,
                "bound": said.key_tiles / said.mean,
                "flop bound": said.flop_bound,
                "dense ms": dense,
                "ms": ours,
                "speed-up": dense / ours,
            }
        )
    shares = [row["speed-up"] / row["bound"] for row in rows if not row["masked tiles"]]
    gains = [row["speed-up"] for row in rows]
    ordered = all(gains[i] > gains[i + 1] for i in range(0, len(gains), 2))
    word = verdict(reproduced=min(shares) >= 0.75 and ordered, partly=shares[-1] >= 0.75 or min(shares) >= 0.5)
    why = "; ".join(
        f"{'×'.join(map(str, row['layout']))}, stride {'×'.join(map(str, row['stride']))}: {row['speed-up']:.1f} × of "
        f"{row['bound']:.1f} × possible in tiles, {row['flop bound']:.1f} × in operations"
        for row in rows
    )
    return Measured(shares[-1], word, why, {"rows": rows})


later(
    "generalized-neighborhood-attention/end-to-end",
    paper=GNA,
    statement="pretrained diffusion transformers are faster with it, without fine-tuning and without visible loss",
    figure="28 % to 46 % faster end to end on B200 (Cosmos-7B, HunyuanVideo, FLUX)",
    needs="one of these pretrained models, to measure images or video with and without it",
)
