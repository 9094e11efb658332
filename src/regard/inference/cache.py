"""One layer's KV cache as transformers sees it (`CacheLayerMixin`), and a new token's attention to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from regard.errors import StoreError
from regard.inference.observed import Logits
from regard.inference.pruning import PrunedLayer, Seen
from regard.inference.ragged import RaggedKV
from regard.inference.weighed import attend_weighed
from regard.kernels.ragged import LaneGroup, ragged_attend
from regard.kernels.sdpa import over_cache

if TYPE_CHECKING:
    from regard.inference.store import KVStore


class Given(NamedTuple):
    """What `update` handed to the model in one forward, so that attention can tell where its keys come from.

    Held weakly: a prompt's keys and values are in the store, and no layer's second copy of them must outlive its use.
    """

    k: ref[Tensor]
    v: ref[Tensor]
    fresh: bool
    stand_in: bool

    def has(self, k: Tensor, v: Tensor) -> bool:
        """Are these the very tensors that were handed out?"""
        return k is self.k() and v is self.v()


class KVLayer(PrunedLayer, CacheLayerMixin):
    """The cache of one attention layer.

    `direct`: the model hands what `update` returned straight to attention (true of all but latent attention). Then
    nothing is gathered for it: from the second forward on `update` returns a stand-in of the right shape, filled
    with NaN and without memory, and attention reads the storage itself.
    """

    is_sliding = False
    is_compileable = False

    def __init__(self, store: KVStore, number: int, direct: bool, sliding_window: int | None = None) -> None:
        CacheLayerMixin.__init__(self)
        PrunedLayer.__init__(self, store, number, direct, sliding_window)
        self.record_past = False

    # ---- what transformers calls

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, heads, _, dim = key_states.shape
        self.storage = RaggedKV(batch, heads, dim, value_states.shape[-1], key_states.dtype, key_states.device)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the new tokens that are real; return what the model may pass on to attention."""
        now = self.store.forward
        if self.storage is None:
            self.lazy_initialization(key_states, value_states)
        assert self.storage is not None
        self.storage.append(key_states, value_states, now.positions, now.real, now.first)
        if self.limits is not None and now.n > 1:  # appended whole, until sealed again
            self.limits = torch.maximum(self.limits, self.storage.lengths)
        fresh, direct = now.offset == 0, self.direct
        if fresh:
            k, v = key_states, value_states
        elif direct:
            k, v = self._stand_in(key_states, value_states)
        else:
            k, v, _ = self.storage.padded(sort=True)
        now.given.append((self, Given(ref(k), ref(v), fresh, stand_in=direct and not fresh)))
        return k, v

    def _stand_in(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        assert self.storage is not None
        storage = self.storage
        shape = (storage.batch, storage.heads, storage.longest)
        keys = self.store.stand_in((*shape, storage.key_dim), k)
        same = storage.value_dim == storage.key_dim
        return keys, keys if same else self.store.stand_in((*shape, storage.value_dim), v)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Columns seen, padding and dropped tokens included: what positions and masks are counted by."""
        now = self.store.forward_or_none
        if now is not None and any(layer is self for layer, _ in now.given):
            return now.offset + now.n
        return self.store.columns

    def get_max_length(self) -> int:
        return -1

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        return not self.pruned

    def reset(self) -> None:
        super().reset()
        self.is_initialized = self.record_past = False

    def crop(self, tokens_to_remove: int) -> None:
        raise StoreError("crop the store, not one of its layers")

    def activate_past_recording(self) -> None:
        """`generate()` says so where it will take tokens back: then a window forgets when `crop` is called."""
        self.record_past = True

    def crop_to(self, left: Tensor, columns: int) -> None:
        """Forget entries whose position is at least left[b], and what was observed from that column on.

        Raises StoreError where a window has passed what would be seen again."""
        window = self.sliding_window
        if window and self.horizon is not None and bool(((left - window + 1).clamp_min(0) < self.horizon).any()):
            raise StoreError(
                f"cannot go back to {left.tolist()} tokens: the window of {self.sliding_window} has passed on"
            )
        if self.storage is not None:
            self.storage.crop(left)
        self.observed.crop(columns)
        self.watched = min(self.watched, columns)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.select_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.storage is not None:
            rows = torch.arange(self.storage.batch).repeat_interleave(repeats)
            self.select_rows(rows)

    def select_rows(self, rows: Tensor) -> None:
        """Row r becomes what row rows[r] was: beams, batch selection, repetition."""
        if self.storage is None:
            return
        if rows.dtype == torch.bool:
            rows = rows.nonzero()[:, 0]
        self.storage.select_rows(rows)
        self.observed.select_rows(rows.to(self.storage.device))
        if self.limits is not None:
            self.limits = self.limits[rows.cpu()]
        if self.horizon is not None:
            self.horizon = self.horizon[rows.cpu()]

    # ---- attention

    def decode(self, q: Tensor, logits: Logits) -> Tensor:
        """One new token q (B, Hq, 1, D) per row against the storage itself: (B, 1, Hq, Dv). No gathering, no copy."""
        storage = self.storage
        assert storage is not None
        self.observed.logits = logits
        batch, heads, _, width = q.shape
        causal = logits.recipe.causal
        held = storage.side_by_side() if causal else None  # the common case: every head sees all it holds
        if held is not None and self._weighs and self.store.forward.real is None:
            out, weights = attend_weighed(q, *held, logits)
            self._seen = Seen(*held, weights)
            return out
        if held is not None and logits.softcap is None and logits.sinks is None:
            stacked = q.reshape(batch, storage.heads, heads // storage.heads, width)
            out = over_cache(stacked, *held, logits.scale)
            return out.reshape(batch, 1, heads, storage.value_dim)
        visible = None if causal else self._visible_in_group
        out = ragged_attend(
            q,
            storage.groups(),
            scale=logits.scale,
            softcap=logits.softcap,
            sinks=logits.sinks,
            visible=visible,
        )
        return out.transpose(1, 2).contiguous()

    def _visible_in_group(self, group: LaneGroup) -> Tensor:
        """(G, 1, C) bool: the layer's own mask (a window, a chunk) at the true columns of the stored keys."""
        logits = self.observed.logits
        assert logits is not None
        now = self.store.forward
        columns = self.store.column(group.rows[:, None], group.positions.long())
        zero = torch.zeros((), dtype=torch.long, device=columns.device)
        return logits.recipe(group.rows[:, None], zero, now.q_columns[-1], columns).expand_as(columns)[:, None]

    def gathered(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """k, v, columns, real of everything stored, lanes side by side; where the model was handed keys, in their
        order: by position."""
        assert self.storage is not None
        k, v, positions = (self.storage.uniform_view() if self.direct else None) or self.storage.padded(sort=True)
        rows = torch.arange(k.shape[0], device=k.device)[:, None, None]
        real = positions >= 0 if bool((self.storage.lengths != k.shape[2]).any()) else None
        columns = self.store.column(rows, positions.long().clamp_min(0))
        if columns.shape[1] == 1:
            columns, real = columns[:, 0], None if real is None else real[:, 0]
        return k, v, columns, real

    def fork(self, store: KVStore) -> KVLayer:
        """A copy that shares memory until one of the two is written to."""
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.store = store
        other.storage = None if self.storage is None else self.storage.fork()
        other.observed, other.doubts = self.observed.fork(), list(self.doubts)
        return other
