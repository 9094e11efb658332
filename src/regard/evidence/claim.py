"""A claim of a paper, and the function that measures it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal, get_args

from regard.errors import ArgumentError, UnknownNameError, UnsupportedError, require
from regard.registry import Paper, import_all

Verdict = Literal["reproduced", "partly", "not reproduced"]
Need = Literal["cpu", "smollm2", "h100"]
"""cpu: nothing but the package; smollm2: the packaged model and texts, on any device; h100: timings on that GPU."""


def verdict(*, reproduced: bool, partly: bool) -> Verdict:
    """The word for it: the stricter of the two that holds."""
    if reproduced:
        return "reproduced"
    return "partly" if partly else "not reproduced"


@dataclass(frozen=True)
class Settings:
    """How to run a claim. quick: the smallest sizes, to see that the code runs; its verdict means nothing."""

    seed: int = 0
    quick: bool = False

    def pick(self, full: Any, quick: Any) -> Any:
        """`quick` in a quick run, else `full`."""
        return quick if self.quick else full


@dataclass(frozen=True)
class Measured:
    """What came out. value: the one number of the table, in the claim's unit. details: everything needed to judge it.

    why: a sentence that holds the figures on which the verdict rests.
    """

    value: float
    verdict: Verdict
    why: str
    details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(self.verdict in get_args(Verdict), "verdict", self.verdict, ", ".join(get_args(Verdict)))


@dataclass(frozen=True)
class Claim:
    """One claim.

    paper: whom it is of. statement: what they say. figure: the number they give, in their setting. measurement: what is
    measured here. tolerance: when the verdict is "reproduced", written before measuring. minutes: roughly how long it
    takes.
    """

    id: str
    paper: Paper
    statement: str
    figure: str
    measurement: str
    unit: str
    tolerance: str
    needs: Need
    minutes: float
    measure: Callable[[Settings], Measured]


@dataclass(frozen=True)
class Later:
    """A claim that nobody can measure here yet: it has no measurement, and no verdict.

    needs: what is missing, most often the training of a task's model.
    """

    id: str
    paper: Paper
    statement: str
    figure: str
    needs: str


_CLAIMS: dict[str, Claim] = {}
_LATER: dict[str, Later] = {}


def claim(
    id: str,
    *,
    paper: Paper | None,
    statement: str,
    figure: str,
    measurement: str,
    unit: str,
    tolerance: str,
    needs: Need,
    minutes: float,
) -> Callable[[Callable[[Settings], Measured]], Callable[[Settings], Measured]]:
    """Decorator: the function measures this claim. `id` is PAPER/WHAT. Raises ArgumentError when the id is taken."""
    paper = _checked(id, paper)
    require(needs in get_args(Need), "needs", needs, ", ".join(get_args(Need)))

    def add(measure: Callable[[Settings], Measured]) -> Callable[[Settings], Measured]:
        held = _CLAIMS.get(id)
        free = held is None or held.measure.__module__ == measure.__module__
        require(free and id not in _LATER, "id", id, "an id not yet taken")
        _CLAIMS[id] = Claim(id, paper, statement, figure, measurement, unit, tolerance, needs, minutes, measure)
        return measure

    return add


def later(id: str, *, paper: Paper | None, statement: str, figure: str, needs: str) -> None:
    """Write down a claim that waits for something: it is listed, and refused when it is to be run.

    Raises ArgumentError for an id that is taken, or where nothing is said of what it needs.
    """
    entry = Later(id, _checked(id, paper), statement, figure, needs)
    require(bool(needs.strip()), "needs", repr(needs), "what the measurement waits for")
    require(id not in _CLAIMS and _LATER.get(id, entry) == entry, "id", id, "an id not yet taken")
    _LATER[id] = entry


def _checked(id: str, paper: Paper | None) -> Paper:
    if paper is None:
        raise ArgumentError("paper", None, "the paper whose claim it is")
    require(id.count("/") == 1 and id.replace("/", "").replace("-", "").isalnum(), "id", id, "PAPER/WHAT, of a-z 0-9 -")
    return paper


def all_claims(*, needs: Need | None = None) -> list[Claim]:
    """Every claim that can be measured, by id; with `needs`, those of that need only."""
    _import()
    return [_CLAIMS[id] for id in sorted(_CLAIMS) if needs in (None, _CLAIMS[id].needs)]


def all_later() -> list[Later]:
    """Every claim that waits, by id."""
    _import()
    return [_LATER[id] for id in sorted(_LATER)]


def find(id: str) -> Claim:
    """The claim of that id; UnknownNameError with the nearest ids otherwise, UnsupportedError for one that waits."""
    _import()
    if id in _LATER:
        raise UnsupportedError(f"claim {id} is for later: it needs {_LATER[id].needs}")
    if id not in _CLAIMS:
        raise UnknownNameError("claim", id, [*_CLAIMS, *_LATER])
    return _CLAIMS[id]


def _import() -> None:
    package = import_module("regard.evidence.claims")
    import_all(package.__name__, package.__path__)
