"""A small trainer: a CausalLM, a training task, AdamW; stopped and gone on with at any step."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import AdamW

from regard.errors import ArgumentError, NotFiniteError
from regard.models.causal_lm import CausalLM
from regard.tasks.training import Batch, TrainingTask
from regard.train import checkpoint
from regard.train.checkpoint import CurvePoint, Progress
from regard.train.evaluation import evaluate, scored_logits
from regard.train.settings import TrainSettings


@dataclass(frozen=True)
class Trained:
    """What a run came to. interrupted: it was stopped before its last step, and can be gone on with."""

    step: int
    seconds: float
    curve: tuple[CurvePoint, ...]
    interrupted: bool

    @property
    def last(self) -> CurvePoint | None:
        """The last evaluation, if there was one."""
        return self.curve[-1] if self.curve else None


@dataclass(frozen=True)
class Step:
    """What is reported after each step: steps done, of how many, this step's loss, the newest point of the curve."""

    done: int
    steps: int
    loss: float
    point: CurvePoint | None


def train(
    model: CausalLM,
    task: TrainingTask,
    settings: TrainSettings,
    *,
    save_to: Path | None = None,
    resume: bool = False,
    report: Callable[[Step], None] = lambda _: None,
) -> Trained:
    """Train `model` in place, on the device where it is; the same seed gives the same weights on a CPU.

    save_to: a file for the checkpoint, replaced as a whole every `save_every` steps and at the end; None = no file.
    resume: go on from that file; weights after the last step are then those of a run that was never stopped (bitwise on
    a CPU with the same number of threads). Without such a file the run begins. Ctrl-C finishes the step, saves and
    returns; a second one stops at once.
    Raises NotFiniteError when the loss is no number any more, ArgumentError or CheckpointError for a file of another
    run or a spoilt one.
    """
    if task.vocabulary > model.config.vocab:
        raise ArgumentError("model", f"vocab {model.config.vocab}", f"at least {task.vocabulary}, what {task} has")
    batches = torch.Generator().manual_seed(settings.seed)
    torch.manual_seed(settings.seed)
    optimizer = _optimizer(model, settings)
    about, progress = checkpoint.describe(model, task, settings), Progress()
    if resume and save_to is not None and save_to.exists():
        progress = checkpoint.load(save_to, model, optimizer, batches, about)
    began, saved = time.perf_counter() - progress.seconds, progress.step

    def save() -> None:
        nonlocal saved
        if save_to is not None and saved != progress.step:
            checkpoint.save(save_to, model, optimizer, batches, progress, about)
            saved = progress.step

    model.train()
    with _interrupts() as interrupted:
        while progress.step < settings.steps and not interrupted():
            loss = _step(model, optimizer, task, settings, progress.step, batches)
            progress.step += 1
            progress.losses.append(loss)
            progress.seconds = time.perf_counter() - began
            finished = progress.step == settings.steps
            if finished or progress.step % settings.evaluate_every == 0:
                progress.curve.append(_point(model, task, settings, progress))
                progress.losses.clear()
            if finished or progress.step % settings.save_every == 0:
                save()
            report(Step(progress.step, settings.steps, loss, progress.curve[-1] if progress.curve else None))
        save()  # where Ctrl-C ended the loop
    model.eval()
    return Trained(progress.step, progress.seconds, tuple(progress.curve), progress.step < settings.steps)


def _step(
    model: CausalLM, optimizer: AdamW, task: TrainingTask, settings: TrainSettings, step: int, batches: torch.Generator
) -> float:
    device = next(model.parameters()).device
    drawn = task.at(step / settings.steps).batch(batches, settings.batch)
    with torch.autocast(device.type, torch.bfloat16, enabled=settings.bf16):
        logits, labels, aux = scored_logits(model, Batch(*(t.to(device) for t in drawn)))
    loss = cross_entropy(logits, labels)
    found = float(loss.detach())
    if not math.isfinite(found):
        raise NotFiniteError(f"the loss of step {step + 1} is {found}: a lower learning rate (--lr) may help")
    (loss + _added("loss", aux, loss) + settings.auxiliary * _added("load_balance", aux, loss)).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
    for group in optimizer.param_groups:
        group["lr"] = settings.rate(step)
    optimizer.step()
    optimizer.zero_grad()
    return found


def _point(model: CausalLM, task: TrainingTask, settings: TrainSettings, progress: Progress) -> CurvePoint:
    score = evaluate(model, task, rows=settings.held_out, seed=settings.seed, bf16=settings.bf16)
    mean = sum(progress.losses) / len(progress.losses)
    return CurvePoint(progress.step, mean, score.loss, score.accuracy, progress.seconds)


def _optimizer(model: CausalLM, settings: TrainSettings) -> AdamW:
    """Weight decay on matrices, the embedding apart: elsewhere it would pull gates and norms towards zero."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = [p for name, p in named if p.ndim >= 2 and not name.startswith("embedding")]
    others = [p for name, p in named if p.ndim < 2 or name.startswith("embedding")]
    groups = [{"params": decayed, "weight_decay": settings.decay}, {"params": others, "weight_decay": 0.0}]
    return AdamW([group for group in groups if group["params"]], lr=settings.lr, betas=(0.9, settings.beta2))


def _added(name: str, aux: tuple[object, ...], like: Tensor) -> Tensor:
    """The sum of what layers call `name` and want to have added to the task's loss."""
    found = [loss for each in aux if isinstance(loss := getattr(each, name, None), Tensor)]
    return sum(found, torch.zeros_like(like))


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """A function that says whether Ctrl-C was pressed; a second press is a KeyboardInterrupt.

    Only the main thread may handle signals; elsewhere Ctrl-C is as ever.
    """
    seen = False

    def press(number: int, frame: object) -> None:
        nonlocal seen
        if seen:
            raise KeyboardInterrupt
        seen = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: seen
    finally:
        signal.signal(signal.SIGINT, before)
