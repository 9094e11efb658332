"""Lightning Attention (TNL): what the decay and the norm are for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from torch import nn

from regard.evidence.claim import Measured, Settings, claim, verdict
from regard.evidence.study import Cell, run_cells, told
from regard.layers.lightning_attention import PAPER, LightningAttention
from regard.models.causal_lm import Block, CausalLM, CausalLMConfig
from regard.models.stack import Mixer
from regard.tasks.training.python_bytes import Bytes


def no_decay(model: CausalLM) -> None:
    """λ = 1 in every head."""
    for mixer in _mixers(model):
        mixer.mixer = replace(mixer.mixer, log_decay=(0.0,) * mixer.heads)


def no_norm(model: CausalLM) -> None:
    """The sum over all tokens goes into the gate as it is."""
    for mixer in _mixers(model):
        mixer.norm = nn.Identity()


def _mixers(model: CausalLM) -> list[LightningAttention]:
    blocks = [block for block in model.blocks if isinstance(block, Block)]
    return [block.mixer for block in blocks if isinstance(block.mixer, LightningAttention)]


VARIANTS: dict[str, Callable[[CausalLM], None] | None] = {"TNL": None, "λ = 1": no_decay, "no norm": no_norm}


@claim(
    "lightning-attention/decay-and-norm",
    paper=PAPER,
    statement="the decay and the norm on the output of linear attention both lower the language-model loss",
    figure="ablations at 385M parameters; no single number kept here",
    measurement="2 layers of width 128, 4 heads, SwiGLU; bytes of the standard library, 256 a row, 300 steps of 8 "
    "rows, learning rate 3e-3; held-out loss as it is (tnl-code, LRPE in the first layer), with λ = 1, and without "
    "the norm; one seed",
    unit="bits per byte, λ = 1 minus TNL",
    tolerance="loss lower by at least 0.02 bits than with λ = 1 and than without the norm; partly: than one of them",
    needs="cpu",
    minutes=3,
)
def decay_and_norm(settings: Settings) -> Measured:
    task = Bytes(settings.pick(256, 16))
    steps, batch = settings.pick((300, 8), (3, 2))
    config = CausalLMConfig(task.vocabulary, 128, (Mixer("lightning-attention", 4),) * 2)
    cells = [
        Cell(name, task, config, 3e-3, steps, batch, settings.seed, settings.pick(256, 4), change)
        for name, change in VARIANTS.items()
    ]
    outcomes = run_cells(cells, 1200.0, workers=0)
    bits = {o.name: math.inf if o.state == "failed" or o.loss is None else o.loss / math.log(2) for o in outcomes}
    tnl, still, raw = bits.values()
    word = verdict(reproduced=min(still, raw) - tnl >= 0.02, partly=max(still, raw) - tnl >= 0.02)
    shown = ", ".join(f"{name} {value:.3f}" if value < math.inf else f"{name} diverged" for name, value in bits.items())
    why = f"held-out bits per byte: {shown}"
    return Measured(still - tnl, word, why, {"runs": told(outcomes)})
