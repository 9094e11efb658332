"""State space duality, Mamba-2's recurrence (Dao and Gu 2024, arXiv 2405.21060).

    S_t = e^{g_t} S_{t−1} + b_t (Δ_t x_t)ᵀ ,   y_t = S_tᵀ c_t + D x_t ,   g_t = Δ_t A

The names are the paper's: b is the key, c the query, Δ x the value; one decay per token and head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from regard.errors import require
from regard.recurrence.contract import check_floating
from regard.recurrence.diagonal_decay import DiagonalDecay, DiagonalInputs, DiagonalState
from regard.recurrence.dsf import LinearSystem, linear_system
from regard.registry import Paper, register

PAPER = Paper(
    "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space Duality",
    "Dao and Gu", 2024, "2405.21060",
)  # fmt: skip


class SSDInputs(NamedTuple):
    """x (B, H, N, P); dt (B, H, N) ≥ 0; log_decay (B, H, N) ≤ 0; b, c (B, G, N, S), G a divisor of H; skip (H,): D.

    Head h reads and writes with b and c of group h // (H/G). P is the head's width, S the size of its state."""

    x: Tensor
    dt: Tensor
    log_decay: Tensor
    b: Tensor
    c: Tensor
    skip: Tensor

    @property
    def length(self) -> int:
        return self.x.shape[2]

    def tokens(self, start: int, stop: int) -> Self:
        """Tokens [start, stop); D does not vary."""
        x, dt, g, b, c = (t[:, :, start:stop] for t in self[:5])
        return self._replace(x=x, dt=dt, log_decay=g, b=b, c=c)


@dataclass(frozen=True)
class SSD:
    """S_t = e^{g_t} S_{t−1} + b_t (Δ_t x_t)ᵀ, y_t = S_tᵀ c_t + D x_t. The state is a DiagonalState, s (B, H, S, P).

    chunk_size: tokens worked on together by `scan`; the result does not depend on it."""

    chunk_size: int = 64

    def init(self, inputs: SSDInputs) -> DiagonalState:
        """Zeros."""
        return DiagonalDecay().init(_normal(inputs))

    def step(self, state: DiagonalState, inputs: SSDInputs) -> tuple[DiagonalState, Tensor]:
        """One token, inputs of length 1."""
        state, out = DiagonalDecay().step(state, _normal(inputs))
        return state, _skipped(out, inputs)

    def scan(self, inputs: SSDInputs, state: DiagonalState | None = None) -> tuple[Tensor, DiagonalState]:
        """Linear in N. Returns (out (B, H, N, P) in x's dtype, final state)."""
        out, state = DiagonalDecay(self.chunk_size).scan(_normal(inputs), state)
        return _skipped(out, inputs), state


def _normal(inputs: SSDInputs) -> DiagonalInputs:
    """As the diagonal-decay executor reads it. Raises ArgumentError naming the tensor."""
    x, dt, g, b, c, skip = inputs
    check_floating(x=x)
    require(x.ndim == 4, "x", tuple(x.shape), "(B, H, N, P)")
    batch, heads, n, _ = x.shape
    for name, tensor in (("dt", dt), ("log_decay", g)):
        require(tensor.shape == x.shape[:3], name, tuple(tensor.shape), f"{(batch, heads, n)}: (B, H, N)")
    fits = b.ndim == 4 and b.shape[::2] == (batch, n) and heads % b.shape[1] == 0
    require(fits, "b", tuple(b.shape), f"({batch}, G, {n}, S), G a divisor of {heads}")
    require(c.shape == b.shape, "c", tuple(c.shape), f"the shape of b, {tuple(b.shape)}")
    require(skip.shape == (heads,), "skip", tuple(skip.shape), f"({heads},): one per head")
    q, k = (t.repeat_interleave(heads // t.shape[1], 1) for t in (c, b))
    return DiagonalInputs(q, k, dt[..., None] * x, g[..., None])


def _skipped(out: Tensor, inputs: SSDInputs) -> Tensor:
    return (out + inputs.skip[:, None, None] * inputs.x).to(inputs.x.dtype)


@linear_system.register
def _system(recurrence: SSD, inputs: SSDInputs) -> LinearSystem:
    """Λ_i = e^{g_i} I, b_i = Δ_i b_i, c_i = c_i, d_i = D."""
    plain = linear_system(DiagonalDecay(), _normal(inputs))
    skip = inputs.skip[:, None].expand(inputs.dt.shape)
    return plain._replace(b=inputs.dt[..., None] * plain.b, d=skip)


def _example() -> tuple[SSD, SSDInputs]:
    x, b, c = (torch.randn(2, h, 21, 4, dtype=torch.float64) for h in (4, 2, 2))
    dt = torch.rand(2, 4, 21, dtype=torch.float64)
    return SSD(chunk_size=8), SSDInputs(x, dt, -2 * dt, b, c, torch.randn(4, dtype=torch.float64))


register(
    "ssd",
    kind="recurrence",
    paper=PAPER,
    families=("recurrent",),
    cost="O(N·(C·(S+P) + S·P)) time, a state of S·P per head",
    example=_example,
)(SSD)
