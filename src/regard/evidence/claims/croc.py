"""Croc: its claim is about what a model learns; the mask alone claims nothing that could be measured."""

from __future__ import annotations

from regard.evidence.claim import later
from regard.patterns.images_in_text import CROC

later(
    "croc/comprehension",
    paper=CROC,
    statement="pre-training that restores replaced visual tokens, under a mask that lets an image see itself whole, "
    "makes multimodal models better",
    figure="+3.3 % on MMBench, +5.5 % on SEED, +8.5 % on LLaVA-Wild over LLaVA-1.5-7B",
    needs="training of a decoder on digit patches (4 layers, 16 patch tokens) with and without the stage, and with a "
    "causal mask for the image; and the stage's pool of tokens and its assignment, which the library has not",
)
