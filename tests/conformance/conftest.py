"""`pytest tests/conformance --write-capabilities` writes docs/capabilities.{json,md} from what passed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from regard.layers.capabilities import Results, render

DOCS = Path(__file__).parents[2] / "docs"
OPTION = "--write-capabilities"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(OPTION, action="store_true", help="write docs/capabilities.{json,md} from what passed")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "conformance(kind, key, check, outcome): a cell of the capability table")
    if config.getoption(OPTION, default=False) and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Writer(), "capabilities")


def pytest_itemcollected(item: pytest.Item) -> None:
    """The cell a test stands for travels with its report, also from another process."""
    marker = item.get_closest_marker("conformance")
    if marker is not None:
        item.user_properties.append(("conformance", marker.args))


class Writer:
    """Collects the outcome of every cell; writes the table unless something failed."""

    def __init__(self) -> None:
        self.results: Results = {}
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        cell = dict(report.user_properties).get("conformance")
        if cell is None or (report.when != "call" and not report.failed):
            return
        kind, key, check, outcome = cell
        known = getattr(report, "wasxfail", None)
        if report.failed or (report.skipped and known is None):
            self.failed.append(report.nodeid)
        else:
            said = outcome if known is None else f"exempt: {known.removeprefix('reason: ')}"
            self.results.setdefault(kind, {}).setdefault(key, {})[check] = said

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        from tests.conformance.cases import CHECKS, UNDECLARED, keys

        missing = []
        for kind, names in CHECKS.items():
            for key in keys(kind):
                found = self.results.setdefault(kind, {}).setdefault(key, {})
                found |= {name: "undeclared" for name in UNDECLARED if name in names and name not in found}
                missing += [(kind, key, name) for name in names if name not in found]
        if self.failed or missing:
            raise pytest.UsageError(f"no table written: failed {self.failed}, not run {missing}")
        ordered = {
            kind: {key: {name: self.results[kind][key][name] for name in names} for key in sorted(self.results[kind])}
            for kind, names in CHECKS.items()
        }
        DOCS.mkdir(exist_ok=True)
        (DOCS / "capabilities.json").write_text(json.dumps(ordered, indent=1, ensure_ascii=False) + "\n")
        (DOCS / "capabilities.md").write_text(render(ordered))
