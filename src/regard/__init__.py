"""regard: one home for attention in all its published forms — build, serve, look, choose.

    regard.create(key, dim=..., heads=...)      a layer by name
    regard.attend(q, k, v, pattern=...)         exact attention under a pattern
    regard.attend_tiled(q, k, v, pattern=...)   the same on a grid, with its boxes of tokens made contiguous
    regard.merge(...)                           join partial results by their log-sum-exp
    regard.attach(model, plan)                  a pretrained model under a plan
    regard.Plan                                 prefill, cache and decode, composed
    regard.patterns                             who may attend to whom
    regard.list(...), regard.show(key)          what there is

Names are loaded on first use, so that `import regard` costs nothing.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from regard import patterns
    from regard.attend import attend, merge
    from regard.attend_tiled import attend_tiled
    from regard.catalogue import list_entries as list
    from regard.catalogue import show_entry as show
    from regard.errors import RegardError
    from regard.inference.plan import Plan
    from regard.inference.seam import attach
    from regard.layers import create
    from regard.registry import Entry, Paper

__all__ = [
    "Entry",
    "Paper",
    "Plan",
    "RegardError",
    "__version__",
    "attach",
    "attend",
    "attend_tiled",
    "create",
    "list",
    "merge",
    "patterns",
    "show",
]

_HOME: dict[str, tuple[str, str]] = {
    "Entry": ("regard.registry", "Entry"),
    "Paper": ("regard.registry", "Paper"),
    "Plan": ("regard.inference.plan", "Plan"),
    "RegardError": ("regard.errors", "RegardError"),
    "attach": ("regard.inference.seam", "attach"),
    "attend": ("regard.attend", "attend"),
    "attend_tiled": ("regard.attend_tiled", "attend_tiled"),
    "create": ("regard.layers", "create"),
    "list": ("regard.catalogue", "list_entries"),
    "merge": ("regard.attend", "merge"),
    "show": ("regard.catalogue", "show_entry"),
}


class _Package(ModuleType):
    """This package. `attend` is a function here and a module of the same name below, and so is `attend_tiled`: the
    functions stay in view.

    Importing the submodule makes Python set the attribute to the module; this class keeps that from happening.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name == "patterns":
        return importlib.import_module("regard.patterns")
    if name not in _HOME:
        raise AttributeError(f"module 'regard' has no attribute {name!r}")
    module, attribute = _HOME[name]
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> Any:
    return sorted({*globals(), *__all__})


sys.modules[__name__].__class__ = _Package
