"""Budgets: how many entries a lane keeps, exact to the token."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.errors import ArgumentError, require

if TYPE_CHECKING:
    from regard.inference.policy import LayerView

UNLIMITED = 2**62
"""Stands for "as many as come" where a number of entries is asked for; no lane can hold as many."""

_UNITS = {"B": 1, "KB": 1000, "MB": 1000**2, "GB": 1000**3, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}
ALLOWED = "an int ≥ 1 (tokens), a float in (0, 1] (share of the row's prompt), or K+V payload such as '64MiB'"


@dataclass(frozen=True)
class Budget:
    """Mean number of entries kept per real row, layer and KV head right after sealing, sinks and windows included.

    An int counts tokens. A float is a share of the row's real prompt tokens, read as the decimal it is written as and
    rounded down, at least one. A string is the K+V payload of the whole batch, spread evenly over layers, rows and
    heads.
    """

    value: int | float | str

    @classmethod
    def parse(cls, value: Budget | int | float | str | None) -> Budget | None:
        """From what a user wrote; None stays None. Raises ArgumentError."""
        if value is None or isinstance(value, Budget):
            return value
        if isinstance(value, str):
            text = value.strip()
            if re.fullmatch(r"[+-]?\d+", text):
                value = int(text)
            elif re.fullmatch(r"[+-]?\d*\.\d*(e-?\d+)?", text) and text != ".":
                value = float(text)
            else:
                value = text
        if isinstance(value, Integral) and not isinstance(value, bool):
            require(value >= 1, "budget", value, ALLOWED)
            return cls(int(value))
        if isinstance(value, float):
            require(0 < value <= 1, "budget", value, ALLOWED)
            return cls(float(value))  # a NumPy float is a float, but its repr is no decimal
        require(isinstance(value, str) and _bytes(value) > 0, "budget", repr(value), ALLOWED)
        return cls(value)

    def __str__(self) -> str:
        return str(self.value)

    def entries(self, view: LayerView) -> Tensor:
        """(B, H) long: entries to keep in each lane of this layer, never more than it holds."""
        return torch.minimum(self.wanted(view), view.lengths)

    def wanted(self, view: LayerView) -> Tensor:
        """(B, H) long: entries each lane of this layer is allowed, whether or not it holds as many."""
        batch, heads = view.lengths.shape
        if isinstance(self.value, str):
            each = (view.k.shape[-1] * view.k.element_size()) + (view.v.shape[-1] * view.v.element_size())
            one_a_lane = view.layers * batch * heads * each
            count = _bytes(self.value) // one_a_lane
            require(count >= 1, "budget", repr(self.value), f"at least {one_a_lane} bytes: one entry a lane")
        elif isinstance(self.value, float):
            share = Fraction(repr(self.value))
            rows = [max(1, int(share * n)) for n in view.prompt.tolist()]
            return torch.tensor(rows, device=view.lengths.device)[:, None].expand(batch, heads)
        else:
            count = self.value
        return torch.full_like(view.lengths, min(count, UNLIMITED))


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?B|B)", text)
    if found is None:
        raise ArgumentError("budget", repr(text), ALLOWED)
    return int(Fraction(found[1]) * _UNITS[found[2]])
