"""MoA: windows of a length of their own for every head find what one window for all does not."""

from __future__ import annotations

from collections import Counter
from itertools import product

import torch

from regard.evidence.claim import Measured, Settings, claim, verdict
from regard.evidence.language import per_cent, right_answers, samples, smollm2
from regard.heads.moa_influence import own_answers, profile
from regard.heads.moa_search import Found, search
from regard.inference.plan import Plan
from regard.inference.policies.moa import MoA
from regard.inference.seam import attach
from regard.patterns.elastic import PAPER, Rule

BLOCK, DENSITY, ANSWER = 16, 0.5, 6
UNIFORM: Rule = (-float(BLOCK), DENSITY)  # with the first block exactly half of the prompt


@claim(
    "moa-mixture-of-sparse-attention/recall",
    paper=PAPER,
    statement="at equal density, rules of their own for every head keep retrieval that one window for all heads loses",
    figure="at 50 % density 1.5 to 7.1 × the retrieval accuracy of the uniform window",
    measurement="SmolLM2-135M, the recall task (8 pairs in a long text), the cache alone: 10 prompts of 1024 tokens to "
    "calibrate on with the model's own answers, 24 others of 1024 and 12 of 2048 to test; blocks of 16, half of the "
    "entries kept, against the first block and the window that together keep as many",
    unit="× the uniform window's accuracy",
    tolerance="at least 1.5 × at both lengths; partly: at 1024 only",
    needs="smollm2",
    minutes=8,
)
def recall(settings: Settings) -> Measured:
    calibrated, tested = settings.pick((10, ((1024, 24), (2048, 12))), (1, ((512, 1),)))
    length = tested[0][0]
    found = _found(calibrated, length, settings.seed)
    shape = [len(row) for row in found.rules]
    plans = {
        "full": "full",
        "moa": str(Plan(cache=MoA(found.rules, BLOCK))),
        "uniform": str(Plan(cache=MoA(tuple((UNIFORM,) * heads for heads in shape), BLOCK))),
    }
    right, ratios = {}, []
    for n, count in tested:
        prompts = samples("recall", count=count, length=n, seed=settings.seed + 1)
        right[n] = {name: per_cent(values) for name, values in right_answers(prompts, plans).items()}
        ratios.append(right[n]["moa"] / max(right[n]["uniform"], 100 / count))  # none right counts as one
    word = verdict(reproduced=min(ratios) >= 1.5, partly=ratios[0] >= 1.5)
    why = "; ".join(
        f"{n} tokens: " + ", ".join(f"{name} {value:.0f} %" for name, value in each.items())
        for n, each in right.items()
    )
    rules = Counter(str(rule) for row in found.rules for rule in row)
    return Measured(min(ratios), word, why, {"right": right, "rules": dict(rules), "predicted": found.losses})


def _found(count: int, length: int, seed: int) -> Found:
    """The rules for half of the entries of a prompt of that length."""
    prompts = samples("recall", count=count, length=length, seed=seed)
    grid = product([0.0, 32.0, 64.0, 128.0, 256.0], [x / 8 for x in range(9)])
    candidates = [(a, b) for a, b in grid if 0 < a + b * length <= length]
    with attach(smollm2().model) as attached:
        answered = own_answers(attached, [torch.tensor(p.context + p.question) for p in prompts], ANSWER)
        influence = profile(attached, answered, block=BLOCK)
    (found,) = search(influence, most={length: DENSITY}, candidates=candidates)
    return found
