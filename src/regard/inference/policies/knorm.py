"""Keys of small norm are attended to most; keep those."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.inference.budget import Budget
from regard.inference.policy import CachePolicy, LayerView
from regard.inference.settings import put
from regard.registry import Paper, register

_PAPER = Paper(
    "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression", "Devoto et al.", 2024, "2406.11430"
)


@register("knorm", kind="cache", paper=_PAPER, families=("kv-cache",), cost="memory O(budget + generated)")
@dataclass(frozen=True)
class KeyNorm(CachePolicy):
    """Keep the keys with the smallest Euclidean norm, as the cache holds them (rotation changes no norm)."""

    budget: Budget | int | float | str | None = None

    def __post_init__(self) -> None:
        put(self, "budget", Budget.parse(self.budget))

    def importance(self, view: LayerView) -> Tensor:
        return -view.k.to(torch.promote_types(view.k.dtype, torch.float32)).norm(dim=-1)
