"""The command `regard`: every command reads its arguments, calls one function and prints what comes back."""

from __future__ import annotations

import inspect
import json
import shlex
import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

import regard
from regard.errors import ArgumentError, RegardError

INTERRUPTED = 130
app = typer.Typer(
    help="Attention in all its published forms: build, serve, look, choose.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
evidence_app = typer.Typer(help="Papers' headline claims, measured again.", no_args_is_help=True)
app.add_typer(evidence_app, name="evidence")


class Objective(StrEnum):
    """What `compare` recommends by."""

    memory = "memory"
    latency = "latency"
    accuracy = "accuracy"


def main() -> None:
    """The entry point. What regard refuses is one line and exit code 2; Ctrl-C is 130."""
    try:
        app()
    except RegardError as error:
        Console(stderr=True).print(Text(f"error: {error}", style="red"), soft_wrap=True)
        sys.exit(2)
    except BrokenPipeError:  # `regard list | head`
        sys.stderr.close()
        sys.exit(0)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"regard {regard.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


@app.command("list")
def list_(
    kind: Annotated[str | None, typer.Option(help="layer, pattern, selection, recurrence, cache, prefill, …")] = None,
    family: Annotated[str | None, typer.Option(help="Only members of this family.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What there is: mechanisms, patterns, policies, plans and tasks."""
    found = regard.list(kind, family)  # type: ignore[arg-type]
    if as_json:
        typer.echo(json.dumps([_entry(entry) for entry in found], indent=1, ensure_ascii=False))
        return
    names = Column("name", no_wrap=True)  # they are typed again, so never shortened
    table = Table(names, "kind", "families", "what it is", box=None, padding=(0, 2, 0, 0))
    for entry in found:
        families = ", ".join(entry.families)
        table.add_row(Text(entry.key, style="bold"), entry.kind, Text(families), Text(entry.summary))
    Console().print(table)


@app.command()
def show(
    key: Annotated[str, typer.Argument(help="A name from `regard list`.")],
    out: Annotated[Path | None, typer.Option(help="For a pattern: write its picture to this file.")] = None,
) -> None:
    """The card of one name: what it is, its settings, cost and paper; a pattern can be drawn."""
    if out is not None:
        _draw(key, out)
    typer.echo(regard.show(key))
    if out is not None:
        typer.echo(f"\npicture: {out}")


@app.command()
def plan(text: Annotated[str, typer.Argument(help="e.g. 'snapkv(budget=512)'")]) -> None:
    """Read a plan and print its three parts."""
    made = regard.Plan.parse(text)
    typer.echo(str(made))
    typer.echo(json.dumps(made.to_json(), indent=1))


@app.command()
def compare(
    model: Annotated[str, typer.Option(help="An alias (smollm2), a local folder, or a hub id.")],
    context: Annotated[str, typer.Option(help="Prompt length in tokens; several with commas.")],
    budget: Annotated[str, typer.Option(help="Entries kept: 512, 0.25 or 64MiB; several with commas.")],
    plans: Annotated[str | None, typer.Option(help="Plans, with commas. [default: all]", show_default=False)] = None,
    tasks: Annotated[str, typer.Option(help="Tasks, with commas.")] = "needle,multi-needle,recall,perplexity",
    mode: Annotated[
        str, typer.Option(help="Seal after the question (aware), before it (agnostic).")
    ] = "aware,agnostic",
    samples: Annotated[int, typer.Option(help="Prompts for each task and length.")] = 16,
    seed: Annotated[int, typer.Option(help="The same seed gives the same prompts and accuracies.")] = 0,
    max_drop: Annotated[float, typer.Option(help="Share of full's accuracy that may be lost.")] = 0.05,
    objective: Annotated[Objective, typer.Option(help="What to recommend by.")] = Objective.memory,
    text: Annotated[Path | None, typer.Option(help="Long text to use instead of Shakespeare.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for results.json and report.html.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out.")] = False,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16 or float64.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that comes with a hub model.")] = False,
) -> None:
    """Measure plans on your model at your length, and recommend one."""
    from regard.choose.compare import REPORT, RESULTS
    from regard.choose.compare import compare as run
    from regard.choose.settings import Settings
    from regard.choose.terminal import show as show_results

    _one_of(resume, overwrite, out)
    settings = Settings(
        model=model,
        context=tuple(_whole("context", item) for item in _items(context)),
        budget=_items(budget),
        plans=None if plans is None else _items(plans),
        tasks=_items(tasks),
        modes=_items(mode),  # type: ignore[arg-type]  # Settings says which there are
        samples=samples,
        seed=seed,
        max_drop=max_drop,
        objective=objective.value,
        text=None if text is None else str(text),
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    folder = out or Path("regard-out") / f"compare-{time.strftime('%Y%m%d-%H%M%S')}"
    console = Console()
    outcome = run(settings, folder, resume=resume, overwrite=overwrite, console=console)
    show_results(outcome.results, console)
    console.print()
    for name in (REPORT, RESULTS):
        console.print(Text(str(folder / name), style="bold"), soft_wrap=True)
    if outcome.interrupted:
        kept = f"{len(outcome.results.records)} of {outcome.results.wanted} measurements are kept in {folder}"
        console.print(Text(f"Stopped: {kept}. Go on with the same command and {_again(folder)}"), soft_wrap=True)
        raise typer.Exit(INTERRUPTED)


@app.command()
def train(
    task: Annotated[str, typer.Option(help="mqar, copying or bytes; NAME(key=value) for settings.")] = "mqar",
    mixer: Annotated[str, typer.Option(help="A causal layer; NAME(key=value) for settings.")] = "gated-deltanet",
    ratio: Annotated[str, typer.Option(help="linear:full, such as 3:1; 0:1 is a Transformer.")] = "3:1",
    layers: Annotated[int, typer.Option(help="Blocks.")] = 3,
    dim: Annotated[int, typer.Option(help="Width.")] = 64,
    heads: Annotated[int, typer.Option(help="Of every mixer.")] = 2,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 2000,
    batch: Annotated[int, typer.Option(help="Rows a step.")] = 16,
    lr: Annotated[float, typer.Option(help="Highest learning rate.")] = 3e-3,
    evaluate_every: Annotated[int, typer.Option(help="Steps between evaluations and checkpoints.")] = 100,
    seed: Annotated[int, typer.Option(help="Of weights, batches and held-out rows.")] = 0,
    compare_full: Annotated[bool, typer.Option(help="Train the same stack in full attention beside it.")] = True,
    bf16: Annotated[bool, typer.Option("--bf16", help="Forward under autocast to bfloat16.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="Folder for models, results.json and curves.svg.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out.")] = False,
) -> None:
    """Train a small hybrid, and report its accuracy beside full attention's."""
    from regard.choose.machine import describe
    from regard.train import run as job
    from regard.train.settings import TrainSettings

    _one_of(resume, overwrite, out)
    training = TrainSettings(
        steps=steps,
        batch=batch,
        lr=lr,
        evaluate_every=evaluate_every,
        save_every=evaluate_every,
        seed=seed,
        bf16=bf16,
    )
    settings = job.RunSettings(task, mixer, ratio, layers, dim, heads, compare_full, device, training)
    folder = out or Path("regard-out") / f"train-{time.strftime('%Y%m%d-%H%M%S')}"
    console = Console()
    machine = describe(job.device_of(settings))
    outcome = job.run(settings, folder, machine=machine, resume=resume, overwrite=overwrite, console=console)
    console.print(job.table(outcome))
    console.print()
    for name in (job.PICTURE, job.RESULTS):
        console.print(Text(str(folder / name), style="bold"), soft_wrap=True)
    if outcome.interrupted:
        told = (
            f"Stopped after step {outcome.models[-1].trained.step} of {outcome.models[-1].name}; all is kept. Go on: "
        )
        console.print(Text(f"{told}{settings.command()} {_again(folder)}"), soft_wrap=True)
        raise typer.Exit(INTERRUPTED)


@app.command("heads")
def heads(
    model: Annotated[str, typer.Option(help="An alias, a local folder or a hub id.")],
    out: Annotated[Path, typer.Option(help="Where the head table goes: a .json file.")],
    text: Annotated[
        Path | None, typer.Option(help="Text to cut prompts from; Python's own sources if not given.")
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens per prompt.")] = 1024,
    plantings: Annotated[int, typer.Option(help="Prompts.")] = 8,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Score every KV head by how it copies, for plans that tell heads apart: duoattention(table=OUT)."""
    from rich.progress import Progress

    from regard.heads.copy_score import read_haystack, score_model

    if out.suffix != ".json" or not out.parent.is_dir():
        raise ArgumentError("--out", out, "a .json file in a folder that exists")
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("prompts", total=plantings)
        table = score_model(
            model,
            read_haystack(text),
            length=length,
            plantings=plantings,
            seed=seed,
            progress=lambda done, _: progress.update(task, completed=done),
        )
    table.save(out)
    typer.echo(f"{out}: {table.shape[0]} layers × {table.shape[1]} KV heads")


@evidence_app.command("list")
def evidence_list() -> None:
    """The claims; "later" where one cannot be measured yet."""
    from regard import evidence

    entries: list[evidence.Claim | evidence.Later] = [*evidence.entries(), *evidence.postponed()]
    columns = (Column("id", no_wrap=True, style="bold"), "needs", "claim")  # ids are typed again, so never shortened
    table = Table(*columns, box=None, padding=(0, 2, 0, 0))
    for claim in sorted(entries, key=lambda entry: entry.id):
        needs = "later" if isinstance(claim, evidence.Later) else claim.needs
        table.add_row(Text(claim.id), Text(needs), Text(claim.statement))
    Console().print(table)


@evidence_app.command("run")
def evidence_run(
    id: Annotated[str, typer.Argument(help="An id from `regard evidence list`.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the record.")] = None,
) -> None:
    """Measure one claim again and write down what came out."""
    from regard import evidence

    record = evidence.run(id, out)
    typer.echo(json.dumps(record.measured.__dict__, indent=1, ensure_ascii=False, default=str))


@evidence_app.command("table")
def evidence_table() -> None:
    """The recorded results as a table in Markdown."""
    from regard import evidence

    typer.echo(evidence.table())


def _one_of(resume: bool, overwrite: bool, out: Path | None) -> None:
    if resume and overwrite:
        raise ArgumentError("resume", "both --resume and --overwrite", "one of the two")
    if resume and out is None:
        raise ArgumentError("out", None, "with --resume, the folder of the run to go on with")


def _again(folder: Path) -> str:
    """The words that go on with a run, as a shell takes them."""
    return f"--out {shlex.quote(str(folder))} --resume"


def _items(text: str) -> tuple[str, ...]:
    from regard.tasks.sample import items_of

    return items_of(text)


def _whole(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ArgumentError(name, repr(text), "a whole number of tokens, such as 4096") from None


def _entry(entry: Any) -> dict[str, Any]:
    return {
        "key": entry.key,
        "kind": entry.kind,
        "families": list(entry.families),
        "summary": entry.summary,
        "settings": {name: value for name, value in entry.settings.items() if _plain(value)},
        "arguments": [
            x.name if x.default is x.empty else f"{x.name}={x.default!r}"
            for x in inspect.signature(entry.factory).parameters.values()
        ],
        "cost": entry.cost,
        "paper": None if entry.paper is None else entry.paper.__dict__,
    }


def _plain(value: Any) -> bool:
    return isinstance(value, (str, int, float, bool, type(None), list, tuple))


def _draw(key: str, out: Path) -> None:
    from regard.registry import lookup

    regard.list("pattern")  # makes them known
    entry = lookup("pattern", key)
    made = (entry.example or entry.factory)()
    try:
        made.show(made.extent or 32, path=out)
    except (OSError, ValueError) as error:  # no such folder, or an ending that is no kind of picture
        raise ArgumentError("out", str(out), f"a picture file, such as .png, that can be written ({error})") from error


if __name__ == "__main__":
    main()
