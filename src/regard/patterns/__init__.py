"""Patterns: boolean rules over positions that answer for whole tiles. Every registered one is an attribute here."""

from collections.abc import Callable
from typing import Any

from regard.patterns.algebra import EMPTY, FULL, PARTIAL, And, BlockMap, Cost, Not, Or, Pattern
from regard.registry import entries, import_all

import_all(__name__, __path__)

__all__ = ["EMPTY", "FULL", "PARTIAL", "And", "BlockMap", "Cost", "Not", "Or", "Pattern"]


def __getattr__(name: str) -> Callable[..., Any]:
    """`regard.patterns.sliding_window` is what is registered as `sliding-window`."""
    for entry in entries("pattern"):
        if entry.key.replace("-", "_") == name:
            return entry.factory
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; patterns: {', '.join(__dir__())}")


def __dir__() -> list[str]:
    return sorted({*__all__, *(entry.key.replace("-", "_") for entry in entries("pattern"))})
