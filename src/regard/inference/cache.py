"""One layer's KV cache as transformers sees it (`CacheLayerMixin`) and as policies see it (`LayerView`)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import CacheLayerMixin, LinearAttentionLayer

from regard.errors import StoreError
from regard.inference import observe
from regard.inference.apply import evict, select
from regard.inference.call import AttentionCall, MaskRecipe
from regard.inference.policy import CachePolicy, LayerView, Needs
from regard.inference.ragged import RaggedKV
from regard.kernels.ragged import LaneGroup, ragged_attend

if TYPE_CHECKING:
    from regard.inference.store import KVStore


@dataclass(frozen=True)
class Given:
    """What `update` handed to the model in one forward, so that attention can tell where its keys come from."""

    k: Tensor
    v: Tensor
    fresh: bool
    stand_in: bool


@dataclass(frozen=True)
class Logits:
    """How a layer turns products into logits; kept from its last call for policies that look again."""

    recipe: MaskRecipe
    scale: float
    softcap: float | None
    sinks: Tensor | None


class KVLayer(CacheLayerMixin):
    """The cache of one attention layer: ragged storage, what its policy asked to observe, and the policy's acts.

    `direct`: the model hands what `update` returned straight to attention (true of all but latent attention). Then
    nothing is gathered for it: from the second forward on `update` returns a stand-in of the right shape, filled
    with NaN and without memory, and attention reads the storage itself.
    """

    is_sliding = False
    is_compileable = False

    def __init__(self, store: KVStore, number: int, direct: bool, sliding_window: int | None = None) -> None:
        super().__init__()
        self.store, self.number, self.direct = store, number, direct
        self.sliding_window = sliding_window  # what transformers' own cache would keep of such a layer
        self.storage: RaggedKV | None = None
        self.window: tuple[Tensor, Tensor] | None = None  # last queries (B, Hq, W, D) and their columns (B, W)
        self.window_weights: Tensor | None = None  # (B, 1, Hq, W, positions), latent layers only
        self.sums: Tensor | None = None  # (B, Hkv, positions) float32
        self.logits: Logits | None = None
        self.limits: Tensor | None = None  # (B, H) on the CPU: entries a lane may hold while decoding
        self.pruned = False

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
        self.storage.append(key_states.detach(), value_states.detach(), now.positions, now.real)
        if self.limits is not None and now.n > 1:  # appended whole, until sealed again
            self.limits = torch.maximum(self.limits, self.storage.lengths)
        if now.offset == 0:
            given = Given(key_states, value_states, fresh=True, stand_in=False)
        elif self.direct:
            given = self._stand_in(key_states, value_states)
        else:
            k, v, _ = self.storage.padded(sort=True)
            given = Given(k, v, fresh=False, stand_in=False)
        now.given.append((self, given))
        return given.k, given.v

    def _stand_in(self, k: Tensor, v: Tensor) -> Given:
        assert self.storage is not None
        shape = (*k.shape[:2], self.storage.longest)
        keys = self.store.stand_in((*shape, k.shape[3]), k)
        values = keys if v.shape[3] == k.shape[3] else self.store.stand_in((*shape, v.shape[3]), v)
        return Given(keys, values, fresh=False, stand_in=True)

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
        self.storage = self.window = self.window_weights = self.sums = self.logits = self.limits = None
        self.is_initialized = self.pruned = False

    def crop(self, tokens_to_remove: int) -> None:
        raise StoreError("crop the store, not one of its layers")

    def crop_to(self, left: Tensor, columns: int) -> None:
        """Forget entries whose position is at least left[b], and what was observed from that column on."""
        if self.storage is not None:
            self.storage.crop(left)
        if self.window is not None:
            self.window = (self.window[0], self.window[1].masked_fill(self.window[1] >= columns, -1))
        if self.sums is not None:
            raise StoreError("cannot remove tokens whose attention has been added to column sums (h2o)")

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
        at = rows.to(self.storage.device)
        if self.window is not None:
            self.window = (self.window[0][at], self.window[1][at])
        if self.sums is not None:
            self.sums = self.sums[at]
        if self.window_weights is not None:
            self.window_weights = self.window_weights[at]
        if self.limits is not None:
            self.limits = self.limits[rows.cpu()]

    # ---- attention

    def decode(self, q: Tensor, logits: Logits) -> Tensor:
        """One new token per row against the storage itself: (B, Hq, 1, Dv). No gathering, no copy."""
        assert self.storage is not None
        self.logits = logits
        causal = logits.recipe.causal
        held = self.storage.side_by_side() if causal and logits.softcap is None and logits.sinks is None else None
        if held is not None:  # the common case: every head sees all it holds
            batch, kv_heads = held[0].shape[:2]
            stacked = q.reshape(batch, kv_heads, -1, q.shape[-1])
            return scaled_dot_product_attention(stacked, *held, scale=logits.scale).reshape(*q.shape[:3], -1)
        visible = None if causal else self._visible_in_group
        return ragged_attend(
            q,
            self.storage.groups(),
            scale=logits.scale,
            softcap=logits.softcap,
            sinks=logits.sinks,
            visible=visible,
        )

    def _visible_in_group(self, group: LaneGroup) -> Tensor:
        """(G, 1, C) bool: the layer's own mask (a window, a chunk) at the true columns of the stored keys."""
        assert self.logits is not None
        now = self.store.forward
        columns = self.store.column(group.rows[:, None], group.positions.long())
        zero = torch.zeros((), dtype=torch.long, device=columns.device)
        return self.logits.recipe(group.rows[:, None], zero, now.q_columns[-1], columns).expand_as(columns)[:, None]

    def gathered(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """k, v, columns, real of everything stored, lanes side by side and sorted by position."""
        assert self.storage is not None
        k, v, positions = self.storage.uniform_view() or self.storage.padded(sort=True)
        rows = torch.arange(k.shape[0], device=k.device)[:, None, None]
        real = positions >= 0 if bool((self.storage.lengths != k.shape[2]).any()) else None
        columns = self.store.column(rows, positions.long().clamp_min(0))
        if columns.shape[1] == 1:
            columns, real = columns[:, 0], None if real is None else real[:, 0]
        return k, v, columns, real

    # ---- what the policy sees and does

    def watch(self, call: AttentionCall, needs: Needs) -> None:
        """Observe a forward of the prompt for the policy."""
        assert self.storage is not None
        self.logits = Logits(call.recipe, call.scale, call.softcap, call.sinks)
        latent = call.k.shape[1] != self.storage.heads or not self.direct
        if needs.last_queries or needs.last_row:
            self.window = observe.last_queries(self.window, call, max(needs.last_queries, 1))
            if latent:
                self.window_weights = self._latent_weights(call)
        if needs.column_sums:
            total = observe.column_sums(call)
            if total.shape[1] != self.storage.heads:
                total = total.unflatten(1, (self.storage.heads, -1)).sum(2)
            self._add_sums(total, call)

    def _latent_weights(self, call: AttentionCall) -> Tensor:
        """(B, 1, Hq, W, P): the window's weights over the expanded keys, laid out by position."""
        assert self.window is not None
        batch = call.q.shape[0]
        rows = []
        for b in range(batch):
            columns = self.window[1][b]
            one = replace(
                call,
                q=self.window[0][b : b + 1].to(call.k.dtype),
                k=call.k[b : b + 1],
                v=call.v[b : b + 1],
                q_columns=columns.clamp_min(0),
                q_real=(columns >= 0)[None],
                recipe=_row(call.recipe, b),
                k_columns=call.k_columns if call.k_columns.ndim == 1 else call.k_columns[b : b + 1],
                k_real=None if call.k_real is None else call.k_real[b : b + 1],
                position_of=None if call.position_of is None else call.position_of[b : b + 1],
                fresh=False,
            )
            found = observe.weights(one, slice(None)).flatten(1, 2)  # (1, Hq, W, M)
            positions = one.k_positions.reshape(1, 1, 1, -1).expand_as(found).clamp_min(0)
            if one.k_real is not None:
                found = found * one.k_real.reshape(1, 1, 1, -1)
            out = found.new_zeros(1, *found.shape[1:3], self.store.columns_now)
            rows.append(out.scatter_add_(3, positions, found))
        return torch.stack(rows)

    def _add_sums(self, total: Tensor, call: AttentionCall) -> None:
        positions = call.k_positions
        while positions.ndim < 3:
            positions = positions.unsqueeze(-2) if positions.ndim == 2 else positions[None]
        if call.k_real is not None:
            total = total * (call.k_real if call.k_real.ndim == 3 else call.k_real[:, None])
        out = total.new_zeros(*total.shape[:2], self.store.columns_now)
        if self.sums is not None:
            out[:, :, : self.sums.shape[2]] = self.sums
        self.sums = out.scatter_add_(2, positions.clamp_min(0).expand_as(total), total)

    def view(self, sort: bool = True, last_row: bool = False) -> LayerView:
        """The layer as its policy sees it."""
        assert self.storage is not None
        k, v, positions = self.storage.padded(sort=sort)
        view = LayerView(
            layer=self.number,
            layers=self.store.caching_layers,
            k=k,
            v=v,
            positions=positions,
            lengths=self.storage.lengths.to(k.device),
            prompt=self.store.prompt.to(k.device),
        )
        at = positions.clamp_min(0)
        if self.sums is not None:
            missing = max(0, self.store.columns_now - self.sums.shape[2])
            view.column_sums = torch.nn.functional.pad(self.sums, (0, missing)).gather(2, at)
        if self.window is not None and self.logits is not None:
            view.last_queries, columns = self.window
            view.query_positions = self.store.position(
                torch.arange(len(columns), device=columns.device)[:, None], columns
            )
            view.scale, view.softcap, view.sinks = self.logits.scale, self.logits.softcap, self.logits.sinks
            if self.window_weights is not None:
                wide = at[:, :, None, None].expand(-1, -1, *self.window_weights.shape[2:4], -1)
                view.window_weights = self.window_weights.gather(4, wide) * view.exists[:, :, None, None]
            elif not self.logits.recipe.causal:
                rows = torch.arange(len(columns), device=columns.device).view(-1, 1, 1, 1)
                zero = torch.zeros((), dtype=torch.long, device=columns.device)
                stored = self.store.column(rows[..., 0], at)[:, :, None]
                view.visible = self.logits.recipe(rows, zero, columns.clamp_min(0)[:, None, :, None], stored)
            else:
                view.visible = positions[:, :, None] <= view.query_positions[:, None, :, None]
            if last_row:
                view.last_row = view.weights(1).mean((2, 3))
        return view

    def seal(self, policy: CachePolicy) -> None:
        """The prompt has ended: the policy keeps what its budget allows, the rest is freed."""
        if self.storage is None or not bool((self.storage.lengths > 0).any()):
            return
        view = self.view(last_row=policy.needs_at(self.number).last_row)
        index, counts = select(policy, view)
        if bool((counts.cpu() < self.storage.lengths).any()):
            self.storage.keep(index, counts)
            self.pruned = True
        if policy.acts == "step":
            self.limits = policy.limits(view).cpu()
        else:
            self.window = self.window_weights = self.sums = None

    def step(self, policy: CachePolicy, q: Tensor, call: AttentionCall | None) -> None:
        """A token was decoded: a policy that acts on steps drops as much as came in."""
        if self.storage is None or self.limits is None:
            return
        over = self.storage.lengths > self.limits
        needs = policy.needs_at(self.number)
        if needs != Needs():
            columns = self.store.forward.q_columns[-1:].expand(q.shape[0], 1)
            self.window = (q[:, :, -1:].detach(), columns)
            if not self.direct and call is not None:
                self.window_weights = self._latent_weights(call)
        elif not bool(over.any()):
            return
        view = self.view(sort=False, last_row=needs.last_row)
        if needs.column_sums:
            added = view.weights(1).sum((2, 3))
            self._grow_sums(added, view)
            view.column_sums = view.column_sums + added if view.column_sums is not None else added
        if bool(over.any()):
            slot = evict(policy, view, self.limits.to(view.k.device))
            self.storage.drop(slot, over)
            self.pruned = True

    def _grow_sums(self, added: Tensor, view: LayerView) -> None:
        assert self.sums is not None
        out = torch.nn.functional.pad(self.sums, (0, max(0, self.store.columns_now - self.sums.shape[2])))
        self.sums = out.scatter_add_(2, view.positions.clamp_min(0), added * view.exists)

    def fork(self, store: KVStore) -> KVLayer:
        """A copy that shares memory until one of the two is written to."""
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.store = store
        other.storage = None if self.storage is None else self.storage.fork()
        return other


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
        LinearAttentionLayer.reorder_cache(self, beam_idx)
        KVLayer.reorder_cache(self, beam_idx)

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        return False

    def fork(self, store: KVStore) -> HybridKVLayer:
        other = KVLayer.fork(self, store)
        assert isinstance(other, HybridKVLayer)
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


def _row(recipe: MaskRecipe, b: int) -> MaskRecipe:
    """The recipe as seen by one row alone: its function keeps being asked about row b of the batch."""

    def mask_function(_: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return recipe(torch.full((), b, dtype=torch.long, device=j.device), h, i, j)

    return replace(recipe, mask_function=mask_function, by_element=False)
