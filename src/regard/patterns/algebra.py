"""Patterns: who may attend to whom, known before any content is seen, and their algebra `&`, `|`, `~`.

A pattern is a frozen dataclass. Its plain fields are its *structure*: they alone decide equality, hash and repr, so a
compiled kernel is found again when only ids or tables differ. Tensor fields are declared `field(compare=False,
repr=False)`. Whoever stores something that depends on the tensors must not use the pattern alone as its key.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch import Tensor

from regard.errors import ArgumentError, require
from regard.patterns.block_map import BlockMap, Grid, build_block_map
from regard.patterns.checks import Read, at_least, true_or_false
from regard.patterns.cost import Cost, measure_cost
from regard.patterns.tiles import EMPTY, FULL, PARTIAL

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure

__all__ = [
    "EMPTY",
    "FULL",
    "PARTIAL",
    "And",
    "BlockMap",
    "Cost",
    "Not",
    "Or",
    "Pattern",
    "a_pattern",
    "at_least",
    "true_or_false",
]


def a_pattern(argument: str, value: object) -> None:
    """Raise ArgumentError unless `value` is a Pattern."""
    require(isinstance(value, Pattern), argument, repr(value), "a Pattern, such as causal()")


class Facts(NamedTuple):
    """What callers ask of a pattern at every call."""

    heads: int | None
    rows: int | None
    extent: int | None
    laid_for: int | None
    tensors: tuple[Tensor, ...]
    read: tuple[Read, ...]


@dataclass(frozen=True)
class Pattern:
    """A rule over (batch row, query head, query position, key position), and its answers for whole tiles.

    Positions are those of real tokens, counted from 0, padding removed. A subclass is a frozen dataclass that writes
    `rule` and, unless PARTIAL everywhere is good enough, `tiles`; all else follows. Fields may be numbers, strings,
    tensors (not compared, see above), patterns, and tuples of patterns.
    """

    # ---- what a subclass says -------------------------------------------------------------------------------------

    def rule(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """bool: may query position i of head h in row b attend to key position j? All integer tensors that broadcast.

        The result has the broadcast shape of i and j, and of b or h where the rule depends on them. Pointwise in plain
        torch operations: it is also called under `vmap` and compiled into kernels.
        """
        raise NotImplementedError

    def tiles(self, b: Tensor, h: Tensor, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor) -> Tensor:
        """uint8 EMPTY, PARTIAL or FULL for query positions i0..i1 × key positions j0..j1, both ends included.

        EMPTY and FULL must be true; PARTIAL is always sound. Exact where `exact` is True.
        """
        shape = torch.broadcast_shapes(i0.shape, j0.shape)
        return torch.full(shape, PARTIAL, dtype=torch.uint8, device=i0.device)

    @property
    def exact(self) -> bool:
        """Does `tiles` say EMPTY exactly where nothing is allowed, and FULL exactly where all is?"""
        return False

    @property
    def heads(self) -> int | None:
        """Number of query heads it is written for, or None where every head is alike."""
        return _agreed("heads", [p.heads for p in self.parts()])

    @property
    def rows(self) -> int | None:
        """Number of batch rows it is written for, or None where every row is alike."""
        return _agreed("rows", [p.rows for p in self.parts()])

    @property
    def extent(self) -> int | None:
        """Number of positions it is defined for (the length of its ids), or None where it knows no end."""
        known = [p.extent for p in self.parts()]
        return min((e for e in known if e is not None), default=None)

    @property
    def laid_for(self) -> int | None:
        """The number of positions it is laid out for (a grid's), or None. Fewer make sense only where no query of
        theirs would see one of the others (`cuts.cut_off`)."""
        known = [p.laid_for for p in self.parts()]
        return min((n for n in known if n is not None), default=None)

    def _layout_said(self) -> str:
        return ""

    def bind(self, n: int) -> Pattern:
        """The pattern for a prompt of n real tokens: what depends on n is fixed. Raises ArgumentError."""
        at_least("n", n, 1)
        return self._rebuilt(lambda p: p.bind(n))

    def for_head(self, h: int) -> Pattern:
        """The pattern of query head h alone."""
        at_least("h", h, 0)
        if self.heads is not None and h >= self.heads:
            raise ArgumentError("h", h, f"a query head from 0 to {self.heads - 1}")
        return self._rebuilt(lambda p: p.for_head(h))

    # ---- structure, the same for all ------------------------------------------------------------------------------

    @property
    def batched(self) -> bool:
        """Does the rule depend on the batch row?"""
        return self.rows is not None

    def parts(self) -> Iterator[Pattern]:
        """The patterns it is directly made of."""
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Pattern):
                yield value
            elif isinstance(value, tuple):
                yield from (p for p in value if isinstance(p, Pattern))

    def tensors(self) -> tuple[Tensor, ...]:
        """Its tensors and those of its parts, in a fixed order."""
        own = tuple(v for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor))
        return own + tuple(t for p in self.parts() for t in p.tensors())

    @cached_property
    def facts(self) -> Facts:
        """`heads`, `rows`, `extent`, `laid_for`, `tensors()` and what `_reads` noted: a pattern does not change."""
        return Facts(self.heads, self.rows, self.extent, self.laid_for, self.tensors(), self._all_read())

    def _reads(self, given: Tensor) -> None:
        """Remember a tensor that may be the caller's: tables are made of it, and must not be outlived."""
        if not given.is_inference():  # those have no versions
            object.__setattr__(self, "_read", Read(given))

    _read = None

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_read", "facts")}  # a copy's tensors are its own

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({k: v for k, v in state.items() if k != "facts"})  # of another version, perhaps

    def _all_read(self) -> tuple[Read, ...]:
        own = () if self._read is None else (self._read,)
        return own + tuple(r for p in self.parts() for r in p._all_read())

    def to(self, device: torch.device | str) -> Self:
        """The same pattern with its tensors on that device; a tensor used twice is moved once.

        Raises ArgumentError where the ids it was made of have been changed in place (not asked while torch compiles).
        """
        tensors = self.facts.tensors
        if not torch.compiler.is_compiling():
            changed = any(read.changed() for read in self.facts.read)
            require(not changed, "pattern", "one whose ids were changed in place", "a new pattern for new ids")
        moved = {id(t): t.to(device) for t in tensors}
        return self._with(moved) if any(moved[id(t)] is not t for t in tensors) else self

    def _with(self, tensors: dict[int, Tensor]) -> Self:
        changed = self._rebuilt(lambda p: p._with(tensors))
        own = {f.name: tensors[id(v)] for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}
        if not own:
            return changed
        new = object.__new__(type(self))  # not `replace`: its checks look at values, and would wait for the device
        for f in fields(self):
            object.__setattr__(new, f.name, own.get(f.name, getattr(changed, f.name)))
        return new

    def _rebuilt(self, change: Any) -> Self:
        """Itself with every part changed; the very same object where no part did change."""
        changes: dict[str, Any] = {}
        for f in fields(self):
            old = getattr(self, f.name)
            if isinstance(old, Pattern):
                new = change(old)
            elif isinstance(old, tuple) and any(isinstance(p, Pattern) for p in old):
                new = tuple(change(p) for p in old)
            else:
                continue
            same = new is old if isinstance(old, Pattern) else all(x is y for x, y in zip(new, old, strict=True))
            if not same:
                changes[f.name] = new
        return replace(self, **changes) if changes else self

    def __and__(self, other: Pattern) -> Pattern:
        return And(self, other) if isinstance(other, Pattern) else NotImplemented

    def __or__(self, other: Pattern) -> Pattern:
        return Or(self, other) if isinstance(other, Pattern) else NotImplemented

    def __invert__(self) -> Pattern:
        return Not(self)

    # ---- what comes for free --------------------------------------------------------------------------------------

    def dense(
        self,
        n: int,
        m: int | None = None,
        *,
        batch: int | None = None,
        heads: int | None = None,
        q_offset: int | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """bool (rows or 1, heads or 1, n, m): the whole rule, for small sizes, tests and eyes.

        The keys are positions 0..m−1 (m = n if not given). The queries are the last n of them, or start at `q_offset`.
        `batch` and `heads` are only checked against what the pattern is written for. Raises ArgumentError.
        """
        p, grid = self._laid_out(n, m, 1, q_offset, device, batch, heads)
        b = torch.arange(p.rows or 1, device=grid.device)[:, None, None, None]
        h = torch.arange(p.heads or 1, device=grid.device)[None, :, None, None]
        i = torch.arange(grid.q_offset, grid.q_offset + grid.n, device=grid.device)[:, None]
        j = torch.arange(grid.m, device=grid.device)
        return p.rule(b, h, i, j).expand(b.shape[0], h.shape[1], grid.n, grid.m)

    def block_map(
        self,
        n: int,
        m: int | None = None,
        *,
        block: int | tuple[int, int] = 128,
        heads: int | None = None,
        batch: int | None = None,
        refine: bool = False,
        q_offset: int | None = None,
        device: torch.device | str | None = None,
    ) -> BlockMap:
        """The tile answers for blocks of `block` queries × `block` keys (or of two sizes), in time of blocks.

        `refine=True` evaluates the rule inside PARTIAL tiles of a pattern that is not `exact`, and makes the map exact.
        Positions as in `dense`. Raises ArgumentError.
        """
        p, grid = self._laid_out(n, m, block, q_offset, device, batch, heads)
        return build_block_map(p, grid, heads=p.heads or heads or 1, refine=refine)

    def cost(
        self,
        n: int,
        m: int | None = None,
        *,
        block: int | tuple[int, int] = 128,
        heads: int | None = None,
        batch: int | None = None,
        head_dim: int = 128,
        q_offset: int | None = None,
        device: torch.device | str | None = None,
    ) -> Cost:
        """How much work the pattern is: entries and tiles, counted exactly. Positions as in `dense`.

        Looks into every PARTIAL tile: with many, half a minute and more at 131,072 positions."""
        at_least("head_dim", head_dim, 1)
        p, grid = self._laid_out(n, m, block, q_offset, device, batch, heads)
        return measure_cost(p, grid, heads=p.heads or heads or 1, batch=p.rows or batch or 1, head_dim=head_dim)

    def show(
        self,
        n: int = 64,
        m: int | None = None,
        *,
        path: str | Path | None = None,
        block: int | tuple[int, int] = 8,
        row: int = 0,
        q_offset: int | None = None,
        refine: bool = False,
    ) -> Figure:
        """A picture of the rule with the tile answers over it, one panel per distinct head; saved where `path` says.

        Raises UnsupportedError when matplotlib is not installed.
        """
        from regard.patterns.picture import draw

        p, grid = self._laid_out(n, m, block, q_offset, "cpu", None, None)
        return draw(p, grid, row=row, refine=refine, path=path)

    def _laid_out(
        self,
        n: int,
        m: int | None,
        block: int | tuple[int, int],
        q_offset: int | None,
        device: torch.device | str | None,
        batch: int | None,
        heads: int | None,
    ) -> tuple[Pattern, Grid]:
        """The pattern on its device and the checked grid of positions and blocks."""
        tensors = self.tensors()
        where = torch.device(device) if device is not None else tensors[0].device if tensors else torch.device("cpu")
        grid = Grid.of(n, m, block, q_offset, where)
        last = max(grid.q_offset + grid.n, grid.m)
        if self.extent is not None and last > self.extent:
            raise ArgumentError("positions", last, f"at most {self.extent}, as many as the pattern has ids")
        if self.laid_for not in (None, grid.m):
            from regard.patterns.cuts import cut_off

            whole = not cut_off(self, self.laid_for, grid.m)
            require(whole, "m", grid.m, f"{self.laid_for}, the tokens of the layout{self._layout_said()}")
        for name, asked, own in (("batch", batch, self.rows), ("heads", heads, self.heads)):
            if asked is not None:
                at_least(name, asked, 1)
                require(own is None or asked == own, name, asked, f"{own}, which the pattern is written for")
        return self.to(where), grid


def _agreed(argument: str, counts: list[int | None]) -> int | None:
    known = sorted({c for c in counts if c is not None})
    if len(known) > 1:
        raise ArgumentError(argument, f"patterns for {' and '.join(map(str, known))} {argument}", "one number for all")
    return known[0] if known else None


def _nested(p: Pattern) -> str:
    return f"({p!r})" if isinstance(p, And | Or) else repr(p)


@dataclass(frozen=True, repr=False)
class _Pair(Pattern):
    a: Pattern
    b: Pattern

    def __post_init__(self) -> None:
        _ = self.heads, self.rows  # raises where the two disagree


@dataclass(frozen=True, repr=False)
class And(_Pair):
    """Allowed by both, written `a & b`."""

    def rule(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return self.a.rule(b, h, i, j) & self.b.rule(b, h, i, j)

    def tiles(self, b: Tensor, h: Tensor, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor) -> Tensor:
        return torch.minimum(self.a.tiles(b, h, i0, i1, j0, j1), self.b.tiles(b, h, i0, i1, j0, j1))

    def __repr__(self) -> str:
        return f"{_nested(self.a)} & {_nested(self.b)}"


@dataclass(frozen=True, repr=False)
class Or(_Pair):
    """Allowed by either, written `a | b`."""

    def rule(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return self.a.rule(b, h, i, j) | self.b.rule(b, h, i, j)

    def tiles(self, b: Tensor, h: Tensor, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor) -> Tensor:
        return torch.maximum(self.a.tiles(b, h, i0, i1, j0, j1), self.b.tiles(b, h, i0, i1, j0, j1))

    def __repr__(self) -> str:
        return f"{_nested(self.a)} | {_nested(self.b)}"


@dataclass(frozen=True, repr=False)
class Not(Pattern):
    """Allowed where `a` does not allow it, written `~a`. Tile answers stay as exact as those of `a`."""

    a: Pattern

    def rule(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return ~self.a.rule(b, h, i, j)

    def tiles(self, b: Tensor, h: Tensor, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor) -> Tensor:
        return FULL - self.a.tiles(b, h, i0, i1, j0, j1)

    @property
    def exact(self) -> bool:
        return self.a.exact

    def __repr__(self) -> str:
        return f"~{_nested(self.a)}"
