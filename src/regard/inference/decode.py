"""How a new token attends to the store: the `decode` part of a plan."""

from __future__ import annotations

from dataclasses import dataclass

from regard.registry import register


class Decode:
    """Base of all decode parts; subclasses are frozen dataclasses whose fields are their settings."""


@register("full", kind="decode", families=("kv-cache",), cost="O(entries held) per token")
@dataclass(frozen=True)
class FullDecode(Decode):
    """Attend to every entry the store holds."""
