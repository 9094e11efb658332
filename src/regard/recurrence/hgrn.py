"""The vector recurrence h_t = f_t ⊙ h_{t−1} + u_t, all channels on their own: no key, no query (HGRN and its kin)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from regard.errors import require
from regard.recurrence.contract import check_floating, check_one_token, check_state
from regard.recurrence.diagonal import accumulation_dtype
from regard.registry import Paper, register

PAPER = Paper(
    "Hierarchically Gated Recurrent Neural Network for Sequence Modeling", "Qin et al.", 2023, "2311.04823"
)  # fmt: skip


class HGRNInputs(NamedTuple):
    """u (B, H, N, D): what is added; log_decay (B, H, N, D) ≤ 0: log f, natural, −inf forgetting exactly.

    H is a way to lay out channels, no more: the recurrence has no heads."""

    u: Tensor
    log_decay: Tensor

    @property
    def length(self) -> int:
        return self.u.shape[2]

    def tokens(self, start: int, stop: int) -> Self:
        """Tokens [start, stop)."""
        return self._replace(u=self.u[:, :, start:stop], log_decay=self.log_decay[:, :, start:stop])


class HGRNState(NamedTuple):
    """h (B, H, D), at least float32."""

    h: Tensor


@dataclass(frozen=True)
class HGRN:
    """h_t = e^{g_t} ⊙ h_{t−1} + u_t; the output at t is h_t itself.

    Two tokens are one with (f, u) = (f₂ f₁, f₂ u₁ + u₂), which is associative: `scan` is a prefix scan over it, in O(N)
    work and a depth of 2·log₂ N. It multiplies decays and never divides by them, so f = 0 is exact."""

    def init(self, inputs: HGRNInputs) -> HGRNState:
        """Zeros."""
        u = inputs.u
        return HGRNState(torch.zeros(*u.shape[:2], u.shape[3], dtype=accumulation_dtype(u), device=u.device))

    def step(self, state: HGRNState, inputs: HGRNInputs) -> tuple[HGRNState, Tensor]:
        """One token, inputs of length 1."""
        f, u, h = _prepare(inputs, state)
        check_one_token(inputs)
        out = f * h[:, :, None] + u
        return HGRNState(out[:, :, 0]), out.to(inputs.u.dtype)

    def scan(self, inputs: HGRNInputs, state: HGRNState | None = None) -> tuple[Tensor, HGRNState]:
        """All tokens. Returns (out (B, H, N, D) in u's dtype, final state)."""
        f, u, h = _prepare(inputs, self.init(inputs) if state is None else state)
        if inputs.length == 0:
            return inputs.u, HGRNState(h)
        first = f[:, :, :1] * h[:, :, None] + u[:, :, :1]
        out = prefixes(f, torch.cat([first, u[:, :, 1:]], 2))
        return out.to(inputs.u.dtype), HGRNState(out[:, :, -1])


def prefixes(f: Tensor, u: Tensor) -> Tensor:
    """h (B, H, N, D) with h_1 = u_1 and h_t = f_t h_{t−1} + u_t: join neighbours, scan the pairs, fill in between."""
    n = u.shape[2]
    if n == 1:
        return u
    half = n // 2
    later_f, later_u = f[:, :, 1::2], u[:, :, 1::2]
    pairs_f, pairs_u = later_f * f[:, :, : 2 * half : 2], later_f * u[:, :, : 2 * half : 2] + later_u
    ends = prefixes(pairs_f, pairs_u)  # h at the second token of each pair
    between = f[:, :, 2::2] * ends[:, :, : (n - 1) // 2] + u[:, :, 2::2]
    starts = torch.cat([u[:, :, :1], between], 2)
    woven = torch.stack([starts[:, :, :half], ends], 3).flatten(2, 3)
    return woven if n % 2 == 0 else torch.cat([woven, starts[:, :, half:]], 2)


def _prepare(inputs: HGRNInputs, state: HGRNState) -> tuple[Tensor, Tensor, Tensor]:
    """f, u and h in the accumulation dtype. Raises ArgumentError naming the tensor."""
    u, g = inputs
    check_floating(u=u)
    require(u.ndim == 4, "u", tuple(u.shape), "(B, H, N, D)")
    require(g.shape == u.shape, "log_decay", tuple(g.shape), f"the shape of u, {tuple(u.shape)}")
    check_state(state, HGRNState)
    wanted = (*u.shape[:2], u.shape[3])
    require(state.h.shape == wanted, "state", tuple(state.h.shape), f"{wanted}: (B, H, D)")
    dtype = accumulation_dtype(u)
    return g.to(dtype).exp(), u.to(dtype), state.h.to(dtype)


def _example() -> tuple[HGRN, HGRNInputs]:
    u, g = (torch.randn(2, 3, 21, 4, dtype=torch.float64) for _ in range(2))
    g = -g.abs()
    g[:, 1, 5], g[:, 2] = -torch.inf, 0.0
    return HGRN(), HGRNInputs(u, g)


register(
    "hgrn",
    kind="recurrence",
    paper=PAPER,
    families=("recurrent",),
    cost="O(N·D) time in 2·log₂ N steps, a state of D",
    example=_example,
)(HGRN)
