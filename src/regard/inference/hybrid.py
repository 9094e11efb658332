"""Layers that keep a recurrent state beside keys and values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer

from regard.inference.cache import KVLayer

if TYPE_CHECKING:
    from regard.inference.store import KVStore


class HybridKVLayer(LinearAttentionLayer, KVLayer):  # type: ignore[misc]
    """A layer with both attention and a recurrent state (Falcon-H1): transformers' own state beside our keys."""

    is_compileable = False

    def __init__(
        self, store: KVStore, number: int, direct: bool, sliding_window: int | None = None, number_of_states: int = 1
    ) -> None:
        KVLayer.__init__(self, store, number, direct, sliding_window)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        if len(args) == 2 and not kwargs:
            KVLayer.lazy_initialization(self, *args)
        else:
            LinearAttentionLayer.lazy_initialization(self, *args, **kwargs)

    def reset(self) -> None:
        LinearAttentionLayer.reset(self)
        KVLayer.reset(self)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.select_rows(beam_idx)

    def select_rows(self, rows: Tensor) -> None:
        KVLayer.select_rows(self, rows)
        LinearAttentionLayer.reorder_cache(self, rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows)

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        return False

    def fork(self, store: KVStore) -> HybridKVLayer:
        other = KVLayer.fork(self, store)
        assert isinstance(other, HybridKVLayer)
        other.__dict__.update({name: dict(x) for name, x in self.__dict__.items() if isinstance(x, dict)})
        copy_states(self, other)
        return other


def copy_states(source: LinearAttentionLayer, target: LinearAttentionLayer) -> None:
    """Give `target` tensors of its own: transformers updates recurrent states in place."""
    for name in ("conv_states", "recurrent_states"):
        states = getattr(source, name)
        if isinstance(states, dict):
            states = {key: None if x is None else x.clone() for key, x in states.items()}
        elif states is not None:
            states = states.clone()
        setattr(target, name, states)
