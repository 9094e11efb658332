"""H2O: half the budget for the most recent tokens, half for those that gathered most attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from regard.inference.budget import Budget
from regard.inference.policy import MUST, CachePolicy, LayerView, Needs
from regard.inference.settings import put
from regard.registry import Paper, register

_PAPER = Paper(
    "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models",
    "Zhang et al.",
    2023,
    "2306.14048",
)


@register(
    "h2o",
    kind="cache",
    paper=_PAPER,
    families=("kv-cache", "sparse-inference"),
    cost="memory O(budget); needs every prompt query's weights, O(n²·d) once, by blocks",
)
@dataclass(frozen=True)
class H2O(CachePolicy):
    """Heavy hitters and recent tokens.

    The most recent budget // 2 entries of a lane always stay; the rest of the budget goes to the keys whose softmax
    weights, summed in float32 over all real queries so far and over the query heads of a KV group, are largest. At each
    decoded token the smallest sum among the older ones goes.
    """

    budget: Budget | int | float | str | None = None

    acts: ClassVar[Literal["seal", "step"]] = "step"
    growth: ClassVar[str] = "nothing"

    def __post_init__(self) -> None:
        put(self, "budget", Budget.parse(self.budget))

    def needs(self) -> Needs:
        return Needs(last_queries=1, column_sums=True)

    def importance(self, view: LayerView) -> Tensor:
        assert view.column_sums is not None, "the policy asked for column_sums"
        return view.column_sums.masked_fill(view.recent(2), MUST)
