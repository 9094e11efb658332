"""AKI: images see the prompt that follows them, for nothing: no parameter, hardly an operation, no leak."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.attend import attend
from regard.evidence.claim import Measured, Settings, claim, later, verdict
from regard.patterns import Pattern, aki_modality_mutual_attention, causal
from regard.patterns.mutual import PAPER

IMAGE, PROMPT, ANSWER = 144, 64, 64
DIM, HIDDEN = 3072, 8192


@claim(
    "aki-modality-mutual-attention/for-nothing",
    paper=PAPER,
    statement="image tokens see the prompt without further parameters and without more training time",
    figure="no additional parameters, the same training time",
    measurement="BOS, 144 image tokens, 64 of the prompt, 64 of the answer: operations of a decoder layer (width 3072, "
    "gated FFN of 8192) that the mask adds to those of the causal one, counted by pairs; which tokens reach which "
    "through 4 layers of attention with a residual, by gradients in float64",
    unit="% more operations",
    tolerance="at most 1 % more; every image token is reached by every token of the prompt (none under the causal "
    "mask), and none before an answer token by it or by later ones; partly: the reach alone",
    needs="cpu",
    minutes=0.2,
)
def for_nothing(settings: Settings) -> Measured:
    image, prompt, answer = settings.pick((IMAGE, PROMPT, ANSWER), (6, 4, 4))
    ranks = torch.tensor([-1] + [0] * image + [1] * prompt + [-1] * answer)
    n, first = len(ranks), 1 + image + prompt
    masks: dict[str, Pattern] = {"mutual": aki_modality_mutual_attention(ranks), "causal": causal()}
    entries = {name: p.cost(n).entries for name, p in masks.items()}
    work = {name: n * (8 * DIM**2 + 6 * DIM * HIDDEN) + 4 * DIM * pairs for name, pairs in entries.items()}
    more = 100 * (work["mutual"] / work["causal"] - 1)
    seen = {name: _reach(p, n, settings.seed) for name, p in masks.items()}
    of_image = {name: float(field[1 : 1 + image, 1 + image : first].float().mean()) for name, field in seen.items()}
    leaks = int(torch.triu(seen["mutual"], 1)[:, first:].sum())
    reach = of_image == {"mutual": 1.0, "causal": 0.0} and leaks == 0
    word = verdict(reproduced=reach and more <= 1, partly=reach)
    why = (
        f"{entries['mutual'] - entries['causal']:,} pairs more, {more:.3f} % of the operations; the prompt reaches "
        f"{100 * of_image['mutual']:.0f} % of the image (causal: {100 * of_image['causal']:.0f} %), {leaks} leaks"
    )
    return Measured(more, word, why, {"entries": entries, "prompt to image": of_image, "leaks": leaks})


def _reach(pattern: Pattern, n: int, seed: int) -> Tensor:
    """bool (n, n): does a change of token j change the state of token i after 4 layers?"""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 1, n, 8, dtype=torch.float64, generator=generator).requires_grad_()
    maps = torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=generator) / 8**0.5
    state = x
    for q, k, v in maps:
        state = state + attend(state @ q, state @ k, state @ v, pattern=pattern)
    rows = [torch.autograd.grad(state[0, 0, i].sum(), x, retain_graph=True)[0][0, 0] for i in range(n)]
    return torch.stack(rows).abs().sum(-1) > 0


later(
    "aki-modality-mutual-attention/benchmarks",
    paper=PAPER,
    statement="images that see the question are understood better",
    figure="+7.2 % on average over 12 multimodal benchmarks",
    needs="training of a decoder on images with a narrow value projection and questions about them (2 layers of width "
    "64, 5 seeds), under the causal mask and under this one",
)
