"""The README's examples run, and the commands it names exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^### (\w+)[^\n]*\n(?:(?!^#).)*?^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def test_all_four_uses_have_an_example() -> None:
    assert [title for title, _ in EXAMPLES] == ["Build", "Serve", "Look", "Choose"]
    assert README.count("```python") == len(EXAMPLES), "an example that no test runs"


@pytest.mark.parametrize(("title", "code"), EXAMPLES, ids=[title for title, _ in EXAMPLES])
def test_example_runs(title: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, f"README.md, {title}", "exec"), {"__name__": "readme"})


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert set(re.findall(r"\bmake (\w+)", " ".join(re.findall(r"`+[^`]+`+", README)))) <= targets


def test_links_lead_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert [link for link in links if not (ROOT / link).exists()] == []
