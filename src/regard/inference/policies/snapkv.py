"""SnapKV: keep what the prompt's last queries look at, with its neighbours."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from regard.errors import require
from regard.inference.budget import Budget
from regard.inference.policy import MUST, CachePolicy, LayerView, Needs
from regard.inference.settings import argument, one_of, put, whole
from regard.registry import Paper, register

_PAPER = Paper("SnapKV: LLM Knows What You are Looking for Before Generation", "Li et al.", 2024, "2404.14469")


@register(
    "snapkv",
    kind="cache",
    paper=_PAPER,
    families=("kv-cache", "sparse-inference"),
    cost="memory O(budget + generated); O(window·n·d) once per layer",
)
@dataclass(frozen=True)
class SnapKV(CachePolicy):
    """Keep what the prompt's last queries look at, with its neighbours.

    The last `window` real tokens of a row always stay. Each of them votes for the earlier keys with its softmax weights
    over all keys; votes are summed over the window and over the query heads of a KV group, cropped to the keys before
    the window, and pooled over `kernel` neighbouring entries (stride 1, zero padding), by maximum or average.

    Raises ArgumentError when a budget given as an int is smaller than the window. Where a share or a payload comes out
    smaller, the most recent tokens of the window stay.
    """

    budget: Budget | int | float | str | None = None
    window: int = 16
    kernel: int = 7
    pooling: str = "max"

    def __post_init__(self) -> None:
        budget = Budget.parse(self.budget)
        put(self, "budget", budget)
        whole(self, "window", 1)
        whole(self, "kernel", 1)
        require(self.kernel % 2 == 1, argument(self, "kernel"), self.kernel, "an odd int")
        one_of(self, "pooling", ("max", "average"))
        if budget is not None and isinstance(budget.value, int):
            fits = self.window <= budget.value
            require(fits, argument(self, "window"), self.window, f"at most the budget of {budget.value}")

    def needs(self) -> Needs:
        return Needs(last_queries=self.window)

    def importance(self, view: LayerView) -> Tensor:
        recent = view.positions >= view.prompt[:, None, None] - self.window
        votes = view.weights(self.window).sum((2, 3))
        votes = votes.masked_fill(recent | ~view.exists, 0.0)  # crop, then pool
        pad = self.kernel // 2
        if self.pooling == "max":
            votes = max_pool1d(votes, self.kernel, 1, pad)  # pads with −inf, which no vote is below: as good as zero
        else:
            votes = avg_pool1d(votes, self.kernel, 1, pad)
        return votes.masked_fill(recent, MUST)
