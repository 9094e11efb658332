"""Hybrid linear attention: a few full layers bring recall back, and the language model hardly notices."""

from __future__ import annotations

from typing import Any

from regard.evidence.claim import Measured, Settings, claim, verdict
from regard.evidence.study import best, caveat, cells_for, percent, run_cells, told
from regard.models.causal_lm import CausalLMConfig
from regard.models.stack import Mixer, full_attention, hybrid
from regard.registry import Paper
from regard.tasks.training import TrainingTask
from regard.tasks.training.mqar import MQAR
from regard.tasks.training.python_bytes import Bytes

PAPER = Paper("A Systematic Analysis of Hybrid Linear Attention", "Wang et al.", 2025, "2507.06457")
FIRST = Mixer("base-conv", 1, {"expand": 2})
HEADS = 8  # little state, so that recall has something to lack
MIXERS = {
    "hgrn-2": Mixer("hgrn-2", HEADS),
    "gated-deltanet": Mixer("gated-deltanet", HEADS, {"key_dim": 8, "value_dim": 8}),
    "retnet": Mixer("retnet", HEADS, {"value_dim": 8}),
    "gated-linear-attention": Mixer("gated-linear-attention", HEADS, {"key_dim": 8}),
}
RATIOS = ("1:0", "3:1", "1:1")
CEILING = "full attention"
FLAT = 0.1  # bits per byte
SECONDS = 115.0


@claim(
    "hybrid-linear-attention/recall-and-ratio",
    paper=PAPER,
    statement="over the ratio of linear to full layers the language-model loss is nearly flat, while recall rises "
    "with more full layers, most clearly from 3:1 on",
    figure="340M to 1.3B parameters, 72 models: flat losses, RULER recall rising; no single number",
    measurement="a BaseConv of 3 tokens, then 4 layers of width 64, SwiGLU; 8 heads of 8 keys and 8 values in every "
    "mixer, full attention in one head; MQAR of 128 tokens with 32 pairs and 256 tokens in the vocabulary (1200 steps "
    "of 128 rows), and bytes of the standard library (256 a row, 400 steps of 32); mixers at 1:0, 3:1, 1:1 and full "
    "attention, one learning rate (5e-3), one seed",
    unit="points of MQAR accuracy, 3:1 minus pure linear, mean of the mixers",
    tolerance="for every mixer accuracy at 3:1 ≥ pure + 5 points and at 1:1 ≥ pure + 5 points, and its byte losses "
    "at the three ratios within 0.1 bits of one another; partly: the mean over mixers of each holds",
    needs="h100",
    minutes=2,
)
def recall_and_ratio(settings: Settings) -> Measured:
    mixers = settings.pick(MIXERS, {"retnet": MIXERS["retnet"]})
    recall = settings.pick(MQAR(128, 32, 256), MQAR(16, 2, 32))
    text = settings.pick(Bytes(256), Bytes(16))
    stacks = {CEILING: (FIRST, *hybrid(full_attention(1), "0:1", 4))}
    for key, mixer in mixers.items():
        for ratio in RATIOS:
            stacks[f"{key} {ratio}"] = (FIRST, *hybrid(mixer, ratio, 4, full_attention(1)))

    def of(task: TrainingTask) -> dict[str, tuple[TrainingTask, CausalLMConfig]]:
        return {f"{task.key}: {n}": (task, CausalLMConfig(task.vocabulary, 64, m)) for n, m in stacks.items()}

    steps, byte_steps = settings.pick((1200, 400), (3, 3))
    batch, byte_batch = settings.pick((128, 32), (4, 4))
    by_name = {
        cell.name: cell
        for cell in cells_for(
            of(recall), rates=(5e-3,), steps=steps, batch=batch, seed=settings.seed, held_out=settings.pick(256, 4)
        )
        + cells_for(
            of(text),
            rates=(5e-3,),
            steps=byte_steps,
            batch=byte_batch,
            seed=settings.seed,
            held_out=settings.pick(256, 4),
        )
    }
    ordered = [by_name[f"{task}: {name}"] for name in stacks for task in ("mqar", "bytes")]
    outcomes = run_cells(ordered, settings.pick(SECONDS, 60.0))
    kept = {key: mixers[key] for key in mixers if all(_trained(outcomes, f"{key} {r}") for r in RATIOS)}
    names = [CEILING] + [f"{key} {ratio}" for key in kept for ratio in RATIOS]
    accuracy = {n.partition(": ")[2]: a for n, a in percent(outcomes, [f"mqar: {n}" for n in names]).items()}
    bits = {name: (best(outcomes, f"bytes: {name}", by="loss").loss or 0.0) / 0.6931471805599453 for name in names}
    gains = [[accuracy[f"{key} {ratio}"] - accuracy[f"{key} 1:0"] for ratio in ("3:1", "1:1")] for key in kept]
    spreads = [max(of_key) - min(of_key) for key in kept for of_key in [[bits[f"{key} {r}"] for r in RATIOS]]]
    count = max(1, len(kept))
    mean_gain = [sum(gain[i] for gain in gains) / count for i in (0, 1)]
    word = verdict(
        reproduced=len(kept) == len(mixers) and min(map(min, gains)) >= 5 and max(spreads) <= FLAT,
        partly=bool(kept) and min(mean_gain) >= 5 and sum(spreads) / count <= FLAT,
    )
    rows = "; ".join(_row(key, accuracy, bits) for key in kept)
    why = f"pure → 3:1 → 1:1: {rows}; {CEILING} {accuracy[CEILING]:.0f} %, {bits[CEILING]:.2f} bits{caveat(outcomes)}"
    details: dict[str, Any] = {"accuracy": accuracy, "bits": bits, "ratios": RATIOS, "mixers": list(kept)}
    return Measured(mean_gain[0], word, why, details | {"runs": told(outcomes)})


def _trained(outcomes: list[Any], name: str) -> bool:
    return all(best(outcomes, f"{task}: {name}").accuracy is not None for task in ("mqar", "bytes"))


def _row(key: str, accuracy: dict[str, float], bits: dict[str, float]) -> str:
    recalled = " → ".join(f"{accuracy[f'{key} {ratio}']:.0f} %" for ratio in RATIOS)
    return f"{key} {recalled}, {' → '.join(f'{bits[name]:.2f}' for name in (f'{key} {r}' for r in RATIOS))} bits"
