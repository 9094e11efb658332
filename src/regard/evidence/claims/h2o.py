"""H2O: a fifth of the cache, half of it heavy hitters, predicts about as well as all of it."""

from __future__ import annotations

import torch

from regard.evidence.claim import Measured, Settings, claim, verdict
from regard.evidence.language import decoded_nll, passages, perplexity, smollm2
from regard.inference.seam import attach
from regard.registry import lookup

PLANS = {
    "full": "full",
    "h2o": "h2o(budget=0.2)",
    "recent only": "streaming(budget=0.2,sinks=0)",
    "sinks + recent": "streaming(budget=0.2)",
    "random": "random(budget=0.2)",
}


@claim(
    "h2o/fifth-of-the-cache",
    paper=lookup("cache", "h2o").paper,
    statement="a fifth of the cache, recent tokens and heavy hitters, holds the quality; recent tokens alone do not",
    figure="OPT, LLaMA, GPT-NeoX: within about a point of full's accuracy at 20 %, where the local strategy fails",
    measurement="perplexity of SmolLM2-135M on the 64 tokens after each of 6 passages of 1024 tokens of Shakespeare, "
    "the cache of the passage reduced to a fifth when it ends",
    unit="× full's perplexity",
    tolerance="h2o ≤ 1.1 × full's perplexity and recent only ≥ 1.5 ×; partly: h2o better than recent only and random",
    needs="smollm2",
    minutes=4,
)
def fifth_of_the_cache(settings: Settings) -> Measured:
    count, prompt, tail = settings.pick((6, 1024, 64), (1, 96, 4))
    model = smollm2().model
    losses: dict[str, list[torch.Tensor]] = {name: [] for name in PLANS}
    with attach(model, "full", observe=list(PLANS.values())) as attached, torch.no_grad():
        for ids in passages(count, prompt + tail):
            store = attached.new_store()
            model(ids[None, : prompt - 1], past_key_values=store, logits_to_keep=1)
            for name, plan in PLANS.items():
                own = store.fork(plan)
                own.seal()
                losses[name].append(decoded_nll(own, ids[prompt - 1 :]))
    found = {name: perplexity(torch.cat(parts)) for name, parts in losses.items()}
    ratio = {name: value / found["full"] for name, value in found.items()}
    word = verdict(
        reproduced=ratio["h2o"] <= 1.1 and ratio["recent only"] >= 1.5,
        partly=ratio["h2o"] < min(ratio["recent only"], ratio["random"]),
    )
    why = "perplexity: " + ", ".join(f"{name} {value:.1f}" for name, value in found.items())
    details = {"perplexity": found, "passages": count, "prompt": prompt, "tail": tail}
    return Measured(ratio["h2o"], word, why, details)
