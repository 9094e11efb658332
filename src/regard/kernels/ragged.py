"""Attention over a ragged cache: lanes of equal capacity side by side, one fused attention per group of lanes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.errors import ArgumentError
from regard.kernels.reference.softmax import softmax_with_lse
from regard.kernels.sdpa import over_cache


class LaneGroup(NamedTuple):
    """G lanes of one capacity C; a lane is what one (batch row, key/value head) holds of one layer.

    Slots from a lane's length on do not exist: their memory may hold anything, NaN included.
    """

    k: Tensor
    """(G, C, D)."""
    v: Tensor
    """(G, C, Dv)."""
    rows: Tensor
    """(G,) long: batch row of each lane."""
    heads: Tensor
    """(G,) long: key/value head of each lane."""
    lengths: Tensor
    """(G,) long, on the device of k."""
    positions: Tensor
    """(G, C) integers: the number of each key among its row's real tokens."""
    uniform: int | None
    """The length that all these lanes have, known without asking the device; None where they differ."""
    complete: bool
    """These are all B·Hkv lanes in row-major order, so that k is a (B, Hkv, C, D) as it lies."""


Visible = Callable[[LaneGroup], Tensor]


@overload
def ragged_attend(
    q: Tensor,
    groups: Sequence[LaneGroup],
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    visible: Visible | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...
@overload
def ragged_attend(
    q: Tensor,
    groups: Sequence[LaneGroup],
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    visible: Visible | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def ragged_attend(
    q: Tensor,
    groups: Sequence[LaneGroup],
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    visible: Visible | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of a few queries q (B, Hq, N, D) to every existing slot of their lanes: out (B, Hq, N, Dv).

    groups: together they hold each of the B·Hkv lanes once. softcap, sinks (Hq,) and the log-sum-exp (B, Hq, N) as in
    `regard.attend.attend`. visible(group) -> bool (G, N or 1, C): which slots the queries may see besides; what it says
    of slots that do not exist does not matter. A query that sees nothing gets zeros and −inf (with sinks: the sink).

    Lanes of one known length are cut to it and need no mask; softcap, sinks and the log-sum-exp are computed in plain
    torch, with logits (G, Hq/Hkv·N, C) in at least float32.

    Raises ArgumentError where the lanes do not fit the queries.
    """
    batch, heads, n, width = q.shape
    lanes = sum(group.k.shape[0] for group in groups)
    kv_heads = lanes // max(batch, 1)
    if kv_heads == 0 or lanes != batch * kv_heads:
        raise ArgumentError("groups", f"{lanes} lanes", f"as many for each of {batch} rows")
    if heads % kv_heads:
        raise ArgumentError("groups", f"{kv_heads} lanes a row", f"a divisor of the {heads} query heads")
    shape = (batch, kv_heads, (heads // kv_heads) * n, width)
    fused = softcap is None and sinks is None and not return_lse
    if len(groups) == 1 and groups[0].complete:
        stacked = q.reshape(lanes, 1, *shape[2:])
        out, lse = _group(stacked, groups[0], n, scale, softcap, sinks, visible, fused)
        out = out.reshape(batch, heads, n, -1)
        return (out, lse.view(batch, heads, n)) if return_lse and lse is not None else out
    stacked = q.reshape(shape)
    outs = q.new_zeros((*shape[:3], groups[0].v.shape[2]))
    held = torch.float64 if q.dtype == torch.float64 else torch.float32
    sums = None if fused else q.new_full(shape[:3], -torch.inf, dtype=held)
    for group in groups:
        place = (group.rows, group.heads)
        out, lse = _group(stacked[place][:, None], group, n, scale, softcap, sinks, visible, fused)
        outs[place] = out[:, 0]
        if sums is not None and lse is not None:
            sums[place] = lse[:, 0]
    out = outs.view(batch, heads, n, -1)
    return (out, sums.view(batch, heads, n)) if return_lse and sums is not None else out


def _group(
    q: Tensor,
    group: LaneGroup,
    n: int,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    visible: Visible | None,
    fused: bool,
) -> tuple[Tensor, Tensor | None]:
    """(G, 1, r·N, Dv) and, unless fused, (G, 1, r·N) for q (G, 1, r·N, D): the r heads of a lane one below another."""
    k, v = group.k[:, None], group.v[:, None]
    seen = None if visible is None else visible(group)  # (G, N or 1, C)
    if group.uniform is not None:
        if group.uniform < k.shape[2]:
            k, v = k[:, :, : group.uniform], v[:, :, : group.uniform]
            seen = None if seen is None else seen[..., : group.uniform]
    else:
        exists = torch.arange(k.shape[2], device=k.device) < group.lengths[:, None]
        missing = ~exists[:, None, :, None]
        k, v = k.masked_fill(missing, 0), v.masked_fill(missing, 0)  # 0 · NaN = NaN: a mask alone does not keep it out
        seen = exists[:, None] if seen is None else seen & exists[:, None]
    if fused:
        return _fused(q, k, v, seen, n, scale), None
    return _plain(q, k, v, seen, n, scale, softcap, None if sinks is None else _of_lanes(sinks, group, q.shape[2] // n))


def _fused(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, n: int, scale: float) -> Tensor:
    if k.shape[2] == 0:
        return q.new_zeros((*q.shape[:3], v.shape[3]))
    if seen is None:
        return over_cache(q, k, v, scale)
    something = seen.any(-1, keepdim=True)
    mask = seen | ~something  # rows without a key are undefined in torch: let them see all, then drop what they saw
    if seen.shape[1] == 1:  # all queries alike: one row of the mask serves every head and query
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], scale=scale)
        return torch.where(something[:, None], out, 0.0)
    r = q.shape[2] // n
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.repeat(1, r, 1)[:, None], scale=scale)
    return torch.where(something.repeat(1, r, 1)[:, None], out, 0.0)


def _plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor | None,
    n: int,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    lanes, _, rows, _ = q.shape
    held = torch.float64 if q.dtype == torch.float64 else torch.float32
    if k.shape[2] == 0:
        lse = q.new_full((lanes, 1, rows), -torch.inf, dtype=held)
        if sinks is not None:
            lse = sinks.to(held).repeat_interleave(n, 1)[:, None]
        return q.new_zeros((lanes, 1, rows, v.shape[3])), lse
    logits = q.to(held) @ k.to(held).mT * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    by_head = logits.view(lanes, rows // n, n, -1)
    weights, lse = softmax_with_lse(by_head, None if seen is None else seen[:, None], sinks)
    out = weights.view(logits.shape) @ v.to(held)
    return out.to(q.dtype), lse.view(lanes, 1, rows)


def _of_lanes(sinks: Tensor, group: LaneGroup, r: int) -> Tensor:
    """(Hq,) → (G, r): the sinks of each lane's query heads."""
    return sinks.view(-1, r)[group.heads]
