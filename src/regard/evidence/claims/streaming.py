"""StreamingLLM: a window forgets everything once the first tokens leave it; with them kept it does not."""

from __future__ import annotations

import torch

from regard.evidence.claim import Measured, Settings, claim, verdict
from regard.evidence.language import decoded_nll, dense_nll, passages, perplexity, smollm2
from regard.inference.seam import attach
from regard.registry import lookup

_STRIDE = 32


@claim(
    "streaming/sinks",
    paper=lookup("cache", "streaming").paper,
    statement="a window of recent keys collapses when the first tokens are evicted; keeping 4 of them restores the "
    "perplexity of a window recomputed for every token",
    figure="Llama-2-13B on PG-19: window 5158, recomputed window 5.43, StreamingLLM 5.40 (perplexity)",
    measurement="perplexity of SmolLM2-135M on 1536 tokens of Shakespeare, from token 256 on, decoded one by one from "
    "a cache of 256 entries with 4 sinks and with none; recomputed: dense on the 224 to 255 tokens before",
    unit="× the perplexity of the recomputed window",
    tolerance="with sinks ≤ 1.1 × the recomputed window's perplexity, without ≥ 3 ×; partly: without sinks ≥ 2 × with",
    needs="smollm2",
    minutes=3,
)
def sinks(settings: Settings) -> Measured:
    length, budget = settings.pick((1537, 256), (113, 48))
    ids = passages(1, length)[0]
    found = {
        "full cache": perplexity(dense_nll(ids)[budget:]),
        "recomputed window": _recomputed(ids, budget),
        "4 sinks": _streamed(ids, budget, 4),
        "no sinks": _streamed(ids, budget, 0),
    }
    base, with_sinks, without = found["recomputed window"], found["4 sinks"], found["no sinks"]
    word = verdict(
        reproduced=with_sinks <= 1.1 * base and without >= 3 * base,
        partly=without >= 2 * with_sinks,
    )
    why = "perplexity: " + ", ".join(f"{name} {value:.1f}" for name, value in found.items())
    return Measured(with_sinks / base, word, why, {"perplexity": found, "tokens": length, "budget": budget})


def _streamed(ids: torch.Tensor, budget: int, sinks: int) -> float:
    model = smollm2().model
    with attach(model, f"streaming(budget={budget},sinks={sinks})") as attached, torch.no_grad():
        store = attached.new_store()
        model(ids[None, :budget], past_key_values=store, logits_to_keep=1)
        store.seal()
        return perplexity(decoded_nll(store, ids[budget:]))


def _recomputed(ids: torch.Tensor, window: int) -> float:
    """Each stretch of 32 tokens predicted from those before it within the window, everything computed afresh."""
    parts = []
    for start in range(window + 1, len(ids), _STRIDE):
        stretch = ids[start + _STRIDE - window : start + _STRIDE]
        parts.append(dense_nll(stretch)[window - _STRIDE - 1 :])
    return perplexity(torch.cat(parts))
