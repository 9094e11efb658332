"""Rules of the house that a linter does not know."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import regard

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "regard"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MODULES = sorted(SOURCE.rglob("*.py"))


def _imports(path: Path) -> set[str]:
    """Top-level packages a file imports anywhere, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module or "")
    return {name.partition(".")[0] for name in found}


def _names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\s\[<>=!;~]", text, maxsplit=1)[0].lower().replace("-", "_") for text in requirements}


def test_import_is_cheap() -> None:
    program = "import sys, regard; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize("name", regard.__all__)
def test_public_name_resolves(name: str) -> None:
    assert getattr(regard, name) is not None


def test_unknown_name_is_refused() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = regard.no_such_name


def test_attend_stays_a_function() -> None:
    program = "import regard.attend; assert callable(regard.attend), regard.attend"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_every_import_is_declared() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    declared = _names(PROJECT["project"]["dependencies"])
    optional = declared.union(*(_names(extras[name]) for name in ("demo", "evidence", "pictures")), {"triton"})
    comes_with = {"sklearn": "scikit_learn", "markupsafe": "jinja2", "numpy": "transformers"}
    undeclared = {
        (path.relative_to(SOURCE).as_posix(), package)
        for path in MODULES
        for package in _imports(path) - set(sys.stdlib_module_names) - {"regard", ""}
        if comes_with.get(package, package) not in optional
    }
    assert not undeclared


def test_every_room_has_a_floor() -> None:
    named = {
        name.strip()
        for layer in PROJECT["tool"]["importlinter"]["contracts"][0]["layers"]
        for name in re.split("[|:]", layer)
    }
    rooms = {f"regard.{p.stem}" for p in SOURCE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert rooms - {"regard.__init__", "regard.__main__"} <= named


def test_files_are_small() -> None:
    sizes = {path.relative_to(SOURCE).as_posix(): path.read_text(encoding="utf-8").count("\n") for path in MODULES}
    assert {name: size for name, size in sizes.items() if size > 400} == {}, "two ideas in one file?"


def test_nothing_is_unpickled() -> None:
    loads = re.compile(r"\bimport (pickle|dill|joblib|cloudpickle)\b|torch\.load\(|\ballow_pickle=True")
    assert [path.name for path in MODULES if loads.search(path.read_text(encoding="utf-8"))] == []


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_data_files_travel_with_the_package() -> None:
    """The wheel takes all of src/regard but what git ignores."""
    data = [str(path) for path in SOURCE.rglob("*") if path.is_file() and path.suffix not in {".py", ".pyc"}]
    ignored = subprocess.run(["git", "check-ignore", *data], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ignored.stdout == ""


def test_shapes_in_signatures_hold() -> None:
    """The jaxtyping annotations of `attend` and of all layers, checked at run time on ordinary input.

    In a process of its own: elsewhere the tests ask that wrong shapes get regard's own errors.
    """
    program = """
import jaxtyping
jaxtyping.install_import_hook(["regard.attend", "regard.layers"], "beartype.beartype")
import torch, regard
from regard.patterns import causal
q, k, v = (torch.randn(2, heads, 9, 8) for heads in (4, 2, 2))
out, lse = regard.attend(q, k, v, pattern=causal(), key_padding=torch.ones(2, 9, dtype=torch.bool), return_lse=True)
assert (out.shape, lse.shape) == ((2, 4, 9, 8), (2, 4, 9))
from regard.layers import Example
for entry in regard.list("layer"):
    about = entry.example() if entry.example else Example()
    layer = regard.create(entry.key, dim=about.dim, heads=about.heads, **about.settings)
    shape = (2, about.lengths[1] if len(about.lengths) > 1 else about.lengths[0], about.dim)
    assert layer(torch.randn(shape)).out.shape == shape
try:
    regard.attend(q, k[:, :, :5], v)
except jaxtyping.TypeCheckError:
    print("checked")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "checked\n", done.stderr[-2000:]
