"""DSF: one linear system for all mixers, and a learned normaliser between linear and softmax attention."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from regard.evidence.claim import Measured, Settings, claim, verdict
from regard.evidence.study import caveat, cells_for, percent, run_cells, told
from regard.layers.normalised_attention import NormalisedAttention
from regard.layers.recurrent import Read, RecurrentState, at_real_tokens, split_heads
from regard.models.causal_lm import Block, CausalLM, CausalLMConfig
from regard.models.stack import FULL, Mixer
from regard.recurrence import DiagonalDecay, DiagonalInputs
from regard.recurrence.delta_rule import DeltaInputs, DeltaRule
from regard.recurrence.dsf import PAPER, linear_system
from regard.recurrence.feature_maps import elu_plus_one, taylor
from regard.recurrence.normalized import NormalisedLinearAttention
from regard.recurrence.prefix_softmax import PrefixInputs, PrefixSoftmax
from regard.tasks.training.mqar import MQAR

DIM = 64
CONV = Mixer("base-conv", 1, {"expand": 2})
KINDS = ("softmax", "normalised", "linear")
SIZES, HEADS = ((64, 4), (128, 16)), (1, 4)
RATES = (1e-2, 3e-3)
SECONDS = 60.0


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
    statement="on multi-query associative recall softmax attention ≥ normalised attention ≥ linear attention, and "
    "more state raises recall",
    figure="curves over width and state expansion at (tokens, pairs) = (64, 4) to (512, 64); no single number",
    measurement="a BaseConv and one mixer of width 64, no MLPs; V = 256, (64, 4) and (128, 16), 1 and 4 heads (state "
    "expansion 64 and 16); up to 1000 steps of 128 rows, left at 99 %, best of two rates (1e-2, 3e-3), one seed",
    unit="share of the gap from linear to softmax that normalised attention closes, mean where the gap is ≥ 3 points",
    tolerance="softmax ≥ normalised − 1 point and normalised ≥ linear − 1 point in all four settings; partly: in "
    "three of them",
    needs="h100",
    minutes=1,
)
def normalised(settings: Settings) -> Measured:
    sizes, heads = settings.pick((SIZES, HEADS), (((16, 2),), (4,)))
    vocabulary, steps, batch = settings.pick((256, 1000, 128), (32, 3, 4))
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
    cells = cells_for(
        names, rates=rates, steps=steps, batch=batch, seed=settings.seed, held_out=settings.pick(256, 4), change=change
    )
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


@claim(
    "dynamical-systems-framework/equality",
    paper=PAPER,
    statement="attention, linear attention, state-space models and gated RNNs are one linear time-varying system; "
    "the normaliser may sit in the state or in the readout, and Mamba's transition is a reversed sigmoid gate",
    figure="equalities, proved in the paper",
    measurement="float64, 24 tokens: the exported (Λ, B, C, D) as one matrix and step by step against each "
    "recurrence's own scan; the normaliser moved into the state (Λ = η_{i−1}/η_i); exp(−softplus(x)) against 1 − "
    "σ(x); the error of Taylor feature maps of order 1 … 5 to softmax attention, logits bounded by √3",
    unit="largest error of an equality",
    tolerance="every equality to 1e-10, and the Taylor error falls with every order; partly: the equalities hold",
    needs="cpu",
    minutes=0.1,
)
@torch.no_grad()
def equality(settings: Settings) -> Measured:
    torch.manual_seed(settings.seed)
    errors = {}
    for name, (recurrence, inputs) in _recurrences().items():
        system, want = linear_system(recurrence, inputs), recurrence.scan(inputs)[0]
        errors[f"{name}, as a matrix"] = _apart(system.matrix() @ inputs.v, want)
        errors[f"{name}, step by step"] = _apart(system.run(inputs.v), want)
    q, k, v = elu_plus_one(_draw(4)), elu_plus_one(_draw(4)), _draw(5)
    plain = linear_system(DiagonalDecay(), DiagonalInputs(q, k, v))
    for name, eta in (("Σ of the weights", (q @ k.mT).tril().sum(-1)), ("learned", _draw().exp())):
        readout = plain._replace(c=plain.c / eta[..., None])
        errors[f"normaliser in the state, {name}"] = _apart(
            readout.with_normaliser_in_state(eta).run(v), (q @ k.mT).tril() / eta[..., None] @ v
        )
    x = torch.linspace(-30, 30, 601, dtype=torch.float64)
    errors["exp(−softplus(x)) = 1 − σ(x)"] = _apart((-torch.nn.functional.softplus(x)).exp(), 1 - x.sigmoid())
    q, k = _draw(3).clamp(-1, 1), _draw(3).clamp(-1, 1)
    softmax = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    mixer = NormalisedLinearAttention(eps=0.0)
    series = [_apart(mixer.scan(DiagonalInputs(taylor(q, p), taylor(k, p), v))[0], softmax) for p in range(1, 6)]
    worst = max(errors.values())
    falls = all(after < before for before, after in itertools.pairwise(series))
    word = verdict(reproduced=worst <= 1e-10 and falls, partly=worst <= 1e-10)
    why = (
        f"{len(errors)} equalities, the largest error {worst:.0e}; Taylor maps of order 1 to 5 differ from softmax by "
        + ", ".join(f"{error:.1e}" for error in series)
    )
    return Measured(worst, word, why, {"errors": errors, "Taylor": series})


def _draw(*shape: int) -> Tensor:
    return torch.randn(2, 3, 24, *shape, dtype=torch.float64)


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def _recurrences() -> dict[str, tuple[Any, Any]]:
    """Every executor with what its layers give it."""
    q, k, v, gate = _draw(4), _draw(4), _draw(5), -_draw(4).abs()
    beta = torch.rand(2, 3, 24, dtype=torch.float64)
    unit = torch.nn.functional.normalize(k, dim=-1)
    fixed = torch.tensor([0.9, 0.5, 1.0], dtype=torch.float64).log()
    return {
        "linear attention, unnormalised": (DiagonalDecay(8), DiagonalInputs(q, k, v)),
        "linear attention": (NormalisedLinearAttention(chunk_size=8), DiagonalInputs(q.exp(), k.exp(), v)),
        "RetNet, Lightning Attention": (DiagonalDecay(8), DiagonalInputs(q, k, v, fixed)),
        "Mamba-2": (DiagonalDecay(8), DiagonalInputs(q, k, v, gate[..., :1])),
        "GLA, HGRN-2": (DiagonalDecay(8), DiagonalInputs(q, k, v, gate)),
        "DeltaNet": (DeltaRule(8), DeltaInputs(q, unit, v, beta)),
        "Gated DeltaNet": (DeltaRule(8), DeltaInputs(q, unit, v, 2 * beta, gate[..., 0])),
        "Aaren": (PrefixSoftmax(8), PrefixInputs(3 * _draw(), v)),
    }
