"""One cell of a study: a small model, a task, a learning rate; trained for some steps and scored on held-out rows.

`regard.train.train` keeps checkpoints and reports; a study needs neither, and its models are so small that launching
kernels is most of the work. On CUDA the whole step is therefore captured once as a graph and replayed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import AdamW

from regard.models.causal_lm import CausalLM, CausalLMConfig
from regard.tasks.training import IGNORE, TrainingTask
from regard.train.evaluation import Score, evaluate
from regard.train.settings import TrainSettings

State = Literal["done", "cut", "not run", "not needed", "failed"]
WARM_UP = 3  # steps before the capture: lazy things happen in them, compilation too
SOLVED = 0.99


@dataclass(frozen=True)
class Cell:
    """One training run. name: what it measures; cells of one name differ in their learning rate, the best one counts.

    held_out: how many rows it is scored on. change: a function of a module (workers find it by name) that alters the
    fresh model where the configuration cannot say it. A recall task is solved, and left, at 99 % held-out accuracy (as
    in Zoology); of a solved name no further learning rate is tried.
    """

    name: str
    task: TrainingTask
    config: CausalLMConfig
    lr: float
    steps: int
    batch: int
    seed: int
    held_out: int = 256
    change: Callable[[CausalLM], None] | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a cell. accuracy and loss (nats): of the last evaluation; None where there was none.

    state: "done" (all steps, or solved), "cut" (the time was over: scored after `steps`), "not run" (the time was over
    before it began), "not needed" (its name was solved at another learning rate), "failed". how: graph or eager, and
    why; or what failed. curve: (step, accuracy, loss).
    """

    name: str
    lr: float
    state: State
    steps: int = 0
    accuracy: float | None = None
    loss: float | None = None
    seconds: float = 0.0
    how: str = ""
    curve: tuple[tuple[int, float, float], ...] = ()


def train_cell(cell: Cell, device: str, deadline: float) -> Outcome:
    """Train on `device` until done, solved, or `time.time()` reaches the deadline; the same seed, the same batches."""
    began, outcome = time.perf_counter(), None
    if device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")
        try:
            outcome = _Run(cell, device, deadline).go(graph=True)
        except Exception as error:  # whatever the capture refuses: the eager run, from the start, decides
            torch.cuda.synchronize()
            refused = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
            outcome = _Run(cell, device, deadline).go(graph=False)
            outcome = replace(outcome, how=f"eager, since a graph failed: {refused}")
    else:
        outcome = _Run(cell, device, deadline).go(graph=False)
    return replace(outcome, seconds=round(time.perf_counter() - began, 2))


class _Run:
    def __init__(self, cell: Cell, device: str, deadline: float) -> None:
        self.cell, self.device, self.deadline = cell, device, deadline
        torch.manual_seed(cell.seed)
        self.model = CausalLM(cell.config)
        if cell.change is not None:
            cell.change(self.model)
        self.model.to(device)
        self.batches = torch.Generator().manual_seed(cell.seed)
        self.settings = TrainSettings(steps=cell.steps, batch=cell.batch, lr=cell.lr, warmup=min(50, cell.steps // 10))
        self.cuda = device.startswith("cuda")
        self.rate = torch.tensor(cell.lr, device=device)
        self.optimizer = self._optimizer()
        shape = (cell.batch, cell.task.width)
        self.tokens = torch.zeros(shape, dtype=torch.long, device=device)
        most = cell.task.batch(torch.Generator().manual_seed(0), 1).labels.ne(IGNORE).sum()
        scored = cell.batch * int(most)  # the curriculum's earlier stages score fewer: the rest is IGNORE
        self.where = torch.zeros(scored, dtype=torch.long, device=device)
        self.targets = torch.full((scored,), IGNORE, dtype=torch.long, device=device)
        self.loss = torch.zeros((), device=device)

    def _optimizer(self) -> AdamW:
        named = list(self.model.named_parameters())
        decayed = [p for name, p in named if p.ndim >= 2 and not name.startswith("embedding")]
        others = [p for name, p in named if p.ndim < 2 or name.startswith("embedding")]
        groups = [{"params": decayed, "weight_decay": self.settings.decay}, {"params": others, "weight_decay": 0.0}]
        groups = [group for group in groups if group["params"]]
        betas = (0.9, self.settings.beta2)
        if self.cuda:  # the rate as a tensor: a graph would hold a number for ever
            return AdamW(groups, lr=self.rate, betas=betas, fused=True, capturable=True)
        return AdamW(groups, lr=self.cell.lr, betas=betas)

    def go(self, graph: bool) -> Outcome:
        """Train; raises only what a graph's capture raises."""
        cell, curve, captured, state, done = self.cell, [], None, "done", 0
        every = min(100, cell.steps // 8) or cell.steps
        while done < cell.steps:
            if time.time() > self.deadline:
                state = "cut"
                break
            self._draw(done)
            if graph and done >= WARM_UP and captured is None:
                captured = self._capture()
            elif captured is not None:
                captured.replay()
            else:
                self._step()
            done += 1
            if done % every == 0 or done == cell.steps:
                curve.append(self._score(done))
                if not math.isfinite(float(self.loss)):
                    return Outcome(cell.name, cell.lr, "failed", done, how="the loss is no number any more")
                if cell.task.metric == "accuracy" and curve[-1][1] >= SOLVED:
                    break
        if not curve or curve[-1][0] != done:
            curve.append(self._score(done))
        how = "graph" if captured is not None else "eager"
        _, accuracy, loss = curve[-1]
        return Outcome(cell.name, cell.lr, state, done, accuracy, loss, how=how, curve=tuple(curve))  # type: ignore[arg-type]

    def _draw(self, step: int) -> None:
        """The next batch into the buffers that the step reads: on a GPU this happens while it works on the last one."""
        cell = self.cell
        drawn = cell.task.at(step / cell.steps).batch(self.batches, cell.batch)
        labels = drawn.labels.flatten()
        where = labels.ne(IGNORE).nonzero()[:, 0]
        count = len(where)
        targets = torch.full(self.targets.shape, IGNORE)
        places = torch.zeros(self.where.shape, dtype=torch.long)
        targets[:count], places[:count] = labels[where], where
        self.tokens.copy_(drawn.tokens)
        self.where.copy_(places)
        self.targets.copy_(targets)
        rate = self.settings.rate(step)
        if self.cuda:
            self.rate.fill_(rate)
        else:
            for group in self.optimizer.param_groups:
                group["lr"] = rate

    def _forward(self) -> Tensor:
        rows = self.model.hidden(self.tokens).out.flatten(0, 1).index_select(0, self.where)
        return cross_entropy(self.model.read(rows).float(), self.targets, ignore_index=IGNORE)

    def _step(self) -> None:
        loss = self._forward()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss = loss.detach()

    def _capture(self) -> torch.cuda.CUDAGraph:
        """The step as a graph, and its first replay, whose loss must be that of an eager forward pass."""
        with torch.no_grad():
            expected = float(self._forward())
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):  # once more beside the default stream, as PyTorch asks; nothing is updated
            self._forward().backward()
        torch.cuda.current_stream().wait_stream(beside)
        self.optimizer.zero_grad(set_to_none=True)  # gradients are then made in the graph's own memory
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            loss = self._forward()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
            self.optimizer.step()
        graph.replay()
        self.loss = loss.detach()
        found = float(self.loss)
        if not abs(found - expected) <= 1e-2 * max(1.0, abs(expected)):
            raise RuntimeError(f"the graph's loss is {found}, the eager one {expected}")
        return graph

    def _score(self, done: int) -> tuple[int, float, float]:
        score: Score = evaluate(self.model, self.cell.task, rows=self.cell.held_out, seed=self.cell.seed)
        return done, round(score.accuracy, 4), round(score.loss, 4)
