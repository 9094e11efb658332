"""Recurrences whose state is one matrix per head: when the kernels run and when torch does, said once for all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from regard.recurrence.contract import check_one_token, check_state
from regard.recurrence.diagonal import accumulation_dtype
from regard.recurrence.documents import one_by_one
from regard.recurrence.executor import Executor, fused, needs_gradient, refuses, without_triton


@dataclass(frozen=True)
class MatrixRecurrence:
    """A recurrence with inputs q, k, v, … and a state of one tensor s (B, H, Dk, Dv), at least float32.

    chunk_size: tokens worked on together by the torch form of `scan`; a tuning knob, the result does not depend on it.
    executor: "torch", "triton" (the kernels, which choose their own chunks), or "auto": the kernels on CUDA.
    A subclass names its `state` and writes the four functions below; each returns (out, s).
    """

    chunk_size: int = 64
    executor: Executor = "auto"
    state: ClassVar[Any]

    def token(self, inputs: Any, s: Tensor) -> tuple[Tensor, Tensor]:
        """One token in torch."""
        raise NotImplementedError

    def chunks(self, inputs: Any, s: Tensor | None) -> tuple[Tensor, Tensor]:
        """All tokens in torch."""
        raise NotImplementedError

    def kernel_token(self, inputs: Any, s: Tensor) -> tuple[Tensor, Tensor]:
        """One token by the kernel, without a gradient."""
        raise NotImplementedError

    def kernels(self, inputs: Any, s: Tensor | None, ends: tuple[int, ...] | None) -> tuple[Tensor, Tensor]:
        """All tokens by the kernels; ends: of packed documents."""
        raise NotImplementedError

    def init(self, inputs: Any) -> Any:
        """Zeros."""
        q, k, v = inputs.q, inputs.k, inputs.v
        dtype = accumulation_dtype(q, k, v)
        return self.state(torch.zeros(*q.shape[:2], q.shape[3], v.shape[3], dtype=dtype, device=q.device))

    def step(self, state: Any, inputs: Any) -> tuple[Any, Tensor]:
        """One token, inputs of length 1."""
        check_state(state, self.state)
        if inputs.q.ndim == 4:  # else its shape is the matter, and is looked at below
            check_one_token(inputs)
        if not self._fused(inputs):
            out, s = self.token(inputs, state.s)
        elif needs_gradient(*inputs, state.s):
            out, s = self.kernels(inputs, state.s, None)
        else:
            out, s = self.kernel_token(inputs, state.s)
        return self.state(s), out

    def scan(self, inputs: Any, state: Any = None) -> tuple[Tensor, Any]:
        """The kernels, or the chunked form. Returns (out (B, H, N, Dv) in v's dtype, final state)."""
        s = None
        if state is not None:
            check_state(state, self.state)
            s = state.s
        out, s = self.kernels(inputs, s, None) if self._fused(inputs) else self.chunks(inputs, s)
        return out, self.state(s)

    def scan_documents(self, inputs: Any, cu_seqlens: Tensor, states: Any) -> tuple[Tensor, Any]:
        """See `documents.scan_documents`, which has checked the arguments."""
        ends = tuple(cu_seqlens.tolist())
        if not self._fused(inputs):
            return one_by_one(self, inputs, ends, states)
        out, s = self.kernels(inputs, None if states is None else states.s, ends)
        return out, self.state(s)

    def _fused(self, inputs: Any) -> bool:
        q = inputs.q
        return inputs.length > 0 and fused(self.executor, q, without_triton(q) or refuses(q, inputs.k, inputs.v))
