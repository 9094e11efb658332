"""DSF: a learned normaliser closes most of the gap between linear and softmax attention."""

from __future__ import annotations

from torch import Tensor

from regard.evidence.claim import Measured, Settings, claim, verdict
from regard.evidence.study import caveat, cells_for, percent, run_cells, told
from regard.layers.normalised_attention import NormalisedAttention
from regard.layers.recurrent import Read, RecurrentState, at_real_tokens, split_heads
from regard.models.causal_lm import Block, CausalLM, CausalLMConfig
from regard.models.stack import FULL, Mixer
from regard.recurrence import DiagonalInputs
from regard.recurrence.dsf import PAPER
from regard.recurrence.feature_maps import elu_plus_one
from regard.recurrence.normalized import NormalisedLinearAttention
from regard.tasks.training.mqar import MQAR

DIM = 64
CONV = Mixer("base-conv", 1, {"expand": 2})
KINDS = ("softmax", "normalised", "linear")
SIZES, HEADS = ((64, 4), (128, 16)), (1, 4)
RATES = (1e-2, 3e-3)
SECONDS = 30.0


class Linear(NormalisedAttention):
    """The same layer with the sum of the weights for η: linear attention with elu + 1 (Katharopoulos et al. 2020)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(dim, heads)
        self.mixer = NormalisedLinearAttention()  # type: ignore[assignment]
        del self.normaliser_proj

    def read(self, x: Tensor, key_padding: Tensor | None, state: RecurrentState | None) -> Read:
        """Features of queries and keys."""
        q, k, v = (split_heads(project(x), self.heads) for project in (self.q_proj, self.k_proj, self.v_proj))
        return Read(DiagonalInputs(elu_plus_one(q), at_real_tokens(elu_plus_one(k), key_padding), v))


def linear(model: CausalLM) -> None:
    """Put linear attention where normalised attention stands, with its projections."""
    for block in model.blocks:
        assert isinstance(block, Block)
        if isinstance(block.mixer, NormalisedAttention):
            other = Linear(block.mixer.dim, block.mixer.heads)
            other.load_state_dict(block.mixer.state_dict(), strict=False)
            block.mixer = other


@claim(
    "dynamical-systems-framework/normalised",
    paper=PAPER,
    statement="on multi-query associative recall softmax attention ≥ normalised attention ≥ linear attention, and more "
    "state raises recall",
    figure="curves over width and state expansion at (tokens, pairs) = (64, 4) to (512, 64); no single number",
    measurement="a BaseConv and one mixer of width 64, no MLPs; V = 256, (64, 4) and (128, 16), 1 and 4 heads (state "
    "expansion 64 and 16); up to 1000 steps of 64 rows, left at 99 %, best of two rates (1e-2, 3e-3), one seed",
    unit="share of the gap from linear to softmax that normalised attention closes, mean where the gap is ≥ 3 points",
    tolerance="softmax ≥ normalised − 1 point and normalised ≥ linear − 1 point in all four settings; "
    "partly: in three of them",
    needs="h100",
    minutes=0.5,
)
def normalised(settings: Settings) -> Measured:
    sizes, heads = settings.pick((SIZES, HEADS), (((16, 2),), (4,)))
    vocabulary, steps, batch = settings.pick((256, 1000, 64), (32, 3, 4))
    rates = settings.pick(RATES, RATES[:1])
    keys = {"softmax": FULL, "normalised": "normalised-attention", "linear": "normalised-attention"}
    names, change, places = {}, {}, {}
    for length, pairs in sizes:
        task = MQAR(length, pairs, vocabulary, curriculum=pairs >= 8)
        for count in heads:
            place = f"({length}, {pairs}), {DIM // count} channels a head"
            places[place] = {kind: f"{kind} {place}" for kind in KINDS}
            for kind, name in places[place].items():
                stack = (CONV, Mixer(keys[kind], count))
                names[name] = (task, CausalLMConfig(vocabulary, DIM, stack, mlp_width=0))
                if kind == "linear":
                    change[name] = linear
    cells = cells_for(names, rates=rates, steps=steps, batch=batch, seed=settings.seed, change=change)
    outcomes = run_cells(cells, settings.pick(SECONDS, 60.0))
    accuracy = percent(outcomes, names)
    found = {place: [accuracy[of[kind]] for kind in KINDS] for place, of in places.items()}
    ordered = [soft >= norm - 1 and norm >= lin - 1 for soft, norm, lin in found.values()]
    closed = [(norm - lin) / (soft - lin) for soft, norm, lin in found.values() if soft - lin >= 3]
    word = verdict(reproduced=all(ordered), partly=sum(ordered) >= len(ordered) - 1)
    shown = "; ".join(f"{place}: {', '.join(f'{value:.1f} %' for value in of)}" for place, of in found.items())
    share = sum(closed) / len(closed) if closed else 0.0
    why = f"{', '.join(KINDS)} — {shown}; gap closed {share:.0%} in {len(closed)} settings{caveat(outcomes)}"
    return Measured(share, word, why, {"accuracy": accuracy, "order": KINDS, "found": found, "runs": told(outcomes)})
