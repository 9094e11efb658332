"""Everything a run found, in one value: what the terminal, results.json and the report are written from."""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from regard.choose.recommend import Recommendation, recommend
from regard.choose.records import Record
from regard.choose.settings import BASELINE, Settings
from regard.choose.summary import Summary, summarize

FORMAT = 1


@dataclass(frozen=True)
class Results:
    """settings and what they came to: plans by name, the machine, records, summaries, one recommendation a mode.

    wanted: measurements asked for; fewer records mean that the run was stopped. notices: sentences for the reader.
    """

    settings: Settings
    plans: dict[str, str]
    text: str
    machine: dict[str, Any]
    peak: str
    wanted: int
    records: tuple[Record, ...]
    summary: Summary
    advice: tuple[Recommendation, ...]
    notices: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Was everything measured?"""
        return len(self.records) >= self.wanted

    def command(self) -> str:
        """The command line that repeats the run."""
        s = self.settings
        words = ["regard compare", f"--model {shlex.quote(s.model)}", f"--context {','.join(map(str, s.context))}"]
        words += [f"--budget {','.join(s.budget)}", f"--plans {shlex.quote(','.join(s.asked_plans()))}"]
        words += [f"--tasks {shlex.quote(','.join(s.tasks))}", f"--mode {','.join(s.modes)}"]
        words += [
            f"--samples {s.samples}",
            f"--seed {s.seed}",
            f"--max-drop {s.max_drop:g}",
            f"--objective {s.objective}",
        ]
        for name in ("text", "dtype", "device"):
            if (value := getattr(s, name)) is not None:
                words.append(f"--{name} {shlex.quote(value)}")
        if s.trust_remote_code:
            words.append("--trust-remote-code")
        return " ".join(words)

    def to_json(self) -> dict[str, Any]:
        """Plain data; infinities become null, as JSON has none."""
        told = {
            "regard_compare": FORMAT,
            "command": self.command(),
            "settings": asdict(self.settings),
            "plans": self.plans,
            "text": self.text,
            "machine": self.machine,
            "peak_memory_is": self.peak,
            "complete": self.complete,
            "wanted": self.wanted,
            "notices": list(self.notices),
            "left_out": list(self.summary.left_out),
            "recommendation": [asdict(advice) for advice in self.advice],
            "summary": [asdict(plan) for plan in self.summary.plans],
            "records": [asdict(record) for record in self.records],
        }
        finite: dict[str, Any] = _finite(told)
        return finite

    def write(self, path: Path) -> None:
        """Write results.json, whole or not at all."""
        write_whole(path, json.dumps(self.to_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def conclude(
    settings: Settings,
    records: Sequence[Record],
    *,
    text: str,
    machine: dict[str, Any],
    peak: str,
    wanted: int,
) -> Results:
    """Summaries and recommendations from what was measured, be it all or not."""
    plans = {name: str(plan) for name, plan in settings.checked_plans().items()}
    summary = summarize(records, list(plans), BASELINE)
    advice = tuple(
        recommend(rows, BASELINE, max_drop=settings.max_drop, objective=settings.objective)
        for mode in settings.modes
        if (rows := summary.of(mode))
    )
    return Results(
        settings=settings,
        plans=plans,
        text=text,
        machine=machine,
        peak=peak,
        wanted=wanted,
        records=tuple(records),
        summary=summary,
        advice=advice,
        notices=tuple(settings.notices()),
    )


def write_whole(path: Path, content: str) -> None:
    """Write a file so that a reader sees the old one or the new one, never a part."""
    part = path.with_name(path.name + ".part")
    part.write_text(content, encoding="utf-8")
    os.replace(part, path)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return value
