"""SinkLoRA: shifted groups and sinks cost a fraction of full attention, and still pass on what they hold."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from regard.attend import attend
from regard.evidence.claim import Measured, Settings, claim, later, verdict
from regard.evidence.clock import cpu_milliseconds
from regard.patterns import Pattern, causal, sinklora
from regard.patterns.powers import receptive_field
from regard.patterns.shifted import SINKLORA

HEADS, SINKS = 32, 4


@claim(
    "sinklora/cost-and-flow",
    paper=SINKLORA,
    statement="fine-tuning attends within shifted groups and to sinks at a fraction of full attention's cost, and "
    "information still passes between groups",
    figure="groups of a quarter of the context, as in LongLoRA; cost linear in the length for a group of fixed size",
    measurement="pairs at 32,768 tokens, 32 heads, groups of a quarter, 4 sinks, half of the displaced heads put back, "
    "over those of causal attention; layers until the last token has learned of every token, over 1024 tokens, with "
    "the displaced heads and without; forward and backward on the CPU at 8192 tokens, 4 heads of 64, float32, beside "
    "torch's fused dense causal attention",
    unit="× faster forward and backward",
    tolerance="at most 26 % of the pairs; every token reached within 8 layers, and never without displaced heads; at "
    "least 2 × faster; partly: all but the time",
    needs="cpu",
    minutes=1,
)
def cost_and_flow(settings: Settings) -> Measured:
    n, short, timed = settings.pick((32_768, 1024, 8192), (256, 64, 128))
    share = sinklora(HEADS, n // 4, sinks=SINKS).cost(n, heads=HEADS).entries / causal().cost(n, heads=HEADS).entries
    layers = {
        "displaced": _layers(sinklora(4, short // 4, sinks=SINKS), short),
        "plain": _layers(sinklora(4, short // 4, sinks=SINKS, rho=0), short),
    }
    q, k, v = (torch.randn(1, 4, timed, 64).requires_grad_() for _ in range(3))
    p = sinklora(4, timed // 4, sinks=SINKS)
    works: dict[str, Any] = {
        "dense": partial(_step, q, k, v, causal(), "sdpa"),
        "groups": partial(_step, q, k, v, p, "auto"),
    }
    times = cpu_milliseconds(works, rounds=3)
    faster = times["dense"] / times["groups"]
    reached = layers["displaced"] is not None and layers["displaced"] <= 8 and layers["plain"] is None
    fraction = share <= 0.26 and reached
    word = verdict(reproduced=fraction and faster >= 2, partly=fraction)
    why = (
        f"{100 * share:.1f} % of the pairs; all reached after {layers['displaced']} layers, without displaced heads "
        f"{'never' if layers['plain'] is None else layers['plain']}; {times['groups']:.0f} ms against "
        f"{times['dense']:.0f}: {faster:.1f} × faster"
    )
    return Measured(faster, word, why, {"share of pairs": share, "layers": layers, "ms": times})


def _layers(pattern: Pattern, n: int) -> int | None:
    """How many layers until the last token has learned of all; None if not after 16."""
    for count in range(1, 17):
        if bool(receptive_field([pattern] * count, n, query=n - 1).all()):
            return count
    return None


def _step(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, backend: str) -> None:
    torch.autograd.grad(attend(q, k, v, pattern=pattern, backend=backend).sum(), (q, k, v))


later(
    "sinklora/perplexity",
    paper=SINKLORA,
    statement="fine-tuned with sinks and part of the heads put back, a model gains most of what full attention gains",
    figure="92 % of full attention's gain in perplexity, where LongLoRA's shifted attention has 39 %",
    needs="fine-tuning of SmolLM2-135M from 512 to 2048 tokens under three masks (full, LongLoRA's, SinkLoRA's), 200 "
    "steps of LoRA each",
)
