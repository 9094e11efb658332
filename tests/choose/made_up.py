"""Records of measurements that nobody made."""

from __future__ import annotations

import math

from regard.choose.records import Record
from regard.tasks.sample import depth_of


def record(
    task: str, index: int, plan: str, score: float, *, mode: str = "aware", said: str = "", length: int = 128
) -> Record:
    match = task != "perplexity"
    return Record(
        task=task,
        length=length,
        index=index,
        mode=mode,
        plan=plan,
        measure="match" if match else "likelihood",
        depth=depth_of(index) if match else None,
        score=score,
        expected="4821" if match else "",
        said=said,
        first_token_s=2.0 if index == 0 else None,
        step_s=(0.05, 0.04, 0.06),
        prompt_bytes=10_000 if plan == "full" else 1_000,
        read_bytes=10_000 if plan == "full" else 1_000,
        peak_bytes=12_000,
    )


def records(plans: dict[str, float], n: int, *, modes: tuple[str, ...] = ("aware",), said: str = "") -> list[Record]:
    """Two tasks; `plans` gives each plan's accuracy, whose lack also costs it perplexity (half a bit of log₂ for
    0.5)."""
    made = []
    for mode in modes:
        for i in range(n):
            for plan, accuracy in plans.items():
                made.append(record("needle", i, plan, float(i < accuracy * n), mode=mode, said=said))
                loss = (plans["full"] - accuracy) * math.log(2)
                made.append(record("perplexity", i, plan, 2.0 + 0.1 * (i % 3) + loss, mode=mode))
    return made
