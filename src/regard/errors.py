"""What regard raises. Every message names the argument, what came and what is allowed."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


class RegardError(Exception):
    """Base of everything regard raises on purpose."""


class ArgumentError(RegardError, ValueError):
    """An argument has a value that is not allowed."""

    def __init__(self, argument: str, got: Any, allowed: str) -> None:
        self.argument, self.got, self.allowed = argument, got, allowed
        super().__init__(f"{argument}: got {got!s}; allowed: {allowed}")


class UnknownNameError(ArgumentError):
    """A name that nothing is registered under; the nearest names are given."""

    def __init__(self, kind: str, name: object, known: Iterable[str]) -> None:
        names = sorted(known)
        near = get_close_matches(name, names, n=3, cutoff=0.5) if isinstance(name, str) else []
        hint = f"did you mean {', '.join(near)}? " if near else ""
        super().__init__(kind, repr(name), f"{hint}known: {', '.join(names) or 'none'}")


class UnsupportedError(RegardError):
    """A combination that is meaningful but that this executor, layer or model does not serve."""


class AttachError(RegardError):
    """The seam cannot be put into this model; the message says why."""


class StoreError(RegardError):
    """A saved store that is corrupted, foreign, or does not fit the model."""


class CheckpointError(RegardError):
    """A saved model or training checkpoint that is corrupted, foreign, or does not belong to what asks for it."""


class NotFiniteError(RegardError, ValueError):
    """NaN or infinity where `validate=True` looked for it."""


def require(condition: bool, argument: str, got: Any, allowed: str) -> None:
    """Raise ArgumentError unless `condition` holds."""
    if not condition:
        raise ArgumentError(argument, got, allowed)
