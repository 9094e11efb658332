"""StreamingLLM: the first tokens, which soak up attention, and the most recent ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from regard.errors import require
from regard.inference.budget import Budget
from regard.inference.policy import MUST, CachePolicy, LayerView
from regard.inference.settings import argument, put, whole
from regard.registry import Paper, register

_PAPER = Paper("Efficient Streaming Language Models with Attention Sinks", "Xiao et al.", 2023, "2309.17453")
_AHEAD = 2.0**40  # above every position, below MUST; float64 holds _AHEAD − position exactly


def sinks_and_recent(view: LayerView, sinks: int) -> Tensor:
    """(B, H, L) float64: the newest entry first, then the first `sinks` tokens in order, then the later the better.

    A lane too small for sinks and a window so keeps the newest token and the earliest sinks.
    """
    place = view.positions.double()
    score = torch.where(view.positions < sinks, _AHEAD - place, place)
    return score.masked_fill(place == place.amax(-1, keepdim=True), MUST)


@register("streaming", kind="cache", paper=_PAPER, families=("kv-cache", "sparse-inference"), cost="memory O(budget)")
@dataclass(frozen=True)
class Streaming(CachePolicy):
    """StreamingLLM: attention sinks and a window of the most recent tokens.

    The first `sinks` tokens of a row and its most recent budget − sinks; the window slides as tokens are generated.
    Positions stay true (the paper renumbers them inside the cache). Raises ArgumentError when a budget given as an int
    leaves no room for a window; a smaller share of a short prompt keeps the newest token and the earliest sinks.
    """

    budget: Budget | int | float | str | None = None
    sinks: int = 4

    acts: ClassVar[Literal["seal", "step"]] = "step"
    growth: ClassVar[str] = "nothing"

    def __post_init__(self) -> None:
        budget = Budget.parse(self.budget)
        put(self, "budget", budget)
        whole(self, "sinks", 0)
        if budget is not None and isinstance(budget.value, int):
            fits = self.sinks < budget.value
            require(fits, argument(self, "sinks"), self.sinks, f"fewer than the budget of {budget.value}")

    def importance(self, view: LayerView) -> Tensor:
        return sinks_and_recent(view, self.sinks)

    @property
    def slides(self) -> int | None:
        return self.sinks
