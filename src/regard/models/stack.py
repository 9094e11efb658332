"""Which mixer stands at which layer: by a ratio linear:full, or by position."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from inspect import signature
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

    within: for a layer that takes patterns, registered ones by key with their arguments; a token attends to those
    before it that all of them allow. {"sliding-window": {"size": 64}} makes sliding_window(64) & causal().

    Checked when it is made: UnknownNameError for a key, setting or pattern that does not exist, UnsupportedError for a
    layer that cannot be causal, or `within` for one that takes no patterns; ArgumentError for a wrong type or value.
    """

    key: str
    heads: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    within: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(isinstance(self.heads, int) and self.heads >= 1, "heads", self.heads, "an int ≥ 1")
        try:
            entry = lookup("layer", self.key)
        except UnknownNameError:
            able = (e.key for e in entries("layer") if e.settings.get("causal"))
            raise UnknownNameError("mixer", self.key, able) from None
        if not entry.settings.get("causal"):
            raise UnsupportedError(f"{self.key} cannot be causal, so it mixes no tokens of a language model")
        require(isinstance(self.settings, Mapping), "settings", self.settings, "a mapping of names to values")
        _check_names(f"setting of {self.key}", self.settings, settings_of(self.key))
        require(isinstance(self.within, Mapping), "within", self.within, "a mapping of patterns to their arguments")
        if self.within and not entry.settings.get("patterns"):
            raise UnsupportedError(f"{self.key} takes no patterns, so nothing to be within")
        for pattern, given in self.within.items():
            require(isinstance(given, Mapping), "within", given, f"a mapping, the arguments of {pattern}")
            _check_names(f"argument of {pattern}", given, signature(lookup("pattern", pattern).factory).parameters)
        try:
            made = self.pattern  # making it checks the arguments' values
        except TypeError as error:
            raise ArgumentError("within", dict(self.within), f"arguments that the patterns take ({error})") from error
        own = None if made is None else made.heads
        require(own in (None, self.heads), "within", f"a pattern for {own} heads", f"one for {self.heads} heads")

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({"within": {}, **state})  # pickles from before it had any

    @property
    def pattern(self) -> Pattern | None:
        """What makes it causal: a pattern, or None where it is so by nature."""
        if not lookup("layer", self.key).settings.get("bidirectional"):
            return None
        made: Pattern = causal()
        for key, given in self.within.items():
            made = lookup("pattern", key).factory(**given) & made
        return made

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
    require(isinstance(ratio, str) and RATIO.fullmatch(ratio) is not None, "ratio", repr(ratio), RATIOS)
    linear, full = map(int, ratio.split(":"))
    if full == 0:
        return ()
    return tuple(range(linear, layers, linear + 1)) if layers > linear else (layers // 2,)


def hybrid(mixer: Mixer, ratio: str, layers: int, full: Mixer | None = None) -> tuple[Mixer, ...]:
    """`layers` mixers: `full` (None = `full_attention` in as many heads) where the ratio puts it, `mixer` elsewhere."""
    _check_mixer("mixer", mixer)
    full = full_attention(mixer.heads) if full is None else full
    _check_mixer("full", full)
    return placed(mixer, layers, (full, full_positions(ratio, layers)))


def placed(others: Mixer, layers: int, *positions: tuple[Mixer, Iterable[int]]) -> tuple[Mixer, ...]:
    """Each mixer at its positions (0-based), `others` everywhere else.

    Based's stack of 27: placed(convolution, 27, (linear, (1, 6, 11, 16, 21)), (window, (2, 7, 12, 17, 22))), with
    window = Mixer("multi-head-attention", heads, {"rotary": True}, within={"sliding-window": {"size": 64}}).
    Raises ArgumentError for a position out of range or taken twice, or what is no Mixer.
    """
    require(isinstance(layers, int) and layers >= 1, "layers", layers, "an int ≥ 1")
    _check_mixer("others", others)
    stack: list[Mixer | None] = [None] * layers
    for given in positions:
        pair = isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], Iterable)
        require(pair, "positions", given, "pairs of a Mixer and its positions, such as (mixer, (1, 3))")
        mixer, where = given
        _check_mixer("positions", mixer)
        for at in where:
            inside = isinstance(at, int) and 0 <= at < layers
            require(inside, "positions", at, f"ints from 0 to {layers - 1}, of {layers} layers")
            require(stack[at] is None, "positions", f"{at} twice", "each layer once")
            stack[at] = mixer
    return tuple(mixer or others for mixer in stack)


def _check_mixer(name: str, mixer: object) -> None:
    require(isinstance(mixer, Mixer), name, repr(mixer), 'a Mixer, such as Mixer("gated-deltanet", heads=2)')


def _check_names(kind: str, given: Iterable[Any], known: Iterable[str]) -> None:
    for name in given:
        if name not in known:
            raise UnknownNameError(kind, name, known)
