"""One layer's KV cache as transformers sees it (`CacheLayerMixin`) and as policies see it (`LayerView`)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, LinearAttentionLayer

from regard.errors import StoreError
from regard.inference.apply import Doubts, evict, lowest, oldest, select, settle
from regard.inference.call import AttentionCall
from regard.inference.observed import Logits, Observed
from regard.inference.policies.full import Full
from regard.inference.policy import CachePolicy, LayerView, Needs
from regard.inference.ragged import PAGE, RaggedKV
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


class Seen(NamedTuple):
    """What a decoded token attended to, slot by slot: k (B, H, L, Dk), v (B, H, L, Dv), weights (B, H, G, L)."""

    k: Tensor
    v: Tensor
    weights: Tensor


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
        self.observed = Observed()
        self._needs, self._weighs = Needs(), False  # what a step needs to see; by the weights of its token?
        self._slides: int | None = None  # as the policy says
        self._has_window = False  # do all lanes have room for more than the tokens that it never drops?
        self._first: int | None = None  # as many of those does every lane hold
        self.limits = None
        self.doubts: Doubts = []  # scores of steps, to be looked at when someone waits for the device anyway
        self._seen: Seen | None = None  # by the newest query
        self.pruned = False
        self.horizon: Tensor | None = None  # (B,) on the CPU: smallest position that may still be held behind a window
        self.watched = 0  # columns when the prompt was last observed for the policy
        self._before: tuple[int, Observed] | None = None  # what was observed before the forward from that column on
        self.record_past = False

    @property
    def limits(self) -> Tensor | None:
        """(B, H) on the CPU: entries a lane may hold while decoding; None = as many as come."""
        return self._limits

    @limits.setter
    def limits(self, limits: Tensor | None) -> None:
        self._limits = limits
        self._limit: int | None = None  # of all lanes, if they have one
        self._limits_there: tuple[Tensor, Tensor] | None = None  # limits, and limits + 1, on the device
        if limits is not None and limits.numel():
            least, most = int(limits.min()), int(limits.max())
            self._limit = least if least == most else None
            self._has_window = self._slides is not None and least > self._slides

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
        self.storage = self.limits = self._seen = None
        self.observed, self.doubts = Observed(), []
        self.is_initialized = self.pruned = self.record_past = False
        self.horizon, self.watched, self._before = None, 0, None

    def crop(self, tokens_to_remove: int) -> None:
        raise StoreError("crop the store, not one of its layers")

    def activate_past_recording(self) -> None:
        """`generate()` says so where it will take tokens back: then a window forgets when `crop` is called."""
        self.record_past = True

    def forget_unreachable(self, spare: int = PAGE) -> None:
        """Drop what the layer's own window has passed: no later query sees it. At the end of a forward it is done by
        the page.

        Each lane waits for `spare` such entries of its own: what a row holds must not depend on its neighbours."""
        window = self.sliding_window
        if window is None or self.storage is None or self.storage.longest < window + spare:
            return
        due = self.storage.lengths >= window + spare
        oldest = (self.store.counts - window + 1).clamp_min(0)  # what the next query still sees
        positions = self.storage.padded(sort=True)[2]
        stays = positions >= (oldest[:, None] * due).to(positions.device)[..., None]
        counts = stays.sum(-1)
        index = (~stays).to(torch.uint8).argsort(dim=-1, stable=True)[..., : int(counts.max())]
        self.storage.keep(index, counts)
        passed = oldest * due.any(1)
        self.horizon = passed if self.horizon is None else torch.maximum(self.horizon, passed)

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

    # ---- what the policy sees and does

    def watch(self, call: AttentionCall, needs: Needs) -> None:
        """Observe a forward of the prompt for the policy."""
        assert self.storage is not None
        self._before, self.observed = (self.store.forward.offset, self.observed), replace(self.observed)
        self.watched = self.store.columns_now
        self.observed.prompt(call, needs, self.store, self.storage.heads, latent=not self.direct)

    def unwatch(self, offset: int) -> None:
        """The forward from that column on failed: what was observed of it did not happen."""
        if self._before is not None and self._before[0] == offset:
            self.observed, self.watched = self._before[1], min(self.watched, offset)

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
        self.observed.show(view, self.store, last_row)
        return view

    def seal(self, policy: CachePolicy) -> None:
        """The prompt has ended: the policy keeps what its budget allows, the rest is freed."""
        self.settle_doubts()
        if self.storage is None or not bool((self.storage.lengths > 0).any()):
            return
        if not isinstance(policy, Full):  # a budget is for what can still be seen
            self.forget_unreachable(spare=0)
        view = self.view(last_row=policy.needs_at(self.number).last_row)
        index, counts = select(policy, view)
        if bool((counts.cpu() < self.storage.lengths).any()):
            self.storage.keep(index, counts)
            self.pruned = True
        if policy.acts == "step":
            self.allow(policy.limits(view).cpu())
        else:
            self.observed = Observed()

    def allow(self, limits: Tensor) -> None:
        """From now on a lane holds at most limits (B, H), on the CPU, after each decoded token: the policy steps."""
        assert self.storage is not None
        policy = self.store.plan.cache
        self._needs, self._slides = policy.needs_at(self.number), policy.slides
        self._weighs = self._needs.last_row or self._needs.column_sums
        self.limits = limits
        self._first = None
        if self._has_window and self.sliding_window is None:
            assert self._slides is not None
            positions = self.storage.padded()[2]
            held = ((positions >= 0) & (positions < self._slides)).sum(-1).cpu()
            first = held + (self._slides - self.store.counts).clamp_min(0)[:, None]  # those that are still to come
            if first.numel() and bool((first == first[0, 0]).all()):
                self._first = int(first[0, 0])

    def settle_doubts(self) -> None:
        """Raise NotFiniteError where a step met NaN. Steps themselves do not wait for the device to tell: one in 64
        does."""
        doubts, self.doubts = self.doubts, []
        settle(doubts)

    def step(self, policy: CachePolicy, q: Tensor, call: AttentionCall | None) -> None:
        """A token was decoded: a policy that acts on steps drops as much as came in."""
        seen, self._seen = self._seen, None
        if len(self.doubts) >= PAGE:
            self.settle_doubts()
        if self.storage is None or self._limits is None:
            return
        length, limit = self.storage.uniform, self._limit
        if length is None or limit is None or not self._sees_all(call, seen):
            self._step_apart(policy, q, call)
            return
        positions = sums = None
        if self._needs.any:
            self.observed.token(q, None, self.store)
        if seen is not None and self._needs.column_sums:
            positions = self.storage.positions()
            sums = self.observed.add(seen.weights.sum(2), positions, self.store)
        if length <= limit:
            return
        self.pruned = True
        if self._first is not None:
            self.storage.slide(self._first)
            return
        positions = self.storage.positions() if positions is None else positions
        if self._has_window:
            assert self._slides is not None
            self.storage.vacate(oldest(positions, self._slides))
        else:
            self.storage.vacate(lowest(policy, self._view_alike(positions, seen, sums), self.doubts))

    def _sees_all(self, call: AttentionCall | None, seen: Seen | None) -> bool:
        """Does the policy need nothing of the token but what it attended to, which was all that the store holds?"""
        if not self._needs.any:
            return True
        logits = self.observed.logits
        known = seen is not None or not self._weighs
        return known and call is None and logits is not None and logits.recipe.causal

    def _view_alike(self, positions: Tensor, seen: Seen | None, sums: Tensor | None) -> LayerView:
        """What `view` shows after a token, where all lanes have one length and one limit, and all of it is seen."""
        assert self.storage is not None and self._limits is not None
        pair = seen or self.storage.side_by_side()
        assert pair is not None
        if self._limits_there is None:
            there = self._limits.to(positions.device)
            self._limits_there = there, there + 1
        view = LayerView(
            layer=self.number,
            layers=self.store.caching_layers,
            k=pair[0],
            v=pair[1],
            positions=positions,
            lengths=self._limits_there[1],
            prompt=self.store.prompt.to(positions.device, non_blocking=True),
            column_sums=sums,
            target=self._limits_there[0],
            limit=self._limit,
        )
        logits = self.observed.logits
        if self.observed.window is not None and logits is not None:
            view.last_queries, view.query_positions = self.observed.window[0], self.store.forward.positions
            view.scale, view.softcap, view.sinks = logits.scale, logits.softcap, logits.sinks
        if seen is not None and self._needs.last_row:
            view.last_row = seen.weights.mean(2)
        return view

    def _step_apart(self, policy: CachePolicy, q: Tensor, call: AttentionCall | None) -> None:
        """The step of lanes of different lengths or limits, of latent keys, and under masks of the layer's own."""
        assert self.storage is not None and self._limits is not None
        over = self.storage.lengths > self._limits
        if self._needs.any:
            self.observed.token(q, call, self.store)
        elif not bool(over.any()):
            return
        elif self._first is not None and self.storage.together(over):
            self.storage.slide(self._first, over)
            self.pruned = True
            return
        elif self._has_window:
            assert self._slides is not None
            self.storage.drop(oldest(self.storage.positions(), self._slides), over)
            self.pruned = True
            return
        view = self.view(sort=False, last_row=self._needs.last_row)
        if self._needs.column_sums:
            self.observed.add_token(view, self.store)
        if bool(over.any()):
            if self._has_window:
                assert self._slides is not None
                slot = oldest(view.positions, self._slides)
            else:
                slot = evict(policy, view, self._limits.to(view.k.device), self.doubts)
            self.storage.drop(slot, over)
            self.pruned = True

    def fork(self, store: KVStore) -> KVLayer:
        """A copy that shares memory until one of the two is written to."""
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.store = store
        other.storage = None if self.storage is None else self.storage.fork()
        other.observed, other.doubts = self.observed.fork(), list(self.doubts)
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
