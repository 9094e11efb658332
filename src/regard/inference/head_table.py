"""A score for every KV head of a model, kept as data: made by one command, served by policies that tell heads apart."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from regard.errors import ArgumentError, require

FORMAT = 1
_SCORES = "a list of layers, each a list of one finite number per KV head, all of one length"


@dataclass(frozen=True)
class HeadTable:
    """scores[layer][kv_head], larger = more in need of the whole context; the model they are of; how they were made."""

    scores: tuple[tuple[float, ...], ...]
    model: str = ""
    made_by: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "scores", _checked(self.scores))

    @property
    def shape(self) -> tuple[int, int]:
        """Layers that cache, KV heads per layer."""
        return len(self.scores), len(self.scores[0])

    @property
    def ranked(self) -> list[tuple[int, int]]:
        """All (layer, head), highest score first; of equal scores the earlier layer, then the earlier head."""
        layers, heads = self.shape
        places = [(layer, head) for layer in range(layers) for head in range(heads)]
        return sorted(places, key=lambda place: -self.scores[place[0]][place[1]])

    def to_json(self) -> dict[str, Any]:
        """A JSON object; `from_json` gives the table back."""
        scores = [list(row) for row in self.scores]
        return {"regard_head_table": FORMAT, "model": self.model, "made_by": self.made_by, "scores": scores}

    @classmethod
    def from_json(cls, data: Any) -> HeadTable:
        """From what `to_json` gave. Raises ArgumentError when it is not a head table."""
        known = isinstance(data, dict) and data.get("regard_head_table") == FORMAT
        require(known, "head table", _short(data), f"a JSON object with regard_head_table = {FORMAT}")
        model, made_by = data.get("model", ""), data.get("made_by", "")
        require(isinstance(model, str) and isinstance(made_by, str), "head table", _short(data), "text for its origin")
        return cls(data.get("scores"), model, made_by)

    def save(self, path: str | Path) -> None:
        """Write the JSON form."""
        Path(path).write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, source: str | Path) -> HeadTable:
        """A packaged table by name, a .json that `save` wrote, or a .tsv: one line per layer, one number per KV head.

        Raises ArgumentError naming the file when it is missing, corrupted or foreign, and the packaged names.
        """
        name, packaged = str(source), packaged_tables()
        if name in packaged:
            text = (files("regard.inference") / "tables" / f"{name}.json").read_text(encoding="utf-8")
            return cls.from_json(json.loads(text))
        path = Path(source)
        allowed = (
            f"a .json or .tsv file of head scores, or a packaged table ({', '.join(packaged) or 'there are none'})"
        )
        require(path.suffix in (".json", ".tsv"), "head table", repr(name), allowed)
        try:
            text = path.read_text(encoding="utf-8")
            if path.suffix == ".json":
                return cls.from_json(json.loads(text))
            rows = tuple(tuple(map(float, line.split())) for line in text.splitlines() if line.strip())
            return cls(rows, made_by=path.name)
        except (OSError, ValueError, RecursionError) as error:
            raise ArgumentError("head table", repr(name), f"{allowed}: {error}") from error


def packaged_tables() -> list[str]:
    """Names of the head tables that ship with the package."""
    folder = files("regard.inference") / "tables"
    return (
        sorted(f.name.removesuffix(".json") for f in folder.iterdir() if f.name.endswith(".json"))
        if folder.is_dir()
        else []
    )


def _checked(scores: Any) -> tuple[tuple[float, ...], ...]:
    listed = isinstance(scores, Sequence) and bool(scores) and all(isinstance(row, (list, tuple)) for row in scores)
    require(listed and bool(scores[0]), "head table scores", _short(scores), _SCORES)
    for number, row in enumerate(scores):
        fits = len(row) == len(scores[0]) and all(_finite(x) for x in row)
        require(fits, f"head table scores of layer {number}", _short(row), _SCORES)
    return tuple(tuple(float(x) for x in row) for row in scores)


def _finite(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"
