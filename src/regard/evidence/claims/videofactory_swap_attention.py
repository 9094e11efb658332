"""VideoFactory: one layer of swap attention mixes space and time at once, which a sum of two layers does not."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from regard.attend import attend
from regard.evidence.claim import Measured, Settings, claim, later, verdict
from regard.evidence.clock import cpu_milliseconds
from regard.layers.swap_attention import PAPER, SwapAttention
from regard.patterns import enerverse, halonet

HEADS, DIM = 4, 64


@claim(
    "videofactory-swap-attention/joint",
    paper=PAPER,
    statement="cross-attention between the spatial and the temporal stream in 3-D windows mixes space and time "
    "jointly, where a temporal layer added to a spatial one does not",
    figure="N · window pairs in place of N²; no figure of its own for the layer",
    measurement="8 frames of 16 × 16, windows of 8 × 8 × 8, 4 heads of 16, float32: share of the window's tokens of "
    "another frame and another place that a token is reached by through one layer, by gradients, for swap attention "
    "(the temporal stream being the spatial one with its channels reversed) and for the sum of attention within the "
    "frame and within the place; time of one forward on the CPU beside attention over all frames and places",
    unit="% of the window's tokens reached",
    tolerance="all of them (99 %), none through the sum, and at least 2 × faster than joint attention; partly: all but "
    "the time",
    needs="cpu",
    minutes=0.2,
)
def joint(settings: Settings) -> Measured:
    frames, side, window = settings.pick((8, 16, 8), (2, 4, 2))
    layout, n = (frames, side, side), frames * side * side
    layer = SwapAttention(DIM, HEADS, layout=layout, window=(frames, window, window), zero_init=False)
    whole = SwapAttention(DIM, HEADS, zero_init=False)
    x = torch.randn(1, n, DIM).requires_grad_()
    asked = n // 2 + side + 1
    f, y, z = torch.unravel_index(torch.arange(n), layout)
    near = (y // window == y[asked] // window) & (z // window == z[asked] // window)
    joint_only = near & (f != f[asked]) & ((y != y[asked]) | (z != z[asked]))

    def reached(out: Tensor) -> float:
        (grad,) = torch.autograd.grad(out[0, asked].sum(), x)
        return 100 * float((grad[0].abs().sum(-1) > 0)[joint_only].float().mean())

    # the two streams hold the same video in other features, here in reversed channels
    swapped, added = reached(layer(x, x.flip(-1)).out), reached(_sum(x, layout))
    with torch.no_grad():
        works = {"swap": partial(layer, x, x), "joint": partial(whole, x, x)}
        times = cpu_milliseconds(works)
    faster = times["joint"] / times["swap"]
    mixes = swapped >= 99 and added == 0
    word = verdict(reproduced=mixes and faster >= 2, partly=mixes)
    why = (
        f"{swapped:.0f} % of {int(joint_only.sum())} tokens reached, {added:.0f} % through the sum; "
        f"{times['swap']:.1f} ms, joint attention {times['joint']:.1f} ms: {faster:.1f} ×"
    )
    return Measured(swapped, word, why, {"through the sum": added, "ms": times})


def _sum(x: Tensor, layout: tuple[int, int, int]) -> Tensor:
    """A spatial and a temporal layer side by side: x + attention within the frame + attention within the place."""
    frames, tokens = layout[0], layout[1] * layout[2]
    q = x.unflatten(-1, (HEADS, -1)).transpose(1, 2)
    spatial = halonet(layout, (1, layout[1], layout[2]), 0)
    temporal = enerverse(frames, frames, tokens=tokens, layer="temporal")
    both = attend(q, q, q, pattern=spatial) + attend(q, q, q, pattern=temporal)
    return x + both.transpose(1, 2).flatten(2)


later(
    "videofactory-swap-attention/next-frame",
    paper=PAPER,
    statement="swap attention gives better frames and motion than temporal layers that are added",
    figure="better frames, temporal correlation and agreement with the text than with additive temporal layers",
    needs="training of two video models of equal size to predict the next frame of a moving digit (16 × 16, 6 "
    "frames), one with swap attention and one with the sum",
)
