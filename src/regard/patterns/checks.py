"""What arguments have to be, and what they have to stay."""

from __future__ import annotations

from numbers import Integral, Real
from typing import TypeGuard

import torch
from torch import Tensor

from regard.errors import require

MOST = 1 << 30
"""The largest size or position: sums of two still fit the 32 bits in which tiles are asked about."""


def at_least(argument: str, value: object, least: int) -> None:
    """Raise ArgumentError unless `value` is an int of at least `least`, and at most MOST."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    require(whole and value >= least, argument, repr(value), f"an int ≥ {least}")  # type: ignore[operator]
    require(value <= MOST, argument, value, f"an int from {least} to {MOST}")  # type: ignore[operator]


def is_number(value: object) -> TypeGuard[float]:
    """Is it a real number, of Python or numpy, and no bool?"""
    return isinstance(value, Real) and not isinstance(value, bool)


def true_or_false(argument: str, value: object) -> None:
    """Raise ArgumentError unless `value` is a bool."""
    require(isinstance(value, bool), argument, repr(value), "True or False")


class Read:
    """A tensor that a pattern was made of, which its caller may still write into, and what was in it."""

    def __init__(self, given: Tensor) -> None:
        self.given, self.version, self.was = given, given._version, given.clone()

    def changed(self) -> bool:
        """Looks only where something was written, if only beside it in the same memory."""
        if self.given._version != self.version and torch.equal(self.given, self.was):
            self.version = self.given._version
        return self.given._version != self.version
