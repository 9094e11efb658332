"""The committed table is that of the mechanisms that are registered and of the checks that are run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.conformance import test_layers, test_recurrences, test_selections  # noqa: F401 — they fill CHECKS
from tests.conformance.cases import CHECKS, EXEMPTIONS, keys

from regard.layers.capabilities import render

DOCS = Path(__file__).parents[2] / "docs"
AGAIN = "write it again: pytest tests/conformance --write-capabilities -n 0"


@pytest.fixture(autouse=True)
def not_while_writing(request: pytest.FixtureRequest) -> None:
    """The run that writes the table cannot hold the old one against itself."""
    if request.config.getoption("--write-capabilities", default=False):
        pytest.skip("the table is being written")


def test_every_registered_mechanism_and_every_check_is_in_the_table() -> None:
    results = json.loads((DOCS / "capabilities.json").read_text())
    assert list(results) == list(CHECKS), AGAIN
    for kind, names in CHECKS.items():
        assert sorted(results[kind]) == keys(kind), AGAIN
        for key, found in results[kind].items():
            assert list(found) == names, f"{kind} {key}: {AGAIN}"


def test_what_the_table_says_fails_is_what_is_exempt() -> None:
    results = json.loads((DOCS / "capabilities.json").read_text())
    said = {
        (kind, key, name): value.removeprefix("exempt: ")
        for kind, found in results.items()
        for key, outcomes in found.items()
        for name, value in outcomes.items()
        if value not in ("passed", "refused", "undeclared")
    }
    assert said == EXEMPTIONS, AGAIN


def test_an_exemption_is_seen_in_the_table_with_its_reason() -> None:
    page = render({"layer": {"moh": {"padding": "exempt: it forgets", "causal": "refused"}}})
    assert "| padding | ✗ |" in page and "- layer moh, padding: it forgets" in page and "| causal | – |" in page


def test_the_page_is_rendered_from_the_results() -> None:
    results = json.loads((DOCS / "capabilities.json").read_text())
    assert (DOCS / "capabilities.md").read_text() == render(results), AGAIN
