"""The table of what was measured, made from the records and nothing else."""

from __future__ import annotations

from pathlib import Path

from regard.evidence.claim import Claim, Later, all_claims, all_later
from regard.evidence.record import RESULTS, Record, read

HEAD = """# Evidence

What papers claim, measured again by `regard evidence run ID`. This page is generated (`make docs`) from the records in
`src/regard/evidence/results/`, which hold every figure, the machine and the versions. The tolerance is part of the
claim's code and was written before the measurement. A verdict speaks of the setting measured here, which is often far
smaller than the paper's. "later" stands where a claim waits, most often for the training of its task's model: nothing
is measured, and nothing is said of whether it holds.
"""


def table(folder: Path = RESULTS) -> str:
    """Markdown: the verdicts in one table, then each claim with its figures."""
    records = read(folder)
    claims: list[Claim | Later] = sorted([*all_claims(), *all_later()], key=lambda entry: entry.id)
    rows = ["| claim | verdict | measured | why |", "|---|---|---|---|"]
    for entry in claims:
        record = records.get(entry.id)
        if isinstance(entry, Later):
            rows.append(f"| {_link(entry)} | later | | needs {_cell(entry.needs)} |")
        elif record is None:
            rows.append(f"| {_link(entry)} | not run | | needs {entry.needs}, about {entry.minutes:g} min |")
        else:
            m = record.measured
            rows.append(f"| {_link(entry)} | **{m.verdict}** | {_value(record)} | {_cell(m.why)} |")
    return "\n".join([HEAD, *rows, "", *(_section(entry, records.get(entry.id)) for entry in claims)])


def _section(entry: Claim | Later, record: Record | None) -> str:
    from regard.evidence.study_picture import PICTURES, picture_name  # it is also run as a program

    lines = [
        f"## {entry.id}",
        "",
        f"{entry.paper}",
        "",
        f"- claim: {entry.statement}",
        f"- their figure: {entry.figure}",
    ]
    if isinstance(entry, Later):
        return "\n".join([*lines, f"- for later: needs {entry.needs}", ""])
    lines += [f"- measured here: {entry.measurement}", f"- reproduced when: {entry.tolerance}"]
    if record is None:
        lines.append("- verdict: not run")
    else:
        m, where = record.measured, record.machine
        software = ", ".join(f"{name} {number}" for name, number in record.versions.items())
        place = where["gpu"] or f"{where['processor']}, {where['threads']} threads"
        lines += [
            f"- verdict: **{m.verdict}** — {m.why}",
            f"- on {place}; {software}; {record.seconds:.0f} s; seed {record.settings.seed}; {record.date}",
        ]
        stale = [name for name, text in record.claim.items() if name != "paper" and text != getattr(entry, name)]
        if stale:
            lines.append(f"- the claim's {', '.join(stale)} changed since it was measured")
        if record.id in PICTURES:
            lines += ["", f"![{PICTURES[record.id][0]}](images/{picture_name(record.id)})"]
    return "\n".join([*lines, ""])


def _link(entry: Claim | Later) -> str:
    return f"[{entry.id}](#{entry.id.replace('/', '')})"


def _value(record: Record) -> str:
    return f"{record.measured.value:.3g} {_cell(record.claim['unit'])}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
