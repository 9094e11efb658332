"""Checks of settings that many layers have. Each raises ArgumentError with the setting's name."""

from __future__ import annotations

import math

from regard.errors import require
from regard.patterns.checks import at_least, is_number, true_or_false


def sizes(**settings: object) -> None:
    """Raise ArgumentError unless every one is an int ≥ 1."""
    for name, value in settings.items():
        at_least(name, value, 1)


def flags(**settings: object) -> None:
    """Raise ArgumentError unless every one is a bool."""
    for name, value in settings.items():
        true_or_false(name, value)


def positive(**settings: object) -> None:
    """Raise ArgumentError unless every one is a finite number above 0."""
    for name, value in settings.items():
        require(is_number(value) and 0 < value < math.inf, name, repr(value), "a finite number above 0")


def from_zero(argument: str, value: object, below: float = math.inf) -> None:
    """Raise ArgumentError unless 0 ≤ `value` < `below`."""
    allowed = "a finite number ≥ 0" if below == math.inf else f"a number from 0 to below {below}"
    require(is_number(value) and 0 <= value < below, argument, repr(value), allowed)
