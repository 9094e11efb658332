"""Zoology: attention recalls at any length, a convolution of the same width does not."""

from __future__ import annotations

from regard.evidence.claim import Measured, Settings, claim, verdict
from regard.evidence.study import caveat, cells_for, percent, run_cells, told
from regard.models.causal_lm import CausalLMConfig
from regard.models.stack import FULL, Mixer
from regard.tasks.recall import ZOOLOGY
from regard.tasks.training.mqar import MQAR

FIRST = Mixer("base-conv", 1, {"expand": 2})
STACKS = {
    "attention": (FIRST, Mixer(FULL, 1)),
    "base-conv": (FIRST, Mixer("base-conv", 1, {"preset": "zoology", "kernel_size": None, "max_length": 256})),
    "gated-deltanet": (FIRST, Mixer("gated-deltanet", 2, {"key_dim": 32, "value_dim": 32})),
}
SIZES = ((64, 4), (128, 8), (256, 16))
RATES = (1e-2, 3e-3)
SECONDS = 38.0


@claim(
    "mqar-zoology/gap",
    paper=ZOOLOGY,
    statement="attention of width 64 solves multi-query associative recall at every length, while gated convolutions "
    "of that width fail as length and pairs grow",
    figure="d = 64, 2 layers, V = 8192: attention above 99 % from 64 to 512 tokens; BaseConv falls behind from 128 on",
    measurement="width 64, no MLPs, a BaseConv of 3 tokens as the first of 2 layers, then one head of softmax "
    "attention, a BaseConv with a filter as long as the sequence, or a recurrence; V twice the tokens, (tokens, "
    "pairs) = (64, 4), (128, 8), (256, 16), up to 1500 steps of 128 rows, left at 99 %, best of two learning rates "
    "(1e-2, 3e-3); one seed",
    unit="points of accuracy, attention minus BaseConv, at 256 tokens",
    tolerance="attention ≥ 99 % at all lengths, and at 256 tokens BaseConv at least 20 points below it; partly: at "
    "256 tokens at least 20 points below",
    needs="h100",
    minutes=0.7,
)
def gap(settings: Settings) -> Measured:
    sizes = settings.pick(SIZES, ((16, 2),))
    steps, batch = settings.pick((1500, 128), (3, 4))
    rates = settings.pick(RATES, RATES[:1])
    names = {}
    for length, pairs in reversed(sizes):  # the longest decides
        for name, mixers in STACKS.items():
            task = MQAR(length, pairs, 2 * length, curriculum=pairs >= 8)
            names[f"{name} {length}"] = (task, CausalLMConfig(task.vocabulary, 64, mixers, mlp_width=0))
    cells = cells_for(names, rates=rates, steps=steps, batch=batch, seed=settings.seed, held_out=settings.pick(256, 4))
    outcomes = run_cells(cells, settings.pick(SECONDS, 60.0))
    accuracy = percent(outcomes, names)
    longest = sizes[-1][0]
    difference = accuracy[f"attention {longest}"] - accuracy[f"base-conv {longest}"]
    attention = min(accuracy[f"attention {length}"] for length, _ in sizes)
    word = verdict(reproduced=attention >= 99 and difference >= 20, partly=difference >= 20)
    listed = {name: ", ".join(f"{accuracy[f'{name} {length}']:.0f} %" for length, _ in sizes) for name in STACKS}
    shown = "; ".join(f"{name} {figures}" for name, figures in listed.items())
    lengths = ", ".join(f"({length}, {pairs})" for length, pairs in sizes)
    why = f"(tokens, pairs) = {lengths}: {shown}{caveat(outcomes)}"
    return Measured(difference, word, why, {"accuracy": accuracy, "sizes": sizes, "runs": told(outcomes)})
