"""Attention of the (token, head) pairs that are wanted, the others never computed: out is zero there."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.attend import attend
from regard.layers.multi_head_attention import Attending
from regard.patterns import Pattern


def attend_gathered(asked: Attending, selected: Tensor, pattern: Pattern | None) -> Tensor:
    """(B, H, N, D): attention of every (token, head) in selected (B, N, H) bool, exact zeros elsewhere.

    The wanted queries are moved next to each other, heads of one key/value head together, and attend as a shorter list
    against all its keys; then they are moved back. As much work as the longest list; waits for the device to learn its
    length. A pattern that differs by head or by row is followed head by head."""
    q, k, v = asked.q, asked.k, asked.v
    batch, kv_heads = k.shape[:2]
    group, n = q.shape[1] // kv_heads, q.shape[2]
    wanted = selected.transpose(1, 2)  # (B, H, N)
    if pattern is None or (pattern.heads is None and pattern.rows is None):
        # Every key/value head becomes a batch row of its own: its group's queries are one list, no key is repeated.
        lists = wanted.reshape(batch * kv_heads, group * n)
        queries = q.reshape(batch * kv_heads, group * n, q.shape[3])
        positions = asked.positions[:, None, None].expand(batch, kv_heads, group, -1).reshape(lists.shape)
        padding = None if asked.key_padding is None else asked.key_padding.repeat_interleave(kv_heads, 0)
        keys, values = (x.reshape(batch * kv_heads, 1, *x.shape[2:]) for x in (k, v))
        return _attend_lists(queries, keys, values, lists, positions, padding, pattern).reshape(
            *q.shape[:3], v.shape[3]
        )
    outs = []
    for h in range(q.shape[1]):
        kv = slice(h // group, h // group + 1)
        own = pattern.for_head(h)
        outs.append(_attend_lists(q[:, h], k[:, kv], v[:, kv], wanted[:, h], asked.positions, asked.key_padding, own))
    return torch.stack(outs, 1)


def _attend_lists(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    wanted: Tensor,
    positions: Tensor,
    key_padding: Tensor | None,
    pattern: Pattern | None,
) -> Tensor:
    """q (R, L, D), k (R, 1, M, D), v (R, 1, M, Dv), wanted and positions (R, L) → (R, L, Dv), zeros elsewhere."""
    longest = int(wanted.sum(-1).max()) if wanted.numel() else 0
    order = (~wanted).to(torch.uint8).argsort(dim=-1, stable=True)[:, :longest]  # wanted ones first, in their order
    held = wanted.gather(1, order)[..., None]
    compact = q.gather(1, order[..., None].expand(-1, -1, q.shape[2]))
    q_positions = positions.gather(1, order) if pattern is not None else None
    out = attend(compact[:, None], k, v, pattern=pattern, key_padding=key_padding, q_positions=q_positions)[:, 0]
    out = out.masked_fill(~held, 0.0)
    return out.new_zeros((*q.shape[:2], v.shape[3])).scatter(1, order[..., None].expand_as(out), out)
