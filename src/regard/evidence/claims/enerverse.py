"""EnerVerse: a chunk costs the same however long the video is; and what waits."""

from __future__ import annotations

from functools import partial

import torch

from regard.attend import attend
from regard.evidence.claim import Measured, Settings, claim, later, verdict
from regard.evidence.clock import cpu_milliseconds
from regard.patterns import enerverse
from regard.patterns.chunks import ENERVERSE

CHUNK, KEPT = 8, 4


@claim(
    "enerverse/constant-cost",
    paper=ENERVERSE,
    statement="with a sparse memory of frames the cost of a chunk does not grow with the video, so that it has no end",
    figure="unbounded length from a bounded context (chunks of 8 frames)",
    measurement="the last chunk of 8 frames of 64 tokens after 16, 64 and 256 frames, 8 heads of 64, float32, on the "
    "CPU: time of attention over 4 memory frames and the chunk alone, and over the whole history; the former against "
    "the same rows of attention under the pattern",
    unit="× the time after 256 frames over that after 16",
    tolerance="at most 1.25 × the time after 256 frames (whole history: at least 4 ×), and equal to the pattern's rows "
    "to 1e-5; partly: equal, and at most 2 ×",
    needs="cpu",
    minutes=0.3,
)
@torch.no_grad()
def constant_cost(settings: Settings) -> Measured:
    tokens = settings.pick(64, 4)
    generator = torch.Generator().manual_seed(settings.seed)
    rows = []
    for history in settings.pick((16, 64, 256), (16, 32)):
        frames = history + CHUNK
        q, k, v = torch.randn(3, 1, 8, frames * tokens, 64, generator=generator)
        memory = [0, history // 3, 2 * history // 3, history - 1]  # the first, two spaced, the last
        p = enerverse(frames, CHUNK, memory, tokens=tokens)
        places = torch.arange(frames * tokens).view(frames, tokens)
        new = places[history:].flatten()
        held = torch.cat([places[memory].flatten(), new])
        asked = q[:, :, new]
        works = {
            "memory": partial(attend, asked, k[:, :, held], v[:, :, held]),
            "history": partial(attend, asked, k, v),
        }
        want = attend(asked, k, v, pattern=p, q_positions=new[None])
        differs = float((works["memory"]() - want).abs().max())
        rows.append({"frames": history, "differs": differs, **cpu_milliseconds(works)})
    grown, dense = (rows[-1][name] / rows[0][name] for name in ("memory", "history"))
    equal = max(row["differs"] for row in rows) <= 1e-5
    word = verdict(reproduced=equal and grown <= 1.25 and dense >= 4, partly=equal and grown <= 2)
    why = "; ".join(
        f"after {row['frames']:.0f} frames {row['memory']:.1f} ms with the memory, {row['history']:.1f} with all of it"
        for row in rows
    )
    return Measured(grown, word, why, {"rows": rows})


later(
    "enerverse/long-horizon",
    paper=ENERVERSE,
    statement="a sparse memory of frames keeps long videos consistent, and policies that use them succeed more often",
    figure="better success of policies on LIBERO",
    needs="training of a video model that is told a colour in the first frame and asked for it after an occlusion, "
    "with the whole history, with a sparse memory, and with the last chunk alone",
)
