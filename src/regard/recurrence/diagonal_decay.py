"""The diagonal-decay executor as a `Recurrence`: the normal form that papers map their inputs to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from regard.recurrence.diagonal import accumulation_dtype, chunked, recurrent
from regard.registry import register


class DiagonalInputs(NamedTuple):
    """q, k (B, H, N, Dk); v (B, H, N, Dv); log_decay ≤ 0: None, (H,), or broadcastable to (B, H, N, Dk)."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None = None

    @property
    def length(self) -> int:
        return self.q.shape[2]

    def tokens(self, start: int, stop: int) -> Self:
        """Tokens [start, stop); a decay that is fixed in time is passed on as it is."""
        g = self.log_decay
        if g is not None and g.ndim == 4 and g.shape[2] > 1:
            g = g[:, :, start:stop]
        q, k, v = (x[:, :, start:stop] for x in (self.q, self.k, self.v))
        return self._replace(q=q, k=k, v=v, log_decay=g)


class DiagonalState(NamedTuple):
    """s (B, H, Dk, Dv), at least float32: what all tokens so far have left."""

    s: Tensor


@dataclass(frozen=True)
class DiagonalDecay:
    """S_t = diag(e^{g_t}) S_{t-1} + k_t v_tᵀ, o_t = S_tᵀ q_t, for any log decay g ≤ 0.

    chunk_size: tokens worked on together by `scan`; a tuning knob, the result does not depend on it."""

    chunk_size: int = 64

    def init(self, inputs: DiagonalInputs) -> DiagonalState:
        """Zeros."""
        q, k, v = inputs.q, inputs.k, inputs.v
        dtype = accumulation_dtype(q, k, v)
        return DiagonalState(torch.zeros(*q.shape[:2], q.shape[3], v.shape[3], dtype=dtype, device=q.device))

    def step(self, state: DiagonalState, inputs: DiagonalInputs) -> tuple[DiagonalState, Tensor]:
        """One token, inputs of length 1."""
        out, s = recurrent(*inputs, state.s)
        return DiagonalState(s), out

    def scan(self, inputs: DiagonalInputs, state: DiagonalState | None = None) -> tuple[Tensor, DiagonalState]:
        """The chunked form. Returns (out (B, H, N, Dv) in v's dtype, final state)."""
        out, s = chunked(*inputs, None if state is None else state.s, chunk_size=self.chunk_size)
        return out, DiagonalState(s)


def _example() -> tuple[DiagonalDecay, DiagonalInputs]:
    q, k, v, g = (torch.randn(2, 3, 21, 4, dtype=torch.float64) for _ in range(4))
    return DiagonalDecay(chunk_size=8), DiagonalInputs(q, k, v, -g.abs())


register(
    "diagonal-decay",
    kind="recurrence",
    families=("recurrent",),
    cost="O(N·(C·(Dk+Dv) + Dk·Dv)) time, a state of Dk·Dv per head",
    example=_example,
)(DiagonalDecay)
