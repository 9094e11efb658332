"""TOVA: keep what the newest query attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from regard.inference.budget import Budget
from regard.inference.policy import CachePolicy, LayerView, Needs
from regard.inference.settings import put
from regard.registry import Paper, register

_PAPER = Paper("Transformers are Multi-State RNNs", "Oren et al.", 2024, "2401.06104")


@register("tova", kind="cache", paper=_PAPER, families=("kv-cache", "sparse-inference"), cost="memory O(budget)")
@dataclass(frozen=True)
class Tova(CachePolicy):
    """Token omission via attention: the keys with the largest weights of the newest query stay.

    The weights are averaged over the query heads of a KV group and each KV head decides for itself; the paper averages
    over all heads of a layer and decides once. After each decoded token the key with the smallest weight goes, which
    may be any, the newest included.
    """

    budget: Budget | int | float | str | None = None

    acts: ClassVar[Literal["seal", "step"]] = "step"
    growth: ClassVar[str] = "nothing"

    def __post_init__(self) -> None:
        put(self, "budget", Budget.parse(self.budget))

    def needs(self) -> Needs:
        return Needs(last_queries=1, last_row=True)

    def importance(self, view: LayerView) -> Tensor:
        assert view.last_row is not None, "the policy asked for last_row"
        return view.last_row
