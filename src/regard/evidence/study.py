"""A study: many small training runs within a wall-time budget, several at once on one device.

A cell that the time did not suffice for is reported as "not run" or "cut": it never just lacks.
"""

from __future__ import annotations

import atexit
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from regard.errors import RegardError, require
from regard.evidence.study_training import SOLVED, Cell, Outcome, train_cell
from regard.models.causal_lm import CausalLM, CausalLMConfig
from regard.tasks.training import TrainingTask

GRACE = 15.0
"""Seconds after the deadline in which a worker may finish its step and score; then it is ended."""

__all__ = ["Cell", "Outcome", "best", "caveat", "cells_for", "percent", "run_cells", "table", "told"]


def run_cells(cells: Sequence[Cell], seconds: float, *, workers: int | None = None) -> list[Outcome]:
    """Train the cells in their order, `workers` at once; one Outcome each, in the same order.

    seconds: wall time for all, the start of the workers included. workers: processes that share the GPU (each with one
    thread of the CPU), kept for the next study; None = 10 on a GPU, fewer with fewer cores, and 0 without one; 0 = in
    this process, one cell after the other.
    """
    deadline = time.time() + seconds
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if workers is None:
        workers = max(1, min(10, (os.cpu_count() or 1) - 2)) if device == "cuda" else 0
    require(workers >= 0, "workers", workers, "an int ≥ 0")
    if workers == 0:
        return _here(cells, device, deadline)
    return _dispatch(cells, _workers(min(workers, len(cells)), device), deadline)


def best(outcomes: Iterable[Outcome], name: str, *, by: str = "accuracy") -> Outcome:
    """The best of the cells of that name that were trained to their end: highest accuracy, or lowest "loss".

    Cells that were cut count only where none of that name was trained to its end: the state then says so. Without any
    that was trained, one that was not.
    """
    named = [o for o in outcomes if o.name == name]
    require(bool(named), "name", name, "the name of a cell")
    for state in ("done", "cut"):
        found = [o for o in named if o.state == state and o.accuracy is not None and o.loss is not None]
        if found:
            return max(found, key=lambda o: o.accuracy or 0.0) if by == "accuracy" else min(found, key=_loss)
    return named[0]


def cells_for(
    names: Mapping[str, tuple[TrainingTask, CausalLMConfig]],
    *,
    rates: Sequence[float],
    steps: int,
    batch: int,
    seed: int,
    held_out: int = 256,
    change: Mapping[str, Callable[[CausalLM], None]] | None = None,
) -> list[Cell]:
    """Every name at the first learning rate, then every name at the next: that is what lacks when time is short."""
    altered = change or {}
    return [
        Cell(name, task, config, rate, steps, batch, seed, held_out, altered.get(name))
        for rate in rates
        for name, (task, config) in names.items()
    ]


def percent(outcomes: Sequence[Outcome], names: Iterable[str]) -> dict[str, float]:
    """The best accuracy of each name, in per cent. Raises RegardError where one was not trained at all."""
    found = {}
    for name in names:
        one = best(outcomes, name)
        if one.accuracy is None:
            raise RegardError(f"study: {name} was not trained ({one.state}: {one.how}); no verdict without it")
        found[name] = 100 * one.accuracy
    return found


def caveat(outcomes: Sequence[Outcome]) -> str:
    """What has to be said with the figures: nothing, or how many cells the time did not suffice for."""
    lacking = {state: count for state, count in table(outcomes).items() if state not in ("done", "not needed")}
    return "".join(f"; {count} of {len(outcomes)} runs {state}" for state, count in lacking.items())


def told(outcomes: Iterable[Outcome]) -> list[dict[str, Any]]:
    """For a record: what JSON holds."""
    return [asdict(o) for o in outcomes]


def table(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """How many cells came to which end."""
    return {state: count for state in ("done", "cut", "not run", "not needed", "failed")
            if (count := sum(o.state == state for o in outcomes))}  # fmt: skip


def _loss(outcome: Outcome) -> float:
    return float("inf") if outcome.loss is None else outcome.loss


def _not_begun(cell: Cell, solved: set[str], deadline: float) -> Outcome | None:
    if cell.name in solved:
        return Outcome(cell.name, cell.lr, "not needed", how="solved at another learning rate")
    if time.time() >= deadline:
        return Outcome(cell.name, cell.lr, "not run", how="the time was over")
    return None


def _is_solved(outcome: Outcome, cell: Cell) -> bool:
    return cell.task.metric == "accuracy" and (outcome.accuracy or 0.0) >= SOLVED


def _attempt(cell: Cell, device: str, deadline: float) -> Outcome:
    try:
        return train_cell(cell, device, deadline)
    except Exception as error:
        return Outcome(cell.name, cell.lr, "failed", how=f"{type(error).__name__}: {error}"[:300])


def _here(cells: Sequence[Cell], device: str, deadline: float) -> list[Outcome]:
    solved: set[str] = set()
    outcomes = []
    for cell in cells:
        outcome = _not_begun(cell, solved, deadline) or _attempt(cell, device, deadline)
        if _is_solved(outcome, cell):
            solved.add(cell.name)
        outcomes.append(outcome)
    return outcomes


class _Worker:
    """A process and the pipe to it."""

    def __init__(self, device: str) -> None:
        context = get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, device), daemon=True)
        self.process.start()
        other.close()

    def end(self) -> None:
        self.process.terminate()
        self.process.join(5)
        self.pipe.close()


_POOL: list[_Worker] = []


def _workers(count: int, device: str) -> list[_Worker]:
    """That many living workers; they stay for the next study, since starting them takes seconds."""
    _POOL[:] = [worker for worker in _POOL if worker.process.is_alive()]
    while len(_POOL) < count:
        _POOL.append(_Worker(device))
    return _POOL[:count]


@atexit.register
def _close() -> None:
    while _POOL:
        _POOL.pop().end()


def _serve(pipe: Connection, device: str) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            cell, deadline = pipe.recv()
        except EOFError:
            return
        pipe.send(_attempt(cell, device, deadline))


def _dispatch(cells: Sequence[Cell], workers: list[_Worker], deadline: float) -> list[Outcome]:
    outcomes: dict[int, Outcome] = {}
    waiting, solved = deque(enumerate(cells)), set[str]()
    busy: dict[Connection, tuple[int, _Worker]] = {}

    def give(worker: _Worker) -> None:
        """The next cell that is to be run."""
        while waiting:
            number, cell = waiting.popleft()
            outcome = _not_begun(cell, solved, deadline)
            if outcome is None:
                worker.pipe.send((cell, deadline))
                busy[worker.pipe] = number, worker
                return
            outcomes[number] = outcome

    for worker in workers:
        give(worker)
    while busy:
        for ready in wait(list(busy), timeout=max(0.0, deadline + GRACE - time.time())) or list(busy):
            assert isinstance(ready, Connection)
            number, worker = busy.pop(ready)
            cell = cells[number]
            try:
                outcomes[number] = ready.recv() if ready.poll() else Outcome(cell.name, cell.lr, "cut")
            except (EOFError, OSError):
                outcomes[number] = Outcome(cell.name, cell.lr, "failed", how="its process ended")
            if outcomes[number].state == "cut" and outcomes[number].accuracy is None:
                outcomes[number] = replace(outcomes[number], how="ended unscored after the deadline")
                worker.end()
            if _is_solved(outcomes[number], cell):
                solved.add(cell.name)
            if worker.process.is_alive():
                give(worker)
    for number, cell in waiting:  # every worker was lost
        outcomes[number] = Outcome(cell.name, cell.lr, "not run", how="no worker was left")
    return [outcomes[number] for number in range(len(cells))]
