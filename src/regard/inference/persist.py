"""A store on disk: safetensors and JSON, checked before use."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from regard.errors import StoreError
from regard.inference.cache import KVLayer
from regard.inference.ragged import RaggedKV

if TYPE_CHECKING:
    from regard.inference.seam import Attached
    from regard.inference.store import KVStore

STATES = ("conv_states", "recurrent_states")


def save(store: KVStore, model: str, path: str | Path) -> None:
    """Write a sealed store; generation resumes from it with the same tokens."""
    from regard.inference.saved import save_state

    if not store.sealed:
        raise StoreError("an unsealed store cannot be saved: call seal() first, so that its plan has acted")
    tensors: dict[str, Tensor] = {"counts": store.counts, "prompt": store.prompt}
    if store.real is not None:
        tensors["real"] = store.real
    for number, layer in enumerate(store.kv_layers):
        assert layer.storage is not None
        for name, value in layer.storage.state().items():
            tensors[f"layer.{number}.{name}"] = value
        for name, extra in (
            ("sums", None if layer.observed.sums is None else layer.observed.sums[..., : store.columns]),
            ("limits", layer.limits),
            ("horizon", layer.horizon),
        ):
            if extra is not None:
                tensors[f"layer.{number}.{name}"] = extra
    for index, layer in enumerate(store.layers):
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            for name in STATES:
                for key, value in _states(layer, name).items():
                    tensors[f"state.{index}.{name}.{key}"] = value
    meta = {
        "model": model,
        "plan": str(store.plan),
        "columns": store.columns,
        "layers": store.caching_layers,
        "pruned": [layer.pruned for layer in store.kv_layers],
    }
    save_state(path, tensors, meta)


def load(attached: Attached, path: str | Path) -> KVStore:
    """The store that `save` wrote, for the same model under the same plan. StoreError when it does not fit."""
    from regard.inference.saved import load_state

    tensors, meta = load_state(path)
    for name, want in (("model", attached.fingerprint), ("plan", str(attached.plan))):
        if meta.get(name) != want:
            raise StoreError(f"{path}: {name}: it was saved for {meta.get(name)!r}, this is {want!r}")
    store = attached.new_store()
    device, dtype = attached.device, attached.dtype
    try:
        if meta["layers"] != store.caching_layers:
            raise StoreError(f"{path}: it holds {meta['layers']} layers, the model caches in {store.caching_layers}")
        store.columns, store.sealed = int(meta["columns"]), True
        store.counts, store.prompt = tensors["counts"], tensors["prompt"]
        store.real = tensors.get("real")
        for number, layer in enumerate(store.kv_layers):
            prefix = f"layer.{number}."
            own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
            _restore(layer, own, device)
            layer.pruned = bool(meta["pruned"][number])
        _restore_states(store, tensors, device)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(f"{path}: not a whole store of this version ({type(error).__name__}: {error})") from error
    held = {layer.storage.dtype for layer in store.kv_layers if layer.storage is not None}
    if held != {dtype}:
        raise StoreError(f"{path}: it holds {held}, the model computes in {dtype}")
    if store.counts.shape != store.prompt.shape or bool((store.counts > store.columns).any()):
        raise StoreError(f"{path}: its counts of tokens contradict each other")
    return store


def _restore(layer: KVLayer, own: dict[str, Tensor], device: torch.device) -> None:
    sums, limits, horizon = (own.pop(name, None) for name in ("sums", "limits", "horizon"))
    layer.storage = RaggedKV.from_state(
        {name: value.to(device) if name != "lengths" else value for name, value in own.items()}
    )
    layer.dtype, layer.device = layer.storage.dtype, layer.storage.device
    layer.is_initialized = True
    layer.observed.sums = None if sums is None else sums.to(device)
    layer.horizon = horizon
    if limits is not None:
        layer.allow(limits)


def _states(layer: Any, name: str) -> dict[Any, Tensor]:
    states = getattr(layer, name)
    states = states if isinstance(states, dict) else {0: states}
    return {key: value for key, value in states.items() if value is not None}


def _restore_states(store: KVStore, tensors: dict[str, Tensor], device: torch.device) -> None:
    for name, value in tensors.items():
        if not name.startswith("state."):
            continue
        _, index, kind, key = name.split(".")
        layer: Any = store.layers[int(index)]
        value = value.to(device)
        if kind == "conv_states":
            layer.lazy_initialization(conv_states=value, state_idx=int(key))
        else:
            layer.lazy_initialization(recurrent_states=value, state_idx=int(key))
        getattr(layer, kind)[int(key)].copy_(value)
        layer.has_previous_state[int(key)] = True
