"""Layers by name."""

from __future__ import annotations

import inspect
from typing import Any

from regard.errors import UnknownNameError
from regard.layers.base import Layer
from regard.registry import lookup


def settings_of(key: str) -> dict[str, Any]:
    """What `create(key, ...)` takes besides dim and heads, with the defaults. Raises UnknownNameError."""
    parameters = inspect.signature(lookup("layer", key).factory).parameters
    return {name: p.default for name, p in parameters.items() if name not in ("dim", "heads")}


def create(key: str, *, dim: int, heads: int, **settings: Any) -> Layer:
    """The layer registered under `key`, of width `dim` with `heads` heads.

    Raises UnknownNameError for a key or a setting that does not exist, naming the nearest that do, and ArgumentError
    for a value that is not allowed.

    >>> create("multi-head-attention", dim=16, heads=4, kv_heads=2).heads
    4
    """
    known = settings_of(key)
    for name in settings:
        if name not in known:
            raise UnknownNameError(f"setting of {key}", name, known)
    layer: Layer = lookup("layer", key).factory(dim=dim, heads=heads, **settings)
    return layer
