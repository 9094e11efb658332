"""Joining attention over parts of the keys into attention over all of them, exactly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from regard.errors import require


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(out, lse) of the union of disjoint key sets from the (out, lse) of each: out = Σ exp(lseₚ − lse)·outₚ.

    out (B, Hq, N, Dv) and lse (B, Hq, N); any shapes do, as long as lse is out's without its last dimension. A part
    with lse = −inf saw nothing and counts nothing; where all parts are so, zeros and −inf come back. Differentiable
    through outputs and lse. Statistics are held in at least float32; out comes back in the parts' dtype.

    Learned sinks belong to the whole softmax: give them to exactly one part, or to none and `apply_sinks` to the
    result.
    Raises ArgumentError for no parts or parts of different shapes.
    """
    require(len(parts) > 0, "parts", "none", "at least one (out, lse)")
    out, lse = parts[0]
    require(lse.shape == out.shape[:-1], "parts", tuple(lse.shape), f"lse of shape {tuple(out.shape[:-1])}")
    for other, other_lse in parts[1:]:
        require(other.shape == out.shape, "parts", tuple(other.shape), f"all outputs of shape {tuple(out.shape)}")
        require(other_lse.shape == lse.shape, "parts", tuple(other_lse.shape), f"all lse of shape {tuple(lse.shape)}")
    if len(parts) == 1:
        return out, lse
    held = torch.float64 if lse.dtype == torch.float64 else torch.float32
    logs = torch.stack([part.to(held) for _, part in parts])
    largest = logs.detach().amax(0)
    shift = torch.where(largest == -torch.inf, 0.0, largest)
    shares = torch.exp(logs - shift)
    total = shares.sum(0)
    seen = total > 0
    safe = torch.where(seen, total, 1.0)
    joined = torch.zeros_like(out, dtype=held)
    for share, (part, _) in zip(shares / safe, parts, strict=True):
        joined = joined + share[..., None] * part.to(held)
    return joined.to(out.dtype), torch.where(seen, shift + safe.log(), -torch.inf)


def apply_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Add a learned logit per head (Hq,) to a softmax taken without it: out·σ(lse − sink), log(exp lse + exp sink)."""
    extra = sinks.to(lse.dtype)[:, None]
    share = torch.sigmoid(lse - extra)
    return (out.to(lse.dtype) * share[..., None]).to(out.dtype), _logaddexp(lse, extra)


def _logaddexp(a: Tensor, b: Tensor) -> Tensor:
    """logaddexp whose gradient is finite where a is −inf; b is finite."""
    empty = a == -torch.inf
    return torch.where(empty, b, torch.logaddexp(torch.where(empty, 0.0, a), b))
