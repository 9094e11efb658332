"""The line that moves while a model is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from regard.train.checkpoint import CurvePoint
from regard.train.trainer import Step


@contextmanager
def progress_line(name: str, steps: int, console: Console) -> Iterator[Callable[[Step], None]]:
    """A function for `train(report=…)`: loss, held-out accuracy and time left on one line.

    Where the console is no terminal (a file, a pipe) a line is printed at each evaluation instead.
    """
    if not console.is_terminal:
        yield _printed(name, console)
        return
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}  held-out accuracy {task.fields[accuracy]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
    )
    with Progress(*columns, console=console, speed_estimate_period=60) as line:
        task = line.add_task(name, total=steps, loss="–", accuracy="–")

        def report(step: Step) -> None:
            accuracy = "–" if step.point is None else f"{step.point.accuracy:.1%}"
            line.update(task, completed=step.done, loss=f"{step.loss:.3f}", accuracy=accuracy)

        yield report


def _printed(name: str, console: Console) -> Callable[[Step], None]:
    last: CurvePoint | None = None

    def report(step: Step) -> None:
        nonlocal last
        if step.point is not None and step.point is not last:
            last, point = step.point, step.point
            left = point.seconds / step.done * (step.steps - step.done)
            told = f"{name}: step {step.done} of {step.steps}, loss {point.training_loss:.3f}, "
            told += f"held-out accuracy {point.accuracy:.1%}, {point.seconds:.0f} s, about {left:.0f} s left"
            console.print(told, soft_wrap=True, highlight=False)

    return report
