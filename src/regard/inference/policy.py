"""The contract of a KV-cache policy: what it needs to see, how it scores keys, when it acts.

Budget, grouped queries, padding, positions, raggedness and the freeing of memory are the library's. A policy is one
dataclass with one method.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from regard.errors import ArgumentError
from regard.inference.budget import ALLOWED, UNLIMITED, Budget

MUST, NEVER = torch.inf, -torch.inf


@dataclass(frozen=True)
class Needs:
    """What the seam must observe for a policy while it attends, computed by row blocks, never as an N×N map.

    last_queries: keep the last W real queries of each row. column_sums: fp32 sum over all real queries and over the
    query heads of a group of each key's softmax weight. last_row: the newest real query's weights, averaged over the
    group.
    """

    last_queries: int = 0
    column_sums: bool = False
    last_row: bool = False

    @property
    def any(self) -> bool:
        """Is there anything to observe?"""
        return bool(self.last_queries or self.column_sums or self.last_row)

    def __or__(self, other: Needs) -> Needs:
        return Needs(
            max(self.last_queries, other.last_queries),
            self.column_sums or other.column_sums,
            self.last_row or other.last_row,
        )


@dataclass
class LayerView:
    """One layer's store as a policy sees it: lanes side by side, padded at the end, sorted by position when sealed.

    layer: this layer's number, of `layers` that cache. k (B, H, L, D), v (B, H, L, Dv); positions (B, H, L) long, the
    token's number among the row's real tokens, −1 where a lane has ended (k, v and the rest may hold anything there);
    lengths (B, H) long; prompt (B,) long: each row's real tokens when it was last sealed (while sealing: up to now).
    last_queries (B, Hq, W, D), aligned at the end (missing ones at the front are zeros), with
    query_positions (B, W) long, −1 = missing; column_sums and last_row (B, H, L) float32 — each None unless needed.
    `weights()` are the softmax weights of last_queries under the layer's own mask, scale, softcap and sinks.
    target (B, H) long: how many entries each lane ends with; set by `apply` before it asks for importance.
    limit: that number, where it is one for all lanes and every slot holds an entry; None = not known on the host.
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
    window_weights: Tensor | None = None
    """(B, H, G, W, L) float32: weights of last_queries where they attend to other than the cached keys (latent)."""
    target: Tensor | None = None
    limit: int | None = None

    @property
    def exists(self) -> Tensor:
        """(B, H, L) bool: slots that hold an entry."""
        return self.positions >= 0

    def recent(self, divisor: int) -> Tensor:
        """(B, H, L) bool: each lane's most recent target // divisor entries, for a divisor of at least 2."""
        assert self.target is not None, "asked before apply has set a target"
        if self.limit is not None:
            older = self.positions.shape[-1] - self.limit // divisor
            newest_older = self.positions.kthvalue(older, keepdim=True).values
        else:
            newest_first = self.positions.sort(dim=-1, descending=True).values
            newest_older = newest_first.gather(-1, (self.target // divisor)[..., None])
        return self.positions > newest_older

    def weights(self, last: int) -> Tensor:
        """(B, H, G, last, L): weights of the last `last` queries over this layer's keys, G = query heads per KV head.

        In float32, or float64 for float64 keys. Rows of missing queries are zero, and so are those of queries that see
        no key. Softmax runs over all keys (and the sinks, whose share is dropped)."""
        if self.window_weights is not None:
            return self.window_weights[:, :, :, -last:]
        assert self.last_queries is not None and self.query_positions is not None, "the policy did not ask for queries"
        batch, heads, _, dim = self.k.shape
        exact = torch.promote_types(self.k.dtype, torch.float32)
        q = self.last_queries[:, :, -last:]
        group = q.shape[1] // heads
        q = q.reshape(batch, heads, group, q.shape[2], dim).to(exact)
        logits = torch.einsum("bhgqd,bhkd->bhgqk", q, self.k.to(exact)) * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        seen = self.exists[:, :, None, :]
        if self.visible is not None:
            seen = seen & self.visible[:, :, -last:]
        logits = logits.masked_fill(~seen[:, :, None], -torch.inf)
        if self.sinks is not None:
            extra = self.sinks.to(exact).view(1, heads, group, 1, 1).expand(*logits.shape[:-1], 1)
            out = torch.cat([logits, extra], -1).softmax(-1)[..., :-1]
        else:
            out = logits.softmax(-1)
        blind = ~seen.any(-1, keepdim=True) | (self.query_positions[:, None, -last:, None] < 0)
        return out.masked_fill(blind[:, :, None], 0.0)  # never nan_to_num: a NaN that comes from the keys must be seen


class CachePolicy:
    """Base of all cache policies; subclasses are frozen dataclasses whose fields are their settings.

    acts: "seal" — once, at the end of the prompt; "step" — then, and again after each decoded token, when it removes as
    many entries per lane as that step added. growth: said in tables; what is added per decoded token.
    """

    acts: ClassVar[Literal["seal", "step"]] = "seal"
    growth: ClassVar[str] = "every generated token"
    per_head: ClassVar[bool] = False
    """Must KV heads keep different entries? Refused where a layer caches one latent for all heads."""
    budget: Budget | int | float | str | None

    @property
    def lacks_budget(self) -> bool:
        """Must it be given a budget before it can act?"""
        return self.budget is None

    def needs(self) -> Needs:
        """What must be observed. Nothing by default."""
        return Needs()

    def needs_at(self, layer: int) -> Needs:
        """What must be observed in one layer: `needs()`, or nothing where the policy leaves the layer alone."""
        return self.needs()

    def check_model(self, heads: list[int]) -> None:
        """Raise ArgumentError when the policy's data does not fit a model of so many KV heads in each caching layer."""

    def importance(self, view: LayerView) -> Tensor:
        """(B, H, L) float: larger = keep; MUST = stays whatever the budget (counted in it), NEVER = goes first.

        Where there are more MUST than the lane may keep, the most recent of them stay."""
        raise NotImplementedError

    @property
    def slides(self) -> int | None:
        """n, where at each step the oldest entry goes but for the first n tokens of the row; None = by importance.

        Nothing but speed hangs on it: in a lane that may hold more than n entries, what it names must be what
        `importance` scores lowest."""
        return None

    def counts(self, view: LayerView) -> Tensor:
        """(B, H) long: how many entries each lane keeps when sealed. The budget, unless a policy shares it out."""
        return torch.minimum(self.wanted(view), view.lengths)

    def limits(self, view: LayerView) -> Tensor:
        """(B, H) long: how many entries each lane may hold while decoding; UNLIMITED where every new one stays."""
        if self.acts == "seal":
            return torch.full_like(view.lengths, UNLIMITED)
        return self.wanted(view)

    def wanted(self, view: LayerView) -> Tensor:
        """(B, H) long: the budget in entries, also where a lane holds fewer. ArgumentError when there is no budget."""
        budget = Budget.parse(self.budget)
        if budget is None:
            raise ArgumentError(f"{type(self).__name__}.budget", None, ALLOWED)
        return budget.wanted(view)
