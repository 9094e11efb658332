"""Keep entries at random: the floor of every table."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.inference.budget import Budget
from regard.inference.policy import CachePolicy, LayerView
from regard.inference.settings import put, whole
from regard.registry import register


@register("random", kind="cache", families=("kv-cache",), cost="memory O(budget + generated)")
@dataclass(frozen=True)
class Random(CachePolicy):
    """Keep entries at random, uniformly, as a function of seed, layer, KV head and position alone.

    Rows of one length so keep the same positions, whatever batch they are in.
    """

    budget: Budget | int | float | str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        put(self, "budget", Budget.parse(self.budget))
        whole(self, "seed", 0)

    def importance(self, view: LayerView) -> Tensor:
        heads = torch.arange(view.positions.shape[1], device=view.positions.device)[None, :, None]
        start = _mix(_mix(_mix(torch.tensor(self.seed % 2**62)) + view.layer)).to(heads.device)
        return (_mix(_mix(start + heads) + view.positions) & (2**53 - 1)).double()


def _mix(x: Tensor) -> Tensor:
    """A bijection of 64-bit integers whose outputs look independent (SplitMix64; Steele et al. 2014)."""
    x = x - 7046029254386353131  # 0x9E3779B97F4A7C15 as a signed integer
    x = (x ^ _shift(x, 30)) * -4658895280553007687
    x = (x ^ _shift(x, 27)) * -7723592293110705685
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & (2 ** (64 - bits) - 1)  # torch's shift keeps the sign; this one does not
