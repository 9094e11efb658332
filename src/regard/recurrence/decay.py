"""Sums of log decays, taken so that −inf (exact forgetting) never meets its own negative.

The usual trick, a difference of two running sums, gives −inf − (−inf) = NaN. Every sum here only ever adds terms ≤ 0.
"""

from __future__ import annotations

import torch
from torch import Tensor


def from_start(log_decay: Tensor) -> Tensor:
    """(…, C, D) → (…, C, D): decay from before the first token up to and including token i, Σ_{s ≤ i} g_s."""
    return log_decay.cumsum(-2)


def to_end(log_decay: Tensor) -> Tensor:
    """(…, C, D) → (…, C, D): decay from just after token j to the end, Σ_{s > j} g_s; 0 for the last token."""
    after = torch.cat([log_decay[..., 1:, :], torch.zeros_like(log_decay[..., :1, :])], -2)
    return after.flip(-2).cumsum(-2).flip(-2)


def between(log_decay: Tensor) -> Tensor:
    """(…, C) → (…, C, C): decay from just after token j up to token i, Σ_{j < s ≤ i} g_s; −inf above the diagonal.

    Its exponential is the matrix M of the parallel form: M_ij = Π decay for i ≥ j, else 0."""
    size = log_decay.shape[-1]
    below = torch.ones(size, size, dtype=torch.bool, device=log_decay.device).tril()
    terms = log_decay[..., :, None].expand(*log_decay.shape, size)  # row s, column j: counts where s > j
    sums = terms.masked_fill(~below.tril(-1), 0.0).cumsum(-2)
    return sums.masked_fill(~below, -torch.inf)
