"""BICO: its claim is about what a model learns; the mask alone claims nothing that could be measured."""

from __future__ import annotations

from regard.evidence.claim import later
from regard.patterns.images_in_text import BICO

later(
    "bico/reversal",
    paper=BICO,
    statement="fine-tuned to restore masked tokens in both directions, a causal model answers questions in the order "
    "that it was not trained on",
    figure="from 0 % to around 70 % on the reversed questions (Llama)",
    needs="training on 200 invented facts in one order, with next-token prediction alone and with half of the batches "
    "in both directions; and the rotary that is reflected for keys to the right, which the library has not",
)
