"""Combiner's structured factorisations (Ren et al. 2021, arXiv 2107.05768) as functions of q, k, v.

Each query attends directly to a few tokens, and to summaries of regions that cover all the others, in one softmax:

    p(j|i) = pd(j|i) for direct j, pr(r|i) · pl(j|r) for j in region r;   pd, pr ∝ exp(q_i · k / √D), exp(q_i · kS_r /
    √D)

pl(·|r) = softmax of qS_r · k_j over the region, the same for all queries, so V_r = Σ pl(j|r) v_j is computed once.
kS_r and qS_r are pooled over the region. Regions and direct tokens of a query never overlap, and together are all it
may see.

Shapes: q, k (B, H, T, D), v (B, H, T, Dv); real (B, T) bool with all real tokens first; returns (B, H, T, Dv). All in
the dtype that comes in: the caller holds it in at least float32. A query without any key gets zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

Pool = Literal["max", "mean", "sum"]
Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Pooling:
    """How q and k become a region's qS and kS: a map on each token, then max, mean or sum over the region.

    weigh_by_size: add ln|r| to a region's logit, so that it counts as |r| slots and not as one (not the paper's model).
    """

    pool: Pool = "max"
    of_q: Map = lambda x: x
    of_k: Map = lambda x: x
    weigh_by_size: bool = False

    def over(self, x: Tensor, there: Tensor) -> Tensor:
        """(..., D) from x (..., S, D) and there (..., S) bool; 0 where nothing is there."""
        if self.pool == "max":
            most = x.masked_fill(~there[..., None], -torch.inf).amax(-2)
            return most.masked_fill(~there.any(-1)[..., None], 0.0)
        total = x.masked_fill(~there[..., None], 0.0).sum(-2)
        return total if self.pool == "sum" else total / there.sum(-1).clamp(min=1)[..., None]


class Summaries(NamedTuple):
    """One slot per region: k (B, H, R, D), v (B, H, R, Dv), size (B, R) long: tokens in it, 0 = no such region."""

    k: Tensor
    v: Tensor
    size: Tensor


def summarise(q: Tensor, k: Tensor, v: Tensor, real: Tensor, pooling: Pooling) -> Summaries:
    """Regions side by side: q, k (B, H, R, S, D), v (B, H, R, S, Dv), real (B, R, S) bool."""
    there = real[:, None].expand(*k.shape[:-1])
    of_k, of_q = pooling.over(pooling.of_k(k), there), pooling.over(pooling.of_q(q), there)
    inside = (of_q[..., None, :] @ k.mT)[..., 0, :] * k.shape[-1] ** -0.5
    values = (_softmax(inside, there)[..., None, :] @ v)[..., 0, :]
    return Summaries(of_k, values, real.sum(-1))


def fixed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    real: Tensor,
    segment: int,
    pooling: Pooling,
    *,
    causal: bool,
    own_region: bool = False,
    past: Summaries | None = None,
) -> tuple[Tensor, Summaries]:
    """Direct: the query's own segment of `segment` tokens, up to it if causal. Regions: the other (earlier) ones.

    own_region: the own segment is also a region (not causal only), as in the public code; then p has two routes to it.
    past: summaries of the segments before the first token here. Also returns the summaries of the segments here.
    """
    batch, _, t, dim = k.shape
    q, k, v, real = _cut(segment, q, k, v, real)
    regions = every = summarise(q, k, v, real, pooling)
    before = 0
    if past is not None:
        before = past.size.shape[1]
        joined = (torch.cat([past.k, regions.k], 2), torch.cat([past.v, regions.v], 2))
        every = Summaries(*joined, torch.cat([past.size, regions.size], 1))
    number = torch.arange(k.shape[2], device=k.device)
    order = torch.arange(-before, k.shape[2], device=k.device)  # of the regions; negative = before the first token
    other = order < number[:, None] if causal else (order != number[:, None]) | own_region
    slots = (every.size > 0)[:, None, None, None] & other[:, None]  # (B, 1, R, 1, regions)

    near = real[:, None, :, None, :].expand(batch, 1, -1, segment, -1)
    if causal:
        near = near & torch.ones(segment, segment, dtype=torch.bool, device=k.device).tril()
    scale = dim**-0.5
    direct = q @ k.mT * scale  # (B, H, R, S, S)
    far = _weighed(torch.einsum("bhrsd,bhmd->bhrsm", q, every.k) * scale, every.size[:, None, None, None], pooling)
    seen = torch.cat([near, slots.expand(-1, -1, -1, segment, -1)], -1)
    weights = _softmax(torch.cat([direct, far], -1), seen)
    out = weights[..., :segment] @ v + torch.einsum("bhrsm,bhmd->bhrsd", weights[..., segment:], every.v)
    return out.flatten(2, 3)[:, :, :t], regions


def logsparse(q: Tensor, k: Tensor, v: Tensor, real: Tensor, pooling: Pooling) -> Tensor:
    """Causal. Direct: the token itself. Regions: the blocks of 1, 2, 4, … tokens that the binary digits of i name.

    i = 11 = 1011₂ sees [10, 11), [8, 10) and [0, 8) (ours: the paper's dyadic scheme is not stated). O(T log T).
    """
    t, scale = k.shape[2], k.shape[3] ** -0.5
    i = torch.arange(t, device=k.device)
    logits, values, seen = [(q * k).sum(-1) * scale], [v], [real[:, None]]
    for p in range(max(t - 1, 0).bit_length()):
        blocks = summarise(*_cut(1 << p, q, k, v, real), pooling)
        at = ((i >> p) - 1).clamp(min=0)  # the block before the one that i is in
        size = blocks.size[:, None, at]
        logits.append(_weighed((q * blocks.k[:, :, at]).sum(-1) * scale, size, pooling))
        values.append(blocks.v[:, :, at])
        seen.append((size > 0) & (i >> p & 1).bool())
    weights = _softmax(torch.stack(logits, -1), torch.stack(seen, -1))
    return torch.einsum("bhtl,bhtld->bhtd", weights, torch.stack(values, -2))


def axial(q: Tensor, k: Tensor, v: Tensor, real: Tensor, width: int, pooling: Pooling) -> Tensor:
    """Causal, over rows of `width` tokens (vertical). Direct: the query's row up to it, and its column above it.

    Regions: the other columns, each down to the row before the query's. O(T · (width + T / width))."""
    t, scale = k.shape[2], k.shape[3] ** -0.5
    q, k, v, real = _cut(width, q, k, v, real)
    q, k, v, real = q.transpose(2, 3), k.transpose(2, 3), v.transpose(2, 3), real.mT
    # now (B, H, columns, rows, D) and (B, columns, rows)
    columns, rows = k.shape[2:4]
    above = torch.ones(rows, rows, dtype=torch.bool, device=k.device).tril(-1)
    there = real[:, None, :, None] & above  # (B, 1, columns, rows, rows)
    of_k, of_q = (_running(f(x), real[:, None], pooling) for f, x in ((pooling.of_k, k), (pooling.of_q, q)))
    summary = _softmax(of_q @ k.mT * scale, there) @ v  # (B, H, columns, rows, Dv)
    size = there.sum(-1)[:, 0]  # (B, columns, rows)

    down = q @ k.mT * scale  # own column
    along = torch.einsum("bhcrd,bherd->bhcre", q, k) * scale  # own row: column c looks at column e
    apart = _weighed(torch.einsum("bhcrd,bherd->bhcre", q, of_k) * scale, size.mT[:, None, None], pooling)
    other = ~torch.eye(columns, dtype=torch.bool, device=k.device)[:, None]
    left = torch.ones(columns, columns, dtype=torch.bool, device=k.device).tril()[:, None]
    shape = (-1, 1, columns, rows, columns)
    row = (real.mT[:, None, None] & left).expand(shape)
    prefix = ((size.mT > 0)[:, None, None] & other).expand(shape)
    seen = torch.cat([there, row, prefix], -1)
    of_column, of_row, of_prefix = _softmax(torch.cat([down, along, apart], -1), seen).split(
        [rows, columns, columns], -1
    )
    out = of_column @ v
    out = out + torch.einsum("bhcre,bherd->bhcrd", of_row, v) + torch.einsum("bhcre,bherd->bhcrd", of_prefix, summary)
    return out.transpose(2, 3).flatten(2, 3)[:, :, :t]


def axial_rows(q: Tensor, k: Tensor, v: Tensor, real: Tensor, width: int, pooling: Pooling) -> Tensor:
    """Causal, over rows of `width` tokens (row-major). Direct: the query's row up to it. Regions: the earlier rows.

    A row is pooled by attention within it, and anew for each column: for queries of column t, qS is the q of the row's
    own cell in that column, and kS = Σ pl(j|r) k_j as V = Σ pl(j|r) v_j. O(T · (width + T / width))."""
    t, scale = k.shape[2], k.shape[3] ** -0.5
    q, k, v, real = _cut(width, q, k, v, real)  # (B, H, rows, columns, D) and (B, rows, columns)
    rows, columns = k.shape[2:4]
    whole = real[:, None, :, None, :]
    logits = pooling.of_q(q) @ pooling.of_k(k).mT * scale  # (B, H, rows, columns, columns)
    within = _softmax(logits, whole.expand(*logits.shape))
    keys, values = within @ k, within @ v

    near = whole & torch.ones(columns, columns, dtype=torch.bool, device=k.device).tril()
    along = q @ k.mT * scale
    size = torch.full((), columns, device=k.device)
    down = _weighed(torch.einsum("bhrcd,bhecd->bhrce", q, keys) * scale, size, pooling)  # row e in the query's column
    above = torch.ones(rows, rows, dtype=torch.bool, device=k.device).tril(-1)[:, None]
    shape = (real.shape[0], 1, rows, columns)
    seen = torch.cat([near.expand(*shape, columns), above.expand(*shape, rows)], -1)
    of_row, of_rows = _softmax(torch.cat([along, down], -1), seen).split([columns, rows], -1)
    out = of_row @ v + torch.einsum("bhrce,bhecd->bhrcd", of_rows, values)
    return out.flatten(2, 3)[:, :, :t]


def _running(x: Tensor, there: Tensor, pooling: Pooling) -> Tensor:
    """(..., rows, D): what `Pooling.over` gives for the rows before each, by running sums; there (..., rows) bool."""
    before = there.cumsum(-1)[..., None] - there[..., None].long()
    if pooling.pool == "max":
        most = x.masked_fill(~there[..., None], -torch.inf).cummax(-2).values
        shifted = pad(most, (0, 0, 1, 0), value=-torch.inf)[..., :-1, :]
        return shifted.masked_fill(before == 0, 0.0)
    total = pad(x.masked_fill(~there[..., None], 0.0).cumsum(-2), (0, 0, 1, 0))[..., :-1, :]
    return total if pooling.pool == "sum" else total / before.clamp(min=1)


def _softmax(logits: Tensor, seen: Tensor) -> Tensor:
    """Over the last axis, among what is seen; zeros where nothing is. Finite in both directions."""
    weights = logits.masked_fill(~seen, torch.finfo(logits.dtype).min).softmax(-1)
    return weights.masked_fill(~seen, 0.0)


def _weighed(logits: Tensor, size: Tensor, pooling: Pooling) -> Tensor:
    """The logits of regions of these sizes, as the pooling counts them."""
    return logits + size.clamp(min=1).to(logits.dtype).log() if pooling.weigh_by_size else logits


def _cut(size: int, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v (B, H, R, size, D) and real (B, R, size), padded at the end with zeros and False."""
    missing = -k.shape[2] % size
    whole = (pad(x, (0, 0, 0, missing)).unflatten(2, (-1, size)) for x in (q, k, v))
    return (*whole, pad(real, (0, missing)).unflatten(1, (-1, size)))  # type: ignore[return-value]
