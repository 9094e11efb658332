"""What policies ask to see of a prompt, computed by blocks of rows: never an N×N map."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.inference.call import AttentionCall

ELEMENTS = 1 << 20
"""Number of weights held at once while column sums are taken: what a core's cache holds."""


def last_queries(held: tuple[Tensor, Tensor] | None, call: AttentionCall, window: int) -> tuple[Tensor, Tensor]:
    """The last `window` real queries of each row, those of earlier forwards included.

    Returns q (B, Hq, W, D) aligned at the end, missing ones zero, and their columns (B, W) long, −1 = missing."""
    batch, heads, n, dim = call.q.shape
    columns = call.q_columns.expand(batch, n)
    if call.q_real is not None:
        columns = torch.where(call.q_real, columns, -1)
    q = call.q.detach()
    if call.q_real is None:  # the common case: nothing to search for
        q, columns = q[:, :, -window:], columns[:, -window:]
    if held is not None:
        q, columns = torch.cat([held[0], q], 2), torch.cat([held[1], columns], 1)
    if (short := window - q.shape[2]) > 0:
        q = torch.cat([q.new_zeros(batch, heads, short, dim), q], 2)
        columns = torch.cat([columns.new_full((batch, short), -1), columns], 1)
    order = (columns >= 0).long().argsort(dim=1, stable=True)[:, -window:]  # real ones to the end, in their order
    columns = columns.gather(1, order)
    q = q.gather(2, order[:, None, :, None].expand(-1, heads, -1, dim))
    return q.masked_fill((columns < 0)[:, None, :, None], 0.0).clone(), columns


def weights(call: AttentionCall, rows: slice, keys: int | None = None) -> Tensor:
    """Softmax weights (B, Hkv, G, n, M) float32 of some of a call's queries; zero rows for padding queries.

    `keys` looks at the first so many keys only: the caller knows that the rest is invisible."""
    k = call.k[:, :, :keys].float()
    batch, heads = k.shape[:2]
    q = call.q[:, :, rows].float()
    n = q.shape[2]
    group = q.shape[1] // heads
    logits = torch.matmul(q.reshape(batch, heads, group * n, -1), k.transpose(2, 3)).view(batch, heads, group, n, -1)
    logits = logits * call.scale
    if call.softcap is not None:
        logits = call.softcap * torch.tanh(logits / call.softcap)
    seen = call.visible(rows)[..., :keys]
    seen = seen.unflatten(1, (heads, group)) if seen.shape[1] > 1 else seen[:, :, None]
    logits = logits.masked_fill(~seen, -torch.inf)
    if call.sinks is not None:
        sinks = call.sinks.float().view(1, heads, group, 1, 1).expand(batch, -1, -1, n, 1)
        out = torch.cat([logits, sinks], -1).softmax(-1)[..., :-1]
    else:
        out = logits.softmax(-1).nan_to_num()
    if call.q_real is not None:
        out = out * call.q_real[:, None, None, rows, None]
    return out


def column_sums(call: AttentionCall) -> Tensor:
    """(B, Hkv, M) float32: each key's weight, summed over all real queries and over the queries of its group."""
    batch, hq, n, _ = call.q.shape
    hkv, m = call.k.shape[1:3]
    total = torch.zeros(batch, hkv, m, dtype=torch.float32, device=call.q.device)
    plain = call.plainly_causal and call.softcap is None and call.sinks is None
    strip = max(1, ELEMENTS // (batch * hq * m)) if call.q.device.type == "cpu" else max(1, 16 * ELEMENTS // (hq * m))
    k = call.k.float().transpose(2, 3) if plain else None
    for start in range(0, n, strip):
        stop = min(start + strip, n)
        if k is not None:
            total[:, :, :stop] += _causal_strip(call, k[..., :stop], start, stop)
        else:
            keys = stop if call.fresh and call.recipe.causal else m
            total[:, :, :keys] += weights(call, slice(start, stop), keys).sum((2, 3))
    return total


def _causal_strip(call: AttentionCall, k: Tensor, start: int, stop: int) -> Tensor:
    """(B, Hkv, stop): the sums of some queries under plain causality, whose mask is one triangle. k (B, Hkv, D,
    stop)."""
    batch, heads = k.shape[:2]
    q = call.q[:, :, start:stop].float() * call.scale
    logits = torch.matmul(q.reshape(batch, heads, -1, q.shape[-1]), k).view(batch, heads, -1, stop - start, stop)
    future = torch.ones(stop - start, stop - start, dtype=torch.bool, device=k.device).triu(1)
    logits[..., start:].masked_fill_(future, -torch.inf)
    return logits.softmax(-1).sum((2, 3))
