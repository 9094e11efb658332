"""What there is: the registry after everything that registers itself has been imported."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from regard.errors import UnknownNameError
from regard.registry import KINDS, Entry, Kind, entries

REGISTERING = (
    "regard.patterns",
    "regard.layers",
    "regard.selection",
    "regard.recurrence",
    "regard.tasks",
    "regard.inference.policies",
    "regard.inference.plan",
)
"""Importing these packages imports every mechanism, pattern, policy and task, and so registers it."""


def list_entries(kind: Kind | None = None, family: str | None = None, **settings: Any) -> list[Entry]:
    """Registered entries of one kind, of one family, with these settings (`causal=True`); sorted by kind, then key.

    Raises UnknownNameError for a kind, family or setting that no entry has.
    """
    everything = _load()
    if kind is not None and kind not in KINDS:
        raise UnknownNameError("kind", kind, KINDS)
    families = {name for entry in everything for name in entry.families}
    if family is not None and family not in families:
        raise UnknownNameError("family", family, families)
    known = {name for entry in everything for name in entry.settings}
    for name in settings:
        if name not in known:
            raise UnknownNameError("setting", name, known)
    return entries(kind, family=family, **settings)


def show_entry(key: str, kind: Kind | None = None) -> str:
    """The card of what is registered under `key`, as text; where several kinds share the name, one card each.

    Raises UnknownNameError with the nearest names.
    """
    everything = [entry for entry in _load() if kind is None or entry.kind == kind]
    found = [entry for entry in everything if entry.key == key]
    if not found:
        raise UnknownNameError(kind or "name", key, {entry.key for entry in everything})
    return "\n\n".join(_card(entry) for entry in found)


def _load() -> list[Entry]:
    for package in REGISTERING:
        importlib.import_module(package)
    return entries()


def _card(entry: Entry) -> str:
    head = f"{entry.key} ({entry.kind})"
    rows = [
        ("families", ", ".join(entry.families)),
        ("settings", ", ".join(f"{name}={value}" for name, value in sorted(entry.settings.items()))),
        ("cost", entry.cost),
        ("paper", str(entry.paper) if entry.paper else ""),
        ("code", f"{entry.factory.__module__}.{entry.factory.__qualname__}"),
    ]
    lines = [head, *(f"  {name + ':':<10}{value}" for name, value in rows if value)]
    text = inspect.getdoc(entry.factory)
    return "\n".join([*lines, "", text] if text else lines)
