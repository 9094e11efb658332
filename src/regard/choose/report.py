"""report.html: one file, no script and no network; whatever came from a user or a model is escaped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from regard.choose import figures
from regard.choose.results import Results, write_whole
from regard.choose.settings import BASELINE
from regard.choose.summary import PlanSummary
from regard.choose.terminal import (
    MODE_MEANING,
    MODE_TITLES,
    bytes_text,
    score_interval,
    score_value,
    seconds_text,
    share_interval,
    speed_text,
)

MOST_WRONG = 60
COLOURS = 10


def write_report(results: Results, path: Path) -> None:
    """Write the report of a run, whole or not at all."""
    write_whole(path, render(results))


def render(results: Results) -> str:
    """The page."""
    environment = Environment(
        loader=PackageLoader("regard.choose"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=False,
        keep_trailing_newline=True,
    )
    colours = _colours(results)
    failures = [r for r in results.records if r.measure == "match" and r.score == 0 and r.plan != BASELINE]
    return environment.get_template("report.html.j2").render(
        settings=results.settings,
        settings_shown={"max_drop": f"{results.settings.max_drop:g}"},
        plans=results.plans,
        machine=results.machine,
        records=results.records,
        complete=results.complete,
        wanted=results.wanted,
        views=[_view(results, mode, colours) for mode in results.settings.modes if results.summary.of(mode)],
        left_out=results.summary.left_out,
        wrong=failures[:MOST_WRONG],
        wrong_count=len(failures),
        command=results.command(),
        facts=_facts(results),
        notes=_notes(results),
        embedded=embedded_json(results.to_json()),
    )


def embedded_json(value: Any) -> Markup:
    """JSON that may stand in a script element: no character in it can end the element or begin a comment."""
    text = json.dumps(value, allow_nan=False)  # ASCII only, so U+2028 and its like are escaped as well
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _colours(results: Results) -> dict[str, int]:
    """A colour for each plan, the same at every budget; 0 is the baseline's."""
    budgets = tuple(f" {budget}" for budget in results.settings.budget)
    ends = {name: next((b for b in budgets if name.endswith(b)), "") for name in results.plans}
    bare = {name: name.removesuffix(end) for name, end in ends.items()}
    order = [name for name in dict.fromkeys(bare.values()) if name != BASELINE]
    return {n: 0 if b == BASELINE else 1 + order.index(b) % (COLOURS - 1) for n, b in bare.items()}


def _view(results: Results, mode: str, colours: dict[str, int]) -> dict[str, Any]:
    plans = results.summary.of(mode)
    tasks = {s.task: s.measure for p in plans for s in p.tasks}
    drop = results.settings.max_drop
    memory = figures.scatter(
        plans,
        colours,
        lambda p: p.prompt_bytes / 2**20,
        title="Accuracy against memory",
        x_label="KV bytes held after the prompt, MiB",
        show=lambda x: f"{x:g}" if x == round(x, 2) else f"{x:.2f}",
        max_drop=drop,
    )
    latency = figures.scatter(
        plans,
        colours,
        lambda p: 1000 * p.step_s,
        title="Accuracy against latency",
        x_label="decoding, milliseconds a token",
        show=lambda x: f"{x:g}" if x == round(x, 1) else f"{x:.1f}",
        max_drop=drop,
    )
    return {
        "title": MODE_TITLES[mode],
        "explanation": f"The cache is {MODE_MEANING[mode]}.",
        "advice": next((a for a in results.advice if a.mode == mode), None),
        "tasks": [{"name": task, "measure": measure} for task, measure in tasks.items()],
        "rows": [_row(p, list(tasks), colours) for p in plans],
        "scatters": [s for s in (memory, latency) if s is not None],
        "heat": figures.heat_map([r for r in results.records if r.mode == mode], list(results.plans)),
    }


def _row(plan: PlanSummary, tasks: list[str], colours: dict[str, int]) -> dict[str, Any]:
    scores = {s.task: s for s in plan.tasks}
    return {
        "plan": plan.plan,
        "colour": colours[plan.plan],
        "scores": [
            {"value": score_value(scores[t]), "interval": score_interval(scores[t])} if t in scores else None
            for t in tasks
        ],
        "quality": "–" if plan.quality is None else f"{plan.quality.value:.0%}",
        "quality_interval": "" if plan.quality is None else share_interval(plan.quality),
        "held": bytes_text(plan.prompt_bytes),
        "memory": "" if plan.memory is None else f"{plan.memory:.0%}",
        "read": bytes_text(plan.read_bytes),
        "first_token": seconds_text(plan.first_token_s),
        "speed": speed_text(plan),
        "peak": bytes_text(plan.peak_bytes),
    }


def _facts(results: Results) -> list[tuple[str, str]]:
    versions = results.machine["versions"]
    return [
        ("machine", str(results.machine["device"])),
        ("versions", ", ".join(f"{name} {number}" for name, number in versions.items())),
        ("long text", results.text),
        *((name, text) for name, text in results.plans.items() if name != text),
        *(("note", notice) for notice in results.notices),
    ]


def _notes(results: Results) -> list[str]:
    return [
        "Every plan answers the same prompts. The accuracy of one plan has Wilson's interval; comparisons with full "
        "are paired over prompts, resampled with a Bayesian bootstrap.",
        "“Of full's accuracy” is the mean over tasks of a plan's accuracy divided by full's; for perplexity, of full's "
        "perplexity divided by the plan's.",
        "Plans that prefill densely share one prefill of a prompt. Its last logits give the first token; every later "
        "token is read from the compressed cache.",
        "The time to the first token is a median over prompts whose prefill observed just what the plan needs; "
        "compression is included. Decoding is the median step, one row.",
        f"Peak memory: {results.peak}.",
    ]
