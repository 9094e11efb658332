"""Layers: one paper, one file. Each registers itself; `create` makes one by name."""

from regard.layers.base import Example, Layer, Output
from regard.layers.creation import create, settings_of
from regard.registry import import_all

__all__ = ["Example", "Layer", "Output", "create", "settings_of"]

import_all(__name__, __path__)
