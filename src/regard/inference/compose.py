"""Policies put together: `a + b` acts in order, `policy@layers.heads` acts in part of the model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from regard.errors import ArgumentError, require
from regard.inference.budget import UNLIMITED
from regard.inference.policy import CachePolicy, LayerView, Needs
from regard.inference.settings import put

Ranges = tuple[tuple[int, int | None], ...]
_RANGES = r"\d+(?:-\d*)?(?:,\d+(?:-\d*)?)*"
SCOPE = rf"({_RANGES})(?:\.({_RANGES}))?"
SCOPE_ALLOWED = "layers such as 0-3,7 or 4- (inclusive, open at the end), then .heads likewise if only some KV heads"


@dataclass(frozen=True)
class Scope:
    """Where a part of a plan acts: layers, and KV heads of them. Ranges are inclusive; an end of None is open."""

    layers: Ranges
    heads: Ranges | None = None

    @classmethod
    def parse(cls, text: str) -> Scope:
        """From `0-3,7`, `4-`, `0-.0,2`. Raises ArgumentError."""
        found = re.fullmatch(SCOPE, text)
        if found is None:
            raise ArgumentError("scope", repr(text), SCOPE_ALLOWED)
        return cls(_ranges(found[1]), None if found[2] is None else _ranges(found[2]))

    def __post_init__(self) -> None:
        for name, ranges in (("layers", self.layers), ("heads", self.heads)):
            if ranges is not None:
                fits = bool(ranges) and all(a >= 0 and (b is None or b >= a) for a, b in ranges)
                require(fits, f"scope.{name}", ranges, "one or more ranges whose end is not before their start")

    def __str__(self) -> str:
        return _text(self.layers) + ("" if self.heads is None else f".{_text(self.heads)}")

    def has_layer(self, layer: int) -> bool:
        """Does it act in this layer?"""
        return _within(self.layers, layer)

    def lanes(self, view: LayerView) -> Tensor:
        """(B, H) bool: the lanes of this layer where it acts."""
        if not self.has_layer(view.layer):
            return torch.zeros_like(view.lengths, dtype=torch.bool)
        heads = [self.heads is None or _within(self.heads, h) for h in range(view.lengths.shape[1])]
        return torch.tensor(heads, device=view.lengths.device).expand(view.lengths.shape)


@dataclass(frozen=True)
class Scoped(CachePolicy):
    """A policy that acts in part of the model and keeps everything elsewhere."""

    policy: CachePolicy
    scope: Scope

    def __post_init__(self) -> None:
        single = isinstance(self.policy, CachePolicy) and not isinstance(self.policy, (Scoped, Composed))
        require(single, "policy", repr(self.policy), "one cache policy, neither scoped nor composed")
        put(self, "acts", self.policy.acts)
        put(self, "growth", self.policy.growth)
        put(self, "per_head", self.policy.per_head)
        put(self, "budget", self.policy.budget)

    def needs(self) -> Needs:
        return self.policy.needs()

    def needs_at(self, layer: int) -> Needs:
        return self.policy.needs_at(layer) if self.scope.has_layer(layer) else Needs()

    def check_model(self, heads: list[int]) -> None:
        """Raise ArgumentError where the scope names no layer, or no KV head, that the model has."""
        inside = [count for layer, count in enumerate(heads) if self.scope.has_layer(layer)]
        require(bool(inside), "scope", str(self.scope), f"layers from 0 to {len(heads) - 1}")
        among = self.scope.heads
        most = max(inside)  # 0: no layer has stored anything yet
        met = among is None or most == 0 or any(_within(among, h) for h in range(most))
        require(met, "scope", str(self.scope), f"KV heads from 0 to {most - 1}")
        self.policy.check_model(heads)

    @property
    def slides(self) -> int | None:
        return self.policy.slides

    def importance(self, view: LayerView) -> Tensor:
        if not self.scope.has_layer(view.layer):
            return torch.zeros(view.positions.shape, device=view.positions.device)
        return self.policy.importance(view)

    def counts(self, view: LayerView) -> Tensor:
        if not self.scope.has_layer(view.layer):
            return view.lengths
        return torch.where(self.scope.lanes(view), self.policy.counts(view), view.lengths)

    def limits(self, view: LayerView) -> Tensor:
        unlimited = torch.full_like(view.lengths, UNLIMITED)
        if not self.scope.has_layer(view.layer):
            return unlimited
        return torch.where(self.scope.lanes(view), self.policy.limits(view), unlimited)


@dataclass(frozen=True)
class Composed(CachePolicy):
    """Policies that act in order, each on what the one before it kept. `apply.select` and `apply.evict` run it.

    While decoding a lane holds no more than the least that any of them allows it.
    """

    parts: tuple[CachePolicy, ...]

    budget = None  # each part has its own

    def __post_init__(self) -> None:
        flat: list[CachePolicy] = []
        for part in self.parts:
            require(isinstance(part, CachePolicy), "parts", repr(part), "cache policies")
            flat.extend(part.parts if isinstance(part, Composed) else [part])
        require(len(flat) > 1, "parts", len(flat), "two or more cache policies")
        put(self, "parts", tuple(flat))
        acts: Literal["seal", "step"] = "step" if any(p.acts == "step" for p in flat) else "seal"
        put(self, "acts", acts)
        put(self, "growth", "; ".join(dict.fromkeys(p.growth for p in flat)))

    def needs(self) -> Needs:
        return _union([part.needs() for part in self.parts])

    def needs_at(self, layer: int) -> Needs:
        return _union([part.needs_at(layer) for part in self.parts])

    def check_model(self, heads: list[int]) -> None:
        for part in self.parts:
            part.check_model(heads)

    @property
    def slides(self) -> int | None:
        """Whichever part decides for a lane: all that act on steps must say the same."""
        said = {part.slides for part in self.parts if part.acts == "step"}
        return said.pop() if len(said) == 1 else None

    def importance(self, view: LayerView) -> Tensor:
        raise NotImplementedError("a composition has no single score: regard.inference.apply runs its parts in order")

    def counts(self, view: LayerView) -> Tensor:
        raise NotImplementedError("a composition's counts come with what it selects: regard.inference.apply.select")

    def limits(self, view: LayerView) -> Tensor:
        return torch.stack([part.limits(view) for part in self.parts]).amin(0)


def parts_of(policy: CachePolicy) -> tuple[CachePolicy, ...]:
    """The parts of a composition, or the policy itself."""
    return policy.parts if isinstance(policy, Composed) else (policy,)


def _union(needs: list[Needs]) -> Needs:
    total = Needs()
    for each in needs:
        total = total | each
    return total


def _ranges(text: str) -> Ranges:
    out: list[tuple[int, int | None]] = []
    for part in text.split(","):
        start, dash, end = part.partition("-")
        out.append((int(start), int(end) if end else (None if dash else int(start))))
    return tuple(out)


def _text(ranges: Ranges) -> str:
    return ",".join(f"{a}-" if b is None else str(a) if a == b else f"{a}-{b}" for a, b in ranges)


def _within(ranges: Ranges, number: int) -> bool:
    return any(a <= number and (b is None or number <= b) for a, b in ranges)
