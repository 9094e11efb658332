"""Which mixer stands at which layer: by a ratio linear:full, or by position."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from regard.errors import ArgumentError, UnknownNameError, UnsupportedError, require
from regard.layers import Layer, create, settings_of
from regard.patterns import Pattern, causal
from regard.registry import entries, lookup

RATIO = re.compile(r"([1-9][0-9]{0,5}):1|0:1|1:0")
RATIOS = "R:1 (R linear blocks for each full one), such as 3:1; 0:1 (full attention only) or 1:0 (none)"
FULL = "multi-head-attention"


@dataclass(frozen=True)
class Mixer:
    """A registered layer by key, with heads and settings of its own. `layer` and `layers` are filled in by the stack.

    Checked when it is made: UnknownNameError for a key or setting that does not exist, UnsupportedError for a layer
    that cannot be causal.
    """

    key: str
    heads: int
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(isinstance(self.heads, int) and self.heads >= 1, "heads", self.heads, "an int ≥ 1")
        try:
            entry = lookup("layer", self.key)
        except UnknownNameError:
            able = (e.key for e in entries("layer") if e.settings.get("causal"))
            raise UnknownNameError("mixer", self.key, able) from None
        if not entry.settings.get("causal"):
            raise UnsupportedError(f"{self.key} cannot be causal, so it mixes no tokens of a language model")
        known = settings_of(self.key)
        for name in self.settings:
            if name not in known:
                raise UnknownNameError(f"setting of {self.key}", name, known)

    @property
    def pattern(self) -> Pattern | None:
        """What makes it causal: a pattern, or None where it is so by nature."""
        return causal() if lookup("layer", self.key).settings.get("bidirectional") else None

    @property
    def steps(self) -> bool:
        """Does it take a state, so that tokens can be generated one by one?"""
        return bool(lookup("layer", self.key).settings.get("steps"))

    def make(self, dim: int, layer: int, layers: int) -> Layer:
        """The module at `layer` (0-based) of `layers`: what depends on depth is told so."""
        known = settings_of(self.key)
        depth = {name: value for name, value in (("layer", layer), ("layers", layers)) if name in known}
        return create(self.key, dim=dim, heads=self.heads, **{**depth, **self.settings})


def full_attention(heads: int) -> Mixer:
    """Softmax attention with rotary positions: the full block of a hybrid."""
    return Mixer(FULL, heads, {"rotary": True})


def full_positions(ratio: str, layers: int) -> tuple[int, ...]:
    """Which of `layers` blocks (0-based) are full attention at the ratio "R:1": the last of each group of R + 1.

    With fewer layers than one group it is the block in the middle, `layers // 2` (24:1 in 24 layers). The positions are
    ours: the study (Wang et al. 2025, arXiv 2507.06457) is not known to state them. "0:1": all; "1:0": none.
    Raises ArgumentError for another text, or no layers.
    """
    require(isinstance(layers, int) and layers >= 1, "layers", layers, "an int ≥ 1")
    if not RATIO.fullmatch(ratio):
        raise ArgumentError("ratio", repr(ratio), RATIOS)
    linear, full = map(int, ratio.split(":"))
    if full == 0:
        return ()
    return tuple(range(linear, layers, linear + 1)) if layers > linear else (layers // 2,)


def hybrid(mixer: Mixer, ratio: str, layers: int, full: Mixer | None = None) -> tuple[Mixer, ...]:
    """`layers` mixers: `full` (None = `full_attention` in as many heads) where the ratio puts it, `mixer` elsewhere."""
    return placed(mixer, layers, (full or full_attention(mixer.heads), full_positions(ratio, layers)))


def placed(others: Mixer, layers: int, *positions: tuple[Mixer, Iterable[int]]) -> tuple[Mixer, ...]:
    """Each mixer at its positions (0-based), `others` everywhere else.

    Based's stack of 27: placed(convolution, 27, (linear, (1, 6, 11, 16, 21)), (window, (2, 7, 12, 17, 22))).
    Raises ArgumentError for a position out of range or taken twice.
    """
    require(isinstance(layers, int) and layers >= 1, "layers", layers, "an int ≥ 1")
    stack: list[Mixer | None] = [None] * layers
    for mixer, where in positions:
        for at in where:
            inside = isinstance(at, int) and 0 <= at < layers
            require(inside, "positions", at, f"ints from 0 to {layers - 1}, of {layers} layers")
            require(stack[at] is None, "positions", f"{at} twice", "each layer once")
            stack[at] = mixer
    return tuple(mixer or others for mixer in stack)
