"""The store: a transformers `Cache` whose attention layers are ours, ragged, prunable, forkable and saved to disk.

Two ways of counting tokens meet here. A *column* counts everything fed to the model, padding included, and is what
transformers' masks and lengths speak of. A *position* counts a row's real tokens, and is what is stored and what
policies see. Without padding they are the same.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin

from regard.errors import ArgumentError, AttachError, StoreError, require
from regard.inference import persist
from regard.inference.cache import Given, KVLayer
from regard.inference.hybrid import HybridKVLayer, copy_states
from regard.inference.plan import Plan
from regard.inference.policy import Needs

if TYPE_CHECKING:
    from regard.inference.seam import Attached


@dataclass
class Forward:
    """One forward of the model over the store: n new columns from `offset` on.

    real (B, n) bool on the CPU, None = no padding among them; positions (B, n) long and q_columns (n,) on the device.
    first: the position of the first column in every row, where no row has padding.
    given: what each layer's `update` handed out, in order.
    """

    n: int
    offset: int
    real: Tensor | None
    positions: Tensor
    q_columns: Tensor
    first: int | None
    given: list[tuple[KVLayer, Given]] = field(default_factory=list)

    @cached_property
    def last_column(self) -> Tensor:
        """(B, 1) long: the column of the last query, in every row."""
        return self.q_columns[-1:].expand(len(self.positions), 1)


class KVStore(Cache):
    """What a model attached to a plan keeps of the past.

    sealed: the prompt has ended and the plan's cache policy has acted. That happens at `seal()` or at the first
    one-token forward; tokens of a later longer forward are appended whole until `seal()` is called again.
    """

    def __init__(self, attached: Attached) -> None:
        self.attached, self.plan = attached, attached.plan
        super().__init__(layers=attached.make_layers(self))
        self._sort_layers()
        self.observed: Callable[[int], Needs] = attached.needs
        self._clear()

    def _clear(self) -> None:
        self.columns = 0
        self.sealed = self.broken = False
        self.counts = torch.zeros(0, dtype=torch.long)  # (B,) real tokens of each row, on the CPU
        self.prompt = self.counts  # the same when it was last sealed
        self.real: Tensor | None = None  # (B, columns) bool on the CPU, None = no padding so far
        self._tables: tuple[Tensor, Tensor] | None = None  # position → column, column → position, on the device
        self._now: Forward | None = None
        self._thread: int | None = None
        self._nan: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}

    # ---- a forward

    def _sort_layers(self) -> None:
        """kv_layers: those that cache keys and values, in the model's order; windowed: those that see a window or a
        chunk only."""
        self.kv_layers = [layer for layer in self.layers if isinstance(layer, KVLayer)]
        self.windowed = [layer for layer in self.kv_layers if layer.sliding_window is not None]

    @property
    def caching_layers(self) -> int:
        return len(self.kv_layers)

    @property
    def forward(self) -> Forward:
        """The forward under way. AttachError when there is none: the store was used past the attached model."""
        if self._now is None or self._thread != threading.get_ident():
            raise AttachError(
                "this store is filled by the model it was made for, while attached: call that model itself"
            )
        return self._now

    @property
    def forward_or_none(self) -> Forward | None:
        return self._now

    @property
    def columns_now(self) -> int:
        return self.columns if self._now is None else self._now.offset + self._now.n

    def begin(self, batch: int, n: int, mask: Tensor | None, device: torch.device) -> Forward:
        """A forward of n columns starts. mask (B, columns + n), 1 = real token, or None. Seals before a one-token
        forward."""
        if self.broken:
            raise StoreError(
                "a forward over this store failed halfway, when entries had been dropped: start a new store"
            )
        require(n >= 1 and batch >= 1, "input_ids", f"shape ({batch}, {n})", "at least one row and one token")
        if self.columns and len(self.counts) != batch:
            raise ArgumentError("input_ids", f"{batch} rows", f"{len(self.counts)} rows, as the store holds")
        real = None
        if mask is not None:
            total = self.columns + n
            if mask.shape != (batch, total):
                allowed = (
                    f"({batch}, {total}): a column for each of the {self.columns} tokens held and the {n} new ones"
                )
                raise ArgumentError("attention_mask", tuple(mask.shape), allowed)
            if not bool(mask[:, self.columns :].all()):
                real = mask[:, self.columns :].bool().cpu()
        if n == 1 and self.columns and not self.sealed:
            self.seal()
        if not self.columns:
            self.counts = torch.zeros(batch, dtype=torch.long)
        columns = torch.arange(self.columns, self.columns + n, device=device)
        if real is None:
            if self.real is None:
                positions = columns.expand(batch, n)
            else:
                positions = (self.counts[:, None] + torch.arange(n)).to(device)
        else:
            positions = (self.counts[:, None] + real.cumsum(1) - 1).clamp_min(0).to(device)
        if real is not None or self.real is not None:
            past = torch.ones(batch, self.columns, dtype=torch.bool) if self.real is None else self.real
            now = torch.ones(batch, n, dtype=torch.bool) if real is None else real
            self.real = torch.cat([past, now], 1)
            self._tables = None
        first = self.columns if self.real is None else None
        self._now = Forward(n, self.columns, real, positions, columns, first)
        self._thread = threading.get_ident()
        self._counts_before = self.counts
        self.counts = self.counts + (n if real is None else real.sum(1))
        return self._now

    def end(self, failed: bool = False) -> None:
        """The forward is over. One that failed midway is undone; where a step has dropped entries, the store is
        broken."""
        if self._now is None:
            return
        now, self._now = self._now, None
        if failed:
            self._undo(now)
            return
        self.columns += now.n
        if not self.sealed:
            self.prompt = self.counts
        for layer in self.windowed:
            if not layer.record_past:
                layer.forget_unreachable()

    def _undo(self, now: Forward) -> None:
        self.counts = self._counts_before
        self.real = None if self.real is None else self.real[:, : self.columns]
        self._tables = None
        if not self.columns:
            self.reset()
            return
        recurrent = any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in self.layers)
        self.broken = recurrent or any(layer.limits is not None for layer, _ in now.given)
        for layer, _ in now.given:
            assert layer.storage is not None
            layer.storage.crop(self.counts)
            layer.unwatch(now.offset)

    def needs(self, layer: int) -> Needs:
        """What must be observed of the prompt in a layer: for the plan, and for plans that may fork from here."""
        return self.observed(layer)

    def stand_in(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """A tensor of that shape, all NaN and without memory: a new one each time, so that it can be told by
        identity."""
        key = (like.dtype, like.device)
        one, last = self._nan.get(key, (None, None))
        if one is None:
            one = torch.full((1,) * len(shape), torch.nan, dtype=like.dtype, device=like.device)
        if last is None or last.shape != shape:
            last = one.expand(shape)
            self._nan[key] = (one, last)
        return last.detach()  # the cheapest way to a tensor of its own: layers of one shape follow one another

    # ---- columns and positions

    def _table(self, device: torch.device) -> tuple[Tensor, Tensor]:
        assert self.real is not None
        if self._tables is None or self._tables[0].device != device:
            position_of = (self.real.cumsum(1) - 1).clamp_min(0)
            order = (~self.real).to(torch.int8).argsort(dim=1, stable=True)  # real columns first, in order
            self._tables = order.to(device), position_of.to(device)
        return self._tables

    def column(self, row: Tensor, position: Tensor) -> Tensor:
        """The column of a row's n-th real token; broadcasts."""
        if self.real is None:
            return position
        return self._table(position.device)[0][row, position.clamp(0, self.real.shape[1] - 1)]

    def position(self, row: Tensor, column: Tensor) -> Tensor:
        """The other way; a column of −1 stays −1."""
        if self.real is None:
            return column
        return torch.where(column < 0, -1, self._table(column.device)[1][row, column.clamp_min(0)])

    def position_of(self, device: torch.device) -> Tensor | None:
        """(B, columns) long: each column's position among its row's real tokens; None where they are the same."""
        return None if self.real is None else self._table(device)[1]

    # ---- the end of the prompt

    def seal(self) -> None:
        """End the prompt: every layer keeps what the plan's cache policy chooses within its budget, the rest is
        freed. Raises NotFiniteError where a policy has met NaN in keys or queries."""
        if not self.columns:
            raise StoreError("nothing to seal: the store has seen no prompt")
        if self.sealed and self.plan.cache.acts == "seal":
            for layer in self.kv_layers:
                blind = layer.storage is not None and layer.watched < self.columns
                if blind and self.plan.cache.needs_at(layer.number).any:
                    raise StoreError(
                        f"cannot seal again: {self.plan} goes by queries, and those of tokens decoded one by one were "
                        "not observed; feed the next turn as one forward, then seal"
                    )
        self.prompt = self.counts
        for layer in self.kv_layers:
            layer.seal(self.plan.cache)
        self.sealed = True

    def fork(self, plan: Plan | str | None = None) -> KVStore:
        """A store with the same past, under another plan. Memory is shared until one of the two is written to.

        The prompt must have been observed for that plan: attach with `observe=[plan, …]`. A sealed store forks under
        its own plan only.
        """
        plan = self.plan if plan is None else Plan.parse(plan) if isinstance(plan, str) else plan
        if self.sealed and plan != self.plan:
            raise ArgumentError("plan", plan, f"{self.plan}: the store is sealed, what that plan dropped is gone")
        if self.columns:
            for number in range(self.caching_layers):
                have, want = self.needs(number), plan.cache.needs_at(number)
                if have | want != have:
                    raise ArgumentError("plan", plan, "a plan that was named in `observe=` when the model was attached")
        other = KVStore.__new__(KVStore)
        other.__dict__.update(self.__dict__)
        other.plan, other._now = plan, None
        other.observed = plan.cache.needs_at  # a fork has chosen: nothing is observed for other plans any more
        other.layers = []
        for layer in self.layers:
            if isinstance(layer, KVLayer):
                other.layers.append(layer.fork(other))
            elif isinstance(layer, LinearAttentionCacheLayerMixin):
                twin = object.__new__(type(layer))
                twin.__dict__.update({k: dict(v) if isinstance(v, dict) else v for k, v in layer.__dict__.items()})
                copy_states(layer, twin)
                other.layers.append(twin)
            else:
                other.layers.append(layer)
        other._sort_layers()
        return other

    def save(self, path: str | Path) -> None:
        """Write the sealed store as one safetensors file; `attached.load_store(path)` goes on from it."""
        for layer in self.kv_layers:
            layer.settle_doubts()
        persist.save(self, self.attached.fingerprint, path)

    # ---- what is held

    @property
    def entries(self) -> list[Tensor]:
        """Per caching layer, (B, Hkv) long: entries in each lane."""
        return [layer.storage.lengths for layer in self.kv_layers if layer.storage is not None]

    @property
    def held_bytes(self) -> int:
        """K and V of all entries."""
        return sum(layer.storage.payload_bytes for layer in self.kv_layers if layer.storage is not None)

    @property
    def allocated_bytes(self) -> int:
        """K and V memory held: the entries and at most one page of 64 a lane."""
        return sum(layer.storage.allocated_bytes for layer in self.kv_layers if layer.storage is not None)

    def read_bytes_per_token(self) -> int:
        """K and V that one decoding step reads: with the decode part `full`, every entry."""
        return self.held_bytes

    def kept(self, layer: int) -> list[list[Tensor]]:
        """Of the caching layer of that number: for each row, for each KV head, the positions kept, ascending."""
        storage = self.kv_layers[layer].storage
        if storage is None:
            return []
        positions = storage.padded(sort=True)[2].cpu()
        return [[lane[lane >= 0] for lane in row] for row in positions]

    # ---- rows and columns, as generate() moves them

    def _select_rows(self, rows: Tensor) -> None:
        rows = rows.cpu()
        if self.columns:
            self.counts, self.prompt = self.counts[rows], self.prompt[rows]
            self.real = None if self.real is None else self.real[rows]
            self._tables = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row r goes on as row beam_idx[r] was."""
        super().reorder_cache(beam_idx)
        self._select_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows stay."""
        rows = indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices
        self.reorder_cache(rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times in succession."""
        self.reorder_cache(torch.arange(len(self.counts)).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last columns: −n removes n. Refused where dropped entries would be needed back."""
        n = -tokens_to_remove
        require(0 <= n <= self.columns, "tokens_to_remove", tokens_to_remove, f"−{self.columns} … 0")
        if n == 0:
            self._forget_recorded()
            return
        if not self.sealed and self.plan.cache != Plan().cache:
            raise StoreError(
                f"cannot take tokens back before the prompt has ended under {self.plan}: call seal() first; "
                "assisted and prompt-lookup decoding, which guess from the first forward on, need the plan full"
            )
        removed = torch.full_like(self.counts, n) if self.real is None else self.real[:, self.columns - n :].sum(1)
        left = self.counts - removed
        layers = self.kv_layers
        dropped = any(layer.pruned for layer in layers)
        if dropped and (self.plan.cache.acts == "step" or bool((left < self.prompt).any())):
            raise StoreError(f"cannot remove {n} tokens: {self.plan} has dropped entries that would be needed again")
        if any(isinstance(layer, HybridKVLayer) for layer in self.layers):
            raise StoreError(f"cannot remove {n} tokens: their share of the recurrent states cannot be taken out")
        if not all(isinstance(layer, KVLayer) for layer in self.layers):
            for layer in self.layers:
                if not isinstance(layer, KVLayer):
                    layer.crop(tokens_to_remove)
        for layer in layers:
            layer.crop_to(left, self.columns - n)
        self.columns -= n
        self.counts = left
        self.real = None if self.real is None else self.real[:, : self.columns]
        self._tables = None
        if not self.sealed:
            self.prompt = self.counts
        self._forget_recorded()

    def _forget_recorded(self) -> None:
        """Windows that waited for a crop move on."""
        for layer in self.windowed:
            if layer.record_past:
                layer.forget_unreachable()

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._clear()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen, what was dropped included. Asked between a layer's update and the end of a forward, those as
        well."""
        if 0 <= layer_idx < len(self.layers) and isinstance(self.layers[layer_idx], KVLayer):
            return self.layers[layer_idx].get_seq_length()
        return self.columns

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.columns + query_length, 0

    @property
    def is_linear(self) -> list[bool]:
        return [
            isinstance(layer, LinearAttentionCacheLayerMixin) and not isinstance(layer, KVLayer)
            for layer in self.layers
        ]

    @property
    def batch_size(self) -> int:
        return len(self.counts) if self.columns else -1
