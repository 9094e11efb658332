"""Writes docs/architectures.json and docs/architectures.md: `python -m tests.inference.write_architectures`.

Every proof runs on every architecture of the zoo, in full; what fails is written down as it failed.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from tests.inference import proof, zoo
from transformers import PreTrainedModel

from regard.errors import AttachError
from regard.inference.seam import attach

DOCS = Path(__file__).parents[2] / "docs"
Row = dict[str, Any]

HEAD = """# Architectures

Which of transformers' decoders `regard.attach` serves. This page is generated
(`python -m tests.inference.write_architectures`) with torch {torch} and transformers {transformers}, from tiny models
with random weights (`tests/inference/zoo.py`).

**Full plan**: logits at real tokens against the model's own eager attention — unpadded, left- and right-padded batches,
with and without given positions, chunked prefill, decoding — and the tokens and logits of `generate()`: greedy,
sampled, with beams, with several sequences returned. The figure is the largest difference, relative to the largest
logit, in float32; at most {allowed} passes.

{full} architectures pass it, {every} of them under every plan as below (a plan that tells heads apart is refused where
one latent serves all heads); {refused} are refused, with the reason.

## Every plan

At a budget of 8 of 20, 13 and 17 prompt tokens: decoding after compression equals dense eager attention under the mask
“kept ∪ new” of each layer and KV head, and a padded batch equals its rows one by one. With a budget for everything the
plan generates what eager generates. The largest relative difference:
"""


def measure(names: Iterable[str] | None = None, say: Callable[[str], None] = print) -> dict[str, Any]:
    """All proofs on all architectures (or on `names`), and the refusals with their reasons."""
    wanted = zoo.known() if names is None else list(names)
    rows = []
    for name in wanted:
        rows.append(_served(name))
        say(f"{name}: {_figure(rows[-1]['full'])}")
    apart = () if names is not None else (*zoo.REFUSED, *zoo.UNROUTED)
    return {
        "torch": torch.__version__.partition("+")[0],
        "transformers": transformers.__version__,
        "allowed": proof.ALLOWED,
        "served": rows,
        "refused": [_refused(name) for name in zoo.known(tuple(apart))],
    }


def _served(name: str) -> Row:
    model = zoo.build(name)
    row: Row = {"architecture": name, "class": type(model).__name__}
    row["full"] = _outcome(lambda: proof.full_plan(model))
    if name in zoo.TWELVE and row["full"]["ok"]:
        row["plans"] = {plan: _outcome(lambda p=plan: _plan(model, p)) for plan in proof.plans(model, 8)}
    return row


def _plan(model: PreTrainedModel, plan: str) -> list[proof.Check]:
    ample = proof.ample_budget(model, proof.plans(model, 64)[plan])
    return [*proof.compressed(model, proof.plans(model, 8)[plan]), ample]


def _outcome(run: Callable[[], list[proof.Check]]) -> Row:
    try:
        checks = run()
    except Exception as error:
        reason = str(error) if isinstance(error, AttachError) else repr(error)
        return {"ok": False, "error": None, "refused": isinstance(error, AttachError), "remarks": [reason]}
    remarks = [f"{check.name}: {check.remark}" for check in checks if check.remark]
    remarks += [f"{check.name} fails: {check.error:.1e}" for check in checks if not check.ok]
    largest = max(check.error for check in checks)
    return {
        "ok": all(check.ok for check in checks),
        "error": largest if math.isfinite(largest) else None,
        "remarks": remarks,
    }


def _refused(name: str) -> Row:
    model = zoo.build(name)
    row: Row = {"architecture": name, "class": type(model).__name__}
    try:
        attach(model, "full").detach()
    except AttachError as error:
        return {**row, "reason": str(error)}
    return {**row, "reason": "", "outcome": _outcome(lambda: proof.full_plan(model, []))}


def page(data: dict[str, Any]) -> str:
    """The Markdown page of what was measured."""
    served, refused = data["served"], data["refused"]
    twelve = [row for row in served if "plans" in row]
    plans = list(dict.fromkeys(plan for row in twelve for plan in row["plans"]))
    head = HEAD.format(
        torch=data["torch"],
        transformers=data["transformers"],
        allowed=f"{data['allowed']:.0e}",
        full=sum(row["full"]["ok"] for row in served),
        every=sum(all(_as_meant(row, plan) for plan in row["plans"]) for row in twelve),
        refused=sum(bool(row["reason"]) for row in refused),
    )
    by_plan = [[row["architecture"], *(_figure(row["plans"][plan]) for plan in plans)] for row in twelve]
    full = [
        [row["architecture"], row["class"], _figure(row["full"]), "; ".join(row["full"]["remarks"])] for row in served
    ]
    reasons = [
        [row["architecture"], row["class"], row["reason"] or f"**not refused**: {'; '.join(row['outcome']['remarks'])}"]
        for row in refused
    ]
    parts = [
        head,
        *_table(["architecture", *plans], by_plan),
        *_plan_remarks(twelve),
        "## Full plan",
        "",
        *_table(["architecture", "class", "largest relative difference", "remarks"], full),
        "## Refused",
        "",
        *_table(["architecture", "class", "reason"], reasons),
    ]
    return "\n".join(parts).rstrip() + "\n"


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(map(_cell, row)) + " |" for row in [header, *rows]]
    return [lines[0], "|---" * len(header) + "|", *lines[1:], ""]


def _as_meant(row: Row, plan: str) -> bool:
    return row["plans"][plan]["ok"] or (row["architecture"], plan) in zoo.REFUSED_PLANS


def _plan_remarks(served: list[Row]) -> list[str]:
    found = [
        f"- {row['architecture']} under {plan}: {'; '.join(outcome['remarks'])}"
        for row in served
        for plan, outcome in row.get("plans", {}).items()
        if outcome["remarks"]
    ]
    return [*found, ""] if found else []


def _figure(outcome: Row) -> str:
    if outcome["ok"]:
        return f"{outcome['error']:.1e}"
    return "refused" if outcome.get("refused") else "**fails**"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def main() -> None:
    """Measure and write both files."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    data = measure(say=lambda line: print(line, file=sys.stderr, flush=True))
    text = json.dumps(data, indent=1, ensure_ascii=False) + "\n"
    (DOCS / "architectures.json").write_text(text, encoding="utf-8")
    (DOCS / "architectures.md").write_text(page(data), encoding="utf-8")


if __name__ == "__main__":
    main()
