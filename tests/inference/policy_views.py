"""Views of small prompts for tests of policies, with slow definitions of what they show."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from regard.inference.apply import select
from regard.inference.policy import CachePolicy, LayerView

KV_HEADS, GROUP, DIM, WINDOW = 2, 2, 4, 16


class Prompt:
    """One row: q (Hq, n, D) and k, v (H, n, D) in fp64, and the weights of every query, by loops over scalars."""

    def __init__(self, n: int, seed: int = 0, *, group: int = GROUP, heads: int = KV_HEADS, **logits: float) -> None:
        draw = torch.Generator().manual_seed(1000 * seed + n)
        self.n, self.heads, self.group = n, heads, group
        self.q = 2 * torch.randn(heads * group, n, DIM, generator=draw, dtype=torch.float64)
        self.k = 2 * torch.randn(heads, n, DIM, generator=draw, dtype=torch.float64)
        self.v = torch.randn(heads, n, DIM, generator=draw, dtype=torch.float64)
        self.softcap = logits.get("softcap")
        self.sink = logits.get("sink")
        self.reach = int(logits.get("reach", 10**6))  # how many keys back a query sees, itself included
        self.scale = 0.5

    def weights(self, head: int, query: int, keys: Sequence[int] | None = None) -> dict[int, float]:
        """Softmax weights of one query of one query head over these keys (all it may see by default)."""
        q = self.q[head, query].tolist()
        logits = {}
        for j in range(query + 1) if keys is None else keys:
            if query - self.reach < j <= query:
                k = self.k[head // self.group, j].tolist()
                x = self.scale * sum(a * b for a, b in zip(q, k, strict=True))
                logits[j] = x if self.softcap is None else self.softcap * math.tanh(x / self.softcap)
        total = sum(math.exp(x) for x in logits.values()) + (0.0 if self.sink is None else math.exp(self.sink))
        return {j: math.exp(x) / total for j, x in logits.items()}

    def column_sums(self, head: int) -> list[float]:
        """For a KV head: each key's weight summed over all queries and over the heads of the group."""
        sums = [0.0] * self.n
        for g in range(self.group):
            for i in range(self.n):
                for j, w in self.weights(head * self.group + g, i).items():
                    sums[j] += w
        return sums

    def last_row(self, head: int) -> list[float]:
        """For a KV head: the last query's weights, averaged over the group."""
        row = [0.0] * self.n
        for g in range(self.group):
            for j, w in self.weights(head * self.group + g, self.n - 1).items():
                row[j] += w / self.group
        return row


def view_of(prompts: Sequence[Prompt], layer: int = 0, layers: int = 2, window: int = WINDOW) -> LayerView:
    """What a policy sees of these rows when they are sealed in one batch. Where a lane has ended there is NaN."""
    first = prompts[0]
    batch, heads, length = len(prompts), first.heads, max(p.n for p in prompts)
    k = torch.full((batch, heads, length, DIM), torch.nan, dtype=torch.float64)
    v = k.clone()
    sums = torch.full((batch, heads, length), torch.nan, dtype=torch.float64)
    row = sums.clone()
    positions = torch.full((batch, heads, length), -1)
    queries = torch.zeros(batch, heads * first.group, window, DIM, dtype=torch.float64)
    query_positions = torch.full((batch, window), -1)
    for b, p in enumerate(prompts):
        k[b, :, : p.n], v[b, :, : p.n] = p.k, p.v
        positions[b, :, : p.n] = torch.arange(p.n)
        sums[b, :, : p.n] = torch.tensor([p.column_sums(h) for h in range(heads)])
        row[b, :, : p.n] = torch.tensor([p.last_row(h) for h in range(heads)])
        seen = min(window, p.n)
        queries[b, :, window - seen :] = p.q[:, p.n - seen :]
        query_positions[b, window - seen :] = torch.arange(p.n - seen, p.n)
    back = query_positions[:, None, :, None] - positions[:, :, None, :]
    return LayerView(
        layer=layer,
        layers=layers,
        k=k,
        v=v,
        positions=positions,
        lengths=(positions >= 0).sum(-1),
        prompt=torch.tensor([p.n for p in prompts]),
        last_queries=queries,
        query_positions=query_positions,
        column_sums=sums,
        last_row=row,
        scale=first.scale,
        softcap=first.softcap,
        sinks=None if first.sink is None else torch.full((heads * first.group,), first.sink, dtype=torch.float64),
        visible=(back >= 0) & (back < first.reach),
    )


def kept(view: LayerView, index: Tensor, counts: Tensor) -> list[list[list[int]]]:
    """Positions kept, by row and KV head."""
    batch, heads = counts.shape
    return [[view.positions[b, h][index[b, h, : counts[b, h]]].tolist() for h in range(heads)] for b in range(batch)]


def sealed(policy: CachePolicy, *prompts: Prompt, layer: int = 0) -> list[list[list[int]]]:
    """Positions that a policy keeps of these rows, sealed in one batch: by row and KV head."""
    view = view_of(prompts, layer=layer)
    return kept(view, *select(policy, view))
