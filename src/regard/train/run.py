"""What `regard train` does: a hybrid on a task, and the same stack in full attention beside it."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from regard.errors import ArgumentError, require
from regard.models.causal_lm import CausalLM, CausalLMConfig, held_bytes
from regard.models.device import device_here
from regard.models.saving import save_model
from regard.models.stack import FULL, Mixer, full_attention, hybrid
from regard.tasks.sample import named
from regard.tasks.training import TrainingTask, parse_training
from regard.train.checkpoint import CurvePoint
from regard.train.evaluation import Score
from regard.train.picture import Line, Panel, svg
from regard.train.progress import progress_line
from regard.train.settings import TrainSettings
from regard.train.trainer import Trained, train

RESULTS, PICTURE, CHECKPOINT = "results.json", "curves.svg", "checkpoint.safetensors"
MODEL, CEILING = "model", "full-attention"
FORMAT = 1


@dataclass(frozen=True)
class RunSettings:
    """task and mixer as texts, NAME or NAME(key=value, …). ratio: linear:full. compare_full: train the ceiling too."""

    task: str = "mqar"
    mixer: str = "gated-deltanet"
    ratio: str = "3:1"
    layers: int = 3
    dim: int = 64
    heads: int = 2
    compare_full: bool = True
    device: str = "cpu"
    training: TrainSettings = field(default_factory=TrainSettings)

    @cached_property
    def made_task(self) -> TrainingTask:
        """The task."""
        return parse_training(self.task)

    @cached_property
    def configs(self) -> dict[str, CausalLMConfig]:
        """The models by name: what was asked for, and its ceiling where that is another and wanted."""
        key, settings = named(self.mixer, "mixer")
        asked = self._config(hybrid(Mixer(key, self.heads, settings), self.ratio, self.layers))
        ceiling = self._config((full_attention(self.heads),) * self.layers)
        return {MODEL: asked, **({CEILING: ceiling} if self.compare_full and ceiling != asked else {})}

    def _config(self, mixers: tuple[Mixer, ...]) -> CausalLMConfig:
        return CausalLMConfig(self.made_task.vocabulary, self.dim, mixers)

    def command(self) -> str:
        """The command line that repeats the run."""
        words = ["regard train"]
        for name in ("task", "mixer", "ratio", "layers", "dim", "heads", "device"):
            words.append(f"--{name} {shlex.quote(str(getattr(self, name)))}")
        for name in ("steps", "batch", "lr", "evaluate_every", "seed"):
            words.append(f"--{name.replace('_', '-')} {getattr(self.training, name)}")
        words += ["--bf16"] if self.training.bf16 else []
        words += [] if self.compare_full else ["--no-compare-full"]
        return " ".join(words)


@dataclass(frozen=True)
class ModelResult:
    """One model of a run. state_bytes: what it holds between two tokens after one row of the task, in float32."""

    name: str
    mixers: tuple[str, ...]
    parameters: int
    state_bytes: int
    trained: Trained

    @property
    def score(self) -> Score | None:
        """At the last evaluation."""
        point = self.trained.last
        return None if point is None else Score(point.loss, point.accuracy)


@dataclass(frozen=True)
class Outcome:
    """What a run found, in the order of training; interrupted: Ctrl-C came before the last step of the last model."""

    settings: RunSettings
    models: tuple[ModelResult, ...]
    interrupted: bool


def run(
    settings: RunSettings,
    out: Path,
    *,
    machine: Mapping[str, Any],
    resume: bool = False,
    overwrite: bool = False,
    console: Console,
) -> Outcome:
    """Train, compare, and write `results.json`, `curves.svg` and a folder for each model into `out`.

    machine: for the results; what they were measured on. Raises ArgumentError for a folder that holds a run already
    (without `resume` or `overwrite`), or holds none (with `resume`).
    """
    begun = [out / name / CHECKPOINT for name in (MODEL, CEILING) if (out / name / CHECKPOINT).exists()]
    device, found = device_of(settings), list[ModelResult]()
    if resume:
        require(bool(begun), "out", str(out), "with --resume, the folder of a run that has saved a checkpoint")
    elif begun and not overwrite:
        raise ArgumentError("out", f"{out}, which holds a run", "another folder, or --resume, or --overwrite")
    models = {name: _built(config, settings) for name, config in settings.configs.items()}  # errors before any folder
    for old in () if resume else begun:
        old.unlink()
    for name, model in models.items():
        model.to(device)
        folder = _folder(out / name)
        with progress_line(name, settings.training.steps, console) as report:
            trained = train(
                model, settings.made_task, settings.training, save_to=folder / CHECKPOINT, resume=resume, report=report
            )
        save_model(model, folder)
        found.append(_result(name, model, settings.made_task, trained))
        if trained.interrupted:
            break
    outcome = Outcome(settings, tuple(found), found[-1].trained.interrupted)
    _write(out / RESULTS, json.dumps(to_json(outcome, machine), indent=1, ensure_ascii=False) + "\n")
    _write(out / PICTURE, picture(outcome))
    return outcome


def device_of(settings: RunSettings) -> torch.device:
    """The device asked for. Raises ArgumentError where torch has none of that name here."""
    return device_here(settings.device)


def to_json(outcome: Outcome, machine: Mapping[str, Any]) -> dict[str, Any]:
    """Plain data."""
    return {
        "regard_train": FORMAT,
        "command": outcome.settings.command(),
        "settings": asdict(outcome.settings),
        "task": str(outcome.settings.made_task),
        "machine": dict(machine),
        "interrupted": outcome.interrupted,
        "models": [
            {
                "name": model.name,
                "mixers": list(model.mixers),
                "parameters": model.parameters,
                "state_bytes": model.state_bytes,
                "steps": model.trained.step,
                "seconds": round(model.trained.seconds, 2),
                "curve": [asdict(point) for point in model.trained.curve],
            }
            for model in outcome.models
        ],
    }


def table(outcome: Outcome) -> Table:
    """The models beside one another."""
    bits = outcome.settings.made_task.metric == "bits"
    shown = Table(box=None, padding=(0, 2, 0, 0))
    shown.add_column("model", no_wrap=True)
    for name in ("bits a label" if bits else "accuracy", "parameters", "state, B", "steps", "s"):
        shown.add_column(name, justify="right", no_wrap=True)
    shown.add_column("layers", overflow="fold")
    for model in outcome.models:
        score = model.score
        shown.add_row(
            Text(model.name, style="bold"),
            "–" if score is None else f"{score.bits:.3f}" if bits else f"{score.accuracy:.1%}",
            f"{model.parameters:,}",
            f"{model.state_bytes:,}",
            str(model.trained.step),
            f"{model.trained.seconds:.0f}",
            Text(_layers(model.mixers)),
        )
    return shown


def picture(outcome: Outcome) -> str:
    """Held-out accuracy (or bits) and loss against steps, as SVG."""
    bits = outcome.settings.made_task.metric == "bits"

    def lines(of: str) -> list[Line]:
        return [Line(f"{m.name}: {_layers(m.mixers)}", [_at(p, of) for p in m.trained.curve]) for m in outcome.models]

    held_out = Panel("held-out accuracy", "steps", lines("accuracy"), lambda y: f"{y:.0%}", 1.0)
    if bits:
        held_out = Panel("held-out bits a label", "steps", lines("bits"), lambda y: f"{y:g}")
    loss = Panel("training loss, nats a label", "steps", lines("training_loss"), lambda y: f"{y:g}")
    return svg(f"regard train: {outcome.settings.made_task}", [held_out, loss])


def _at(point: CurvePoint, of: str) -> tuple[float, float]:
    values = {"accuracy": point.accuracy, "bits": Score(point.loss, 0.0).bits, "training_loss": point.training_loss}
    return float(point.step), values[of]


def _layers(mixers: tuple[str, ...]) -> str:
    """ "2 × gated-deltanet, 1 × full": counts, in the order of first appearance."""
    return ", ".join(f"{mixers.count(key)} × {'full' if key == FULL else key}" for key in dict.fromkeys(mixers))


def _result(name: str, model: CausalLM, task: TrainingTask, trained: Trained) -> ModelResult:
    device = next(model.parameters()).device
    row = task.batch(torch.Generator().manual_seed(0), 1, "held-out").tokens.to(device)
    with torch.no_grad():
        held = held_bytes(model(row).state)
    count = sum(p.numel() for p in model.parameters())
    return ModelResult(name, tuple(m.key for m in model.config.mixers), count, held, trained)


def _built(config: CausalLMConfig, settings: RunSettings) -> CausalLM:
    torch.manual_seed(settings.training.seed)
    return CausalLM(config)


def _folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentError("out", str(path), f"a folder that can be written ({error})") from error
    return path


def _write(path: Path, content: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(content, encoding="utf-8")
    os.replace(part, path)
