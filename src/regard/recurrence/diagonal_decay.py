"""The diagonal-decay executor as a `Recurrence`: the normal form that papers map their inputs to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from regard.recurrence.diagonal import check, chunked, recurrent
from regard.recurrence.executor import MAX_DIM
from regard.recurrence.matrix_state import MatrixRecurrence
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
class DiagonalDecay(MatrixRecurrence):
    """S_t = diag(e^{g_t}) S_{t-1} + k_t v_tᵀ, o_t = S_tᵀ q_t, for any log decay g ≤ 0. Settings: `MatrixRecurrence`."""

    state = DiagonalState

    def token(self, inputs: DiagonalInputs, s: Tensor) -> tuple[Tensor, Tensor]:
        """By the definition."""
        return recurrent(*inputs, s)

    def chunks(self, inputs: DiagonalInputs, s: Tensor | None) -> tuple[Tensor, Tensor]:
        """The chunked form."""
        return chunked(*inputs, s, chunk_size=self.chunk_size)

    def kernel_token(self, inputs: DiagonalInputs, s: Tensor) -> tuple[Tensor, Tensor]:
        """One pass over the state."""
        from regard.kernels.triton.state_step import step

        return step(inputs.q, inputs.k, inputs.v, s, check(*inputs, s))

    def kernels(self, inputs: DiagonalInputs, s: Tensor | None, ends: tuple[int, ...] | None) -> tuple[Tensor, Tensor]:
        """The values' columns do not see one another: more than the kernels take go in parts."""
        from regard.kernels.triton.diagonal import diagonal

        q, k, v, _ = inputs
        g = check(*inputs, s if ends is None else None)
        if v.shape[3] <= MAX_DIM:
            return diagonal(q, k, v, g, s, ends=ends)
        parts = v.split(MAX_DIM, -1)  # its gradient is a copy of all
        states = [None] * len(parts) if s is None else s.split(MAX_DIM, -1)
        done = [diagonal(q, k, part, g, state, ends=ends) for part, state in zip(parts, states, strict=True)]
        return torch.cat([out for out, _ in done], -1), torch.cat([state for _, state in done], -1)


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
