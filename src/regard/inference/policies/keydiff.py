"""KeyDiff: keep the keys least like the others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from regard.inference.budget import Budget
from regard.inference.policy import CachePolicy, LayerView
from regard.inference.settings import put
from regard.registry import Paper, register

_PAPER = Paper(
    "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in Resource-Constrained "
    "Environments",
    "Park et al.",
    2025,
    "2504.15364",
)


@register("keydiff", kind="cache", paper=_PAPER, families=("kv-cache",), cost="memory O(budget + generated)")
@dataclass(frozen=True)
class KeyDiff(CachePolicy):
    """Keep the keys whose cosine similarity to the mean of the lane's normalised keys is smallest."""

    budget: Budget | int | float | str | None = None

    def __post_init__(self) -> None:
        put(self, "budget", Budget.parse(self.budget))

    def importance(self, view: LayerView) -> Tensor:
        k = view.k.to(torch.promote_types(view.k.dtype, torch.float32)).masked_fill(~view.exists[..., None], 0.0)
        anchor = normalize(k, dim=-1).sum(2, keepdim=True) / view.lengths[..., None, None].clamp_min(1)
        return -cosine_similarity(k, anchor, dim=-1)
