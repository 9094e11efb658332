"""A run that can be gone on with: one safetensors file with the weights, the optimizer, the random numbers, the curve.

One file, replaced only when the next one is whole: a run killed at any moment leaves a checkpoint that fits together.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

from regard.errors import ArgumentError, CheckpointError, StoreError
from regard.inference.saved import load_state, save_state
from regard.models.causal_lm import CausalLM
from regard.train.settings import TrainSettings

FORMAT = 1
FREE = ("save_every",)
"""Settings that may differ when a run is gone on with: they do not touch what is computed."""


@dataclass(frozen=True)
class CurvePoint:
    """After `step` steps: mean training loss since the point before, held-out loss and accuracy, seconds so far."""

    step: int
    training_loss: float
    loss: float
    accuracy: float
    seconds: float


@dataclass
class Progress:
    """Where a run stands. losses: those since the last point of the curve."""

    step: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    curve: list[CurvePoint] = field(default_factory=list)


def save(
    path: Path,
    model: CausalLM,
    optimizer: AdamW,
    batches: torch.Generator,
    progress: Progress,
    about: Mapping[str, Any],
) -> None:
    """Write all that the rest of the run depends on. Raises ArgumentError when it cannot be written."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for index, held in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in held.items()}
    tensors |= {f"random.{name}": value for name, value in _random(model, batches).items()}
    save_state(path, tensors, {"regard_training": FORMAT, "about": dict(about), "progress": asdict(progress)})


def load(path: Path, model: CausalLM, optimizer: AdamW, batches: torch.Generator, about: Mapping[str, Any]) -> Progress:
    """Put everything back into its place.

    Raises CheckpointError when the file is corrupted, foreign, or of a run that `about` tells apart; ArgumentError when
    there is none.
    """
    try:
        tensors, meta = load_state(path)
    except StoreError as error:
        raise CheckpointError(f"not a checkpoint of a training run: {error}") from error
    if meta.get("regard_training") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of a training run of version {FORMAT}")
    _check_same(path, meta.get("about"), about)
    try:
        model.load_state_dict(_below("model.", tensors))
        held: dict[int, dict[str, Tensor]] = {}
        for name, value in _below("optimizer.", tensors).items():
            index, _, what = name.partition(".")
            held.setdefault(int(index), {})[what] = value
        optimizer.load_state_dict({"state": held, "param_groups": optimizer.state_dict()["param_groups"]})
        told = meta["progress"]
        progress = Progress(**{**told, "curve": [CurvePoint(**point) for point in told["curve"]]})
        _restore_random(model, batches, _below("random.", tensors))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: not a whole checkpoint of this version: {error}") from error
    return progress


def describe(model: CausalLM, task: object, settings: TrainSettings) -> dict[str, Any]:
    """What a checkpoint belongs to. parts: what the model's fingerprint is of, so that a difference can be named."""
    parts = json.loads(model.config.to_json())
    mixers = parts.pop("mixers")
    parts = {"layers": len(mixers), **parts, **{f"layer {i}": _words(mixer) for i, mixer in enumerate(mixers)}}
    return {"task": str(task), "model": model.fingerprint, "parts": parts, "settings": asdict(settings)}


def _words(mixer: Mapping[str, Any]) -> str:
    """`moh(top_k=2) in 4 heads`, of a mixer as the configuration's JSON has it."""
    given = {**mixer["settings"], **({"within": mixer["within"]} if "within" in mixer else {})}
    inner = ", ".join(f"{name}={value!r}" for name, value in given.items())
    return f"{mixer['key']}{f'({inner})' if inner else ''} in {mixer['heads']} heads"


def _check_same(path: Path, was: Any, now: Mapping[str, Any]) -> None:
    was = was if isinstance(was, dict) else {}
    parts = isinstance(was.get("parts"), dict)  # older files have none
    flat_was, flat_now = _flat(was, parts), _flat(now, parts)
    for name in flat_was | flat_now:
        if name not in FREE and flat_was.get(name) != flat_now.get(name):
            raise ArgumentError(
                "resume", f"{path} of a run with {name}={flat_was.get(name)}", f"one with {name}={flat_now.get(name)}"
            )


def _flat(about: Mapping[str, Any], parts: bool) -> dict[str, Any]:
    """Everything by name: the task, since it brings the vocabulary, then what the model is made of, then the rest."""
    settings = about.get("settings")
    made = about["parts"] if parts else {}
    told = {"task": about.get("task"), **made, "model": about.get("model")}
    return {**told, **(settings if isinstance(settings, dict) else {})}


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _random(model: CausalLM, batches: torch.Generator) -> dict[str, Tensor]:
    states = {"batches": batches.get_state(), "cpu": torch.get_rng_state()}
    device = next(model.parameters()).device
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def _restore_random(model: CausalLM, batches: torch.Generator, states: Mapping[str, Tensor]) -> None:
    batches.set_state(states["batches"])
    torch.set_rng_state(states["cpu"])
    device = next(model.parameters()).device
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
