"""The dynamical-systems view: a mixer that is linear in its values is one linear time-varying system, and one matrix.

    h_i = Λ_i h_{i-1} + b_i u_i ,   y_i = c_iᵀ h_i + d_i u_i ,   h_0 = 0      for each channel of the values u_i
    y_i = Σ_{j ≤ i} Φ_ij u_j ,   Φ_ij = c_iᵀ (Λ_i ⋯ Λ_{j+1}) b_j + d_i [i = j]

Sieber et al. 2024, Understanding the differences in Foundation Models (arXiv 2405.15731), write it for all channels
together with Kronecker products; here all value channels of a head share Λ, b, c, d, and a mixer that treats channels
apart has a head per channel. For small N: these are oracles and means of comparison, not ways to compute.
"""

from __future__ import annotations

from functools import singledispatch
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regard.errors import UnsupportedError, require
from regard.recurrence.contract import Recurrence
from regard.recurrence.delta_rule import DeltaInputs, DeltaRule
from regard.recurrence.diagonal import prepare
from regard.recurrence.diagonal_decay import DiagonalDecay, DiagonalInputs
from regard.recurrence.hgrn import HGRN, HGRNInputs
from regard.recurrence.normalized import NormalisedLinearAttention
from regard.recurrence.prefix_softmax import PrefixInputs, PrefixSoftmax
from regard.registry import Paper

PAPER = Paper(
    "Understanding the differences in Foundation Models: Attention, State Space Models, and Recurrent Neural Networks",
    "Sieber et al.", 2024, "2405.15731",
)  # fmt: skip


class LinearSystem(NamedTuple):
    """lam (B, H, N, n, n), b and c (B, H, N, n), d (B, H, N); n: the state expansion, numbers held per channel."""

    lam: Tensor
    b: Tensor
    c: Tensor
    d: Tensor

    def run(self, u: Tensor) -> Tensor:
        """Step by step: u (B, H, N, Dv) → y (B, H, N, Dv)."""
        h = u.new_zeros(*self.b.shape[:2], self.b.shape[3], u.shape[3])
        out = []
        for i in range(u.shape[2]):
            h = self.lam[:, :, i] @ h + self.b[:, :, i, :, None] * u[:, :, i, None, :]
            out.append((self.c[:, :, i, None, :] @ h)[:, :, 0] + self.d[:, :, i, None] * u[:, :, i])
        return torch.stack(out, 2)

    def matrix(self) -> Tensor:
        """Φ (B, H, N, N), lower triangular. O(N²·n²) time."""
        n = self.b.shape[2]
        reached, rows = self.b[:, :, :0], []  # row j: what is left of b_j at time i
        for i in range(n):
            reached = torch.cat([reached @ self.lam[:, :, i].mT, self.b[:, :, i : i + 1]], 2)
            row = (reached @ self.c[:, :, i, :, None])[..., 0]
            rows.append(torch.nn.functional.pad(row, (0, n - 1 - i)))
        return torch.stack(rows, 2) + torch.diag_embed(self.d)

    def with_normaliser_in_state(self, normaliser: Tensor) -> LinearSystem:
        """The same system, y_i = (c_i / η_i)ᵀ h_i + …, its readout c undivided: Λ_i η_{i-1}/η_i and b_i / η_i instead.

        normaliser η (B, H, N) > 0. `self` has c already divided by η. The form in which the paper writes attention; it
        explodes where η drops quickly: equal, not to be computed with."""
        before = torch.cat([normaliser[:, :, :1], normaliser[:, :, :-1]], 2)
        lam = self.lam * (before / normaliser)[..., None, None]
        return LinearSystem(lam, self.b / normaliser[..., None], self.c * normaliser[..., None], self.d)


@singledispatch
def linear_system(recurrence: Any, inputs: Any) -> LinearSystem:
    """(Λ, B, C, D) of a recurrence on these inputs, their values apart. Raises UnsupportedError where none is known.

    A recurrence that can be written so adds itself with `@linear_system.register`."""
    raise UnsupportedError(f"{type(recurrence).__name__} has no export as (Λ, B, C, D); `mixing_matrix` may give its Φ")


@linear_system.register
def _diagonal(recurrence: DiagonalDecay, inputs: DiagonalInputs) -> LinearSystem:
    """Λ_i = diag(e^{g_i}), b_i = k_i, c_i = q_i."""
    q, k, _, g, _ = prepare(*inputs, None)
    return LinearSystem(torch.diag_embed(g.exp().expand(q.shape)), k, q, torch.zeros_like(q[..., 0]))


@linear_system.register
def _delta(recurrence: DeltaRule, inputs: DeltaInputs) -> LinearSystem:
    """Λ_i = e^{g_i} (I − β_i k_i k_iᵀ), b_i = β_i k_i, c_i = q_i."""
    q, k, beta, g = inputs.q, inputs.k, inputs.beta, inputs.log_decay
    kept = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device) - (beta[..., None] * k)[..., None] * k[..., None, :]
    if g is not None:
        kept = (g[:, None] if g.ndim == 1 else g).exp().expand(beta.shape)[..., None, None] * kept
    return LinearSystem(kept, beta[..., None] * k, q, torch.zeros_like(beta))


@linear_system.register
def _normalised(recurrence: NormalisedLinearAttention, inputs: DiagonalInputs) -> LinearSystem:
    """The diagonal system read with c_i = q_i / η_i, η_i = q_iᵀ z_i + ε; 0 where η_i is 0."""
    plain = linear_system(DiagonalDecay(), inputs)
    total = plain.run(torch.ones_like(inputs.v[..., :1]))[..., 0] + recurrence.eps
    share = torch.where(total == 0, 0.0, 1 / torch.where(total == 0, 1.0, total))
    return plain._replace(c=plain.c * share[..., None])


@linear_system.register
def _prefix(recurrence: PrefixSoftmax, inputs: PrefixInputs) -> LinearSystem:
    """n = 1, the state being the output itself: Λ_i = 1 − b_i, b_i = e^{s_i} / Σ_{j ≤ i} e^{s_j}, c_i = 1.

    Softmax attention with a query of its own at each token would need n = ∞; one fixed query needs one number."""
    scores = inputs.scores
    so_far = scores.logcumsumexp(-1)
    b = (scores - so_far.masked_fill(so_far == -torch.inf, 0.0)).exp()
    return LinearSystem((1 - b)[..., None, None], b[..., None], torch.ones_like(b)[..., None], torch.zeros_like(b))


@linear_system.register
def _hgrn(recurrence: HGRN, inputs: HGRNInputs) -> LinearSystem:
    """n = 1 and a head per channel, (B, H·D, N): Λ_i = e^{g_i}, b_i = c_i = 1. No state expansion."""
    kept = inputs.log_decay.exp().mT.flatten(1, 2)[..., None]
    return LinearSystem(kept[..., None], torch.ones_like(kept), torch.ones_like(kept), torch.zeros_like(kept[..., 0]))


def mixing_matrix(recurrence: Recurrence[Any, Any], inputs: Any, values: str = "v") -> Tensor:
    """Φ (B, H, Dv, N, N) of any recurrence that is linear in its values, channel by channel: its output for unit ones.

    values: which field of `inputs` (B, H, N, Dv) they are. N scans. Exact, and no proof: a recurrence that is not
    linear, or mixes value channels, has Φ u ≠ scan(u), which is for the caller to test."""
    require(values in inputs._fields, "values", repr(values), f"a field of the inputs: {', '.join(inputs._fields)}")
    u = getattr(inputs, values)
    columns = []
    for j in range(u.shape[2]):
        unit = torch.zeros_like(u)
        unit[:, :, j] = 1
        columns.append(recurrence.scan(inputs._replace(**{values: unit}))[0].mT)  # (B, H, Dv, N)
    return torch.stack(columns, -1)
