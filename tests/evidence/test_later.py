"""Claims that wait for something: listed, in the table without a verdict, and refused when they are to be run."""

from __future__ import annotations

import pytest

from regard import evidence
from regard.errors import ArgumentError, UnknownNameError, UnsupportedError
from regard.evidence import claim
from regard.registry import Paper

PAPER = Paper("T", "A", 2024)


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> str:
    evidence.entries()
    monkeypatch.setattr(claim, "_LATER", dict(claim._LATER))
    claim.later("nobody/later", paper=PAPER, statement="s", figure="f", needs="training of | a model")
    return "nobody/later"


def test_it_is_listed_and_in_the_table(waiting: str) -> None:
    assert waiting in [entry.id for entry in evidence.postponed()]
    assert waiting not in [entry.id for entry in evidence.entries()]
    page = evidence.table()
    assert "| [nobody/later](#nobodylater) | later | | needs training of \\| a model |" in page
    section = page.split("## nobody/later")[1].split("##")[0]
    assert "for later: needs training" in section and "verdict" not in section


def test_it_is_not_run(waiting: str, tmp_path: object) -> None:
    with pytest.raises(UnsupportedError, match="nobody/later is for later: it needs training of"):
        evidence.run(waiting, str(tmp_path))
    with pytest.raises(UnknownNameError, match="did you mean nobody/later"):
        claim.find("nobody/latre")


def test_ids_are_taken_once(waiting: str) -> None:
    again = {"paper": PAPER, "statement": "s", "figure": "f", "needs": "training of | a model"}
    claim.later(waiting, **again)  # the same module read twice
    with pytest.raises(ArgumentError, match="id: got nobody/later"):
        claim.later(waiting, **{**again, "figure": "other"})
    with pytest.raises(ArgumentError, match="id: got snapkv/needle"):
        claim.later("snapkv/needle", **again)
    with pytest.raises(ArgumentError, match="id: got nobody/later"):
        claim.claim(
            waiting, paper=PAPER, statement="", figure="", measurement="", unit="", tolerance="", needs="cpu", minutes=1
        )(lambda settings: evidence.Measured(0.0, "partly", ""))
    for changed in ({"needs": " "}, {"paper": None}):
        with pytest.raises(ArgumentError):
            claim.later("nobody/other", **{**again, **changed})


def test_what_waits_has_no_record() -> None:
    assert not {entry.id for entry in evidence.postponed()} & set(evidence.read())
    assert all(entry.needs.strip() for entry in evidence.postponed())
