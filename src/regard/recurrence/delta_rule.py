"""The delta-rule executor as a `Recurrence`: the normal form of DeltaNet, Gated DeltaNet and their kin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from regard.recurrence.delta import check, chunked, recurrent
from regard.recurrence.diagonal import accumulation_dtype
from regard.recurrence.documents import one_by_one
from regard.recurrence.executor import Executor, fused, needs_gradient, refuses, without_triton
from regard.registry import register


class DeltaInputs(NamedTuple):
    """q, k (B, H, N, Dk); v (B, H, N, Dv); beta (B, H, N); log_decay ≤ 0: None, (H,), or like (B, H, N).

    k is taken as it comes: the layer normalises it."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    log_decay: Tensor | None = None

    @property
    def length(self) -> int:
        return self.q.shape[2]

    def tokens(self, start: int, stop: int) -> Self:
        """Tokens [start, stop); a decay that is fixed in time is passed on as it is."""
        g = self.log_decay
        if g is not None and g.ndim == 3 and g.shape[2] > 1:
            g = g[:, :, start:stop]
        q, k, v, beta = (x[:, :, start:stop] for x in (self.q, self.k, self.v, self.beta))
        return self._replace(q=q, k=k, v=v, beta=beta, log_decay=g)


class DeltaState(NamedTuple):
    """s (B, H, Dk, Dv), at least float32: the associations held now."""

    s: Tensor


@dataclass(frozen=True)
class DeltaRule:
    """S' = e^{g_t} S_{t-1}, S_t = S' + β_t k_t (v_t − S'ᵀ k_t)ᵀ, o_t = S_tᵀ q_t.

    chunk_size: tokens worked on together by the torch form of `scan`; a tuning knob, the result does not depend on it.
    executor: "torch", "triton" (the kernels, which choose their own chunks), or "auto": the kernels on CUDA.
    """

    chunk_size: int = 64
    executor: Executor = "auto"

    def init(self, inputs: DeltaInputs) -> DeltaState:
        """Zeros."""
        q, k, v = inputs.q, inputs.k, inputs.v
        dtype = accumulation_dtype(q, k, v)
        return DeltaState(torch.zeros(*q.shape[:2], q.shape[3], v.shape[3], dtype=dtype, device=q.device))

    def step(self, state: DeltaState, inputs: DeltaInputs) -> tuple[DeltaState, Tensor]:
        """One token, inputs of length 1."""
        if self._fused(inputs):
            if needs_gradient(*inputs, state.s):
                out, state = self.scan(inputs, state)
                return state, out
            from regard.kernels.triton.state_step import step

            g = check(*inputs, state.s)
            g = None if g is None else g[..., None]
            out, s = step(inputs.q, inputs.k, inputs.v, state.s, g, inputs.beta)
            return DeltaState(s), out
        out, s = recurrent(*inputs, state.s)
        return DeltaState(s), out

    def scan(self, inputs: DeltaInputs, state: DeltaState | None = None) -> tuple[Tensor, DeltaState]:
        """The kernels, or the chunked form. Returns (out (B, H, N, Dv) in v's dtype, final state)."""
        s = None if state is None else state.s
        if self._fused(inputs):
            out, s = _kernels(inputs, s, None)
        else:
            out, s = chunked(*inputs, s, chunk_size=self.chunk_size)
        return out, DeltaState(s)

    def scan_documents(
        self, inputs: DeltaInputs, cu_seqlens: Tensor, states: DeltaState | None
    ) -> tuple[Tensor, DeltaState]:
        """See `documents.scan_documents`, which has checked the arguments."""
        if not self._fused(inputs):
            return one_by_one(self, inputs, cu_seqlens.tolist(), states)
        out, s = _kernels(inputs, None if states is None else states.s, tuple(cu_seqlens.tolist()))
        return out, DeltaState(s)

    def _fused(self, inputs: DeltaInputs) -> bool:
        q, k, v = inputs[:3]
        return inputs.length > 0 and fused(self.executor, q, without_triton(q) or refuses(q, k, v))


def _kernels(inputs: DeltaInputs, s: Tensor | None, ends: tuple[int, ...] | None) -> tuple[Tensor, Tensor]:
    from regard.kernels.triton.delta_rule import delta_rule

    q, k, v, beta, _ = inputs
    g = check(*inputs, s if ends is None else None)
    g = None if g is None else g.expand(q.shape[:3])
    return delta_rule(q, k, v, beta, g, s, ends=ends)


def _example() -> tuple[DeltaRule, DeltaInputs]:
    q, k, v = (torch.randn(2, 3, 21, 4, dtype=torch.float64) for _ in range(3))
    beta, g = (torch.rand(2, 3, 21, dtype=torch.float64) for _ in range(2))
    return DeltaRule(chunk_size=8), DeltaInputs(q, torch.nn.functional.normalize(k, dim=-1), v, 2 * beta, -g)


register(
    "delta-rule",
    kind="recurrence",
    families=("recurrent",),
    cost="O(N·(C·(Dk+Dv) + Dk·Dv)) time, a state of Dk·Dv per head",
    example=_example,
)(DeltaRule)
