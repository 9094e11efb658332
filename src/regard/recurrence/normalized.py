"""Normalised linear attention: the diagonal-decay recurrence with a denominator, which is one more column of values.

    S_t = diag(e^{g_t}) S_{t-1} + k_t v_tᵀ ,  z_t = diag(e^{g_t}) z_{t-1} + k_t ,   o_t = S_tᵀ q_t / (z_tᵀ q_t + ε)

q and k are features, φ(q) and φ(k) ≥ 0 (`regard.recurrence.feature_maps`): with signs, the denominator may be anything.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.errors import require
from regard.recurrence.contract import check_floating
from regard.recurrence.diagonal import accumulation_dtype
from regard.recurrence.diagonal_decay import DiagonalDecay, DiagonalInputs, DiagonalState
from regard.registry import Paper, register

PAPER = Paper(
    "Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention",
    "Katharopoulos et al.", 2020, "2006.16236",
)  # fmt: skip


@dataclass(frozen=True)
class NormalisedLinearAttention:
    """o_t = Σ_{j ≤ t} (q_t·k_j) v_j / (Σ_{j ≤ t} q_t·k_j + ε), under any log decay that the diagonal recurrence takes.

    Inputs are DiagonalInputs whose q and k are features ≥ 0. eps ≥ 0, added to the denominator; where that is 0 for
    want of keys the output is 0. Numerator and denominator are held in at least float32. The state is a DiagonalState,
    s (B, H, Dk, Dv + 1): S and, as its last column, z."""

    eps: float = 1e-6
    chunk_size: int = 64

    def __post_init__(self) -> None:
        require(self.eps >= 0, "eps", self.eps, "a number ≥ 0")

    def init(self, inputs: DiagonalInputs) -> DiagonalState:
        """Zeros."""
        return DiagonalDecay().init(with_ones(inputs))

    def step(self, state: DiagonalState, inputs: DiagonalInputs) -> tuple[DiagonalState, Tensor]:
        """One token, inputs of length 1."""
        state, sums = DiagonalDecay().step(state, with_ones(inputs))
        return state, normalise(sums, self.eps).to(inputs.v.dtype)

    def scan(self, inputs: DiagonalInputs, state: DiagonalState | None = None) -> tuple[Tensor, DiagonalState]:
        """Linear in N. Returns (out (B, H, N, Dv) in v's dtype, final state)."""
        sums, state = DiagonalDecay(self.chunk_size).scan(with_ones(inputs), state)
        return normalise(sums, self.eps).to(inputs.v.dtype), state

    def mix(self, inputs: DiagonalInputs, state: DiagonalState | None = None) -> tuple[Tensor, DiagonalState]:
        """Without causality: every token reads all tokens of `inputs` and what the state holds. No decay."""
        require(inputs.log_decay is None, "log_decay", "a tensor", "None: without an order nothing decays")
        q, k, v, _ = with_ones(inputs)
        s = k.mT @ v
        if state is not None:
            require(state.s.shape == s.shape, "state", tuple(state.s.shape), f"{tuple(s.shape)}: (B, H, Dk, Dv + 1)")
            s = s + state.s
        return normalise(q.to(s.dtype) @ s, self.eps).to(inputs.v.dtype), DiagonalState(s)


def with_ones(inputs: DiagonalInputs) -> DiagonalInputs:
    """The same inputs in at least float32, the values with a last column of ones."""
    check_floating(v=inputs.v)
    dtype = accumulation_dtype(inputs.q, inputs.k, inputs.v)
    q, k, v = (x.to(dtype) for x in inputs[:3])
    return inputs._replace(q=q, k=k, v=torch.cat([v, torch.ones_like(v[..., :1])], -1))


def normalise(sums: Tensor, eps: float) -> Tensor:
    """(…, Dv + 1) → (…, Dv): all but the last column over the last plus eps; 0 where that is 0."""
    total = sums[..., -1:] + eps
    nothing = total == 0
    return torch.where(nothing, 0.0, sums[..., :-1] / torch.where(nothing, 1.0, total))


def _example() -> tuple[NormalisedLinearAttention, DiagonalInputs]:
    q, k, v = (torch.randn(2, 3, 21, 4, dtype=torch.float64) for _ in range(3))
    return NormalisedLinearAttention(chunk_size=8), DiagonalInputs(q.exp(), k.exp(), v)


register(
    "normalised-linear-attention",
    kind="recurrence",
    paper=PAPER,
    families=("recurrent",),
    cost="O(N·(C·(Dk+Dv) + Dk·Dv)) time, a state of Dk·(Dv + 1) per head",
    example=_example,
)(NormalisedLinearAttention)
