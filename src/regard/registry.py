"""Names. A thing registers itself where it is written; nothing else needs editing to make it known."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args

from regard.errors import ArgumentError, UnknownNameError

Kind = Literal[
    "layer", "pattern", "selection", "recurrence", "cache", "prefill", "decode", "preset", "task", "training-task"
]
KINDS: tuple[str, ...] = get_args(Kind)
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Paper:
    """Whom to credit."""

    title: str
    authors: str
    year: int
    arxiv: str = ""

    def __str__(self) -> str:
        source = f", arXiv {self.arxiv}" if self.arxiv else ""
        return f"{self.authors} {self.year}, “{self.title}”{source}"


@dataclass(frozen=True)
class Entry:
    """One registered mechanism, policy, pattern or task.

    `settings` are facts that can be asked for (`causal=True`, `cross=False`, …); `cost` says time and memory in words;
    `example_inputs` builds the smallest legal instance for the conformance suite where the defaults do not do.
    """

    key: str
    kind: Kind
    factory: Callable[..., Any]
    paper: Paper | None = None
    families: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    cost: str = ""
    example: Callable[..., Any] | None = None

    @property
    def summary(self) -> str:
        """The first line of the factory's docstring."""
        return (self.factory.__doc__ or "").strip().partition("\n")[0]


_ENTRIES: dict[tuple[str, str], Entry] = {}


def register(
    key: str,
    *,
    kind: Kind,
    paper: Paper | None = None,
    families: Iterable[str] = (),
    cost: str = "",
    example: Callable[..., Any] | None = None,
    **settings: Any,
) -> Callable[[F], F]:
    """Decorator: make `factory` known as `key` among its kind. Raises ArgumentError when the name is taken."""
    if kind not in KINDS:
        raise UnknownNameError("kind", kind, KINDS)

    def add(factory: F) -> F:
        held = _ENTRIES.get((kind, key))
        if held is not None and held.factory.__qualname__ != factory.__qualname__:
            raise ArgumentError("key", key, f"a name not yet taken by another {kind}")
        _ENTRIES[kind, key] = Entry(key, kind, factory, paper, tuple(families), settings, cost, example)
        return factory

    return add


def mechanism(key: str, **about: Any) -> Callable[[F], F]:
    """`register(..., kind="layer")`: a building block that `regard.create` makes."""
    return register(key, kind="layer", **about)


def lookup(kind: Kind, key: str) -> Entry:
    """The entry of that kind and name; UnknownNameError with the nearest names otherwise."""
    entry = _ENTRIES.get((kind, key)) if isinstance(key, str) else None
    if entry is None:
        raise UnknownNameError(kind, key, (k for t, k in _ENTRIES if t == kind))
    return entry


def entries(kind: Kind | None = None, *, family: str | None = None, **settings: Any) -> list[Entry]:
    """All entries, by kind then key, of one kind, of one family, with these settings."""
    chosen = (
        e
        for e in _ENTRIES.values()
        if (kind is None or e.kind == kind)
        and (family is None or family in e.families)
        and all(e.settings.get(name) == value for name, value in settings.items())
    )
    return sorted(chosen, key=lambda e: (e.kind, e.key))


def import_all(package: str, path: Iterable[str]) -> None:
    """Import every module of a package, so that what it registers is known. Called from its `__init__`."""
    for module in pkgutil.iter_modules(path):
        importlib.import_module(f"{package}.{module.name}")
