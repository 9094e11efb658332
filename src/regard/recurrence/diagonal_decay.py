"""The diagonal-decay executor as a `Recurrence`: the normal form that papers map their inputs to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from regard.recurrence.diagonal import accumulation_dtype, check, chunked, recurrent
from regard.recurrence.documents import one_by_one
from regard.recurrence.executor import MAX_DIM, Executor, fused, needs_gradient, refuses, without_triton
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

    chunk_size: tokens worked on together by the torch form of `scan`; a tuning knob, the result does not depend on it.
    executor: "torch", "triton" (the kernels, which choose their own chunks), or "auto": the kernels on CUDA.
    """

    chunk_size: int = 64
    executor: Executor = "auto"

    def init(self, inputs: DiagonalInputs) -> DiagonalState:
        """Zeros."""
        q, k, v = inputs.q, inputs.k, inputs.v
        dtype = accumulation_dtype(q, k, v)
        return DiagonalState(torch.zeros(*q.shape[:2], q.shape[3], v.shape[3], dtype=dtype, device=q.device))

    def step(self, state: DiagonalState, inputs: DiagonalInputs) -> tuple[DiagonalState, Tensor]:
        """One token, inputs of length 1."""
        if self._fused(inputs):
            if needs_gradient(*inputs, state.s):
                out, state = self.scan(inputs, state)
                return state, out
            from regard.kernels.triton.state_step import step

            g = check(*inputs, state.s)
            out, s = step(inputs.q, inputs.k, inputs.v, state.s, g)
            return DiagonalState(s), out
        out, s = recurrent(*inputs, state.s)
        return DiagonalState(s), out

    def scan(self, inputs: DiagonalInputs, state: DiagonalState | None = None) -> tuple[Tensor, DiagonalState]:
        """The kernels, or the chunked form. Returns (out (B, H, N, Dv) in v's dtype, final state)."""
        s = None if state is None else state.s
        if self._fused(inputs):
            out, s = _kernels(inputs, s, None)
        else:
            out, s = chunked(*inputs, s, chunk_size=self.chunk_size)
        return out, DiagonalState(s)

    def scan_documents(
        self, inputs: DiagonalInputs, cu_seqlens: Tensor, states: DiagonalState | None
    ) -> tuple[Tensor, DiagonalState]:
        """See `documents.scan_documents`, which has checked the arguments."""
        if not self._fused(inputs):
            return one_by_one(self, inputs, cu_seqlens.tolist(), states)
        out, s = _kernels(inputs, None if states is None else states.s, tuple(cu_seqlens.tolist()))
        return out, DiagonalState(s)

    def _fused(self, inputs: DiagonalInputs) -> bool:
        q, k, v, _ = inputs
        return inputs.length > 0 and fused(self.executor, q, without_triton(q) or refuses(q, k, v))


def _kernels(inputs: DiagonalInputs, s: Tensor | None, ends: tuple[int, ...] | None) -> tuple[Tensor, Tensor]:
    """The values' columns do not see one another: more than the kernels take go in parts."""
    from regard.kernels.triton.diagonal import diagonal

    q, k, v, _ = inputs
    g = check(*inputs, s if ends is None else None)
    parts = v.split(MAX_DIM, -1)
    states = [None] * len(parts) if s is None else s.split(MAX_DIM, -1)
    done = [diagonal(q, k, part, g, state, ends=ends) for part, state in zip(parts, states, strict=True)]
    if len(done) == 1:
        return done[0]
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
