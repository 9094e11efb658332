"""Based: recall is bought with state, and a window beside linear attention buys it cheapest."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

from regard.evidence.claim import Measured, Settings, claim, verdict
from regard.evidence.study import caveat, cells_for, percent, run_cells, told
from regard.layers.based import PAPER
from regard.models.causal_lm import Block, CausalLM, CausalLMConfig
from regard.models.stack import Mixer, full_attention
from regard.patterns import causal, sliding_window
from regard.tasks.training.mqar import MQAR

DIM, HEADS = 64, 2
CONV = Mixer("base-conv", 1, {"expand": 2})
WINDOWS, FEATURES = (4, 8, 16, 32), (2, 4, 8, 12)
BOTH = ((4, 2), (8, 4), (16, 8), (32, 12))
RATES = (1e-2, 3e-3)
SECONDS = 100.0


def windowed(model: CausalLM, windows: tuple[int | None, ...]) -> None:
    """Give the blocks' full attention a sliding window, where one is named."""
    for block, window in zip(model.blocks, windows, strict=True):
        assert isinstance(block, Block)
        if window is not None:
            block.pattern = sliding_window(window) & causal()


def state_bytes(window: int | None, feature_dim: int | None) -> int:
    """Of one mixer in float32: 2·w·dim of a window, heads·F·(D + 1) of Based's linear attention."""
    if window is not None:
        return 4 * 2 * window * DIM
    assert feature_dim is not None
    features = 1 + feature_dim + feature_dim * (feature_dim + 1) // 2
    return 4 * HEADS * features * (DIM // HEADS + 1)


@claim(
    "based/recall-state",
    paper=PAPER,
    statement="recall rises with the bytes of state; linear attention together with a small window lies on or above "
    "both of them alone",
    figure="MQAR and 360M to 1.3B models: the frontier of the recall–memory curve; +6.22 points over Mamba on recall",
    measurement="MQAR of 128 tokens, 16 pairs, V = 256; two mixers of width 64 (2 heads) after one BaseConv, no "
    "MLPs: two windows (w = 4 … 32), two linear (D' = 2 … 12), or one of each; up to 1000 steps of 128 rows, left at "
    "99 %, best of two learning rates (1e-2, 3e-3); one seed. State: bytes in float32, the convolution apart",
    unit="points of accuracy, both minus the better of the two alone, mean over the sizes both has",
    tolerance="accuracy never falls by more than 3 points as the state of one kind grows, and both is nowhere more "
    "than 3 points below the straight line through the points of either alone; partly: the first half holds",
    needs="h100",
    minutes=1.7,
)
def recall_state(settings: Settings) -> Measured:
    task = settings.pick(MQAR(128, 16, 256), MQAR(16, 2, 32))
    steps, batch = settings.pick((1000, 128), (3, 4))
    rates = settings.pick(RATES, RATES[:1])
    kinds: dict[str, list[tuple[tuple[int | None, int | None], ...]]] = {
        "both": [((None, d), (w, None)) for w, d in BOTH],
        "linear": [((None, d), (None, d)) for d in FEATURES],
        "window": [((w, None), (w, None)) for w in WINDOWS],
    }
    names, change, size = {}, {}, {}
    for kind, stacks in kinds.items():
        for pair in stacks[:: settings.pick(1, 3)]:
            name = " ".join([kind, *(f"D'={d}" if w is None else f"w={w}" for w, d in dict.fromkeys(pair))])
            mixers = (
                CONV,
                *(full_attention(HEADS) if d is None else Mixer("based", HEADS, {"feature_dim": d}) for _, d in pair),
            )
            names[name] = (task, CausalLMConfig(task.vocabulary, DIM, mixers, mlp_width=0))
            change[name] = partial(windowed, windows=(None, *(w for w, _ in pair)))
            size[name] = sum(state_bytes(w, d) for w, d in pair)
    cells = cells_for(
        names, rates=rates, steps=steps, batch=batch, seed=settings.seed, held_out=settings.pick(256, 4), change=change
    )
    outcomes = run_cells(cells, settings.pick(SECONDS, 60.0))
    accuracy = percent(outcomes, names)
    curves = {kind: sorted((size[n], accuracy[n]) for n in names if n.startswith(kind)) for kind in kinds}
    falls = max(a[1] - b[1] for curve in curves.values() for a, b in pairwise(curve))
    ahead = [y - max(at(curves["linear"], x), at(curves["window"], x)) for x, y in curves["both"]]
    word = verdict(reproduced=falls <= 3 and min(ahead) >= -3, partly=falls <= 3)
    shown = "; ".join(f"{k} {', '.join(f'{y:.0f} % in {x / 1024:.1f} KiB' for x, y in c)}" for k, c in curves.items())
    why = f"{shown}{caveat(outcomes)}"
    details = {"curves": curves, "accuracy": accuracy, "bytes": size, "runs": told(outcomes)}
    return Measured(sum(ahead) / len(ahead), word, why, details)


def at(curve: list[tuple[int, float]], x: float) -> float:
    """Straight lines between the points; level outside them."""
    for (x0, y0), (x1, y1) in pairwise(curve):
        if x <= x0:
            return y0
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return curve[-1][1]
