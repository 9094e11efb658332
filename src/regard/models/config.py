"""What a CausalLM is made of, as data: to JSON and back."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from regard.errors import CheckpointError, RegardError, require
from regard.layers.checks import positive
from regard.models.stack import Mixer

FORMAT = 1


@dataclass(frozen=True)
class CausalLMConfig:
    """vocab: how many tokens. dim: the width. mixers: a tuple (or list) of one a layer, see `regard.models.stack`.

    mlp_width: inner width of the SwiGLU MLP; None = 8/3·dim, rounded up to a multiple of 8; 0 = blocks without one.
    tied: the head's weights are the embedding's. eps: of the RMSNorms.
    """

    vocab: int
    dim: int
    mixers: tuple[Mixer, ...]
    mlp_width: int | None = None
    tied: bool = True
    eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("vocab", "dim"):
            value = getattr(self, name)
            require(isinstance(value, int) and value >= 1, name, value, "an int ≥ 1")
        fits = self.mlp_width is None or (isinstance(self.mlp_width, int) and self.mlp_width >= 0)
        require(fits, "mlp_width", self.mlp_width, "an int ≥ 0, or None")
        require(isinstance(self.tied, bool), "tied", repr(self.tied), "True or False")
        positive(eps=self.eps)
        object.__setattr__(self, "eps", float(self.eps))
        sound = isinstance(self.mixers, (tuple, list)) and len(self.mixers) >= 1
        sound = sound and all(isinstance(m, Mixer) for m in self.mixers)
        require(sound, "mixers", self.mixers, "a tuple of one Mixer or more")
        object.__setattr__(self, "mixers", tuple(self.mixers))

    @property
    def inner(self) -> int:
        """The MLP's inner width."""
        return -(-8 * self.dim // 24) * 8 if self.mlp_width is None else self.mlp_width

    @property
    def fingerprint(self) -> str:
        """Eight hexadecimal digits that change with the configuration."""
        return f"{zlib.crc32(self.to_json().encode()):08x}"

    def to_json(self) -> str:
        """As text. Raises ArgumentError where a mixer's setting is nothing that JSON holds exactly."""
        told: dict[str, Any] = {"regard_causal_lm": FORMAT, **asdict(self)}
        told["mixers"] = [_told(m) for m in self.mixers]
        allowed = "numbers, texts, lists and None"
        try:
            text = json.dumps(told, indent=1, allow_nan=False)
        except (TypeError, ValueError) as error:
            require(False, "settings", error, allowed)
        for mixer, again in zip(self.mixers, json.loads(text)["mixers"], strict=True):
            require(again == _told(mixer), "settings", _told(mixer), allowed)
        return text

    @classmethod
    def from_json(cls, text: str, source: object = "the configuration") -> CausalLMConfig:
        """What `to_json` wrote. Raises CheckpointError, naming `source`, for anything else."""
        try:
            told = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{source} is not JSON, or only a part of it: {error}") from error
        if not isinstance(told, Mapping) or "regard_causal_lm" not in told:
            raise CheckpointError(f"{source} is not the configuration of a regard CausalLM")
        if told["regard_causal_lm"] != FORMAT:
            raise CheckpointError(f"{source} is of version {told['regard_causal_lm']!r}; this regard reads {FORMAT}")
        values = {name: value for name, value in told.items() if name != "regard_causal_lm"}
        names = {f.name for f in fields(cls)}
        if set(values) != names:
            odd = ", ".join(sorted(set(values) ^ names))
            raise CheckpointError(f"{source}: {odd}: missing, or unknown to this regard")
        try:
            values["mixers"] = tuple(Mixer(**m) for m in values["mixers"])
            return cls(**values)
        except (RegardError, TypeError, KeyError) as error:
            raise CheckpointError(f"{source}: {error}") from error


def _told(mixer: Mixer) -> dict[str, Any]:
    """A mixer as JSON has it; `within` only where there is something, so that older files stay what they are."""
    told = {"key": mixer.key, "heads": mixer.heads, "settings": dict(mixer.settings)}
    return {**told, "within": {key: dict(of) for key, of in mixer.within.items()}} if mixer.within else told
