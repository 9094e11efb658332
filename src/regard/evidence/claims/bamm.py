"""BAMM: one mask is causal and bidirectional at once, without a leak, and its second pass is decoded from a cache."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from regard.evidence.claim import Measured, Settings, claim, later, verdict
from regard.evidence.clock import cpu_milliseconds
from regard.layers.multi_head_attention import MultiHeadAttention
from regard.patterns import Pattern, bamm
from regard.patterns.given_tokens import PAPER

LENGTH, LAYERS, HEADS, DIM = 50, 8, 4, 256  # a text token and 49 of motion, the sizes of the public code


@claim(
    "bamm/two-passes",
    paper=PAPER,
    statement="one mask makes a transformer bidirectional over given tokens and autoregressive over the others, so "
    "that half of a sequence is generated anew with the other half as context",
    figure="unified generation and editing with one model; cascade of two passes over at most 49 tokens",
    measurement="8 random-weight layers of 4 heads and width 256, a text token and 49 of motion, each given with "
    "probability 1/2: outputs of the second pass decoded from a cache (given tokens once, then the others one by one) "
    "against the whole forward under the mask, float32; gradients of every output that predicts a token not given, "
    "with respect to that token and to later ones not given; time of both ways to decode, on the CPU",
    unit="largest difference",
    tolerance="difference at most 1e-4, no gradient at all, and the cache faster; partly: all but the time",
    needs="cpu",
    minutes=0.3,
)
def two_passes(settings: Settings) -> Measured:
    n, layers = settings.pick((LENGTH, LAYERS), (10, 2))
    generator = torch.Generator().manual_seed(settings.seed)
    given = torch.rand(n, generator=generator) < 0.5
    given[0] = given[-1] = True  # the text, and the end
    net = nn.ModuleList(_Block() for _ in range(layers))
    x = torch.randn(1, n, DIM, generator=generator)
    with torch.no_grad():
        differs = float((_cached(net, x, given) - _whole(net, x, bamm(given))).abs().max())
        works: dict[str, Any] = {"cache": partial(_cached, net, x, given), "again": partial(_recomputed, net, x, given)}
        times = cpu_milliseconds(works, rounds=3)
    x.requires_grad_()
    out, leaks = _whole(net, x, bamm(given)), 0
    for target in (~given).nonzero()[:, 0].tolist():
        (grad,) = torch.autograd.grad(out[0, target - 1].sum(), x, retain_graph=True)
        leaks += int(grad[0, target:][~given[target:]].any(-1).sum())
    exact = differs <= 1e-4 and leaks == 0
    word = verdict(reproduced=exact and times["cache"] < times["again"], partly=exact)
    why = (
        f"{int(given.sum())} of {n} given; largest difference {differs:.1e}, {leaks} leaks; {times['cache']:.0f} ms "
        f"from a cache, {times['again']:.0f} ms computed again"
    )
    return Measured(differs, word, why, {"given": given.tolist(), "leaks": leaks, "ms": times})


class _Block(nn.Module):
    """Pre-norm attention and a feed-forward layer, both with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(DIM), MultiHeadAttention(DIM, HEADS)
        self.feed = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM))

    def forward(self, x: Tensor, pattern: Pattern | None, state: object = None) -> tuple[Tensor, object]:
        attended = self.attention(self.norm(x), pattern=pattern, state=state)
        x = x + attended.out
        return x + self.feed(x), attended.state


def _whole(net: nn.ModuleList, x: Tensor, pattern: Pattern) -> Tensor:
    for block in net:
        x = block(x, pattern)[0]
    return x


def _cached(net: nn.ModuleList, x: Tensor, given: Tensor) -> Tensor:
    """The given tokens once, among themselves; then each of the others, which sees all that came before it."""
    chunks = [given.nonzero()[:, 0], *(~given).nonzero()[:, 0].split(1)]
    states: list[object] = [None] * len(net)
    out = torch.empty_like(x)
    for chunk in chunks:
        now = x[:, chunk]
        for number, block in enumerate(net):
            now, states[number] = block(now, None, states[number])
        out[:, chunk] = now
    return out


def _recomputed(net: nn.ModuleList, x: Tensor, given: Tensor) -> None:
    """A whole forward for every token that is not given."""
    for _ in range(int((~given).sum())):
        _whole(net, x, bamm(given))


later(
    "bamm/cascade",
    paper=PAPER,
    statement="two passes give better motions than masked or autoregressive models alone, without a given length",
    figure="better than masked and autoregressive models of motion, without being given the length",
    needs="training of a token model on synthetic sequences (8 classes, Markov chains over 32 codes, lengths of 10 to "
    "40), and sampling with one pass and with two",
)
