"""MoA: the first block and a window of its own for every KV head, whose span grows with the prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from regard.errors import ArgumentError, require
from regard.inference.policies.streaming import sinks_and_recent
from regard.inference.policy import CachePolicy, LayerView
from regard.inference.prefill import Prefill
from regard.inference.settings import argument, put, whole
from regard.patterns.elastic import PAPER, Rule, moa_mixture_of_sparse_attention, window_blocks
from regard.registry import register

if TYPE_CHECKING:
    from regard.patterns.algebra import Pattern

Rules = tuple[tuple[Rule, ...], ...]
"""(α, β) for every layer and KV head."""


@register(
    "moa-mixture-of-sparse-attention",
    kind="cache",
    paper=PAPER,
    families=("kv-cache", "heads", "sparse-inference"),
    cost="memory O(Σ over heads of span + block)",
)
@dataclass(frozen=True)
class MoA(CachePolicy):
    """Each KV head keeps the first `block` tokens and its most recent ones: α + β · N, in whole blocks.

    rules: [[(α, β) of each KV head of layer 0], …]. The window has max(1, int(⌊α / block⌋ + β · N / block)) blocks, N
    being the row's real prompt tokens when it is sealed; while decoding it slides and no longer grows. Memory is freed
    head by head. `regard.heads.moa_plan.moa_plan` finds the rules for a model.

    The window slides by tokens: a query sees itself and span tokens before it, which is what the paper's block rule
    sees and up to `block` older tokens (ours; the rule inside the window would hide these). The prompt attends densely
    unless the plan has the prefill part of this name. Raises ArgumentError for rules that are not numbers, β < 0, and
    when they do not fit the model.
    """

    rules: Rules | None = None
    block: int = 64

    budget = None
    lacks_budget = False  # type: ignore[assignment]
    acts: ClassVar[Literal["seal", "step"]] = "step"
    growth: ClassVar[str] = "nothing"
    per_head: ClassVar[bool] = True

    def __post_init__(self) -> None:
        whole(self, "block", 1)
        put(self, "rules", _checked(self, self.rules))

    @property
    def by_layer(self) -> Rules:
        """The rules, which are there."""
        assert self.rules is not None
        return self.rules

    def check_model(self, heads: list[int]) -> None:
        own = [len(row) for row in self.by_layer]
        allowed = (
            f"rules for {len(heads)} layers of {'/'.join(map(str, dict.fromkeys(heads)))} KV heads, as the model has"
        )
        require(own == heads, argument(self, "rules"), f"{len(own)} layers of {own[0]} heads", allowed)

    def importance(self, view: LayerView) -> Tensor:
        return sinks_and_recent(view, self.block)

    @property
    def slides(self) -> int | None:
        return self.block

    def counts(self, view: LayerView) -> Tensor:
        return torch.minimum(self.limits(view), view.lengths)

    def limits(self, view: LayerView) -> Tensor:
        rules = self.by_layer[view.layer] if view.layer < len(self.by_layer) else ()
        fits = len(self.by_layer) == view.layers and len(rules) == view.lengths.shape[1]
        found = f"{len(self.by_layer)} layers, {len(rules)} heads in layer {view.layer}"
        require(fits, argument(self, "rules"), found, f"{view.layers} layers of {view.lengths.shape[1]} KV heads")
        rows = [
            [self.block * (window_blocks(rule, max(1, n), self.block) + 1) for rule in rules]
            for n in view.prompt.tolist()
        ]
        return torch.tensor(rows, device=view.lengths.device)


@register(
    "moa-mixture-of-sparse-attention",
    kind="prefill",
    paper=PAPER,
    families=("sparse-inference",),
    cost="O(n · Σ over heads of span + block)",
)
@dataclass(frozen=True)
class MoAPrefill(Prefill):
    """The prompt attends under the same rules: the pattern of that name, in whole blocks.

    group: query heads per KV head. length: the N of the rules, in tokens; a prefill part is not told the prompt's
    length. A prompt of any length is served, with the spans of that N. Raises ArgumentError as the cache part does.
    """

    rules: Rules | None = None
    group: int = 1
    length: int = 4096
    block: int = 64

    def __post_init__(self) -> None:
        for name in ("group", "length", "block"):
            whole(self, name, 1)
        put(self, "rules", _checked(self, self.rules))

    def pattern(self, layer: int) -> Pattern | None:
        assert self.rules is not None
        require(
            layer < len(self.rules), argument(self, "rules"), f"{len(self.rules)} layers", f"more than {layer} layers"
        )
        rules = self.rules[layer]
        return moa_mixture_of_sparse_attention(rules, group=self.group, block=self.block).bind(self.length)


def _checked(owner: object, rules: Any) -> Rules:
    """As tuples of tuples of pairs of floats. Raises ArgumentError."""
    allowed = "for every layer a list with a pair (alpha, beta) of numbers for each KV head, beta ≥ 0"
    try:
        made = tuple(tuple((float(alpha), float(beta)) for alpha, beta in layer) for layer in rules)
    except (TypeError, ValueError) as error:
        raise ArgumentError(argument(owner, "rules"), _short(rules), allowed) from error
    require(bool(made) and all(made), argument(owner, "rules"), _short(rules), allowed)
    for layer in made:
        moa_mixture_of_sparse_attention(layer)  # raises for a number that is not finite, and for β < 0
    return made


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"
