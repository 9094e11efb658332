"""The contract of a KV-cache policy: what it needs to see, how it scores keys, when it acts.

Budget, grouped queries, padding, positions, raggedness and the freeing of memory are the library's. A policy is one
dataclass with one method.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from regard.inference.budget import Budget

MUST, NEVER = torch.inf, -torch.inf


@dataclass(frozen=True)
class Needs:
    """What the seam must observe for a policy while it attends, computed by row blocks, never as an N×N map.

    last_queries: keep the last W real queries of each row. column_sums: fp32 sum over all real queries and over the
    query heads of a group of each key's softmax weight. last_row: the newest real query's weights, averaged over the group.
    """

    last_queries: int = 0
    column_sums: bool = False
    last_row: bool = False

    def __or__(self, other: Needs) -> Needs:
        return Needs(
            max(self.last_queries, other.last_queries),
            self.column_sums or other.column_sums,
            self.last_row or other.last_row,
        )


@dataclass
class LayerView:
    """One layer's store as a policy sees it: lanes side by side, padded at the end, sorted by position.

    layer: this layer's number, of `layers` that cache. k (B, H, L, D), v (B, H, L, Dv); positions (B, H, L) long, the token's number among the row's real tokens, −1 where
    a lane has ended; lengths (B, H) long; prompt (B,) long: real tokens seen so far in each row.
    last_queries (B, Hq, W, D), aligned at the end (missing ones at the front are zeros), with
    query_positions (B, W) long, −1 = missing; column_sums and last_row (B, H, L) float32 — each None unless needed.
    `weights()` are the softmax weights (float32) of last_queries under the layer's own mask, scale, softcap and sinks.
    """

    layer: int
    layers: int
    k: Tensor
    v: Tensor
    positions: Tensor
    lengths: Tensor
    prompt: Tensor
    last_queries: Tensor | None = None
    query_positions: Tensor | None = None
    column_sums: Tensor | None = None
    last_row: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    sinks: Tensor | None = None
    visible: Tensor | None = None
    """(B, H or 1, W, L) bool: which stored keys each of last_queries may see."""

    @property
    def exists(self) -> Tensor:
        """(B, H, L) bool: slots that hold an entry."""
        return self.positions >= 0

    def weights(self, last: int) -> Tensor:
        """(B, H, G, last, L) float32: weights of the last `last` queries over this layer's keys, G = query heads per KV head.

        Rows of missing queries are zero. Softmax runs over all keys (and the sinks, whose share is dropped)."""
        assert self.last_queries is not None and self.query_positions is not None, "the policy did not ask for last_queries"
        batch, heads, length, dim = self.k.shape
        q = self.last_queries[:, :, -last:]
        group = q.shape[1] // heads
        q = q.reshape(batch, heads, group, q.shape[2], dim).float()
        logits = torch.einsum("bhgqd,bhkd->bhgqk", q, self.k.float()) * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        seen = self.exists[:, :, None, :]
        if self.visible is not None:
            seen = seen & self.visible[:, :, -last:]
        logits = logits.masked_fill(~seen[:, :, None], -torch.inf)
        if self.sinks is not None:
            extra = self.sinks.float().view(1, heads, group, 1, 1).expand(*logits.shape[:-1], 1)
            out = torch.cat([logits, extra], -1).softmax(-1)[..., :-1]
        else:
            out = logits.softmax(-1).nan_to_num()
        return out * (self.query_positions[:, None, None, -last:, None] >= 0)


class CachePolicy:
    """Base of all cache policies; subclasses are frozen dataclasses whose fields are their settings.

    acts: "seal" — once, at the end of the prompt; "step" — then, and again after each decoded token, when it removes as
    many entries per lane as that step added. growth: said in tables; what is added per decoded token.
    """

    acts: ClassVar[Literal["seal", "step"]] = "seal"
    growth: ClassVar[str] = "every generated token"
    budget: Budget | None

    def needs(self) -> Needs:
        """What must be observed. Nothing by default."""
        return Needs()

    def importance(self, view: LayerView) -> Tensor:
        """(B, H, L) float: larger = keep; MUST = stays whatever the budget (counted in it), NEVER = goes first."""
        raise NotImplementedError

    def counts(self, view: LayerView) -> Tensor:
        """(B, H) long: how many entries each lane keeps. The budget for every lane, unless a policy shares it out."""
        if self.budget is None:
            return view.lengths
        return self.budget.entries(view)
