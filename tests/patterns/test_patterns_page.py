"""docs/patterns.md: its code runs, and the pattern it adds passes the test of all patterns."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.patterns.test_pattern_tiles import test_registered_example as check_registered

import regard.patterns
from regard import registry

PAGE = Path(__file__).parents[2] / "docs" / "patterns.md"


def test_code_of_the_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))
    first, grid, second = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    names: dict[str, object] = {"__name__": __name__}
    exec(first, names)
    assert (tmp_path / "pattern.png").stat().st_size > 5000
    exec(grid, names)
    assert names["out"].shape == (1, 2, 24 * 32, 16)  # type: ignore[attr-defined]
    exec(second, names)
    check_registered("same-block")
    assert repr(regard.patterns.same_block(3)) == "SameBlock(size=3)"


def test_every_pattern_is_in_the_table() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for entry in registry.entries("pattern"):
        assert f"`{entry.factory.__name__}(" in page
