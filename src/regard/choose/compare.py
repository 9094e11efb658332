"""The main job: every plan on every prompt, written down as it goes; then the conclusion."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from regard.choose import machine, records
from regard.choose.records import JOURNAL, Journal, Key
from regard.choose.report import write_report
from regard.choose.results import Results, conclude
from regard.choose.runner import ModelRunner, Runner, answer_room, peak_kind
from regard.choose.settings import BASELINE, Settings, check_lengths, check_writable
from regard.errors import RegardError, UnsupportedError
from regard.inference.plan import Plan
from regard.inference.seam import attach
from regard.models.pretrained import Loaded, load
from regard.tasks import Sample, Task
from regard.tasks.text import Text, long_text

WARM_UP_TOKENS = 128
RESULTS, REPORT = "results.json", "report.html"


@dataclass(frozen=True)
class Job:
    """One prompt in one mode."""

    length: int
    index: int
    task: str
    mode: Any


@dataclass(frozen=True)
class Outcome:
    """The results, where they lie, and whether Ctrl-C cut the run short."""

    results: Results
    folder: Path
    interrupted: bool


def compare(
    settings: Settings,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
    loaded: Loaded | None = None,
    make_runner: Callable[[Loaded, dict[Plan, str]], Runner] | None = None,
) -> Outcome:
    """Measure, conclude, and write the journal, results.json and report.html into `out`.

    loaded: the model, where it is at hand; else `settings.model` is loaded. make_runner: measures in ModelRunner's
    place. Raises what is wrong with the settings, the folder or the model before anything is measured. Ctrl-C ends
    the run early: what was measured is kept and concluded from.
    """
    console = console or Console(quiet=True)
    check_writable(out)
    text = long_text(settings.text)
    identity = settings.identity(text)
    records.check(out, identity, resume=resume, overwrite=overwrite)
    if loaded is None:
        with console.status(f"loading {settings.model}"):
            loaded = load(
                settings.model,
                dtype=settings.dtype,
                device=settings.device,
                trust_remote_code=settings.trust_remote_code,
            )
    plans, tasks = settings.checked_plans(), settings.checked_tasks()
    if make_runner is None:
        plans = _served(loaded.model, plans, settings)
    names = {plan: name for name, plan in plans.items()}
    runner = make_runner(loaded, names) if make_runner else ModelRunner(loaded.model, loaded.tokenizer, names)
    check_lengths(settings.context, 1, loaded.max_length)  # before a text is found too short for them
    first = [_sample(loaded, task, text, length, 0, settings) for task in tasks.values() for length in settings.context]
    check_lengths(settings.context, max(map(answer_room, first)), loaded.max_length)
    if make_runner is None:
        _warm_up(loaded, settings)
    jobs = list(_jobs(settings, tasks))
    with Journal.open(out, identity, resume=resume, overwrite=overwrite) as journal:
        if journal.records:
            console.print(f"going on with {len(journal.records)} measurements from {journal.path}", markup=False)
        interrupted = _measure(settings, jobs, tasks, plans, runner, loaded, text, journal, console)
        asked = {Key(j.task, j.length, j.index, j.mode, name) for j in jobs for name in plans}
        kept = [record for record in journal.records if record.key in asked]
    device = loaded.model.device
    results = conclude(
        settings,
        kept,
        text=identity["text"],
        machine=machine.describe(device),
        peak=peak_kind(device),
        wanted=len(asked),
    )
    results.write(out / RESULTS)
    write_report(results, out / REPORT)
    return Outcome(results, out, interrupted)


def _measure(
    settings: Settings,
    jobs: list[Job],
    tasks: dict[str, Task],
    plans: dict[str, Plan],
    runner: Runner,
    loaded: Loaded,
    text: Text,
    journal: Journal,
    console: Console,
) -> bool:
    """Do what the journal lacks. True when Ctrl-C ended it."""
    done = journal.done()
    progress = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        speed_estimate_period=120,
    )
    try:
        with progress:
            bar = progress.add_task("measuring", total=len(jobs) * len(plans), completed=0)
            for job in jobs:
                missing = [
                    plan
                    for name, plan in plans.items()
                    if Key(job.task, job.length, job.index, job.mode, name) not in done
                ]
                progress.advance(bar, len(plans) - len(missing))
                if not missing:
                    continue
                progress.update(bar, description=f"{job.task} #{job.index} {job.mode}")
                sample = _sample(loaded, tasks[job.task], text, job.length, job.index, settings)
                for record in runner.measure(sample, job.mode, missing):
                    journal.add(record)
                    progress.advance(bar)
    except KeyboardInterrupt:
        return True
    return False


def _jobs(settings: Settings, tasks: dict[str, Task]) -> Iterator[Job]:
    """By prompt number first, so that a run that is stopped has seen every task alike."""
    for index in range(settings.samples):
        for length in settings.context:
            for task in tasks:
                for mode in settings.modes:
                    yield Job(length, index, task, mode)


def _sample(loaded: Loaded, task: Task, text: Text, length: int, index: int, settings: Settings) -> Sample:
    return task.sample(loaded.tokenizer, text, length, index, settings.seed)


def _served(model: Any, plans: dict[str, Plan], settings: Settings) -> dict[str, Plan]:
    """The plans, after each has been attached once; a refusal names the plan. `full` first: does the seam reach it at
    all?"""
    for name, plan in plans.items():
        try:
            attach(model, plan).detach()
        except RegardError as error:
            if name == BASELINE:
                raise
            raise UnsupportedError(f"plans: {name} cannot be served by {settings.model}: {error}") from error
    return plans


@torch.no_grad()
def _warm_up(loaded: Loaded, settings: Settings) -> None:
    """One forward that no one times: on CUDA as long as the prompts, as kernels are chosen by shape."""
    device = loaded.model.device
    n = max(settings.context) if device.type == "cuda" else min(WARM_UP_TOKENS, *settings.context)
    loaded.model(torch.ones(1, n, dtype=torch.long, device=device), use_cache=False)


__all__ = ["JOURNAL", "REPORT", "RESULTS", "Outcome", "compare"]
