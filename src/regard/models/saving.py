"""A CausalLM on disk: a folder with config.json and model.safetensors. Nothing is ever unpickled."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from regard.errors import ArgumentError, CheckpointError
from regard.models.causal_lm import CausalLM
from regard.models.config import CausalLMConfig

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def save_model(model: CausalLM, folder: str | os.PathLike[str]) -> None:
    """Write the model into `folder`, made if it does not exist; each file is replaced only when it is whole.

    Raises ArgumentError when it cannot be written, or a mixer's settings do not fit into JSON.
    """
    target, config = Path(folder), model.config.to_json()
    weights = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    parts = {name: target / f".{name}.part" for name in (WEIGHTS, CONFIG)}
    try:
        target.mkdir(parents=True, exist_ok=True)
        save_file(weights, parts[WEIGHTS], metadata={"format": "pt", "regard_causal_lm": model.fingerprint})
        parts[CONFIG].write_text(config + "\n", encoding="utf-8")
        for name, part in parts.items():
            os.replace(part, target / name)
    except (OSError, SafetensorError) as error:
        raise ArgumentError("folder", f"{str(target)!r} ({error})", "a folder that can be written") from error


def load_model(folder: str | os.PathLike[str], device: str | torch.device = "cpu") -> CausalLM:
    """The model that `save_model` wrote, in `eval()`.

    Raises ArgumentError when there is none, CheckpointError when a file is corrupted, foreign, or not of the other.
    """
    source = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (source / name).is_file():
            raise ArgumentError("folder", repr(str(source)), f"a saved model: a folder with {CONFIG} and {WEIGHTS}")
    try:
        text = (source / CONFIG).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{source / CONFIG} cannot be read: {error}") from error
    try:
        with safe_open(source / WEIGHTS, framework="pt", device="cpu") as file:
            written_for = (file.metadata() or {}).get("regard_causal_lm")
            weights = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{source / WEIGHTS} is not a safetensors file, or a part of one: {error}") from error
    config = CausalLMConfig.from_json(text, source / CONFIG)
    if written_for != config.fingerprint:
        raise CheckpointError(f"{source}: {WEIGHTS} was not written with this {CONFIG}: one of them was replaced")
    model = CausalLM(config)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"{source / WEIGHTS}: {error}") from error
    kept = {weights[name].dtype for name in weights if weights[name].is_floating_point()}
    if len(kept) == 1:
        model = model.to(kept.pop())
        model.load_state_dict(weights)
    return model.to(device).eval()
