"""Keep everything: what every other policy is compared with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.inference.budget import UNLIMITED
from regard.inference.policy import CachePolicy, LayerView
from regard.registry import register


@register("full", kind="cache", families=("kv-cache",), cost="memory O(n)")
@dataclass(frozen=True)
class Full(CachePolicy):
    """Keep every entry."""

    budget = None
    lacks_budget = False  # type: ignore[assignment]

    def importance(self, view: LayerView) -> Tensor:
        return torch.zeros(view.positions.shape, device=view.k.device)

    def wanted(self, view: LayerView) -> Tensor:
        return torch.full_like(view.lengths, UNLIMITED)
