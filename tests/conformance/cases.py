"""Which checks run on which registered mechanism, and which failures are known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from regard.catalogue import list_entries
from regard.layers import Example, Layer, create
from regard.registry import Entry, lookup

EXEMPTIONS: dict[tuple[str, str, str], str] = {}
"""(kind, key, check) → why it fails. The test then has to fail: when it passes, this row has to go."""

CHECKS: dict[str, list[str]] = {"layer": [], "recurrence": [], "selection": []}
"""The checks of each kind, in the order of their columns; every `check` and `refusal` adds its own."""

Test = Callable[..., None]


def keys(kind: str) -> list[str]:
    """Every registered mechanism of that kind."""
    return [entry.key for entry in list_entries(kind)]  # type: ignore[arg-type]


def check(name: str, *, kind: str = "layer", declared: str | None = None) -> Callable[[Test], Test]:
    """Run a test for every mechanism of a kind, or for those that declare `declared=True`; its column is `name`."""
    return _over(name, kind, [k for k in keys(kind) if declared is None or _declares(kind, k, declared)], "passed")


UNDECLARED = {"torch.compile"}
"""Checks of what nothing refuses: a mechanism that does not declare it is simply not vouched for."""


def refusal(name: str, *, declared: str, kind: str = "layer") -> Callable[[Test], Test]:
    """Run a test for every mechanism that declares `declared=False`: it shows that the thing is refused by name."""
    return _over(name, kind, [k for k in keys(kind) if not _declares(kind, k, declared)], "refused")


def _declares(kind: str, key: str, setting: str) -> bool:
    value = lookup(kind, key).settings.get(setting)  # type: ignore[arg-type]
    assert isinstance(value, bool), f"{kind} {key} has to declare {setting}=True or {setting}=False"
    return value


def _over(name: str, kind: str, chosen: list[str], outcome: str) -> Callable[[Test], Test]:
    if name not in CHECKS[kind]:
        CHECKS[kind].append(name)

    def wrap(test: Test) -> Test:
        cases = []
        for key in chosen:
            reason = EXEMPTIONS.get((kind, key, name))
            known = [pytest.mark.xfail(strict=True, reason=reason)] if reason else []
            marks = [pytest.mark.conformance(kind, key, name, outcome), *known]
            cases.append(pytest.param(key, id=key, marks=marks))
        return pytest.mark.parametrize("key", cases)(test)

    return wrap


def example(key: str) -> Example:
    """The example of a layer."""
    made = lookup("layer", key).example
    return Example() if made is None else made()


def make(key: str, *, dtype: torch.dtype = torch.float64, seed: int = 0, **settings: Any) -> Layer:
    """The layer's example with these settings on top, parameters drawn from the seed."""
    about = example(key)
    torch.manual_seed(seed)
    return create(key, dim=about.dim, heads=about.heads, **{**about.settings, **settings}).to(dtype)


def tokens(key: str, n: int, *, batch: int = 2, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    """(B, n, C), random."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, n, example(key).dim, dtype=torch.float64, generator=generator).to(dtype)


def some_length(key: str, most: int = 12) -> int:
    """The longest legal length that is at most `most`, or the shortest there is."""
    lengths = example(key).lengths
    return most if lengths == Example().lengths else max((n for n in lengths if n <= most), default=min(lengths))


def entry(key: str) -> Entry:
    """The layer's registration."""
    return lookup("layer", key)
