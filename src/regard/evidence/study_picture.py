"""Pictures of the training studies, from their records: `python -m regard.evidence.study_picture OUT [RESULTS]`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from regard.errors import UnknownNameError
from regard.evidence.record import RESULTS, Record, read
from regard.train.picture import Line, Panel, svg


def draw(record: Record) -> str:
    """The SVG of one study. Raises UnknownNameError for a record that is no study."""
    if record.id not in PICTURES:
        raise UnknownNameError("study", record.id, PICTURES)
    title, panels = PICTURES[record.id]
    return svg(title, panels(record.measured.details))


def write(out: Path, results: Path = RESULTS) -> list[Path]:
    """The picture of every study that has a record in `results`, to the folder `out`; returns the files."""
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for id, record in read(results).items():
        if id in PICTURES:
            path = out / picture_name(id)
            path.write_text(draw(record), encoding="utf-8")
            written.append(path)
    return written


def picture_name(id: str) -> str:
    """The file of a study's picture."""
    return f"{id.replace('/', '--')}.svg"


def _percent(value: float) -> str:
    return f"{value:.0f} %"


def _hybrid(details: dict[str, Any]) -> list[Panel]:
    """Full layers of four: 0, 1, 2, and 4, which is full attention for every mixer."""
    places = dict(zip(details["ratios"], (0, 1, 2), strict=True))

    def lines(figures: dict[str, float]) -> list[Line]:
        end = (4, figures["full attention"])
        return [Line(m, [*((places[r], figures[f"{m} {r}"]) for r in places), end]) for m in details["mixers"]]

    x = "full-attention layers of four"
    return [
        Panel("MQAR accuracy, 128 tokens, 32 pairs", x, lines(details["accuracy"]), _percent, 100.0),
        Panel("Held-out bits per byte", x, lines(details["bits"]), "{:.1f}".format),
    ]


def _gap(details: dict[str, Any]) -> list[Panel]:
    lengths = [length for length, _ in details["sizes"]]
    names = dict.fromkeys(name.rpartition(" ")[0] for name in details["accuracy"])
    lines = [Line(name, [(n, details["accuracy"][f"{name} {n}"]) for n in lengths]) for name in names]
    return [Panel("MQAR accuracy, a pair for every 16 tokens", "tokens", lines, _percent, 100.0)]


def _recall_state(details: dict[str, Any]) -> list[Panel]:
    names = {"both": "Based: linear + window", "linear": "linear only", "window": "window only"}
    curves = details["curves"]
    lines = [Line(names[kind], [(size / 1024, y) for size, y in curve]) for kind, curve in curves.items()]
    return [Panel("MQAR accuracy, 128 tokens, 16 pairs", "KiB of state", lines, _percent, 100.0)]


def _normalised(details: dict[str, Any]) -> list[Panel]:
    """A panel a size; places are named "(tokens, pairs), D channels a head"."""
    panels: dict[str, dict[int, list[float]]] = {}
    for place, figures in details["found"].items():
        size, _, channels = place.rpartition(", ")
        panels.setdefault(size, {})[int(channels.split()[0])] = figures
    return [
        Panel(
            f"MQAR accuracy, (tokens, pairs) = {size}",
            "state expansion: channels a head",
            [Line(kind, [(n, of[n][i]) for n in sorted(of)]) for i, kind in enumerate(details["order"])],
            _percent,
            100.0,
        )
        for size, of in panels.items()
    ]


PICTURES: dict[str, tuple[str, Callable[[dict[str, Any]], list[Panel]]]] = {
    "hybrid-linear-attention/recall-and-ratio": ("A few full layers bring recall back", _hybrid),
    "mqar-zoology/gap": ("Attention recalls at any length", _gap),
    "based/recall-state": ("Recall is bought with state", _recall_state),
    "dynamical-systems-framework/normalised": ("A learned normaliser in linear attention", _normalised),
}


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python -m regard.evidence.study_picture OUT_DIR [RESULTS_DIR]")
    for each in write(*map(Path, sys.argv[1:])):
        print(each)
