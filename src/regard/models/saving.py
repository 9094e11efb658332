"""A CausalLM on disk: a folder with config.json and model.safetensors. Nothing is ever unpickled."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from regard.errors import ArgumentError, CheckpointError, require
from regard.models.causal_lm import CausalLM
from regard.models.config import CausalLMConfig
from regard.models.device import device_here

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def save_model(model: CausalLM, folder: str | os.PathLike[str]) -> None:
    """Write the model into `folder`, made if it does not exist; each file is replaced only when it is whole.

    A parameter that several modules share (`share_lower_bounds`) is written once, and shared again when loaded.
    Raises ArgumentError when it cannot be written, a module stands at two places, or a mixer's settings do not fit
    into JSON.
    """
    target, config = Path(folder), model.config.to_json()
    places = len([name for name, _ in model.named_modules(remove_duplicate=False)])
    alone = places == len(list(model.named_modules()))
    require(alone, "model", "one module at two places", "a module of its own at each: its depth is told to it")
    own: dict[int, str] = {}  # of each parameter, the first name
    held = model.state_dict(keep_vars=True)
    shared = {name: first for name, t in held.items() if (first := own.setdefault(id(t), name)) != name}
    weights = {name: t.detach().cpu().contiguous() for name, t in held.items() if name not in shared}
    about = {"format": "pt", "regard_causal_lm": model.fingerprint} | ({"shared": json.dumps(shared)} if shared else {})
    parts = {name: target / f".{name}.part" for name in (WEIGHTS, CONFIG)}
    try:
        target.mkdir(parents=True, exist_ok=True)
        save_file(weights, parts[WEIGHTS], metadata=about)
        parts[CONFIG].write_text(config + "\n", encoding="utf-8")
        for name, part in parts.items():
            os.replace(part, target / name)
    except (OSError, SafetensorError) as error:
        raise ArgumentError("folder", f"{str(target)!r} ({error})", "a folder that can be written") from error


def load_model(folder: str | os.PathLike[str], device: str | torch.device = "cpu") -> CausalLM:
    """The model that `save_model` wrote, in `eval()`: every parameter in the dtype that it had.

    Raises ArgumentError when there is none, or no such device, CheckpointError when a file is corrupted, foreign, or
    not of the other.
    """
    source, place = Path(folder), device_here(device)
    for name in (CONFIG, WEIGHTS):
        if not (source / name).is_file():
            raise ArgumentError("folder", repr(str(source)), f"a saved model: a folder with {CONFIG} and {WEIGHTS}")
    try:
        text = (source / CONFIG).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{source / CONFIG} cannot be read: {error}") from error
    try:
        with safe_open(source / WEIGHTS, framework="pt", device="cpu") as file:
            about = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{source / WEIGHTS} is not a safetensors file, or a part of one: {error}") from error
    config = CausalLMConfig.from_json(text, source / CONFIG)
    if about.get("regard_causal_lm") != config.fingerprint:
        raise CheckpointError(f"{source}: {WEIGHTS} was not written with this {CONFIG}: one of them was replaced")
    model = CausalLM(config)
    try:
        _share(model, weights, json.loads(about.get("shared", "{}")))
        model.load_state_dict(weights)
        for name, held in model.state_dict(keep_vars=True).items():
            if weights[name].is_floating_point():
                held.data = held.data.to(weights[name].dtype)
        model.load_state_dict(weights)  # again, unrounded
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{source / WEIGHTS}: {error}") from error
    return model.to(place).eval()


def _share(model: CausalLM, weights: dict[str, Tensor], shared: dict[str, str]) -> None:
    """Give one parameter to all modules that shared it, and to `weights` all its names; shared: name → the one held."""
    for name, first in shared.items():
        weights[name] = weights[first]
        (module, leaf), (owner, held) = (_place(model, each) for each in (name, first))
        if getattr(owner, held) is None:  # nothing is shared before somebody says so
            setattr(owner, held, nn.Parameter(weights[first].clone()))
        setattr(module, leaf, getattr(owner, held))


def _place(model: CausalLM, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf
