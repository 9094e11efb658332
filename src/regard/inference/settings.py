"""Checks that the settings of plans share."""

from __future__ import annotations

from typing import Any

from regard.errors import require


def whole(owner: object, name: str, minimum: int) -> None:
    """Field `name` of a dataclass must be an int of at least `minimum`; ArgumentError naming it otherwise."""
    value = getattr(owner, name)
    fits = isinstance(value, int) and not isinstance(value, bool) and value >= minimum
    require(fits, argument(owner, name), repr(value), f"an int ≥ {minimum}")


def one_of(owner: object, name: str, allowed: tuple[str, ...]) -> None:
    """Field `name` must be one of these words."""
    value = getattr(owner, name)
    require(value in allowed, argument(owner, name), repr(value), " or ".join(map(repr, allowed)))


def put(owner: object, name: str, value: Any) -> None:
    """Set a field of a frozen dataclass while it is being made."""
    object.__setattr__(owner, name, value)


def argument(owner: object, name: str) -> str:
    """How an error names a setting: `SnapKV.window`."""
    return f"{type(owner).__name__}.{name}"
