"""Budgets: how many entries a lane keeps, exact to the token."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.errors import ArgumentError, require

if TYPE_CHECKING:
    from regard.inference.policy import LayerView

_UNITS = {"B": 1, "KB": 1000, "MB": 1000**2, "GB": 1000**3, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}
ALLOWED = "an int ≥ 1 (tokens), a float in (0, 1] (share of the row's prompt), or K+V payload such as '64MiB'"


@dataclass(frozen=True)
class Budget:
    """Mean number of entries kept per real row, layer and KV head right after sealing, sinks and windows included.

    An int counts tokens. A float is a share of the row's real prompt tokens, read as the decimal it is written as and
    rounded down, at least one. A string is the K+V payload of the whole batch, spread evenly over layers, rows and heads.
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
        require(not isinstance(value, bool) and isinstance(value, (int, float, str)), "budget", repr(value), ALLOWED)
        if isinstance(value, int):
            require(value >= 1, "budget", value, ALLOWED)
        elif isinstance(value, float):
            require(0 < value <= 1, "budget", value, ALLOWED)
        else:
            require(_bytes(value) > 0, "budget", repr(value), ALLOWED)
        return cls(value)

    def __str__(self) -> str:
        return str(self.value)

    def entries(self, view: LayerView) -> Tensor:
        """(B, H) long: entries to keep in each lane of this layer, never more than it holds."""
        batch, heads = view.lengths.shape
        if isinstance(self.value, str):
            each = (view.k.shape[-1] * view.k.element_size()) + (view.v.shape[-1] * view.v.element_size())
            count = _bytes(self.value) // (view.layers * batch * heads * each)
            if count < 1:
                raise ArgumentError("budget", repr(self.value), f"at least {view.layers * batch * heads * each} bytes: one entry a lane")
            wanted = torch.full_like(view.lengths, count)
        elif isinstance(self.value, float):
            share = Fraction(repr(self.value))
            rows = [max(1, int(share * n)) for n in view.prompt.tolist()]
            wanted = torch.tensor(rows, device=view.lengths.device)[:, None].expand(batch, heads)
        else:
            wanted = torch.full_like(view.lengths, self.value)
        return torch.minimum(wanted, view.lengths)


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?B|B)", text)
    if found is None:
        raise ArgumentError("budget", repr(text), ALLOWED)
    return int(Fraction(found[1]) * _UNITS[found[2]])
