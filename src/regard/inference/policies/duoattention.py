"""DuoAttention: the whole context for retrieval heads, sinks and a window for the others."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor

from regard.errors import ArgumentError, require
from regard.inference.budget import UNLIMITED, Budget
from regard.inference.head_table import HeadTable, packaged_tables
from regard.inference.policies.streaming import sinks_and_recent
from regard.inference.policy import CachePolicy, LayerView
from regard.inference.settings import argument, put, whole
from regard.registry import Paper, register

_PAPER = Paper(
    "DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads",
    "Xiao et al.",
    2024,
    "2410.10819",
)
Scores = tuple[tuple[float, ...], ...]


@register(
    "duoattention",
    kind="cache",
    paper=_PAPER,
    families=("kv-cache", "heads", "sparse-inference"),
    cost="memory O(retrieval heads·n + streaming heads·(sinks + recent))",
)
@dataclass(frozen=True)
class DuoAttention(CachePolicy):
    """Retrieval heads keep every entry, streaming heads the first `sinks` tokens and the most recent `recent`.

    `table` scores the KV heads: the name of a packaged table, a .json or .tsv file (see HeadTable), or the scores
    themselves, [[layer 0's heads], …]. Which heads are retrieval heads is said in one of two ways:

    sparsity: this share of the heads streams. τ is that quantile of all scores and score ≥ τ retrieves; of equal scores
    the earlier layer and head retrieves. 0 = none streams, 1 = all stream.

    budget: the mean number of entries over all layers and KV heads. As many top-scoring heads retrieve as fit while the
    others keep sinks + recent; what is left over lengthens windows, evenly, one token more for higher-scoring heads, so
    that the mean is exact to the token for a prompt longer than the budget. A budget below sinks + recent shortens
    `recent`, and then the sinks, and no head retrieves; one that the prompt does not exceed lets all heads retrieve.

    While decoding, retrieval heads grow and windows slide. Raises ArgumentError when the table does not fit the model.
    """

    table: str | HeadTable | Scores | None = None
    sparsity: float | None = None
    budget: Budget | int | float | str | None = None
    sinks: int = 64
    recent: int = 256

    acts: ClassVar[Literal["seal", "step"]] = "step"
    growth: ClassVar[str] = "every generated token in retrieval heads, nothing in streaming heads"
    per_head: ClassVar[bool] = True

    def __post_init__(self) -> None:
        budget = Budget.parse(self.budget)
        put(self, "budget", budget)
        whole(self, "sinks", 0)
        whole(self, "recent", 1)
        put(self, "_heads", self._load())
        if not isinstance(self.table, str):
            put(self, "table", self.heads.scores)
        if self.sparsity is not None:
            share = isinstance(self.sparsity, (int, float)) and not isinstance(self.sparsity, bool)
            require(share and 0 <= self.sparsity <= 1, argument(self, "sparsity"), self.sparsity, "a number in [0, 1]")
            put(self, "sparsity", float(self.sparsity))
            require(budget is None, argument(self, "sparsity"), self.sparsity, "either sparsity or a budget, not both")

    @property
    def lacks_budget(self) -> bool:
        return self.budget is None and self.sparsity is None

    @property
    def heads(self) -> HeadTable:
        """The table itself, as it was when the policy was made."""
        return cast(HeadTable, self.__dict__["_heads"])

    def _load(self) -> HeadTable:
        if self.table is None:
            names = ", ".join(packaged_tables()) or "there are none"
            raise ArgumentError(argument(self, "table"), None, f"a file, the scores, or a packaged table ({names})")
        if isinstance(self.table, str):
            return HeadTable.load(self.table)
        return self.table if isinstance(self.table, HeadTable) else HeadTable(self.table)

    def importance(self, view: LayerView) -> Tensor:
        return sinks_and_recent(view, self.sinks)

    @property
    def slides(self) -> int | None:
        return self.sinks

    def counts(self, view: LayerView) -> Tensor:
        return torch.minimum(self.limits(view), view.lengths)

    def check_model(self, heads: list[int]) -> None:
        table = self.heads
        of = f" of {table.model}" if table.model else ""
        allowed = (
            f"scores for {len(heads)} layers of {'/'.join(map(str, dict.fromkeys(heads)))} KV heads, as the model has"
        )
        fits = heads == [table.shape[1]] * table.shape[0]
        require(fits, argument(self, "table"), f"{table.shape[0]} × {table.shape[1]}{of}", allowed)

    def limits(self, view: LayerView) -> Tensor:
        self.check_model([view.lengths.shape[1]] * view.layers)
        table = self.heads
        if self.sparsity is not None:
            rows = [_by_sparsity(table, self.sparsity, self.sinks + self.recent)] * len(view.prompt)
        else:
            wanted = self.wanted(view)[:, 0].tolist()
            window = self.sinks + self.recent
            rows = [_by_budget(table, w, n, window) for w, n in zip(wanted, view.prompt.tolist(), strict=True)]
        return torch.tensor([row[view.layer] for row in rows], device=view.lengths.device)


@lru_cache(maxsize=64)
def _by_sparsity(table: HeadTable, sparsity: float, window: int) -> list[list[int]]:
    """Entries by layer and head: UNLIMITED for retrieval heads."""
    heads = table.shape[0] * table.shape[1]
    streaming = (
        heads if sparsity == 1 else math.ceil(Fraction(repr(sparsity)) * (heads - 1))
    )  # scores below the quantile
    return _share_out(table, heads - streaming, window, 0)


@lru_cache(maxsize=256)
def _by_budget(table: HeadTable, budget: int, prompt: int, window: int) -> list[list[int]]:
    """Entries by layer and head whose mean, for a prompt of more than `budget` tokens, is `budget`."""
    heads = table.shape[0] * table.shape[1]
    if prompt <= budget:
        return _share_out(table, heads, window, 0)
    window = min(window, budget)
    retrieval = heads * (budget - window) // (prompt - window)
    return _share_out(table, retrieval, window, heads * (budget - window) - retrieval * (prompt - window))


def _share_out(table: HeadTable, retrieval: int, window: int, spare: int) -> list[list[int]]:
    """The first `retrieval` heads by score are unlimited, the others have `window` and an even part of `spare`."""
    layers, heads = table.shape
    out = [[0] * heads for _ in range(layers)]
    streaming = layers * heads - retrieval
    for rank, (layer, head) in enumerate(table.ranked):
        if rank < retrieval:
            out[layer][head] = UNLIMITED
        else:
            out[layer][head] = window + spare // streaming + (rank - retrieval < spare % streaming)
    return out
