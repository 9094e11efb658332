"""The delta-rule executor as a `Recurrence`: the normal form of DeltaNet, Gated DeltaNet and their kin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from regard.recurrence.delta import check, chunked, recurrent
from regard.recurrence.matrix_state import MatrixRecurrence
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
class DeltaRule(MatrixRecurrence):
    """S' = e^{g_t} S_{t-1}, S_t = S' + β_t k_t (v_t − S'ᵀ k_t)ᵀ, o_t = S_tᵀ q_t. Settings: `MatrixRecurrence`."""

    state = DeltaState

    def token(self, inputs: DeltaInputs, s: Tensor) -> tuple[Tensor, Tensor]:
        """By the definition."""
        return recurrent(*inputs, s)

    def chunks(self, inputs: DeltaInputs, s: Tensor | None) -> tuple[Tensor, Tensor]:
        """The chunked form."""
        return chunked(*inputs, s, chunk_size=self.chunk_size)

    def kernel_token(self, inputs: DeltaInputs, s: Tensor) -> tuple[Tensor, Tensor]:
        """One pass over the state."""
        from regard.kernels.triton.state_step import step

        g = check(*inputs, s)
        return step(inputs.q, inputs.k, inputs.v, s, None if g is None else g[..., None], inputs.beta)

    def kernels(self, inputs: DeltaInputs, s: Tensor | None, ends: tuple[int, ...] | None) -> tuple[Tensor, Tensor]:
        """Chunks solved in parallel, then a scan."""
        from regard.kernels.triton.delta_rule import delta_rule

        q, k, v, beta, _ = inputs
        g = check(*inputs, s if ends is None else None)
        return delta_rule(q, k, v, beta, None if g is None else g.expand(q.shape[:3]), s, ends=ends)


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
