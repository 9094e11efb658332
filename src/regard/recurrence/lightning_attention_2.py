"""Lightning Attention-2: unnormalised linear attention with a fixed decay per head (Qin et al. 2024, arXiv 2401.04658).

    S_t = λ_h S_{t-1} + k_t v_tᵀ ,   o_t = S_tᵀ q_t       no softmax, no denominator, no 1/√D

The slopes are those of TransNormerLLM / TNL, not learned; λ_h = exp(−slope_h).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, Self, get_args

import torch
from torch import Tensor

from regard.errors import UnknownNameError, require
from regard.patterns.checks import at_least
from regard.recurrence.diagonal_decay import DiagonalDecay, DiagonalInputs, DiagonalState
from regard.registry import Paper, register

PAPER = Paper(
    "Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths in Large Language Models",
    "Qin et al.", 2024, "2401.04658",
)  # fmt: skip
Slopes = Literal["code", "paper"]


def alibi_slopes(heads: int) -> list[float]:
    """2^{−8h/H}, h = 1..H, for a power of two; else those of the one below, then every second of its double."""
    at_least("heads", heads, 1)
    below = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * h / below) for h in range(1, below + 1)]
    return slopes + [2.0 ** (-8 * h / (2 * below)) for h in range(1, 2 * (heads - below), 2)]


def tnl_log_decay(heads: int, *, layer: int = 0, layers: int = 1, slopes: Slopes = "code") -> Tensor:
    """(H,) float64 ≤ 0: log λ of every head in layer `layer` (from 0) of `layers`. Deep layers forget less.

    "code", as released: −s_h·(1 − layer/(layers−1) + 1e-5) with ALiBi slopes s_h; the last layer hardly forgets.
    "paper": −(8h/H)·(1 − layer/layers), h = 1..H. The two do not agree. A single layer counts as the first."""
    at_least("heads", heads, 1)
    at_least("layers", layers, 1)
    at_least("layer", layer, 0)
    require(layer < layers, "layer", layer, f"0 … {layers - 1} (layers={layers})")
    if slopes not in get_args(Slopes):
        raise UnknownNameError("slopes", str(slopes), get_args(Slopes))
    if slopes == "code":
        rate = 1 - layer / max(layers - 1, 1) + 1e-5
        return torch.tensor([-s * rate for s in alibi_slopes(heads)], dtype=torch.float64)
    return torch.tensor([-8 * h / heads * (1 - layer / layers) for h in range(1, heads + 1)], dtype=torch.float64)


class LightningInputs(NamedTuple):
    """q, k (B, H, N, Dk); v (B, H, N, Dv); key_padding (B, N) bool, True = real token, None = all real."""

    q: Tensor
    k: Tensor
    v: Tensor
    key_padding: Tensor | None = None

    @property
    def length(self) -> int:
        return self.q.shape[2]

    def tokens(self, start: int, stop: int) -> Self:
        """Tokens [start, stop)."""
        real = None if self.key_padding is None else self.key_padding[:, start:stop]
        q, k, v = (x[:, :, start:stop] for x in (self.q, self.k, self.v))
        return self._replace(q=q, k=k, v=v, key_padding=real)


@dataclass(frozen=True)
class LightningAttention2:
    """S_t = λ_h S_{t-1} + k_t v_tᵀ with λ_h fixed per head; padding neither writes nor lets the state decay.

    log_decay: one number ≤ 0 per head (`tnl_log_decay`), −inf = each token reads only itself.
    chunk_size: tokens worked on together by `scan`; the result does not depend on it."""

    log_decay: tuple[float, ...]
    chunk_size: int = 64

    def __post_init__(self) -> None:
        at_least("chunk_size", self.chunk_size, 1)
        allowed = all(g <= 0 for g in self.log_decay) and not any(math.isnan(g) for g in self.log_decay)
        require(allowed and len(self.log_decay) > 0, "log_decay", self.log_decay, "numbers ≤ 0, one per head")

    def init(self, inputs: LightningInputs) -> DiagonalState:
        """Zeros (B, H, Dk, Dv)."""
        return DiagonalDecay().init(self._normal(inputs))

    def step(self, state: DiagonalState, inputs: LightningInputs) -> tuple[DiagonalState, Tensor]:
        """One token, inputs of length 1."""
        return DiagonalDecay().step(state, self._normal(inputs))

    def scan(self, inputs: LightningInputs, state: DiagonalState | None = None) -> tuple[Tensor, DiagonalState]:
        """Linear in N. Returns (out (B, H, N, Dv) in v's dtype, final state)."""
        return DiagonalDecay(self.chunk_size).scan(self._normal(inputs), state)

    def _normal(self, inputs: LightningInputs) -> DiagonalInputs:
        q, k, v, real = inputs.q, inputs.k, inputs.v, inputs.key_padding
        heads = len(self.log_decay)
        require(q.ndim == 4 and q.shape[1] == heads, "q", tuple(q.shape), f"(B, {heads}, N, Dk)")
        g = torch.tensor(self.log_decay, dtype=torch.float64, device=q.device)[None, :, None, None]
        g = g if q.dtype == torch.float64 else g.float()
        if real is not None:
            require(real.shape == q.shape[::2], "key_padding", tuple(real.shape), f"{tuple(q.shape[::2])}: (B, N)")
            real = real[:, None, :, None]
            k, g = k.masked_fill(~real, 0.0), torch.where(real, g, 0.0)
        return DiagonalInputs(q, k, v, g)


def _example() -> tuple[LightningAttention2, LightningInputs]:
    q, k, v = (torch.randn(2, 3, 21, 4, dtype=torch.float64) for _ in range(3))
    real = torch.ones(2, 21, dtype=torch.bool)
    real[1, :5] = False
    return LightningAttention2((-0.5, 0.0, -float("inf")), chunk_size=8), LightningInputs(q, k, v, real)


register(
    "lightning-attention-2",
    kind="recurrence",
    paper=PAPER,
    families=("recurrent",),
    cost="O(N·(C·(Dk+Dv) + Dk·Dv)) time, a state of Dk·Dv per head",
    example=_example,
)(LightningAttention2)
