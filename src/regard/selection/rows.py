"""Rows without their padding: real tokens moved to the front, so that blocks count real tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.errors import require


def moved_to_front(key_padding: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Each tensor (B, H, M, D) with the real tokens of every row first, in their order; key_padding (B, M) or None."""
    if key_padding is None:
        return tensors
    order = (~key_padding).to(torch.uint8).argsort(dim=-1, stable=True)[:, None, :, None]
    return tuple(x.gather(2, order.expand(x.shape)) for x in tensors)


def real_lengths(k: Tensor, key_padding: Tensor | None) -> Tensor:
    """(B,) long: how many real tokens each row of k (B, H, M, D) has."""
    if key_padding is None:
        return torch.full(k.shape[:1], k.shape[2], dtype=torch.long, device=k.device)
    return key_padding.sum(-1)


def query_positions(q: Tensor, k: Tensor, key_padding: Tensor | None, q_positions: Tensor | None) -> Tensor:
    """(B, N) long: as given, else the queries are the last N columns of the keys. Raises ArgumentError."""
    batch, n, m = q.shape[0], q.shape[2], k.shape[2]
    if q_positions is not None:
        require(
            tuple(q_positions.shape) == (batch, n), "q_positions", tuple(q_positions.shape), f"{(batch, n)}: (B, N)"
        )
        return q_positions.long()
    require(n <= m, "q_positions", f"None with more queries ({n}) than keys ({m})", f"({batch}, {n}) integers")
    if key_padding is None:
        return torch.arange(m - n, m, device=q.device).expand(batch, n)
    return (key_padding.long().cumsum(-1) - 1).clamp(min=0)[:, m - n :]
